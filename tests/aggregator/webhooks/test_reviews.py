"""Customers who are moved by one decision are told, without a movement of their own."""

from datetime import timedelta
from unittest.mock import patch

import pytest

from aggregator.webhooks import reviews
from tests.support.servers.query_api import Json, Tenant
from tests.support.servers.webhook_tenant import Told, live
from tests.support.waiting import until

SECOND = timedelta(seconds=1)
NONE = {"conjunction": "and", "clauses": [{"property": "name", "operator": "eq", "value": "nothing"}]}


def shown(told: Told) -> dict[str, list[int]]:
    """By customer, what the newest state says was used."""
    states = [one.event["data"] for one in told.receiver.deliveries if one.event["type"] == "customer.state_changed"]
    return {one["external_id"]: [meter["consumed_units"] for meter in one["active_meters"]] for one in states}


async def line(told: Told, meter: str, value: int, **fields: Json) -> None:
    """A threshold of usage."""
    await told.ask("POST", "/v1/webhooks/thresholds", {"meter_id": meter, "measure": "usage", "value": value, **fields})


def reached(told: Told) -> list[tuple[str, int]]:
    """Whose thresholds were told, with the usage."""
    found = [one.event["data"] for one in told.receiver.deliveries if one.event["type"] == "meter.threshold_reached"]
    return sorted((one["customer"]["external_id"], int(one["consumed_units"])) for one in found)


def test_a_meter_that_is_made_with_history_is_told(tenant: Tenant) -> None:
    """Of everybody who used it, a page of customers at a time, and of nobody else."""
    async def story(told: Told) -> None:
        for name in ("ann", "bob", "cid", "dan"):
            await told.customer(name)
        for name in ("ann", "bob", "cid"):
            await told.use(name, name=name)
        await told.listen("customer.state_changed")
        await told.meter()
        await until(lambda: shown(told) == {"ann": [1], "bob": [1], "cid": [1]})
        await told.settled()

    with patch.object(reviews, "CUSTOMERS_AT_ONCE", 2):
        live(tenant, story)


def test_a_meter_that_is_edited_is_told(tenant: Tenant) -> None:
    """Also of whoever has nothing of it any more."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        meter = await told.meter()
        await told.customer()
        await until(lambda: shown(told) == {"ann": []})
        tenant.server.now += SECOND  # of two states told at one time neither is the last
        await told.use("a", "b")
        await until(lambda: shown(told) == {"ann": [2]})
        tenant.server.now += SECOND
        await told.ask("PATCH", f"/v1/meters/{meter}", {"filter": NONE})
        await until(lambda: shown(told) == {"ann": []})
        tenant.server.now += SECOND
        await told.ask("PATCH", f"/v1/meters/{meter}", {"filter": {"conjunction": "and", "clauses": []}})
        await until(lambda: shown(told) == {"ann": [2]})

    live(tenant, story)


@pytest.mark.parametrize("is_for_one", [False, True])
def test_a_threshold_that_is_made_when_its_line_is_passed_is_told(tenant: Tenant, is_for_one: bool) -> None:
    """Once, and without states that did not change."""
    async def story(told: Told) -> None:
        meter, ann = await told.meter(), await told.customer()
        await told.customer("bob")
        await told.use("a", "b", "c")
        await told.use("d", "e", name="bob")
        await told.listen("customer.state_changed", "meter.threshold_reached")
        await line(told, meter, 2, **({"customer_id": ann} if is_for_one else {}))
        await until(lambda: reached(told) == ([("ann", 3)] if is_for_one else [("ann", 3), ("bob", 2)]))
        await told.settled()
        assert told.receiver.types() == ["meter.threshold_reached"] * (1 if is_for_one else 2)

    live(tenant, story)


def test_an_endpoint_that_is_enabled_again_is_told_of_who_moved_meanwhile(tenant: Tenant) -> None:
    """The state and the threshold that it answered with 410, and what moved while it was disabled; nobody else."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed", "meter.threshold_reached")
        meter = await told.meter()
        for name in ("ann", "bob", "cid"):
            await told.customer(name)
        await told.settled()
        await line(told, meter, 2)
        told.receiver.deliveries.clear()
        told.receiver.answers = [410]
        await told.use("a", "b")
        await until(lambda: _is_disabled(told))
        tenant.server.now += 5 * SECOND
        await told.use("c", "d", name="bob")
        tenant.server.now += 5 * SECOND
        told.receiver.deliveries.clear()
        await told.ask("PATCH", f"/v1/webhooks/endpoints/{told.endpoint_id}", {"enabled": True})
        await until(lambda: shown(told) == {"ann": [2], "bob": [2]} and reached(told) == [("ann", 2), ("bob", 2)])
        await told.settled()

    live(tenant, story)


def _is_disabled(told: Told) -> bool:
    endpoint = told.tenant.server.aggregator.catalogue.webhooks.endpoints[told.endpoint_id]
    return endpoint.disabled_at is not None
