"""Nobody waits for another: for endpoints that are switched off or hang, for names, for customers of unknown state."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from aggregator.api.webhooks import ENDPOINTS_MAX
from aggregator.service import balances
from aggregator.store import webhook_outbox
from aggregator.store.queries.scope import naive
from aggregator.store.webhook_outbox import KEPT, Cause, Message
from aggregator.webhooks import messages, targets
from aggregator.webhooks.messages import messages_of
from aggregator.webhooks.sender import ORDER_GUARD
from meters.log import format_position
from meters.webhooks import STATE_CHANGED, Endpoint, EndpointSet, Heard
from tests.support.held_backfills import uncounted
from tests.support.servers.query_api import Server, Tenant
from tests.support.servers.webhook_receiver import HURRY, receiving
from tests.support.servers.webhook_tenant import Told, caused_anew, live
from tests.support.waiting import until

MOMENT = timedelta(milliseconds=20)
MANY = 300  # of which any may be asked first
SPARED = ENDPOINTS_MAX - targets.LOOKUPS_AT_ONCE


@pytest.fixture
def none_recounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory does not have of a customer's meters cannot be told, as where it lacks more than a hundred."""
    monkeypatch.setattr(balances, "RECOUNTED_MAX", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The slow names that were asked for: none is answered before the test ends, as where a name server is away."""
    names_asked: list[str] = []
    ended, getaddrinfo = threading.Event(), socket.getaddrinfo

    def slowly(host: str, *more: object, **settings: object) -> object:
        if not host.endswith(".slow.example"):
            return getaddrinfo(host, *more, **settings)  # type: ignore[arg-type]
        names_asked.append(host)
        ended.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "away")

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    monkeypatch.setattr(targets, "RESOLVE_S_MAX", 0.1)
    try:
        yield names_asked
    finally:
        ended.set()


def rows(server: Server, sql: str, *values: object) -> list[tuple[object, ...]]:
    """What the outbox has."""
    with server.aggregator.outbox() as connection:
        return connection.execute(sql, values).fetchall()


def switched_off(tenant: Tenant) -> Endpoint:
    """An endpoint of a tenant, disabled."""
    return Endpoint(
        id=str(uuid4()), organization_id=tenant.id, url="https://example.com/", events=[STATE_CHANGED], secrets=[],
        created_at=tenant.server.now, begins_at=Heard("", 0), disabled_at=tenant.server.now,
    )  # fmt: skip


def due(endpoint: Endpoint) -> Message:
    """A message that waits for an endpoint."""
    at = naive(endpoint.created_at)
    return Message(
        id=str(uuid4()), endpoint_id=endpoint.id, organization_id=endpoint.organization_id, type=STATE_CHANGED,
        customer_id=str(uuid4()), body="{}", caused_at=at, created_at=at, due_at=at,
    )  # fmt: skip


def test_endpoints_that_are_switched_off_take_nobodys_turn(server: Server, tenant: Tenant) -> None:
    """However many of them have something waiting, who listens is told, and theirs waits on."""
    off = [switched_off(tenant) for _ in range(MANY)]
    server.run(server.aggregator.decide(*map(EndpointSet, off)))
    with server.aggregator.outbox() as connection:
        webhook_outbox.put_messages(connection, [due(endpoint) for endpoint in off], [])

    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        await told.customer()
        await told.arrived(1)

    live(server.tenant(), story)
    waiting = "SELECT count(*) FROM webhook_messages WHERE organization_id = ? AND status = 'pending'"
    assert rows(server, waiting, tenant.id) == [(MANY,)]


def test_names_that_are_slow_keep_nobody_else_waiting(server: Server, tenant: Tenant, asked: list[str]) -> None:
    """A few lookups of an organization go on at a time; an endpoint that waits for those to end loses no attempt."""
    stranger = server.tenant()

    async def story(told: Told) -> None:
        for number in range(ENDPOINTS_MAX):
            await told.ask("POST", "/v1/webhooks/endpoints", {"url": f"http://e{number}.slow.example/"})
        await told.customer()
        await until(lambda: len(asked) == targets.LOOKUPS_AT_ONCE)
        told.receiver.url = told.receiver.url.replace("127.0.0.1", "localhost")
        other = Told(stranger, told.receiver)
        await other.listen("customer.state_changed")
        await other.customer("eve")
        await told.arrived(1, passing=MOMENT)  # a good lookup may be late as well, on a busy machine
        await until(lambda: rows(server, tried, tenant.id) == [(targets.LOOKUPS_AT_ONCE,)])
        found = (await told.ask("GET", "/v1/webhooks/deliveries"))["items"]
        assert {one["outcome"] for one in found} == {"the name could not be resolved in 0.1 s"}
        assert sorted(rows(server, attempts, tenant.id)) == [(0,)] * SPARED + [(1,)] * targets.LOOKUPS_AT_ONCE
        assert len(asked) == targets.LOOKUPS_AT_ONCE

    tried = "SELECT count(*) FROM webhook_attempts WHERE organization_id = ?"
    attempts = "SELECT attempts FROM webhook_messages WHERE organization_id = ?"
    live(tenant, story)


def test_endpoints_that_hang_keep_nobody_else_waiting(server: Server, tenant: Tenant) -> None:
    """All that an organization may have of them, with more to tell each of them than fits into a turn."""
    stranger = server.tenant()

    async def story(told: Told) -> None:
        async with receiving() as hanging:
            hanging.answers = [None] * 10_000
            for _ in range(ENDPOINTS_MAX):
                await told.ask("POST", "/v1/webhooks/endpoints", {"url": hanging.url})
            for number in range(10):
                await told.customer(f"c{number}")
            server.now += ORDER_GUARD + MOMENT
            await until(lambda: len(hanging.deliveries) >= ENDPOINTS_MAX)
            before = len(hanging.deliveries)
            other = Told(stranger, told.receiver)
            await other.listen("customer.state_changed")
            await other.customer("eve")
            await told.arrived(1, passing=MOMENT)
            assert len(hanging.deliveries) - before < 4 * ENDPOINTS_MAX

    live(tenant, story, pace=HURRY._replace(timeout_s=1, attempts_max=10))


def test_a_cookie_of_one_endpoint_goes_to_no_other(server: Server, tenant: Tenant) -> None:
    """Two organizations have endpoints at one address: neither, nor the same endpoint again, hears what it answered."""
    other = server.tenant()

    async def story(told: Told) -> None:
        for number, one in enumerate((told, Told(other, told.receiver), told), 1):
            if not one.endpoint_id:
                await one.listen()
            await one.customer(f"ann-{number}")
            await one.arrived(number)
        assert [delivery.headers.get("cookie") for delivery in told.receiver.deliveries[:3]] == [None] * 3

    live(tenant, story)


def test_whoever_makes_messages_lets_others_go_on(
    server: Server, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop has a turn between two customers, where those took their time."""
    tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/"})
    ids = [tenant.customer(external_id=f"c{number}") for number in range(20)]
    causes = [Cause(number, tenant.id, id, None, None, None, naive(server.now)) for number, id in enumerate(ids)]
    monkeypatch.setattr(messages, "TURN_S", 0)
    turns = []

    async def others() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def story() -> None:
        beside = asyncio.create_task(others())
        telling = await messages_of(server.app.state.desk, causes, naive(server.now))
        beside.cancel()
        assert {message.customer_id for message in telling.messages} == set(ids)
        assert len(turns) >= len(ids)

    server.run(story())


def test_what_waits_for_a_disabled_endpoint_is_given_up_after_a_month(server: Server, tenant: Tenant) -> None:
    """No further attempt is made, and it is let go of like anything that failed."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        told.receiver.answers = [500]
        await told.customer()
        await told.arrived(1)
        await told.ask("PATCH", f"/v1/webhooks/endpoints/{told.endpoint_id}", {"enabled": False})

    async def later(told: Told) -> None:
        await until(lambda: rows(server, status, tenant.id) == [("failed",)])
        assert told.receiver.deliveries == []

    status = "SELECT status FROM webhook_messages WHERE organization_id = ?"
    live(tenant, story)
    assert rows(server, status, tenant.id) == [("pending",)]
    server.now += KEPT + timedelta(seconds=1)
    live(tenant, later)


@pytest.mark.usefixtures("none_recounted")
def test_a_deleted_customer_is_told_without_meters(tenant: Tenant) -> None:
    """Nothing has to be counted for that, whatever windows the customer had."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        customer, _ = await told.customer(), await told.meter()
        await told.use("a")
        tenant.server.now += timedelta(seconds=1)
        await told.ask("POST", f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
        await told.settled()
        assert len(told.receiver.deliveries[-1].event["data"]["active_meters"]) == 1
        await told.ask("DELETE", f"/v1/customers/{customer}")
        await told.settled()
        data = told.receiver.deliveries[-1].event["data"]
        assert (data["id"], data["active_meters"], data["deleted_at"] is None) == (customer, [], False)

    live(tenant, story)


@pytest.mark.usefixtures("none_recounted")
def test_who_cannot_be_told_of_keeps_nobody_waiting(server: Server, tenant: Tenant, tmp_path: Path) -> None:
    """Others are told; of this one a single cause stays, nothing counts as told in the log, and all is told at last."""
    stranger = server.tenant()
    tenant.event("before", external_customer_id="ann")
    causes = "SELECT count(*) FROM webhook_causes WHERE organization_id = ? AND customer_id IS NOT NULL"
    settled, endpoint_ids = server.aggregator.catalogue.webhooks.settled, []

    async def story(told: Told) -> None:
        other = Told(stranger, told.receiver)
        await told.listen("customer.state_changed")
        await other.listen("customer.state_changed")
        await told.meter()
        await told.customer()
        for number in range(3):
            await told.use(f"use-{number}")
        await other.customer("eve")
        (first,) = await told.arrived(1)
        assert first.event["data"]["external_id"] == "eve"
        await until(lambda: rows(server, causes, tenant.id) == [(1,)])
        events = format_position(server.aggregator.as_of)
        await until(lambda: other.endpoint_id in settled and settled[other.endpoint_id].events == events)
        endpoint_ids.append(told.endpoint_id)

    async def at_last(told: Told) -> None:
        told.endpoint_id = endpoint_ids[0]
        await told.ask("PATCH", f"/v1/webhooks/endpoints/{told.endpoint_id}", {"url": told.receiver.url})
        (last,) = await told.arrived(1, passing=MOMENT)
        await told.settled()
        assert [one["consumed_units"] for one in last.event["data"]["active_meters"]] == [4]

    with uncounted():
        live(tenant, story)
        assert (None, "ann") in caused_anew(server, tenant, tmp_path)
    live(tenant, at_last)
    assert rows(server, causes, tenant.id) == [(0,)]


@pytest.mark.usefixtures("none_recounted")
def test_who_is_deleted_while_nothing_can_be_told_is_told_of(server: Server, tenant: Tenant) -> None:
    """The cause that stays says whose it is, though the usage that made it has a name that is nobody's any more."""
    tenant.event("before", external_customer_id="ann")
    customer = tenant.customer(external_id="ann")

    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        await told.meter()
        await told.use("a")
        kept = "SELECT 1 FROM webhook_causes WHERE organization_id = ? AND customer_id = ?"
        await until(lambda: rows(server, kept, tenant.id, customer) == [(1,)])
        await told.ask("DELETE", f"/v1/customers/{customer}")
        (last,) = await told.arrived(1)
        assert (last.event["data"]["id"], last.event["data"]["active_meters"]) == (customer, [])

    with uncounted():
        live(tenant, story)


def test_what_is_written_is_sent_while_nothing_can_be_decided(tenant: Tenant) -> None:
    """Whoever makes new messages waits for a decision; those that there are go out."""
    desk = tenant.server.app.state.desk

    async def story(told: Told) -> None:
        await told.listen("customer.state_changed", "meter.threshold_reached")
        await told.customer()
        meter = await told.meter()
        await told.ask("POST", "/v1/webhooks/thresholds", {"meter_id": meter, "measure": "usage", "value": 1})
        (first,) = await told.arrived(1)
        await told.settled()
        async with desk.deciding:
            await told.use("a")
            await until(lambda: bool(desk.deciding._lock._waiters))
            await told.ask("POST", f"/v1/webhooks/events/{first.headers['webhook-id']}/redeliver")
            again = (await told.arrived(2))[1]
        assert again.body == first.body
        await told.arrived(4)  # the new state, and the threshold

    live(tenant, story)
