"""Two tenants and a customer's token: nobody learns or changes anything of another.

Every operation of the document is tried with the ids of somebody else; one that is new has to be given ids here.
"""

import asyncio
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import httpx
import pytest

from aggregator.api import create_app, openapi
from aggregator.service.errors import QUERIES_AT_ONCE, QUERIES_OF_ONE_AT_ONCE, QUERIES_OF_ONE_WAITING_MAX
from meters.ledger.ledger import customer_meter_id
from tests.support.records import line
from tests.support.servers.query_api import Server, Tenant

DOCUMENT: Any = create_app(None, None, None).openapi()  # type: ignore[arg-type]  # nothing is asked of them
OPERATIONS = [
    (method.upper(), path)
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
    if path.startswith("/v1/") and path != openapi.PATH  # which the gateway answers
]
MARK = "zebra"
"""Stands in every text of the owner's, so that a leak is seen."""
NEEDED = {
    "start_date": "2026-02-01", "end_date": "2026-03-01", "interval": "day", "since": "2026-02-01T00:00:00Z",
    "before": "2026-03-02T00:00:00Z", "start": "2026-02-01T00:00:00Z", "end": "2026-03-02T00:00:00Z",
}  # fmt: skip
"""Parameters without which some lists answer nobody, beside a meter of one's own."""


def described(path: str, params: dict[str, str]) -> dict[str, str]:
    """Those of the parameters that a GET of this path has; any other would be refused."""
    names = {one["name"] for one in DOCUMENT["paths"][path]["get"].get("parameters", ()) if one["in"] == "query"}
    return {name: value for name, value in params.items() if name in names}


class Owned(NamedTuple):
    """A tenant with one of everything, and what its things are called."""

    tenant: Tenant
    ids: dict[str, str]  # by the part of the path before them
    session: str

    def path(self, template: str) -> str:
        """A path with this tenant's ids in it."""
        parts: list[str] = []
        for part in template.split("/"):
            parts.append(self.ids[f"{parts[-1]}"] if part.startswith("{") else part)
        return "/".join(parts)

    def seen(self) -> list[Any]:
        """All that this tenant sees of itself, without what webhooks tell of being asked."""
        needed = NEEDED | {"meter_id": self.ids["meters"]}
        return [self.tenant.get(self.path(path), **described(path, needed)) for path in self.readable()]

    def readable(self) -> Iterator[str]:
        """Paths that a token may ask for with nothing but these parameters."""
        for method, path in OPERATIONS:
            is_special = "customer-portal" in path or path.endswith(("quantities", "}/usage", "export"))
            if method == "GET" and not is_special:
                yield path


@pytest.fixture(scope="module")
def owner(server: Server) -> Owned:
    """Everything there can be, marked."""
    tenant = server.tenant()
    meter = tenant.post("/v1/meters/", {
        "name": MARK, "filter": {"conjunction": "and", "clauses": []}, "aggregation": {"func": "count"},
    })["id"]  # fmt: skip
    customer = tenant.customer(external_id=MARK, name=MARK)
    event = tenant.event(f"{MARK} 1", name=MARK, external_customer_id=MARK, metadata={"note": MARK})
    tenant.send(f'{{"{MARK}"'.encode(), admitted=False)
    credit = tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 5})["id"]
    assert tenant.ask("PUT", f"/v1/meters/{meter}/price", json={"unit_amount": "1"}).is_success
    benefit = tenant.post("/v1/benefits/", {
        "type": "meter_credit", "description": MARK,
        "properties": {"meter_id": meter, "units": 5, "rollover": False},
    })["id"]  # fmt: skip
    grant = tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": customer})["id"]
    session = tenant.post("/v1/customer-sessions/", {"customer_id": customer})["token"]
    endpoint = tenant.post("/v1/webhooks/endpoints", {"url": f"https://{MARK}.example.com/", "name": MARK})["id"]
    threshold = tenant.post("/v1/webhooks/thresholds", {"meter_id": meter, "measure": "balance", "value": 1})["id"]
    source = tenant.post("/v1/webhooks/sources", {"secret": "whsec_" + MARK * 8})["id"]
    one = customer_meter_id(customer, meter)
    entries = tenant.get(f"/v1/customer-meters/{one}/ledger")["items"]
    ids = {
        "meters": meter, "customers": customer, "external": MARK, "events": event, "customer-meters": one,
        "dead-letters": tenant.get("/v1/dead-letters/")["items"][0]["id"], "benefits": benefit, "credits": credit,
        "benefit-grants": grant, "endpoints": endpoint, "thresholds": threshold, "sources": source,
        "ledger": next(entry["id"] for entry in entries if entry["cause"] == "usage"),
    }  # fmt: skip
    return Owned(tenant, ids, session)


