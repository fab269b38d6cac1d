"""A customer that Polar and the application know by different ids is one customer, whatever was told first."""

from datetime import timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch

import pytest

from aggregator.service import cuts
from aggregator.view import Unavailable
from tests.support.polar.organization import BEGINNING, Polar, numbers, state
from tests.support.servers.query_api import Tenant

DAY = timedelta(days=1)
Json = dict[str, Any]


def use(tenant: Tenant, count: int, **whose: str) -> None:
    """Send so many events of a customer."""
    for _ in range(count):
        tenant.event(**{"external_customer_id": None, **whose})


@pytest.fixture
def linked_late(polar: Polar) -> str:
    """A customer of Polar's without external id, usage 5 and a grant; a local one with usage 3; then they are one."""
    polar.mirrored_meter()
    nameless = polar.customer(external_id=None)
    polar.deliver("customer.created", nameless, "1")
    polar.deliver("benefit_grant.created", polar.grant(BEGINNING) | {"customer": nameless}, "2")
    use(polar.tenant, 5, customer_id=polar.customer_id)
    known = polar.tenant.customer(external_id="ann")
    use(polar.tenant, 3, external_customer_id="ann")
    polar.deliver("customer.updated", polar.customer(BEGINNING + DAY), "3")
    use(polar.tenant, 7, customer_id=polar.customer_id)
    return known


def test_customers_that_are_linked_late_are_one(polar: Polar, linked_late: str) -> None:
    """Usage and credits of both count together; nobody is left over."""
    assert (state(polar)["id"], numbers(polar)) == (linked_late, [(100, 15, 85)])
    assert [one["id"] for one in polar.tenant.get("/v1/customers/")["items"]] == [linked_late]


def test_polars_id_names_the_customer_that_was_there_first(polar: Polar) -> None:
    """A local customer, then Polar's of its external id: events, states and lists by Polar's id are that customer's."""
    tenant = polar.tenant
    polar.mirrored_meter()
    known = tenant.customer(external_id="ann")
    use(tenant, 2, external_customer_id="ann")
    polar.deliver("customer.created", polar.customer(), "1")
    use(tenant, 3, customer_id=polar.customer_id)
    assert numbers(polar) == [(0, 5, -5)]
    assert tenant.get(f"/v1/customers/{polar.customer_id}/state") == state(polar)
    assert tenant.get(f"/v1/customers/{polar.customer_id}")["id"] == known
    for ids in ([polar.customer_id], [known], [known, polar.customer_id]):
        (shown,) = tenant.get("/v1/customer-meters/", customer_id=ids)["items"]
        assert (shown["customer_id"], shown["consumed_units"]) == (known, 5)
    assert tenant.get("/v1/events/", customer_id=polar.customer_id)["pagination"]["total_count"] == 5



def test_what_rolls_over_follows_from_the_usage_of_both(polar: Polar) -> None:
    """A reset of one of the two, before they were one: 100 with rollover, 30 used there and 20 by the other."""
    tenant, server = polar.tenant, polar.tenant.server
    meter = polar.mirrored_meter()
    polar.deliver("customer.created", polar.customer(external_id=None), "1")
    tenant.customer(external_id="ann")
    tenant.post(f"/v1/customers/{polar.customer_id}/credits", {"meter_id": meter, "units": 100, "rollover": True})
    use(tenant, 30, customer_id=polar.customer_id)
    use(tenant, 20, external_customer_id="ann")
    server.now += DAY
    tenant.post(f"/v1/customers/{polar.customer_id}/resets", {"meter_ids": [meter]})
    server.now += DAY
    use(tenant, 4, external_customer_id="ann")
    polar.deliver("customer.updated", polar.customer(BEGINNING + DAY), "2")
    assert numbers(polar) == [(50, 4, 46)]


def test_a_delivery_that_ended_after_the_link_is_completed_by_its_repetition(polar: Polar) -> None:
    """The usage of both is counted then."""
    tenant, server = polar.tenant, polar.tenant.server
    meter = polar.mirrored_meter()
    polar.deliver("customer.created", polar.customer(external_id=None), "1")
    tenant.customer(external_id="ann")
    tenant.post(f"/v1/customers/{polar.customer_id}/credits", {"meter_id": meter, "units": 100, "rollover": True})
    use(tenant, 20, external_customer_id="ann")
    server.now += DAY
    tenant.post(f"/v1/customers/{polar.customer_id}/resets", {"meter_ids": [meter]})
    named = polar.customer(BEGINNING + DAY)

    async def far_behind(*question: object) -> Decimal:
        raise Unavailable("far behind")

    with patch.object(cuts, "consumed_between", far_behind):
        assert polar.deliver("customer.updated", named, "2").status_code == 503
    assert polar.deliver("customer.updated", named, "2").status_code == 202
    assert numbers(polar) == [(80, 0, 80)]


def test_webhooks_and_thresholds_are_of_the_one_customer(polar: Polar, linked_late: str) -> None:
    """A threshold of Polar's id watches the customer, who may be named by either id."""
    tenant = polar.tenant
    (meter,) = [one["id"] for one in tenant.get("/v1/meters/")["items"]]
    body = {"meter_id": meter, "measure": "usage", "unit": "units", "value": 1, "customer_id": polar.customer_id}
    tenant.post("/v1/webhooks/thresholds", body)
    session = tenant.post("/v1/customer-sessions/", {"customer_id": polar.customer_id})
    assert session["customer_id"] == linked_late
    for id in (polar.customer_id, linked_late):
        (grant,) = tenant.get(f"/v1/benefits/{polar.benefit_id}/grants", customer_id=id)["items"]
        assert grant["customer_id"] == linked_late
    assert tenant.ask("DELETE", f"/v1/customers/{polar.customer_id}").status_code == 204
    for id in (polar.customer_id, linked_late):
        assert tenant.ask("GET", f"/v1/customers/{id}").status_code == 404


def test_answers_that_tell_customers_apart_have_one(polar: Polar) -> None:
    """Largest usage of a customer, and how many customers there are: by three names and by one."""
    tenant = polar.tenant
    meter, known = polar.mirrored_meter(), tenant.customer(external_id="ann")
    polar.deliver("customer.created", polar.customer(), "1")
    for count, whose in ((2, polar.customer_id), (3, known)):
        use(tenant, count, customer_id=whose)
    use(tenant, 4, external_customer_id="ann")
    use(tenant, 6, external_customer_id="bob")
    day = tenant.server.now.date()
    asked = {"start_timestamp": f"{day}T00:00:00Z", "end_timestamp": f"{day}T23:00:00Z", "interval": "day"}
    path = f"/v1/meters/{meter}/quantities"
    assert tenant.get(path, **asked, customer_aggregation_function="max")["total"] == 9
    metric = "active_user_by_event"
    shown = tenant.get("/v1/metrics/", start_date=f"{day}", end_date=f"{day}", interval="day", metrics=[metric])
    assert shown["totals"][metric] == 2
