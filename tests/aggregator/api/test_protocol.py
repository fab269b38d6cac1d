"""What holds for every endpoint: who may ask, how errors look, positions, limits."""

import asyncio
import re
import threading
from collections.abc import Coroutine
from typing import Any

import duckdb
import httpx
import pytest

from aggregator.api import audit, openapi, requests
from aggregator.service.errors import QUERIES_AT_ONCE
from aggregator.service.service import Asking
from aggregator.view import Unavailable
from meters.catalogue.access import AUDIT, SCOPES
from meters.log import USAGE_EVENTS, TryAgain
from tests.support.polar.organization import signed
from tests.support.records import NOW, entry, line
from tests.support.servers.query_api import Server, Tenant

NOWHERE = "00000000-0000-4000-8000-00000000ffff"
RANGE = "start_timestamp=2026-02-01T00:00:00Z&end_timestamp=2026-02-01T00:00:00Z&interval=day"
NEEDS = [
    ("GET", "/v1/events/", {"events:read", "events:write"}),
    ("GET", "/v1/events/names", {"events:read", "events:write"}),
    ("GET", f"/v1/events/{NOWHERE}", {"events:read", "events:write"}),
    ("GET", "/v1/meters/", {"meters:read", "meters:write"}),
    ("POST", "/v1/meters/", {"meters:write"}),
    ("GET", f"/v1/meters/{NOWHERE}", {"meters:read", "meters:write"}),
    ("PATCH", f"/v1/meters/{NOWHERE}", {"meters:write"}),
    ("GET", f"/v1/meters/{NOWHERE}/quantities?{RANGE}", {"meters:read", "meters:write"}),
    ("GET", f"/v1/meters/{NOWHERE}/usage", {"meters:read", "meters:write"}),
    ("GET", "/v1/usage", {"meters:read", "meters:write"}),
    ("POST", "/v1/meters/preview", {"meters:read", "meters:write"}),
    ("GET", "/v1/metrics/", {"metrics:read"}),
    ("GET", "/v1/metrics/limits", {"metrics:read"}),
    ("GET", "/v1/customers/", {"customers:read", "customers:write"}),
    ("POST", "/v1/customers/", {"customers:write"}),
    ("GET", "/v1/customers/export", {"customers:read", "customers:write"}),
    ("GET", f"/v1/customers/{NOWHERE}", {"customers:read", "customers:write"}),
    ("PATCH", f"/v1/customers/{NOWHERE}", {"customers:write"}),
    ("DELETE", f"/v1/customers/{NOWHERE}", {"customers:write"}),
    ("GET", f"/v1/customers/{NOWHERE}/state", {"customers:read", "customers:write"}),
    ("GET", "/v1/customers/external/ann", {"customers:read", "customers:write"}),
    ("PATCH", "/v1/customers/external/ann", {"customers:write"}),
    ("DELETE", "/v1/customers/external/ann", {"customers:write"}),
    ("GET", "/v1/customers/external/ann/state", {"customers:read", "customers:write"}),
    ("GET", f"/v1/customers/{NOWHERE}/credits", {"customers:read", "customers:write", "customer_meters:read"}),
    ("POST", f"/v1/customers/{NOWHERE}/credits", {"customers:write"}),
    ("DELETE", f"/v1/customers/{NOWHERE}/credits/0-0", {"customers:write"}),
    ("POST", f"/v1/customers/{NOWHERE}/resets", {"customers:write"}),
    ("GET", f"/v1/customers/{NOWHERE}/charges", {"customer_meters:read"}),
    ("GET", "/v1/customer-meters/", {"customer_meters:read"}),
    ("GET", f"/v1/customer-meters/{NOWHERE}", {"customer_meters:read"}),
    ("GET", f"/v1/customer-meters/{NOWHERE}/ledger", {"customer_meters:read"}),
    ("GET", f"/v1/customer-meters/{NOWHERE}/ledger/0-0/events", {"customer_meters:read"}),
    ("GET", f"/v1/meters/{NOWHERE}/price", {"meters:read", "meters:write"}),
    ("PUT", f"/v1/meters/{NOWHERE}/price", {"meters:write"}),
    ("DELETE", f"/v1/meters/{NOWHERE}/price", {"meters:write"}),
    ("GET", "/v1/benefits/", {"benefits:read", "benefits:write"}),
    ("POST", "/v1/benefits/", {"benefits:write"}),
    ("GET", f"/v1/benefits/{NOWHERE}", {"benefits:read", "benefits:write"}),
    ("PATCH", f"/v1/benefits/{NOWHERE}", {"benefits:write"}),
    ("DELETE", f"/v1/benefits/{NOWHERE}", {"benefits:write"}),
    ("GET", f"/v1/benefits/{NOWHERE}/grants", {"benefits:read", "benefits:write"}),
    ("POST", f"/v1/benefits/{NOWHERE}/grants", {"benefits:write"}),
    ("GET", "/v1/benefit-grants/", {"benefits:read", "benefits:write"}),
    ("GET", f"/v1/benefit-grants/{NOWHERE}", {"benefits:read", "benefits:write"}),
    ("POST", f"/v1/benefit-grants/{NOWHERE}/cycle", {"benefits:write"}),
    ("POST", f"/v1/benefit-grants/{NOWHERE}/revoke", {"benefits:write"}),
    ("POST", "/v1/customer-sessions/", {"customer_sessions:write"}),
    ("GET", "/v1/webhooks/endpoints", {"webhooks:read", "webhooks:write"}),
    ("POST", "/v1/webhooks/endpoints", {"webhooks:write"}),
    ("GET", f"/v1/webhooks/endpoints/{NOWHERE}", {"webhooks:read", "webhooks:write"}),
    ("PATCH", f"/v1/webhooks/endpoints/{NOWHERE}", {"webhooks:write"}),
    ("DELETE", f"/v1/webhooks/endpoints/{NOWHERE}", {"webhooks:write"}),
    ("PATCH", f"/v1/webhooks/endpoints/{NOWHERE}/secret", {"webhooks:write"}),
    ("GET", "/v1/webhooks/deliveries", {"webhooks:read", "webhooks:write"}),
    ("POST", f"/v1/webhooks/events/{NOWHERE}/redeliver", {"webhooks:write"}),
    ("GET", "/v1/webhooks/thresholds", {"webhooks:read", "webhooks:write"}),
    ("POST", "/v1/webhooks/thresholds", {"webhooks:write"}),
    ("DELETE", f"/v1/webhooks/thresholds/{NOWHERE}", {"webhooks:write"}),
    ("GET", "/v1/webhooks/sources", {"webhooks:read", "webhooks:write"}),
    ("GET", "/v1/webhooks/polar/deliveries", {"webhooks:read", "webhooks:write"}),
    ("GET", "/v1/webhooks/polar/waiting", {"webhooks:read", "webhooks:write"}),
    ("POST", "/v1/webhooks/polar/objects", {"webhooks:write"}),
    ("POST", "/v1/webhooks/sources", {"webhooks:write"}),
    ("DELETE", f"/v1/webhooks/sources/{NOWHERE}", {"webhooks:write"}),
    ("GET", "/v1/feed/", {"events:read", "events:write"}),
    ("GET", "/v1/feed/position", {"events:read", "events:write"}),
    ("GET", "/v1/feed/backlog", {"events:read", "events:write"}),
    ("GET", "/v1/feed/customers", {"events:read", "events:write"}),
    ("GET", f"/v1/feed/rollup?before=2026-02-01T00:00:00Z&meter_id={NOWHERE}", {"events:read", "events:write"}),
    ("GET", "/v1/feed/traffic?since=2026-02-01T00:00:00Z", {"events:read", "events:write"}),
    ("GET", "/v1/dead-letters/", {"events:read", "events:write"}),
    ("GET", "/v1/dead-letters/0-0-0", {"events:read", "events:write"}),
    ("POST", "/v1/dead-letters/0-0-0/replay", {"events:write"}),
]


