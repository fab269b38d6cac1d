"""Whatever moves a balance happens once under an Idempotency-Key, and is answered alike whenever it is repeated."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import uuid4

import httpx
import pytest

from aggregator.api import create_app
from aggregator.engine.supervisor import Aggregator
from aggregator.service.service import Deciding
from aggregator.view import Unavailable
from meters import exact
from meters.catalogue.catalogue import Change, encode_changes
from meters.ledger.ledger import CreditGranted
from meters.ledger.requests import KEY_LENGTH_MAX
from meters.log import USAGE_CONTROL, Entry
from tests.support.records import SMALL
from tests.support.servers.query_api import Server, Tenant, serving
from tests.support.waiting import PATIENCE_S, until

DOCUMENT: Any = create_app(None, None, None).openapi()  # type: ignore[arg-type]  # nothing is asked of them
DAY = timedelta(days=1)


class Party:
    """Ann has credits by hand and a benefit, both of which roll over; Bob has nothing."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant, self.meter = tenant, tenant.meter(func="sum", property="units")
        self.ann, self.bob = (tenant.customer(external_id=name) for name in ("ann", "bob"))
        given = {"meter_id": self.meter, "units": 50, "rollover": True}
        self.credit = tenant.post(f"/v1/customers/{self.ann}/credits", given)["id"]
        properties = {"meter_id": self.meter, "units": 100, "rollover": True}
        body = {"type": "meter_credit", "description": "Units", "properties": properties}
        self.benefit = tenant.post("/v1/benefits/", body)["id"]
        self.grant = tenant.post(f"/v1/benefits/{self.benefit}/grants", {"customer_id": self.ann})["id"]
        tenant.server.now += DAY

    def state(self) -> Any:
        """Every balance and movement, and who has the benefit."""
        movements = [self.tenant.get(f"/v1/customers/{id}/credits", limit=100) for id in (self.ann, self.bob)]
        return self.numbers(), movements, self.tenant.get(f"/v1/benefit-grants/{self.grant}")

    def numbers(self) -> list[tuple[Decimal, Decimal, Decimal]]:
        """Credited, consumed and balance of each customer meter."""
        rows = self.tenant.get("/v1/customer-meters/", limit=100, sorting="created_at")["items"]
        return [tuple(Decimal(row[name]) for name in ("credited_units", "consumed_units", "balance")) for row in rows]

    def use(self, units: int) -> None:
        """Ann uses some."""
        self.tenant.event(external_customer_id="ann", metadata=f'{{"units":{units}}}')


class Move(NamedTuple):
    """A request that moves a balance, and another body for the same path, if it takes one."""

    path: Callable[[Party], str]
    body: Callable[[Party], Any] = lambda party: None
    other: Callable[[Party], Any] | None = None
    whose: str = "ann"


MOVES = {
    "POST /v1/customers/{id}/credits": Move(
        lambda party: f"/v1/customers/{party.ann}/credits",
        lambda party: {"meter_id": party.meter, "units": 5},
        lambda party: {"meter_id": party.meter, "units": 6},
    ),
    "DELETE /v1/customers/{id}/credits/{credit_id}": Move(
        lambda party: f"/v1/customers/{party.ann}/credits/{party.credit}"
    ),
    "POST /v1/customers/{id}/resets": Move(
        lambda party: f"/v1/customers/{party.ann}/resets",
        lambda party: {"meter_ids": [party.meter]},
        lambda party: {"meter_ids": "all"},
    ),
    "POST /v1/benefits/{id}/grants": Move(
        lambda party: f"/v1/benefits/{party.benefit}/grants",
        lambda party: {"external_customer_id": "bob"},
        lambda party: {"external_customer_id": "ann"},
        "bob",
    ),
    "POST /v1/benefit-grants/{id}/cycle": Move(
        lambda party: f"/v1/benefit-grants/{party.grant}/cycle",
        lambda party: {},
        lambda party: {"at": party.tenant.server.now.isoformat()},
    ),
    "POST /v1/benefit-grants/{id}/revoke": Move(lambda party: f"/v1/benefit-grants/{party.grant}/revoke"),
    "DELETE /v1/benefits/{id}": Move(lambda party: f"/v1/benefits/{party.benefit}"),
}
each_move = pytest.mark.parametrize("name", MOVES)


def keyed(party: Party, name: str, key: str, *, other: bool = False) -> httpx.Response:
    """Ask for a move, or with another body."""
    move = MOVES[name]
    body = move.other(party) if other and move.other else move.body(party)
    return party.tenant.ask(name.split()[0], move.path(party), headers={"Idempotency-Key": key}, json=body)


