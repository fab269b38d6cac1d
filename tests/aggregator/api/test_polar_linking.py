"""A customer that Polar and the application know by different ids is one customer, whatever was told first."""

from datetime import timedelta
from typing import Any

import pytest

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

