"""What is answered in front of the framework is what the endpoint behind it would have answered, to the byte."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest
import uvicorn
from uvicorn.server import ServerState

from aggregator.api.fast_reads import METERS_MAX, AtOnce, front
from meters.aggregation import Aggregation
from meters.catalogue.access import SCOPES
from meters.catalogue.catalogue import MeterCreated
from meters.fast_paths import FastRead, path_pattern
from meters.filters import Filter
from meters.ledger.ledger import customer_meter_id
from meters.meter import Meter
from tests.support.records import line
from tests.support.servers.query_api import Server, Tenant

Headers = list[tuple[bytes, bytes]]
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


def at_once(world: World, path: str, headers: Headers | None = None) -> tuple[bytes, bytes] | None:
    """What is answered without the framework: ``As-Of`` and the body."""
    server = world.tenant.server
    return AtOnce(server.app.state.desk).answer(path.encode(), headers or [bearer(world.tenant.secret)])


def bearer(secret: str) -> tuple[bytes, bytes]:
    """The header that shows a token."""
    return b"authorization", b"Bearer " + secret.encode()


@pytest.fixture(scope="module")
def world(server: Server) -> World:
    """Ann used every kind of meter, was credited, has a benefit and had a reset; Bob and a customer with a slash in the
    external id did nothing; nobody knows who eve is."""
    tenant = server.tenant()
    names = {"ann": tenant.customer(external_id="ann", name="Ann Ü"), "bob": tenant.customer(external_id="bob")}
    tenant.customer(external_id="acme/eu %2F+ü")
    for func in FUNCTIONS:
        names[func] = tenant.meter(func=func, **({} if func == "count" else {"property": "tokens"}))
    names["unique"] = tenant.meter(func="unique", property="model")
    names["old"] = tenant.meter()
    tenant.patch(f"/v1/meters/{names['old']}", {"is_archived": True})
    tenant.send(line("a", metadata={"tokens": 2.5, "model": "m"}), line("b", metadata={"tokens": -3}))
    server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{names['ann']}/credits", {"meter_id": names["sum"], "units": 20})
    tenant.post(f"/v1/customers/{names['ann']}/resets", {"meter_ids": [names["count"]]})
    benefit = {"type": "meter_credit", "description": "100 units", "properties": {"units": 100, "rollover": False}}
    benefit["properties"] |= {"meter_id": names["max"]}
    made = tenant.post("/v1/benefits/", benefit)["id"]
    tenant.post(f"/v1/benefits/{made}/grants", {"customer_id": names["ann"]})
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
STATES = ["/v1/customers/{ann}/state", "/v1/customers/{bob}/state"]
STATES_BY_EXTERNAL_ID = [
    f"/v1/customers/external/{segment}/state" for segment in ("ann", "a%6en", "bob", "acme%2Feu%20%252F+%C3%BC")
]
ANSWERED = {
    FastRead.CUSTOMER_METER: ONE,
    FastRead.CUSTOMER_METERS: LISTS,
    FastRead.USAGE: TOTALS,
    FastRead.STATE: STATES,
    FastRead.STATE_BY_EXTERNAL_ID: STATES_BY_EXTERNAL_ID,
}


@pytest.mark.parametrize(("read", "path"), [(read, path) for read in FastRead for path in ANSWERED[read]])
def test_the_answer_is_the_endpoints_own(world: World, read: FastRead, path: str) -> None:
    """The body's bytes and the position that they are true for, of every read that a gateway relays."""
    path = world.path(path)
    assert path_pattern(read).fullmatch(path.partition("?")[0])
    endpoint = world.tenant.ask("GET", path)
    assert endpoint.status_code == 200
    assert at_once(world, path) == (endpoint.headers["as-of"].encode(), endpoint.content)


@pytest.mark.parametrize("read", FastRead)
def test_a_fast_read_has_an_endpoint(world: World, read: FastRead) -> None:
    """It answers what is unusual about such a read."""
    assert "get" in world.tenant.server.app.openapi()["paths"][read.value]


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
    f"/v1/meters/{NOWHERE}/usage?customer_id={{ann}}", "/v1/meters/{sum}/usage?external_customer_id=ann#x",
    "/v1/meters/{sum}", "/v1/events/",
    f"/v1/customers/{NOWHERE}/state", "/v1/customers/ann/state", "/v1/customers/{ann}/state?x=1",
    "/v1/customers/external/eve/state", "/v1/customers/external/ann/state?x=1", "/v1/customers/external/ann/state/",
    "/v1/customers/external/acme/eu/state", "/v1/customers/{ann}",
]  # fmt: skip


@pytest.mark.parametrize("path", UNUSUAL)
def test_what_is_unusual_goes_on_to_the_endpoint(world: World, path: str) -> None:
    """Refusals, other forms of an id, filters, sorting, what the store has to be asked: all have one home."""
    assert at_once(world, world.path(path)) is None


@pytest.mark.parametrize("template", ["{ann}", "{sum}"])
def test_an_id_in_another_form_is_the_endpoints_to_read(world: World, template: str) -> None:
    """Capitals or no hyphens: the endpoint knows these forms, so the answer is found there and not missed here."""
    id = world.path(template)
    for form in {id.upper(), id.replace("-", "")} - {id}:
        path = f"/v1/customer-meters/?external_customer_id=ann&meter_id={form}"
        if template == "{ann}":
            path = f"/v1/customer-meters/?customer_id={form}"
        assert at_once(world, path) is None
        assert world.tenant.ask("GET", path).json()["items"]


