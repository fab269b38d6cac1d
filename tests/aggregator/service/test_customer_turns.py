"""Everything that moves one customer's balance takes turns, by whatever name the customer is called."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from aggregator.service.errors import SETTLED_S
from meters.webhooks import keys
from tests.support.polar.organization import Json, Polar, numbers, signed
from tests.support.servers.query_api import Server, Tenant, serving
from tests.support.waiting import until

DAY = timedelta(days=1)
Move = Callable[[], Awaitable[httpx.Response]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An API whose resets wait for usage on its way, as in production."""
    with serving(tmp_path, SETTLED_S) as server:
        yield server


class Party:
    """A customer whose meter is Polar's, too, with a plan and a top-up, and everything that may move the balance."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant, self.polar = tenant, Polar(tenant)
        self.meter = tenant.meter()
        tenant.patch(f"/v1/meters/{self.meter}", {"metadata": {"polar_meter_id": self.polar.meter_id}})
        self.customer = tenant.customer(external_id="ann")
        self.polar.deliver("customer.created", self.polar.customer(), "link")
        self.plan, self.other = (self._benefit(units) for units in (100, 30))
        self.grant = tenant.post(f"/v1/benefits/{self.plan}/grants", {"customer_id": self.customer})["id"]
        self.credit = self._give(50)["id"]
        self.moves: dict[str, Move] = {
            "credit": self._api("POST", f"/v1/customers/{self.customer}/credits", {"meter_id": self.meter, "units": 7}),
            "deletion": self._api("DELETE", f"/v1/customers/{self.customer}/credits/{self.credit}"),
            "reset": self._api("POST", f"/v1/customers/{self.customer}/resets", {"meter_ids": [self.meter]}),
            "grant": self._api("POST", f"/v1/benefits/{self.other}/grants", {"external_customer_id": "ann"}),
            "cycle": self._api("POST", f"/v1/benefit-grants/{self.grant}/cycle", {}),
            "revocation": self._api("POST", f"/v1/benefit-grants/{self.grant}/revoke"),
            "deletion of a benefit": self._api("DELETE", f"/v1/benefits/{self.plan}"),
            "webhook": self._webhook,
        }

    def _benefit(self, units: int) -> str:
        properties = {"meter_id": self.meter, "units": units, "rollover": False}
        made: str = self.tenant.post(
            "/v1/benefits/", {"type": "meter_credit", "description": "units", "properties": properties}
        )["id"]
        return made

    def _give(self, units: int) -> Json:
        body = {"meter_id": self.meter, "units": units, "rollover": True}
        made: Json = self.tenant.post(f"/v1/customers/{self.customer}/credits", body)
        return made

    def _api(self, method: str, path: str, body: Json | None = None) -> Move:
        headers = {"Authorization": f"Bearer {self.tenant.secret}"}

        async def move() -> httpx.Response:
            return await self.tenant.server.http.request(method, path, headers=headers, json=body)

        return move

    async def _webhook(self) -> httpx.Response:
        server = self.tenant.server
        news = self.polar.grant(server.now - timedelta(minutes=1), units=5)
        body = json.dumps({"type": "benefit_grant.created", "data": news}).encode()
        headers = signed(body, "news", int(server.now.timestamp()), keys(self.polar.secret)[0])
        return await server.http.post("/webhooks/polar", headers=headers, content=body)


@contextmanager
def held_up(party: Party, others: dict[str, Move]) -> Iterator[dict[str, asyncio.Task[httpx.Response]]]:
    """While a reset waits for usage on its way the others begin, and come no further than to their turn."""
    server, tasks = party.tenant.server, dict[str, asyncio.Task[httpx.Response]]()
    turn = server.app.state.desk.settling(party.tenant.id, party.customer)

    async def meanwhile(seconds: float) -> None:
        if not tasks:
            tasks.update((name, asyncio.create_task(_answered(move))) for name, move in others.items())
            await until(lambda: len(turn._waiters or ()) == len(others) or any(task.done() for task in tasks.values()))
            assert [name for name, task in tasks.items() if task.done()] == []
        server.now += timedelta(seconds=seconds)

    with patch("aggregator.service.balances.sleep", meanwhile):
        yield tasks


async def _answered(move: Move) -> httpx.Response:
    return await move()


def test_while_a_meter_begins_anew_nothing_else_moves_the_balance(tenant: Tenant) -> None:
    """Neither the API nor Polar, by none of the customer's names; all of it is done after the reset."""
    party, server = Party(tenant), tenant.server
    server.now += DAY
    others = {name: move for name, move in party.moves.items() if name != "reset"}

    async def run() -> list[int]:
        with held_up(party, others) as tasks:
            assert (await party.moves["reset"]()).status_code == 201
            return [(await task).status_code for task in tasks.values()]

    assert all(status in (200, 201, 202, 204, 404, 409, 422) for status in server.run(run()))
    assert numbers(party.polar) == [(37, 0, 37)]  # the credit of 7 and the grant of 30; Polar's was before the reset


def test_a_plan_that_ends_while_its_meter_begins_anew_takes_nothing(tenant: Tenant) -> None:
    """Plan 100 and a top-up of 50: the reset leaves 50, and the plan's end 50 of them."""
    party, server = Party(tenant), tenant.server
    server.now += DAY

    async def run() -> int:
        with held_up(party, {"revocation": party.moves["revocation"]}) as tasks:
            await party.moves["reset"]()
            return (await tasks["revocation"]).status_code

    assert server.run(run()) == 200
    assert numbers(party.polar) == [(50, 0, 50)]


@pytest.mark.parametrize("first", ["deletion", "revocation", "grant", "credit", "webhook", "cycle"])
def test_moves_side_by_side_come_to_what_they_are_one_after_the_other(tenant: Tenant, first: str) -> None:
    """Many at once, each twice: nothing waits for ever, and the entries add up to the balance."""
    party, server = Party(tenant), tenant.server
    server.now += DAY
    names = [first, *(name for name in party.moves if name != first)]

    async def run() -> list[int]:
        answers = await asyncio.gather(*(party.moves[name]() for name in names * 2))
        return [answer.status_code for answer in answers]

    with patch("aggregator.service.balances.sleep", _passing(server)):
        assert all(status < 500 for status in server.run(run()))
    (row,) = tenant.get("/v1/customer-meters/")["items"]
    entries = tenant.get(f"/v1/customer-meters/{row['id']}/ledger", limit=100)["items"]
    assert sum(entry["units"] for entry in entries) == row["balance"]


def _passing(server: Server) -> Callable[[float], Awaitable[None]]:
    async def passing(seconds: float) -> None:
        server.now += timedelta(seconds=seconds)
        await asyncio.sleep(0)

    return passing