def test_every_route_is_listed_with_the_scopes_it_needs(server: Server) -> None:
    """The table of this test knows every route under /v1, so none can be added without saying who may use it."""
    known = {
        (method, path.replace(NOWHERE, "{id}").replace("0-0-0", "{id}").replace("0-0", "{part}").split("?")[0])
        for method, path, _ in NEEDS
    }
    document = server.app.openapi()["paths"]
    served = {
        (method.upper(), re.sub(r"{(entry|credit)_id}", "{part}", path.replace("{external_id}", "ann")))
        for path, methods in document.items()
        for method in methods
        if path.startswith("/v1") and "/customer-portal/" not in path  # which takes a customer's token
        and path != openapi.PATH  # which the gateway answers
    }
    assert served == known


@pytest.fixture(scope="module")
def scoped(server: Server) -> tuple[Tenant, dict[str, str]]:
    """A tenant and a token for each scope alone."""
    tenant = server.tenant()
    return tenant, {scope: tenant.token(scope) for scope in SCOPES}


@pytest.mark.parametrize(("method", "path", "scopes"), NEEDS)
def test_a_route_needs_one_of_its_scopes(
    scoped: tuple[Tenant, dict[str, str]], method: str, path: str, scopes: set[str]
) -> None:
    """With any of its scopes a route is entered, with any other it is 403, and that before the body is looked at."""
    tenant, secrets = scoped
    for scope, secret in secrets.items():
        response = tenant.ask(method, path, secret=secret, content=b"{")
        assert (response.status_code != 403) is (scope in scopes)
    refused = tenant.ask(method, path, secret=tenant.token())
    assert refused.json()["error"] == "insufficient_scope"
    assert f'scope="{" ".join(sorted(scopes))}"' in refused.headers["www-authenticate"]