@pytest.fixture(scope="module")
def stranger(server: Server) -> Tenant:
    """Another tenant, who knows every id."""
    return server.tenant()


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if "{" in one[1]])
def test_ids_of_another_tenant_are_no_ids(owner: Owned, stranger: Tenant, method: str, path: str) -> None:
    """404 for whatever belongs to another, as if there were nothing; a person's portal is closed to tokens."""
    params = {"start_timestamp": "2026-02-01T00:00:00Z", "end_timestamp": "2026-03-01T00:00:00Z", "interval": "day"}
    body = {"json": {}} if method != "GET" else {"params": described(path, params)}
    answer = stranger.ask(method, owner.path(path), **body)
    assert answer.status_code == (401 if "customer-portal" in path else 404), answer.text
    assert MARK not in answer.text


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "GET" and "{" not in path])
def test_lists_show_nothing_of_another_tenant(owner: Owned, stranger: Tenant, path: str) -> None:
    """Not even to who asks for it by name. What a list needs is given, for one that refuses everybody shows nothing."""
    secret = stranger.secret
    if "customer-portal" in path:
        secret = stranger.post("/v1/customer-sessions/", {"customer_id": stranger.customer()})["token"]
    own = NEEDED | {"meter_id": stranger.meter()}
    asked = own | {
        "customer_id": owner.ids["customers"], "external_customer_id": MARK, "query": MARK,
        "organization_id": owner.tenant.id,
    }  # fmt: skip
    assert stranger.ask("GET", path, secret=secret, params=described(path, own)).is_success
    foreign = own | {"meter_id": owner.ids["meters"], "rollup_meter_id": owner.ids["meters"]}
    for params in ({}, own, asked, foreign):
        answer = stranger.ask("GET", path, secret=secret, params=described(path, params))
        shown = answer.text if answer.is_success else _without(answer.text, params.values())
        assert MARK not in shown
        assert not [id for id in owner.ids.values() if id in shown]


def _without(text: str, asked: Iterable[str]) -> str:
    """A refusal without what was asked, which it repeats."""
    for value in asked:
        text = text.replace(value, "")
    return text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/customers/{own}/credits", {"meter_id": "meters", "units": 1}),
        ("/v1/customers/{own}/resets", {"meter_ids": ["meters"]}),
        ("/v1/benefits/", {"type": "meter_credit", "description": "units",
                           "properties": {"meter_id": "meters", "units": 1, "rollover": False}}),
        ("/v1/customer-sessions/", {"customer_id": "customers"}),
        ("/v1/customer-sessions/", {"external_customer_id": "external"}),
        ("/v1/webhooks/thresholds", {"meter_id": "meters", "measure": "balance", "value": 1}),
    ],
)  # fmt: skip
def test_bodies_cannot_name_what_belongs_to_another(owner: Owned, stranger: Tenant, path: str, body: Any) -> None:
    """422, as for an id that nobody has."""
    own = stranger.customer()
    answer = stranger.ask("POST", path.replace("{own}", own), json=_named(body, owner.ids))
    assert answer.status_code == 422, answer.text


def _named(body: Any, ids: dict[str, str]) -> Any:
    if isinstance(body, dict):
        return {key: _named(value, ids) for key, value in body.items()}
    if isinstance(body, list):
        return [_named(value, ids) for value in body]
    return ids.get(body, body) if isinstance(body, str) else body


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if "customer-portal" not in one[1]])
def test_a_customers_token_opens_nothing_of_the_organization(owner: Owned, method: str, path: str) -> None:
    """It is no token there, whatever is asked for, the customer's own things included."""
    answer = owner.tenant.ask(method, owner.path(path), secret=owner.session)
    assert answer.status_code == 401, answer.text


def test_a_customers_token_shows_that_customer_alone(owner: Owned) -> None:
    """Its own meter, and nobody else's of the same organization."""
    other = owner.tenant.customer(external_id="other")
    owner.tenant.send(line("other", external_customer_id="other"))
    theirs = customer_meter_id(other, owner.ids["meters"])
    assert owner.tenant.ask("GET", f"/v1/customer-meters/{theirs}").is_success
    listed = owner.tenant.ask("GET", "/v1/customer-portal/meters/", secret=owner.session)
    assert [one["id"] for one in listed.json()["items"]] == [owner.ids["customer-meters"]]
    hidden = owner.tenant.ask("GET", f"/v1/customer-portal/meters/{theirs}", secret=owner.session)
    assert hidden.status_code == 404