@pytest.fixture
def party(tenant: Tenant) -> Party:
    """Customers of a tenant of their own."""
    return Party(tenant)


def test_every_route_that_moves_a_balance_takes_a_key() -> None:
    """In the document: what gives, takes back, begins anew, grants, renews and revokes, and what deletes what gives."""
    said = {
        f"{method.upper()} {path}"
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
        if any(one["name"] == "Idempotency-Key" for one in operation.get("parameters", ()))
    }
    moving = {
        f"{method.upper()} {path}"
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
        if method != "get" and {"credits", "resets", "grants", "cycle", "revoke"} & set(path.split("/"))
    }
    assert said == moving | {"DELETE /v1/benefits/{id}"} == set(MOVES)


@each_move
def test_a_repetition_is_answered_as_the_first_time_and_moves_nothing(party: Party, name: str) -> None:
    """To the byte, also days later, when other things have moved the balance in between."""
    before = party.numbers()
    first = keyed(party, name, "key")
    assert first.is_success, first.text
    assert party.numbers() != before or name.endswith("/resets")  # what was left rolled over
    for _ in range(2):
        state = party.state()
        again = keyed(party, name, "key")
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert again.headers.get("content-type") == first.headers.get("content-type")
        assert party.state() == state
        party.tenant.server.now += DAY
        party.use(3)
        party.tenant.post(f"/v1/customers/{party.ann}/credits", {"meter_id": party.meter, "units": 7})


@each_move
def test_a_key_of_another_body_is_refused(party: Party, name: str) -> None:
    """And moves nothing; of another path or organization it is another key."""
    assert keyed(party, name, "key").is_success
    if MOVES[name].other is not None:
        state = party.state()
        refused = keyed(party, name, "key", other=True)
        assert (refused.status_code, refused.json()["detail"][0]["type"]) == (422, "idempotency_key")
        assert party.state() == state
    other = Party(party.tenant.server.tenant())
    assert keyed(other, name, "key").is_success
    path = f"/v1/customers/{party.bob}/credits"
    body = {"meter_id": party.meter, "units": 1}
    assert party.tenant.ask("POST", path, headers={"Idempotency-Key": "key"}, json=body).status_code == 201


@each_move
def test_what_was_refused_leaves_nothing_behind(party: Party, name: str) -> None:
    """The key is free for the request that is right."""
    method, path = name.split()[0], MOVES[name].path(party)
    wrong = {"no_such_field": 1}
    assert party.tenant.ask(method, path, headers={"Idempotency-Key": "key"}, json=wrong).status_code in (204, 422)
    if name != "DELETE /v1/benefits/{id}":  # Polar's, which passes over a body
        assert keyed(party, name, "key").is_success


@each_move
def test_a_key_has_from_1_to_255_characters(party: Party, name: str) -> None:
    """More are refused, and so is none."""
    state = party.state()
    for key in ("", "k" * (KEY_LENGTH_MAX + 1)):
        refused = keyed(party, name, key)
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["header", "Idempotency-Key"])
    assert party.state() == state
    assert keyed(party, name, "k" * KEY_LENGTH_MAX).is_success


@each_move
def test_who_repeats_too_early_is_told_to_wait(party: Party, name: str) -> None:
    """While the first is at work, its repetition is 409 with a time to wait; another key waits for its turn."""
    server, move = party.tenant.server, MOVES[name]
    headers = {"Authorization": f"Bearer {party.tenant.secret}", "Idempotency-Key": "key"}
    desk = server.app.state.desk

    async def story() -> tuple[httpx.Response, httpx.Response]:
        def ask() -> Any:
            return server.http.request(name.split()[0], move.path(party), headers=headers, json=move.body(party))

        async with desk.turn(party.tenant.id, getattr(party, move.whose)):
            first = asyncio.create_task(ask())
            await until(lambda: bool(desk.requests_at_work))
            second = await ask()
        async with asyncio.timeout(PATIENCE_S):
            return await first, second

    first, second = server.run(story())
    assert (first.is_success, second.status_code, second.headers["retry-after"]) == (True, 409, "1")
    assert keyed(party, name, "key").content == first.content


@each_move
def test_what_nobody_heard_of_is_done_once(party: Party, name: str) -> None:
    """The first is durable, its sender told to try again, and the second decided before anybody here knows of it."""
    with party.tenant.server.unheard():
        assert keyed(party, name, "key").status_code == 503
        party.tenant.server.now += timedelta(minutes=1)
        second = keyed(party, name, "key")
    alone = Party(party.tenant.server.tenant())
    assert keyed(alone, name, "key").is_success
    assert party.numbers() == alone.numbers()
    assert keyed(party, name, "key").content == second.content