@pytest.mark.parametrize(("method", "path", "scopes"), NEEDS)
def test_a_route_needs_a_good_token(server: Server, method: str, path: str, scopes: set[str]) -> None:
    """Without a token, and with one that nobody issued, the answer is Polar's 401 for each."""
    none = server.ask(method, path)
    assert (none.status_code, none.json()) == (401, {"error": "Unauthorized", "detail": "Unauthorized"})
    assert none.headers["www-authenticate"] == 'Bearer realm="polar"'
    unknown = server.ask(method, path, secret="polar_oat_nobodys")
    assert (unknown.status_code, unknown.json()["error"]) == (401, "invalid_token")


def test_who_has_no_token_waits_for_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes a place from others, so it is for those who may ask."""
    async def waits(*_: Any) -> bool:
        raise AssertionError("it waited")

    monkeypatch.setattr(type(server.aggregator), "wait_for", waits)
    headers = {"prefer": "wait=30", "log-position": "0:999999999"}
    assert server.ask("GET", "/v1/meters/", headers=headers).status_code == 401
    assert server.ask("GET", "/v1/customer-portal/meters/", headers=headers).status_code == 401


def test_an_expired_token_is_good_no_longer(server: Server, tenant: Tenant) -> None:
    """Expiry is looked at with the clock of the request."""
    assert tenant.ask("GET", "/v1/meters/", secret=tenant.token("meters:read", expires_at=NOW)).status_code == 401


def test_paths_without_their_slash_are_redirected(server: Server) -> None:
    """Collections end with a slash; without it the answer is a 307 that keeps method and body, and names no host."""
    for path in ("/v1/meters", "/v1/events", "/v1/metrics", "/v1/customers"):
        response = server.ask("GET", f"{path}?limit=3")
        assert (response.status_code, response.headers["location"]) == (307, f"{path}/?limit=3")


def test_unknown_paths_and_methods(server: Server) -> None:
    """A 404 has the fields that Polar's clients read from every 404; a wrong method is answered as by Polar."""
    unknown, message = server.ask("GET", "/v1/orders/"), "There is no /v1/orders/ here. GET /docs lists every route."
    assert (unknown.status_code, unknown.json()) == (404, {"error": "ResourceNotFound", "detail": message})
    assert len(server.ask("GET", "/" + "x" * 4_000).text) < 400
    assert server.ask("DELETE", "/v1/meters/").json() == {"detail": "Method Not Allowed"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", ("missing", ["body"])),
        (b'{"name": }', ("json_invalid", ["body", 9])),
        (b'{"name": NaN}', ("json_invalid", ["body", 0])),
        (b"\xff", ("json_invalid", ["body", 0])),
        (b'{"name": "\\ud800"}', ("json_invalid", ["body", 0])),
        (b"[" * 100_000, ("json_invalid", ["body", 0])),
    ],
)
def test_a_body_that_is_no_json_is_refused(tenant: Tenant, content: bytes, complaint: tuple[str, list[Any]]) -> None:
    """Whatever the bytes, the answer is a 422 that says where they stop being JSON."""
    expected = (422, "RequestValidationError", [complaint])
    assert tenant.refusal("POST", "/v1/meters/", content=content) == expected