def test_whoever_may_not_read_hears_it_from_the_endpoint(world: World) -> None:
    """No token, a wrong one, one without the scope, two of them, another organization's: none is answered here."""
    tenant, scopes = world.tenant, set(SCOPES)
    stranger = tenant.server.tenant().secret
    good, unscoped = tenant.secret, tenant.token("events:read")
    expired = tenant.token(*scopes, expires_at=tenant.server.now)
    for path in map(world.path, (ONE[0], LISTS[0], LISTS[1], TOTALS[0], STATES[0], STATES_BY_EXTERNAL_ID[0])):
        assert at_once(world, path, [(b"host", b"x")]) is None
        for secrets in (("x",), (unscoped,), (expired,), (stranger,), (good, good)):
            assert at_once(world, path, [bearer(secret) for secret in secrets]) is None
        assert at_once(world, path, [(b"authorization", f"bearer  {good}".encode())])


def test_a_position_is_waited_for_by_the_endpoint_unless_it_is_reached(world: World) -> None:
    """Read your own writes: at once where they are counted already."""
    path = world.path(ONE[0])
    for position, known in ((world.position, True), ("0:999999", False), ("soon", False)):
        headers = [bearer(world.tenant.secret), (b"prefer", b"wait=1"), (b"log-position", position.encode())]
        assert bool(at_once(world, path, headers)) is known


def test_a_customer_of_many_meters_is_looked_up_elsewhere(server: Server) -> None:
    """Hundreds of meters take a while, and the event loop is everybody's."""
    tenant = server.tenant()
    tenant.customer(external_id="ann")
    world = World(tenant, "", {})
    paths = ["/v1/customer-meters/?external_customer_id=ann", STATES_BY_EXTERNAL_ID[0]]
    assert all(at_once(world, path) for path in paths)

    counted = Aggregation("count")
    meters = [
        Meter(id=str(uuid4()), organization_id=tenant.id, name="Calls", filter=Filter("and", []), aggregation=counted,
              created_at=server.now)
        for _ in range(METERS_MAX + 1)
    ]  # fmt: skip
    server.run(server.aggregator.decide(*[MeterCreated(meter) for meter in meters]))
    assert not any(at_once(world, path) for path in paths)
    assert [tenant.ask("GET", path).status_code for path in paths] == [200, 200]


def test_without_a_view_the_endpoint_says_so(world: World) -> None:
    """Between two engines there is nothing to read: 503 is the endpoint's to say."""
    desk = world.tenant.server.app.state.desk
    aggregator = desk.view
    engine = aggregator._engine
    try:
        aggregator._engine = None
        assert at_once(world, world.path(ONE[0])) is None
    finally:
        aggregator._engine = engine


def request(world: World, path: str, method: str = "GET", more: str = "", version: str = "1.1", body: str = "") -> str:
    """A request as it is on the wire."""
    head = f"{method} {world.path(path)} HTTP/{version}\r\nhost: h\r\nauthorization: Bearer {world.tenant.secret}\r\n"
    return f"{head}{more}\r\n{body}"


def converse(world: World, place: Path, *requests: str) -> list[bytes]:
    """The answers to requests that are sent all at once; the server closes the connection after the last."""
    app, path, state = world.tenant.server.app, str(place / "api.sock"), ServerState()
    config = uvicorn.Config(app, log_config=None, lifespan="off")
    config.load()
    connection = front(app.state.desk)

    async def exchange() -> bytes:
        made = await asyncio.get_running_loop().create_unix_server(lambda: connection(config, state, {}), path)
        async with made:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write("".join(requests).encode())
            answers = await reader.read()
            writer.close()
        return answers

    parts = world.tenant.server.run(exchange()).split(b"HTTP/1.1 ")
    return parts[1:]


def test_requests_of_both_kinds_take_turns_on_a_connection(world: World, tmp_path: Path) -> None:
    """In their order, each with its own answer, whatever is under way when the next one comes."""
    hot, slow = request(world, TOTALS[0]), request(world, "/v1/meters/{sum}")
    body = request(world, "/v1/meters/preview", "POST", "content-length: 2\r\n", body="{}")
    read_with_body = request(world, ONE[0], more="content-length: 2\r\n", body="{}")
    last = request(world, ONE[0], more="connection: close\r\n")
    answers = converse(world, tmp_path, hot, hot, slow, hot, body, hot, read_with_body, slow, last)
    assert [answer[:3] for answer in answers] == [b"200"] * 4 + [b"422"] + [b"200"] * 4
    total = answers[0].partition(b"\r\n\r\n")[2]
    assert b'"value"' in total
    assert [answer.endswith(total) for answer in answers] == [True, True, False, True, False, True, False, False, False]
    heads = [answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:] for answer in answers]
    names = [sorted(line.partition(b":")[0] for line in head) for head in heads]
    assert names[0] == names[2], "the same headers, framework or not"


def test_the_connection_is_closed_where_the_client_says_so(world: World, tmp_path: Path) -> None:
    """HTTP/1.0, and HTTP/1.1 with Connection: close."""
    for last in (request(world, TOTALS[0], version="1.0"), request(world, TOTALS[0], more="connection: close\r\n")):
        assert [answer[:3] for answer in converse(world, tmp_path, last)] == [b"200"]


def test_nothing_behind_an_offer_of_another_protocol_is_a_request(world: World, tmp_path: Path) -> None:
    """The parser reads no body then, so the connection ends with the answer, whoever gives it."""
    offer = "connection: upgrade\r\nupgrade: foo\r\n"
    for path, status in ((TOTALS[0], b"200"), ("/v1/meters/{sum}", b"200"), ("/v1/nothing", b"404")):
        smuggled = request(world, TOTALS[0])
        first = request(world, path, more=f"{offer}content-length: {len(smuggled)}\r\n")
        (answer,) = converse(world, tmp_path, first, smuggled)
        assert answer[:3] == status
        assert b"\r\nconnection: close\r\n" in answer
