"""A meter begins anew when all that was stamped before is in the log: what is carried over is decided for ever."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from aggregator.service.errors import PRESENT_S_MAX, SETTLED_S
from ingest.log import memory
from meters.log import USAGE_EVENTS
from tests.support.polar.organization import Polar, numbers
from tests.support.records import entry, line
from tests.support.servers.query_api import Server, Tenant, serving
from tests.support.waiting import PATIENCE_S, until

INSTANT, SECOND = timedelta(milliseconds=1), timedelta(seconds=1)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An API that waits for usage on its way, as in production. Each writer has its own clock, as over Kafka."""
    monkeypatch.setattr(memory, "next_stamp", lambda stream, now, newest: now)
    with serving(tmp_path, SETTLED_S) as server:
        yield server


@contextmanager
def meanwhile(
    server: Server, *works: Callable[[], Awaitable[None]], stands: bool = False
) -> Iterator[list[float]]:  # fmt: skip
    """The server's time stands still, but for when it waits: then these are done, once, and time passes if it may."""
    waits, left = list[float](), list(works)

    async def passing(seconds: float) -> None:
        waits.append(seconds)
        while left:
            await left.pop(0)()
        server.now += timedelta(seconds=0 if stands else seconds)

    with patch("aggregator.service.balances.sleep", passing):
        yield waits


def arriving(tenant: Tenant, count: int, *, stamped: timedelta) -> Callable[[], Awaitable[None]]:
    """A record of so many events that is durable only now, and was stamped so much later than now."""

    async def arrive() -> None:
        lines = [line(f"{tenant.id} {number}", metadata={"tokens": 1}) for number in range(count)]
        tenant.server.now += stamped
        await tenant.server.log.append(USAGE_EVENTS, [entry(*lines, organization_id=tenant.id, admitted=True)])
        tenant.server.now -= stamped

    return arrive


def deciding(other: Tenant) -> Callable[[], Awaitable[None]]:
    """A credit in another organization, which is given meanwhile."""
    meter, customer = other.meter(), other.customer()

    async def decide() -> None:
        headers, body = {"Authorization": f"Bearer {other.secret}"}, {"meter_id": meter, "units": 5}
        async with asyncio.timeout(PATIENCE_S):
            made = await other.server.http.post(f"/v1/customers/{customer}/credits", headers=headers, json=body)
        assert made.status_code == 201

    return decide


@pytest.mark.parametrize("by", ["reset", "cycle"])
def test_what_was_stamped_before_a_meter_begins_anew_counts_before_it(tenant: Tenant, by: str) -> None:
    """Also when it is durable a moment later; of 100 that roll over 30 are used so. Nobody else waits for that."""
    server, meter, customer = tenant.server, tenant.meter(), tenant.customer(external_id="ann")
    if by == "reset":
        tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 100, "rollover": True})
        path, body = f"/v1/customers/{customer}/resets", {"meter_ids": "all"}
    else:
        properties = {"meter_id": meter, "units": 100, "rollover": True}
        made = tenant.post("/v1/benefits/", {"type": "meter_credit", "description": "abc", "properties": properties})
        granted = tenant.post(f"/v1/benefits/{made['id']}/grants", {"customer_id": customer})
        path, body = f"/v1/benefit-grants/{granted['id']}/cycle", {}
    server.now += timedelta(days=1)
    with meanwhile(server, arriving(tenant, 30, stamped=-INSTANT), deciding(server.tenant())) as waits:
        tenant.post(path, body)
    (row,) = tenant.get("/v1/customer-meters/")["items"]
    assert (row["consumed_units"], row["credited_units"]) == (0, 70 if by == "reset" else 170)
    assert waits == [server.app.state.desk.settled_s]


def test_a_cut_of_polars_waits_until_the_clock_here_has_passed_it(server: Server, tenant: Tenant) -> None:
    """Polar's clock may be ahead: what arrives before the cut belongs to what the cut ends. Nobody else waits."""
    polar = Polar(tenant)
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(server.now - timedelta(days=40), rollover=True), "1")
    renewed = polar.grant(server.now + SECOND, units=50)
    with meanwhile(server, arriving(tenant, 30, stamped=SECOND - INSTANT), deciding(server.tenant())):
        assert polar.deliver("benefit_grant.cycled", renewed, "2").status_code == 202
    assert numbers(polar) == [(120, 0, 120)]


@pytest.mark.parametrize("ahead", [timedelta(seconds=PRESENT_S_MAX), SECOND])
def test_a_cut_of_polars_that_the_clock_does_not_reach_is_told_again(
    server: Server, tenant: Tenant, ahead: timedelta
) -> None:  # fmt: skip
    """Polar delivers again what was not accepted; once the time has come it is credited, by all that came before."""
    polar = Polar(tenant)
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(server.now - timedelta(days=40), rollover=True), "1")
    renewed = polar.grant(server.now + ahead, units=50)
    with meanwhile(server, stands=True):
        assert polar.deliver("benefit_grant.cycled", renewed, "2").status_code == 503
        server.run(arriving(tenant, 30, stamped=ahead - INSTANT)())
        server.now += ahead
        assert polar.deliver("benefit_grant.cycled", renewed, "2").status_code == 202
    assert numbers(polar) == [(120, 0, 120)]


def test_a_meter_that_becomes_polars_holds_up_no_decision(server: Server, tenant: Tenant) -> None:
    """What Polar told before of its customers is credited once all is there; others decide meanwhile."""
    polar = Polar(tenant)
    polar.deliver("benefit_grant.created", polar.grant(server.now - timedelta(days=40), rollover=True), "1")
    polar.deliver("benefit_grant.cycled", polar.grant(server.now, units=50), "2")
    with meanwhile(server, arriving(tenant, 30, stamped=-INSTANT), deciding(server.tenant())):
        polar.mirrored_meter()
    assert numbers(polar) == [(120, 0, 120)]


def test_a_credit_is_not_taken_back_while_its_window_ends(tenant: Tenant) -> None:
    """Whoever takes it back meanwhile hears that it is gone; units of the new window would be taken for it."""
    server, meter, customer = tenant.server, tenant.meter(), tenant.customer()
    path, headers = f"/v1/customers/{customer}/credits", {"Authorization": f"Bearer {tenant.secret}"}
    made = tenant.post(path, {"meter_id": meter, "units": 5})
    tenant.post(path, {"meter_id": meter, "units": 100, "rollover": True})
    server.now += timedelta(days=1)
    settling, taking = server.app.state.desk.settling(tenant.id, customer), list[asyncio.Task[httpx.Response]]()

    async def take_back() -> None:
        taking.append(asyncio.create_task(server.http.delete(f"{path}/{made['id']}", headers=headers)))
        await until(lambda: taking[0].done() or bool(settling._waiters))

    async def answer() -> int:
        return (await taking[0]).status_code

    with meanwhile(server, take_back):
        tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    assert server.run(answer()) == 422
    assert tenant.get("/v1/customer-meters/")["items"][0]["credited_units"] == 100