def test_a_body_that_is_too_large_is_not_read_to_its_end(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops at the limit, whether or not the length was announced."""

    async def endless() -> Any:
        yield b"["
        while True:
            yield b" " * 65536

    monkeypatch.setattr(audit, "BODY_BYTES_MAX", requests.BODY_BYTES_MAX)
    secret = tenant.token(AUDIT, "meters:write")
    headers = signed(b"", "one", int(tenant.server.now.timestamp()), b"nobody's")  # for Polar's door
    for path in ("/v1/meters/", "/webhooks/polar", "/v1/audit/total", "/v1/audit/ask/tallies"):
        for content in (b" " * (requests.BODY_BYTES_MAX + 1), endless()):
            response = tenant.ask("POST", path, content=content, secret=secret, headers=headers)
            assert (response.status_code, response.json()["error"]) == (413, "RequestBodyTooLarge")


def test_every_answer_says_as_of_when_it_is_true(tenant: Tenant) -> None:
    """``As-Of`` is the position of the view, for answers from memory and from the store."""
    meter = tenant.meter()
    tenant.event(timestamp="2026-02-01T00:00:00Z")
    position = tenant.send(b'{"name":"last","external_customer_id":"ann","external_id":"last"}')
    paths = ["/v1/events/", "/v1/events/names", "/v1/meters/", f"/v1/meters/{meter}/quantities?{RANGE}"]
    paths += [f"/v1/usage?meter_id={meter}&start=2026-02-01T00:00:00Z&end=2026-02-02T00:00:00Z"]
    paths += [f"/v1/meters/{meter}/usage?external_customer_id=ann", "/v1/metrics/limits", "/v1/dead-letters/"]
    assert {tenant.ask("GET", path).headers["as-of"] for path in paths} == {position}


def test_a_reader_can_wait_for_what_it_wrote(server: Server, tenant: Tenant) -> None:
    """With ``Prefer: wait`` the answer comes once the position is reached, and includes it."""
    meter = tenant.meter()
    first = tenant.send(b'{"name":"a","external_customer_id":"ann","external_id":"a"}')
    following = f"0:{int(first.split(':')[1]) + 1}"
    headers = {
        "Prefer": "respond-async, wait=10",
        "Log-Position": following,
        "Authorization": f"Bearer {tenant.secret}",
    }

    async def ask() -> httpx.Response:
        return await server.http.get(f"/v1/meters/{meter}/usage?external_customer_id=ann", headers=headers)

    async def both() -> httpx.Response:
        waiting = asyncio.create_task(ask())
        await asyncio.sleep(0)
        await server.log.append(USAGE_EVENTS, [entry(line("b"), organization_id=tenant.id)])
        return await waiting

    response = server.run(both())
    assert (response.json()["count"], response.headers["as-of"]) == (2, following)


@pytest.mark.parametrize("prefer", [["handling=lenient", "wait=10"], ["wait=10; foo=bar"], ['Wait = "10";x, a=b']])
def test_every_way_to_ask_for_waiting_is_understood(server: Server, tenant: Tenant, prefer: list[str]) -> None:
    """In a header of its own beside others, with parameters, in quotes: an answer includes what was written."""
    first = tenant.send(b'{"name":"a","external_customer_id":"ann","external_id":"a"}')
    following = f"0:{int(first.split(':')[1]) + 1}"
    headers = [("Log-Position", following), ("Authorization", f"Bearer {tenant.secret}")]

    async def both() -> httpx.Response:
        waiting = asyncio.create_task(
            server.http.get("/v1/meters/", headers=[*headers, *(("Prefer", one) for one in prefer)])
        )
        await asyncio.sleep(0)
        await server.log.append(USAGE_EVENTS, [entry(line("b"), organization_id=tenant.id)])
        return await waiting

    assert server.run(both()).headers["as-of"] == following


def test_waiting_ends_with_the_time(tenant: Tenant) -> None:
    """When the view does not get there in time the answer comes all the same, and ``As-Of`` says how far it got."""
    at = tenant.send(b'{"name":"a","external_customer_id":"ann","external_id":"a"}')
    headers = {"Prefer": "wait=0", "Log-Position": "0:999999"}
    response = tenant.ask("GET", "/v1/meters/", headers=headers)
    assert (response.status_code, response.headers["as-of"]) == (200, at)
    refusal = tenant.refusal("GET", "/v1/meters/", headers=headers | {"Log-Position": "here"})
    assert refusal == (422, "RequestValidationError", [("value_error", ["header", "Log-Position"])])


def test_too_many_questions_are_turned_away(server: Server, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few questions run, a few wait, and who comes after is told to come back; reads from memory go on."""
    gate = threading.Event()
    desk = server.app.state.desk
    monkeypatch.setattr(desk._asking.waits, "_most", 2)

    async def crowd() -> tuple[list[int], httpx.Response]:
        asked = [desk.ask_about(str(n), lambda _: gate.wait(20)) for n in range(QUERIES_AT_ONCE)]
        held = [asyncio.create_task(one) for one in asked]
        headers = {"Authorization": f"Bearer {tenant.secret}"}
        waiting = [asyncio.create_task(server.http.get("/v1/events/", headers=headers)) for _ in range(2)]
        while desk._asking.waits.now < 2:  # noqa: ASYNC110 - nothing tells when a request stands in line
            await asyncio.sleep(0)
        turned_away = await server.http.get("/v1/events/", headers=headers)
        from_memory = await server.http.get("/v1/meters/", headers=headers)
        gate.set()
        answers = await asyncio.gather(*waiting)
        await asyncio.gather(*held)
        return [from_memory.status_code, *(answer.status_code for answer in answers)], turned_away

    statuses, turned_away = server.run(crowd())
    assert statuses == [200, 200, 200]
    assert (turned_away.status_code, turned_away.headers["retry-after"]) == (503, "1")


def test_a_question_that_takes_too_long_is_given_up(
    server: Server, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB is interrupted, though no statement ran at first, and the client learns that the question was too long."""
    monkeypatch.setattr("aggregator.service.service.QUERY_S_MAX", 0.05)
    interrupt, interrupted = Asking.interrupt, threading.Event()

    def heard(asking: Asking[Any]) -> None:
        interrupt(asking)
        interrupted.set()

    def endless(connection: duckdb.DuckDBPyConnection, *_: Any) -> Any:
        assert interrupted.wait(30)
        return connection.execute(
            "SELECT COUNT(*) FROM range(1000000) a, range(1000000) b WHERE a.range % 7 = 3"
        ).fetchall()

    monkeypatch.setattr(Asking, "interrupt", heard)
    monkeypatch.setattr("aggregator.api.events.events.page", endless)
    response = tenant.ask("GET", "/v1/events/")
    assert (response.status_code, response.json()["error"]) == (504, "QueryTimeout")


@pytest.mark.parametrize("error", [Unavailable("opening", 3), TryAgain("full", 2.5), duckdb.OutOfMemoryException("no")])
def test_what_cannot_be_answered_now_is_503(tenant: Tenant, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A store that is being opened, a full log and a question that is too large are said to be just that."""

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("aggregator.api.events.events.page", fail)
    response = tenant.ask("GET", "/v1/events/")
    assert response.status_code == 503
    assert response.headers.get("retry-after") == {"opening": "3", "full": "2"}.get(str(error))


def test_operators_need_no_token(server: Server) -> None:
    """Health, readiness and metrics are for the machine room; the documentation is for everybody."""
    assert server.ask("GET", "/livez").text == "ok\n"
    assert server.ask("GET", "/readyz").json()["status"] == "ready"
    assert server.ask("GET", "/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    page = server.ask("GET", "/docs")
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "/v1/meters/{id}/quantities" in page.text


def test_decisions_at_the_same_time_do_not_overtake_each_other(server: Server, tenant: Tenant) -> None:
    """Of many customers made at once with one external id, exactly one comes to be."""
    headers = {"Authorization": f"Bearer {tenant.secret}"}

    def make(number: int) -> Coroutine[Any, Any, httpx.Response]:
        body = {"email": f"{number}@example.com", "external_id": "same"}
        return server.http.post("/v1/customers/", json=body, headers=headers)

    async def many() -> list[httpx.Response]:
        return list(await asyncio.gather(*map(make, range(8))))

    assert sorted(answer.status_code for answer in server.run(many())) == [201] + [422] * 7