# A crash between the decision and its answer.


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """One that may die."""
    with serving(tmp_path) as server:
        yield server


def begin_again(server: Server, store: Path) -> None:
    """The process ends, and another one begins with this store and the same log."""
    server.aggregator.stop()
    server.aggregator = Aggregator(server.log, store, SMALL)
    desk = server.app.state.desk
    desk.view, desk.deciding = server.aggregator, Deciding(server.aggregator)
    server.aggregator.start()
    assert server.run(server.aggregator.informed(PATIENCE_S))


@each_move
def test_a_crash_after_the_decision_loses_no_answer(own_server: Server, tmp_path: Path, name: str) -> None:
    """Killed once the record is durable: the next process answers as the dead one would have, and a rebuilt store."""
    party, durable = Party(own_server.tenant()), list[bytes]()

    async def killed(*changes: Change) -> None:
        durable.append(encode_changes(changes))
        await own_server.log.append(USAGE_CONTROL, [Entry(durable[-1], admitted=True)])
        raise Unavailable("the process is gone")

    with patch.object(own_server.aggregator, "decide", killed):
        while not (durable and b'"request.answered"' in durable[-1]):  # a benefit's grants are revoked before
            assert keyed(party, name, "key").status_code == 503
    begin_again(own_server, tmp_path / "store.duckdb")
    state, answered = party.state(), keyed(party, name, "key")
    assert answered.is_success
    assert party.state() == state
    begin_again(own_server, tmp_path / "rebuilt.duckdb")
    again = keyed(party, name, "key")
    assert (again.status_code, again.content) == (answered.status_code, answered.content)
    assert party.state() == state


# What found its way into a bill: a job that runs again with its keys. (credited, consumed, balance)


def test_a_job_that_resets_and_credits_may_run_again(party: Party) -> None:
    """50 + 100 of units that rolled over, and the 10 of the job once."""
    def job() -> list[tuple[Decimal, ...]]:
        for path, body in (
            ("resets", {"meter_ids": "all"}), ("credits", {"meter_id": party.meter, "units": 10})
        ):  # fmt: skip
            headers = {"Idempotency-Key": f"november {path}"}
            made = party.tenant.ask("POST", f"/v1/customers/{party.ann}/{path}", headers=headers, json=body)
            assert made.status_code == 201
        party.tenant.server.now += timedelta(minutes=1)
        return party.numbers()

    assert job() == job() == [(160, 0, 160)]


def test_a_cycle_under_one_key_happens_once(party: Party) -> None:
    """100 that roll over, and 50 by hand: renewed to 250, used 40 of it, and asked for again."""
    cycle = "POST /v1/benefit-grants/{id}/cycle"
    found = []
    for used in (0, 0, 40, 0):
        if used:
            party.use(used)
        else:
            assert keyed(party, cycle, "november").status_code == 200
        found += party.numbers()
        party.tenant.server.now += timedelta(minutes=1)
    assert found == [(250, 0, 250), (250, 0, 250), (250, 40, 210), (250, 40, 210)]


# Credits that older versions gave: their keys are the organization's, and stand with the credit.


def test_a_key_that_an_older_version_kept_with_its_credit_keeps_its_meaning(party: Party) -> None:
    """The same request finds that credit; another one, and one for another customer, is refused."""
    tenant, id, now = party.tenant, str(uuid4()), party.tenant.server.now
    said = sha256(exact.encode([party.ann, party.meter, 20, False])).hexdigest()
    tenant.server.decide(CreditGranted(
        id=id, organization_id=tenant.id, customer_id=party.ann, meter_id=party.meter, units=Decimal(20), at=now,
        key="old", content=said,
    ))  # fmt: skip
    body, headers = {"meter_id": party.meter, "units": 20}, {"Idempotency-Key": "old"}
    again = tenant.ask("POST", f"/v1/customers/{party.ann}/credits", headers=headers, json=body)
    assert (again.status_code, again.json()["id"]) == (201, id)
    for who, units in ((party.ann, 21), (party.bob, 20)):
        refusal = tenant.refusal("POST", f"/v1/customers/{who}/credits", headers=headers, json=body | {"units": units})
        assert (refusal[0], refusal[2]) == (422, [("idempotency_key", ["header", "Idempotency-Key"])])
    assert party.numbers() == [(170, 0, 170)]
