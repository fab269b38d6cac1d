"""What is answered in front of the framework is what the endpoint behind it would have answered, to the byte."""

from datetime import timedelta
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest

from aggregator.api.at_once import METERS_MAX, AtOnce
from meters.access import SCOPES
from meters.aggregation import Aggregation
from meters.catalogue import MeterCreated
from meters.filter import Filter
from meters.ledger import customer_meter_id
from meters.meter import Meter
from tests.aggregator.records import line
from tests.aggregator.serving import Server, Tenant

PASSED_ON = 299
NOWHERE = "00000000-0000-4000-8000-00000000ffff"
FUNCTIONS = ("count", "sum", "avg", "min", "max")


class World(NamedTuple):
    """A tenant with usage, credits and a reset, and the names of what it has."""

    tenant: Tenant
    position: str
    names: dict[str, str]

    def path(self, template: str) -> str:
        """The path with its names filled in."""
        return template.format(**self.names)


async def passed_on(scope: Any, receive: Any, send: Any) -> None:
    """Stands where the framework would."""
    await send({"type": "http.response.start", "status": PASSED_ON, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def at_once(world: World, path: str, headers: Any = None, method: str = "GET") -> httpx.Response:
    """The answer without a framework behind; PASSED_ON where there is none."""
    server = world.tenant.server
    own = [("Authorization", f"Bearer {world.tenant.secret}")] if headers is None else headers

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(AtOnce(passed_on, server.app.state.desk))
        async with httpx.AsyncClient(transport=transport, base_url="http://meterstream.test") as client:
            return await client.request(method, path, headers=own)

    return server.run(ask())


@pytest.fixture(scope="module")
def world(server: Server) -> World:
    """Ann used every kind of meter, was credited, and had a reset; Bob did nothing; nobody knows who eve is."""
    tenant = server.tenant()
    names = {"ann": tenant.customer(external_id="ann", name="Ann Ü"), "bob": tenant.customer(external_id="bob")}
    for func in FUNCTIONS:
        names[func] = tenant.meter(func=func, **({} if func == "count" else {"property": "tokens"}))
    names["unique"] = tenant.meter(func="unique", property="model")
    names["old"] = tenant.meter()
    tenant.patch(f"/v1/meters/{names['old']}", {"is_archived": True})
    tenant.send(line("a", metadata={"tokens": 2.5, "model": "m"}), line("b", metadata={"tokens": -3}))
    server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{names['ann']}/credits", {"meter_id": names["sum"], "units": 20})
    tenant.post(f"/v1/customers/{names['ann']}/resets", {"meter_ids": [names["count"]]})
    server.now += timedelta(minutes=1)
    position = tenant.send(line("c", metadata={"tokens": 1}), line("d", external_customer_id="eve"))
    names |= {f"ann_{name}": customer_meter_id(names["ann"], names[name]) for name in (*FUNCTIONS, "unique", "old")}
    return World(tenant, position, names)


ONE = [f"/v1/customer-meters/{{ann_{name}}}" for name in (*FUNCTIONS, "unique", "old")]
LISTS = [
    f"/v1/customer-meters/?{query}"
    for query in (
        "customer_id={ann}", "external_customer_id=ann", "external_customer_id=bob", "customer_id={ann}&limit=3&page=2",
        "external_customer_id=ann&limit=1000", "external_customer_id=ann&page=9", "customer_id={ann}&meter_id={sum}",
        "meter_id={old}&external_customer_id=a%6en", "customer_id={ann}&meter_id=" + NOWHERE,
    )
]  # fmt: skip
TOTALS = [
    f"/v1/meters/{{{name}}}/usage?{query}"
    for name in (*FUNCTIONS, "old")
    for query in ("external_customer_id=ann", "customer_id={ann}", "external_customer_id=eve", "customer_id=" + NOWHERE)
]


@pytest.mark.parametrize("path", [*ONE, *LISTS, *TOTALS])
def test_the_answer_is_the_endpoints_own(world: World, path: str) -> None:
    """Status, headers and bytes. A parameter that nobody knows sends the same question to the endpoint."""
    path = world.path(path)
    found = at_once(world, path)
    other = f"{path}{'&' if '?' in path else '?'}nobody-knows-this=1"
    assert at_once(world, other).status_code == PASSED_ON
    endpoint = world.tenant.ask("GET", other)
    assert (found.status_code, found.headers.raw, found.content) == (200, endpoint.headers.raw, endpoint.content)


UNUSUAL = [
    "/v1/customer-meters/", "/v1/customer-meters", "/v1/customer-meters/{ann_sum}/",
    "/v1/customer-meters/{ann_sum}/ledger", "/v1/customer-meters/{ann}", "/v1/customer-meters/x",
    "/v1/customer-meters/{ann_sum}?x=1",
    "/v1/customer-meters/?customer_id={ann}&external_customer_id=ann", "/v1/customer-meters/?customer_id=",
    "/v1/customer-meters/?customer_id={ann}&customer_id={bob}", "/v1/customer-meters/?customer_id=" + NOWHERE,
    "/v1/customer-meters/?customer_id={ann}&limit=0", "/v1/customer-meters/?customer_id={ann}&page=x",
    "/v1/customer-meters/?customer_id={ann}&sorting=balance", "/v1/customer-meters/?customer_id={ann}&meter_id=x",
    "/v1/meters/{sum}/usage", "/v1/meters/{sum}/usage?external_customer_id=", "/v1/meters/{sum}/usage?customer_id=ann",
    "/v1/meters/{sum}/usage?customer_id={ann}&external_customer_id=ann", "/v1/meters/{unique}/usage?customer_id={ann}",
    f"/v1/meters/{NOWHERE}/usage?customer_id={{ann}}", "/v1/meters/{sum}", "/v1/events/",
]  # fmt: skip


@pytest.mark.parametrize("path", UNUSUAL)
def test_what_is_unusual_goes_on_to_the_endpoint(world: World, path: str) -> None:
    """Refusals, other forms of an id, filters, sorting, what the store has to be asked: all have one home."""
    assert at_once(world, world.path(path)).status_code == PASSED_ON


@pytest.mark.parametrize("template", ["{ann}", "{sum}"])
def test_an_id_in_another_form_is_the_endpoints_to_read(world: World, template: str) -> None:
    """Capitals or no hyphens: the endpoint knows these forms, so the answer is found there and not missed here."""
    id = world.path(template)
    for form in {id.upper(), id.replace("-", "")} - {id}:
        path = f"/v1/customer-meters/?external_customer_id=ann&meter_id={form}"
        if template == "{ann}":
            path = f"/v1/customer-meters/?customer_id={form}"
        assert at_once(world, path).status_code == PASSED_ON
        assert world.tenant.ask("GET", path).json()["items"]


def test_other_methods_are_not_for_here(world: World) -> None:
    """Only GET reads."""
    for method in ("HEAD", "POST", "DELETE"):
        assert at_once(world, world.path(ONE[0]), method=method).status_code == PASSED_ON


def test_whoever_may_not_read_hears_it_from_the_endpoint(world: World) -> None:
    """No token, a wrong one, one without the scope, two of them, another organization's: none is answered here."""
    tenant, scopes = world.tenant, set(SCOPES)
    stranger = tenant.server.tenant().secret
    good, unscoped = tenant.secret, tenant.token(*scopes - {"customer_meters:read", "meters:read", "meters:write"})
    expired = tenant.token(*scopes, expires_at=tenant.server.now)
    for path in map(world.path, (ONE[0], LISTS[0], LISTS[1], TOTALS[0])):
        for secrets in ((), ("x",), (unscoped,), (expired,), (stranger,), (good, good)):
            headers = [("Authorization", f"Bearer {secret}") for secret in secrets]
            assert at_once(world, path, headers).status_code == PASSED_ON
        assert at_once(world, path, [("authorization", f"bearer  {good}")]).status_code == 200


def test_a_position_is_waited_for_by_the_endpoint_unless_it_is_reached(world: World) -> None:
    """Read your own writes: at once where they are counted already."""
    good = ("Authorization", f"Bearer {world.tenant.secret}")
    path = world.path(ONE[0])
    for position, status in ((world.position, 200), ("0:999999", PASSED_ON), ("soon", PASSED_ON)):
        headers = [good, ("Prefer", "wait=1"), ("Log-Position", position)]
        assert at_once(world, path, headers).status_code == status


def test_a_customer_of_many_meters_is_looked_up_elsewhere(server: Server) -> None:
    """Hundreds of meters take a while, and the event loop is everybody's."""
    tenant = server.tenant()
    tenant.customer(external_id="ann")
    world = World(tenant, "", {})
    path = "/v1/customer-meters/?external_customer_id=ann"
    assert at_once(world, path).status_code == 200

    counted = Aggregation("count")
    meters = [
        Meter(id=str(uuid4()), organization_id=tenant.id, name="Calls", filter=Filter("and", []), aggregation=counted,
              created_at=server.now)
        for _ in range(METERS_MAX + 1)
    ]  # fmt: skip
    server.run(server.aggregator.decide(*[MeterCreated(meter) for meter in meters]))
    assert at_once(world, path).status_code == PASSED_ON
    assert tenant.ask("GET", path).json()["pagination"]["total_count"] == 0


def test_without_a_view_the_endpoint_says_so(world: World) -> None:
    """Between two engines there is nothing to read: 503 is the endpoint's to say."""
    desk = world.tenant.server.app.state.desk
    aggregator = desk.view
    engine = aggregator._engine
    try:
        aggregator._engine = None
        assert at_once(world, world.path(ONE[0])).status_code == PASSED_ON
    finally:
        aggregator._engine = engine
