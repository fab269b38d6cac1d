"""After the clock has gone back, or on a machine that is behind: what is given counts, and what is taken goes."""

from datetime import timedelta

import pytest

from tests.support.servers.query_api import Tenant

STEP = timedelta(seconds=1)


def credited(tenant: Tenant) -> list[int]:
    """The credited units of every customer meter."""
    return [row["credited_units"] for row in tenant.get("/v1/customer-meters/")["items"]]


def granted(tenant: Tenant, meter: str, customer: str, *, rollover: bool = False) -> str:
    """Grant a benefit of 100 units; the path of the grant."""
    properties = {"meter_id": meter, "units": 100, "rollover": rollover}
    made = tenant.post("/v1/benefits/", {"type": "meter_credit", "description": "abc", "properties": properties})
    grant = tenant.post(f"/v1/benefits/{made['id']}/grants", {"customer_id": customer})
    return f"/v1/benefit-grants/{grant['id']}"


def test_credits_are_of_the_newest_window(tenant: Tenant) -> None:
    """By hand, and of a benefit: before the beginning of the window they would count nowhere."""
    meter, customer = tenant.meter(), tenant.customer()
    tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    tenant.server.now -= STEP
    made = tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 30})
    assert credited(tenant) == [30]
    granted(tenant, meter, customer)
    assert credited(tenant) == [130]
    tenant.ask("DELETE", f"/v1/customers/{customer}/credits/{made['id']}")
    assert credited(tenant) == [100]


def test_a_credit_is_taken_back_after_it_was_given(tenant: Tenant) -> None:
    """Before it there would be nothing to take, and the credit would stay."""
    meter, customer = tenant.meter(), tenant.customer()
    path = f"/v1/customers/{customer}/credits"
    made = tenant.post(path, {"meter_id": meter, "units": 30})
    tenant.server.now -= STEP
    assert tenant.ask("DELETE", f"{path}/{made['id']}").status_code == 200
    assert credited(tenant) == [0]


@pytest.mark.parametrize("begun", ["granted", "granted again", "cycled"])
def test_a_grant_ends_after_it_credited(tenant: Tenant, begun: str) -> None:
    """Whichever of its credits was the last; a grant that is given again, too, is named by when it had ended."""
    grant = granted(tenant, tenant.meter(), customer := tenant.customer())
    if begun == "granted again":
        tenant.server.now -= STEP
        tenant.post(f"{grant}/revoke", {})
        benefit = tenant.get(grant)["benefit_id"]
        tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": customer})
    elif begun == "cycled":
        tenant.server.now += timedelta(days=1)
        tenant.post(f"{grant}/cycle", {})
    assert credited(tenant) == [100]
    tenant.server.now -= STEP
    tenant.post(f"{grant}/revoke", {})
    assert credited(tenant) == [0]


def test_a_grant_that_rolled_over_ends_after_that(tenant: Tenant) -> None:
    """What was carried over is in the new window with its beginning, and is taken back there."""
    customer = tenant.customer()
    grant = granted(tenant, tenant.meter(), customer, rollover=True)
    tenant.server.now += timedelta(days=1)
    tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    assert credited(tenant) == [100]
    tenant.server.now -= STEP
    tenant.post(f"{grant}/revoke", {})
    assert credited(tenant) == [0]


def test_a_benefit_that_is_deleted_is_taken_back_from_all(tenant: Tenant) -> None:
    """From everybody after it was given to them."""
    meter = tenant.meter()
    grants = [granted(tenant, meter, tenant.customer()) for _ in range(2)]
    tenant.server.now -= STEP
    for grant in grants:
        assert tenant.ask("DELETE", f"/v1/benefits/{tenant.get(grant)['benefit_id']}").status_code == 204
    assert credited(tenant) == [0, 0]