@pytest.fixture(params=["reset", "cycle"])
def cutting(request: pytest.FixtureRequest, server: Server) -> tuple[Tenant, str, str]:
    """A tenant, a customer of 10 units that roll over and no external id, and the path that begins a window anew."""
    tenant = server.tenant()
    meter, customer = tenant.meter(func="sum", property="units"), tenant.customer()
    properties = {"meter_id": meter, "units": 10, "rollover": True}
    path = f"/v1/customers/{customer}/resets"
    if request.param == "reset":
        tenant.post(f"/v1/customers/{customer}/credits", properties)
    else:
        benefit = {"type": "meter_credit", "description": "Units", "properties": properties}
        benefit_id = tenant.post("/v1/benefits/", benefit)["id"]
        grant = tenant.post(f"/v1/benefits/{benefit_id}/grants", {"customer_id": customer})["id"]
        path = f"/v1/benefit-grants/{grant}/cycle"
    tenant.send(line("used", external_customer_id=customer, metadata={"units": 4}))
    server.now += timedelta(minutes=1)
    return tenant, customer, path


def test_a_cut_that_waits_for_the_store_keeps_nobody_waiting(
    server: Server, cutting: tuple[Tenant, str, str]
) -> None:  # fmt: skip
    """Another tenant decides meanwhile; and what is decided of this customer meanwhile is in what is carried over."""
    (tenant, customer, path), gate, desk = cutting, threading.Event(), server.app.state.desk
    body = {"meter_ids": "all"} if path.endswith("/resets") else {}
    own, others = ({"Authorization": f"Bearer {one.secret}"} for one in (tenant, server.tenant()))

    async def crowd() -> list[httpx.Response]:
        asked = [desk.ask_about(str(n), lambda _: gate.wait(60)) for n in range(QUERIES_AT_ONCE)]
        held = [asyncio.create_task(one) for one in asked]
        cut = asyncio.create_task(server.http.post(path, headers=own, json=body))
        try:
            while not desk._asking.waits.now:  # noqa: ASYNC110 - nothing tells when a question stands in line
                await asyncio.sleep(0)
            async with asyncio.timeout(30):
                made = await server.http.post("/v1/customers/", headers=others, json={"email": "b@example.com"})
                named = await server.http.patch(
                    f"/v1/customers/{customer}", headers=own, json={"external_id": customer}
                )
            assert not cut.done()
        finally:
            gate.set()
            await asyncio.gather(*held)
        return [made, named, await cut]

    assert [answer.is_success for answer in server.run(crowd())] == [True] * 3
    (rolled,) = [one["units"] for one in tenant.get(f"/v1/customers/{customer}/credits")["items"]
                 if one["cause"] == "rollover"]  # fmt: skip
    assert rolled == 6


def test_slow_questions_of_one_tenant_leave_room_for_others(server: Server) -> None:
    """Whoever asks as many as may be asked is told to come back; another is answered at once."""
    slow, other, gate, desk = server.tenant(), server.tenant(), threading.Event(), server.app.state.desk

    async def crowd() -> list[int]:
        asked = [desk.ask_about(slow.id, lambda _: gate.wait(60)) for _ in range(QUERIES_OF_ONE_AT_ONCE)]
        held = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(0)  # they come in
        asked = [desk.ask_about(slow.id, lambda _: True) for _ in range(QUERIES_OF_ONE_WAITING_MAX)]
        waiting = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(0)  # they stand in line
        try:
            async with asyncio.timeout(30):
                return [(await _events(server, one)).status_code for one in (slow, other)]
        finally:
            gate.set()
            await asyncio.gather(*held, *waiting)

    assert server.run(crowd()) == [503, 200]


def test_nobody_waits_long_for_a_turn(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked has gone by then, and the question would only make others wait."""
    monkeypatch.setattr("aggregator.service.service.TURN_S_MAX", 0.05)
    slow, gate, desk = server.tenant(), threading.Event(), server.app.state.desk

    async def crowd() -> tuple[int, int]:
        asked = [desk.ask_about(slow.id, lambda _: gate.wait(60)) for _ in range(QUERIES_OF_ONE_AT_ONCE)]
        held = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(0)  # they come in
        try:
            late = (await _events(server, slow)).status_code
        finally:
            gate.set()
            await asyncio.gather(*held)
        return late, (await _events(server, slow)).status_code

    assert server.run(crowd()) == (503, 200)


async def _events(server: Server, tenant: Tenant) -> httpx.Response:
    """A list that is asked of the store."""
    return await server.http.get("/v1/events/", headers={"Authorization": f"Bearer {tenant.secret}"})


def test_nothing_was_changed_by_all_that(server: Server, owner: Owned, stranger: Tenant) -> None:
    """What the owner sees is the same before and after another tries everything."""
    before = owner.seen()
    for method, path in OPERATIONS:
        stranger.ask(method, owner.path(path), json={})
        owner.tenant.ask(method, owner.path(path), secret=owner.session, json={})
    assert owner.seen() == before
