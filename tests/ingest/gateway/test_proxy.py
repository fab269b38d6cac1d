"""What is passed on to the query API, and what clients hear while it is away."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from ingest.gateway.proxy import end_to_end
from ingest.limits import PASSTHROUGH_CONNECTIONS_MAX
from tests.support.servers.gateway import PATIENCE_S, RunningGateway, event, receive_all
from tests.support.waiting import eventually

Message = dict[str, Any]


class QueryApi:
    """A stand-in for the query API on a unix socket: it tells what it was asked, or does what the path says."""

    def __init__(self, path: Path) -> None:
        self.asked: list[Message] = []
        self.go_on = threading.Event()
        config = uvicorn.Config(
            self.answer, uds=str(path), interface="asgi3", lifespan="off", log_config=None, ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="query-api")

    def __enter__(self) -> "QueryApi":
        self._thread.start()
        eventually(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.should_exit = True
        self._thread.join()

    async def answer(self, scope: Message, receive: Any, send: Any) -> None:
        """One request."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        asked = {
            "method": scope["method"], "path": scope["raw_path"].decode(), "query": scope["query_string"].decode(),
            "headers": headers, "body": body.decode("latin-1"),
        }  # fmt: skip
        self.asked.append(asked)
        await getattr(self, "_" + scope["path"].strip("/").split("/")[-1], self._tell)(asked, send)

    async def _tell(self, asked: Message, send: Any) -> None:
        content = json.dumps(asked).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)),
                   (b"x-one", b"1"), (b"x-one", b"2"), (b"connection", b"x-hop"), (b"x-hop", b"gone")]  # fmt: skip
        await send({"type": "http.response.start", "status": 207, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _metrics(self, asked: Message, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"aggregator_metric 1\n"})

    async def _empty(self, asked: Message, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, asked: Message, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.to_thread(self.go_on.wait)
        await send({"type": "http.response.body", "body": b"second" * 100_000})

    async def _late(self, asked: Message, send: Any) -> None:
        await asyncio.to_thread(self.go_on.wait)
        await self._empty(asked, send)

    async def _broken(self, asked: Message, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})


@pytest.fixture
def api(tmp_path: Path) -> Iterator[QueryApi]:
    """The query API, there."""
    with QueryApi(tmp_path / "api.sock") as running:
        yield running


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[RunningGateway]:
    """A gateway that expects the query API on a socket in the test's directory."""
    with RunningGateway(upstream=f"unix:{tmp_path / 'api.sock'}", body_bytes_max=100_000) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/meters/?page=1&metadata%5Bk%5D=v&name=x&name=y"),
        ("POST", "/v1/meters/"),
        ("PATCH", "/v1/meters/a%2Fb"),
        ("DELETE", "/v1/customers/external/acme%2F"),
        ("GET", "/v1/customers/external/acme%252Feu/state"),
        ("DELETE", "/v1/customers/1"),
        ("GET", "/"),
    ],
)
def test_a_request_arrives_as_it_was_sent(gateway: RunningGateway, api: QueryApi, method: str, path: str) -> None:
    """Method, target and body are the client's; headers too, save those of the connection. So is the answer."""
    body = b'{"a":"\xc3\xa9"}' if method in ("POST", "PATCH") else b""
    answer = gateway.client.request(
        method, path, content=body, headers={"authorization": "Bearer x", "te": "trailers", "x-custom": "1"}
    )
    asked = answer.json()
    assert answer.status_code == 207
    assert (asked["method"], asked["path"], asked["query"]) == (method, *path.partition("?")[::2])
    assert asked["body"] == body.decode("latin-1")
    assert asked["headers"]["authorization"] == "Bearer x"
    assert asked["headers"]["x-custom"] == "1"
    assert "te" not in asked["headers"]
    assert answer.headers.get_list("x-one") == ["1", "2"]
    assert "x-hop" not in answer.headers
    assert len(answer.headers.get_list("date")) == 1


def test_the_description_is_one_for_all_versions(gateway: RunningGateway, api: QueryApi) -> None:
    """Polar has one of each version; a version that there is not has none."""
    paths = [gateway.client.get(f"/{version}/openapi.json").json()["path"] for version in ("2026-04", "1999-01")]
    assert paths == ["/openapi.json", "/1999-01/openapi.json"]


def test_reads_are_of_the_same_quota(tmp_path: Path, api: QueryApi) -> None:
    """A minute's requests are those of all kinds, of a token or of a customer at the portal; whoever has no good one is
    refused where tokens are checked."""
    with RunningGateway(upstream=f"unix:{tmp_path / 'api.sock'}", requests_per_minute=2) as running:
        def ask(secret: str) -> int:
            return running.client.get("/v1/meters/", headers={"authorization": f"Bearer {secret}"}).status_code

        assert [ask(running.secret) for _ in range(3)] == [207, 207, 429]
        assert running.ingest({"events": []}).status_code == 429
        assert [ask("guessed") for _ in range(3)] == [207, 207, 207]
        first, other = running.add_session(), running.add_session()
        assert [ask(first) for _ in range(3)] == [207, 207, 429]
        assert ask(other) == 207


def test_the_old_prefix_is_taken_off(gateway: RunningGateway, api: QueryApi) -> None:
    """/api/v1/... is /v1/..., and the answer says so."""
    answer = gateway.client.get("/api/v1/meters/?a=1")
    assert answer.json()["path"] == "/v1/meters/"
    assert answer.headers["x-polar-deprecation-notice"]


def test_connections_are_kept_and_survive_a_restart_of_the_api(gateway: RunningGateway, tmp_path: Path) -> None:
    """Many reads after one another, then the API goes and comes back: reads that cannot be answered say so."""
    with QueryApi(tmp_path / "api.sock"):
        assert [gateway.client.get("/v1/x").status_code for _ in range(20)] == [207] * 20
    answer = gateway.client.get("/v1/x")
    assert answer.status_code == 503
    (tmp_path / "api.sock").unlink(missing_ok=True)
    with QueryApi(tmp_path / "api.sock"):
        assert gateway.client.get("/v1/x").status_code == 207


def test_events_are_taken_while_the_api_is_away(gateway: RunningGateway) -> None:
    """Reads are 503 with Retry-After; ingestion and the gateway's own pages do not mind."""
    answer = gateway.client.get("/v1/meters/")
    assert answer.status_code == 503
    assert answer.json()["error"] == "ViewUnavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert gateway.ingest({"events": [event()]}).status_code == 200
    assert gateway.client.get("/readyz").status_code == 200
    assert "meterstream_gateway_requests_total" in gateway.client.get("/metrics").text


def test_metrics_are_the_gateways_and_the_aggregators(gateway: RunningGateway, api: QueryApi) -> None:
    """One page for both halves."""
    def page() -> str:  # the aggregator's half is left out where it takes long
        return gateway.client.get("/metrics").text

    text = eventually(lambda: shown if (shown := page()).endswith("aggregator_metric 1\n") else "")
    assert "meterstream_gateway_events_total" in text


def test_an_answer_without_body_has_none(gateway: RunningGateway, api: QueryApi) -> None:
    """204, and HEAD, and the connection can be used again."""
    assert gateway.client.get("/v1/empty").status_code == 204
    assert gateway.client.head("/v1/x").content == b""
    assert gateway.client.get("/v1/x").status_code == 207


def test_an_answer_comes_as_it_is_made(gateway: RunningGateway, api: QueryApi) -> None:
    """The first piece arrives while the second is still to come."""
    with gateway.client.stream("GET", "/v1/stream") as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"first"
        api.go_on.set()
        assert b"".join(pieces) == b"second" * 100_000


def test_an_answer_that_does_not_begin_is_not_waited_for(
    gateway: RunningGateway, api: QueryApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """504 when the time is up; the connection that still owes an answer is not used again."""
    monkeypatch.setattr("ingest.gateway.proxy.PASSTHROUGH_ANSWER_DEADLINE_S", 0.2)
    assert gateway.client.get("/v1/late").status_code == 504
    monkeypatch.undo()
    api.go_on.set()
    assert gateway.client.get("/v1/x").status_code == 207


def test_one_organization_leaves_some_of_the_api_to_others(
    api: QueryApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests beyond that wait, and are told in the end that there are too many; events are taken all the same."""
    monkeypatch.setattr("ingest.gateway.proxy.PASSTHROUGH_CONNECTIONS_OF_ONE_MAX", 2)
    monkeypatch.setattr("ingest.gateway.proxy.SLOT_S_MAX", 0.2)
    with RunningGateway(upstream=f"unix:{tmp_path / 'api.sock'}") as gateway, ThreadPoolExecutor(2) as clients:
        def late(_: int) -> int:
            return gateway.client.get("/v1/late", headers=gateway.authorization).status_code

        held = clients.map(late, range(2))
        eventually(lambda: len(api.asked) == 2)
        answer = gateway.client.get("/v1/x", headers=gateway.authorization)
        others = gateway.client.get("/v1/x").status_code
        taken = gateway.ingest({"events": [event()]}).status_code
        api.go_on.set()

        assert (answer.status_code, answer.json()["error"]) == (503, "TooManyQueries")
        assert answer.headers["retry-after"] == "1"
        assert (others, taken, list(held)) == (207, 200, [204, 204])
        assert gateway.client.get("/v1/x", headers=gateway.authorization).status_code == 207


def test_strangers_leave_some_of_the_api_to_customers(
    api: QueryApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A customer at the portal asks as one of the organization, and is answered while strangers hold their share."""
    monkeypatch.setattr("ingest.gateway.proxy.PASSTHROUGH_CONNECTIONS_OF_ONE_MAX", 2)
    monkeypatch.setattr("ingest.gateway.proxy.SLOT_S_MAX", 0.2)
    with RunningGateway(upstream=f"unix:{tmp_path / 'api.sock'}") as gateway, ThreadPoolExecutor(2) as clients:
        session = {"authorization": f"Bearer {gateway.add_session()}"}
        held = clients.map(lambda _: gateway.client.get("/v1/late").status_code, range(2))
        eventually(lambda: len(api.asked) == 2)
        answers = [gateway.client.get("/v1/x", headers=headers).status_code for headers in ({}, session)]
        api.go_on.set()

        assert answers == [503, 207]
        assert list(held) == [204, 204]


def test_answers_at_the_same_time_do_not_mix(gateway: RunningGateway, api: QueryApi) -> None:
    """Each request has a connection to itself while it is answered."""
    with ThreadPoolExecutor(8) as clients:
        told = list(clients.map(lambda n: gateway.client.get(f"/v1/{n}").json()["path"], range(200)))
    assert told == [f"/v1/{n}" for n in range(200)]


def test_half_an_answer_is_no_answer(gateway: RunningGateway, api: QueryApi) -> None:
    """Where the API breaks off, so does the gateway."""
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.client.get("/v1/broken")
    assert gateway.client.get("/v1/x").status_code == 207


@pytest.mark.parametrize("told", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"])
def test_an_aggregator_that_falls_silent_keeps_nothing(monkeypatch: pytest.MonkeyPatch, told: bytes) -> None:
    """In a request that it takes no more of (504), or an answer that it began (cut): both connections are closed."""
    monkeypatch.setattr("ingest.gateway.proxy.PASSTHROUGH_IDLE_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with RunningGateway(upstream=address) as gateway, gateway.connect() as client:
            length = 0 if told else 8_000_000
            client.sendall(b"POST /v1/x HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % length + b"x" * length)
            silent, _ = listener.accept()
            with silent:
                silent.settimeout(PATIENCE_S)
                silent.recv(1024)
                silent.sendall(told)
                if told:
                    assert receive_all(client).endswith(b"half")
                else:
                    assert b" 504 " in client.recv(65536)
                receive_all(silent)
            assert gateway.gateway.upstream._slots.all._value == PASSTHROUGH_CONNECTIONS_MAX


def test_bodies_to_the_api_have_a_limit_and_a_length(gateway: RunningGateway, api: QueryApi) -> None:
    """413 and 411 before the API hears of it."""
    assert gateway.client.post("/v1/meters/", content=b"x" * 100_001).status_code == 413
    assert gateway.client.post("/v1/meters/", content=iter([b"x"])).status_code == 411
    assert api.asked == []


def test_an_api_over_http_will_do(tmp_path: Path) -> None:
    """The other form of the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with RunningGateway(upstream=address) as gateway, gateway.connect() as client:
            client.sendall(b"GET /v1/x HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(65536) == b"GET /v1/x HTTP/1.1\r\nhost: h\r\n\r\n"
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                assert receive_all(client).endswith(b"\r\n\r\nok")


def test_headers_of_one_connection_stay_there() -> None:
    """RFC 9110 7.6.1: the known ones, and those that Connection names."""
    headers = [(b"connection", b"close, X-Mine"), (b"x-mine", b"1"), (b"keep-alive", b"5"), (b"accept", b"*/*")]
    assert end_to_end(headers) == ((b"accept", b"*/*"),)


def test_a_body_is_never_taken_for_the_next_request(gateway: RunningGateway, api: QueryApi) -> None:
    """Whatever a client's ``Connection`` header says of the length, the query API hears one request, body and all."""
    smuggled = b"GET /v1/secret HTTP/1.1\r\nhost: x\r\n\r\n"
    with gateway.connect() as connection:
        head = b"POST /v1/meters/ HTTP/1.1\r\nhost: x\r\nconnection: content-length, host\r\ncontent-length: %d\r\n\r\n"
        connection.sendall(head % len(smuggled) + smuggled)
        assert b" 207 " in connection.recv(65536)
    assert gateway.client.get("/v1/next").json()["path"] == "/v1/next"

    assert [(one["path"], one["body"].encode()) for one in api.asked] == [("/v1/meters/", smuggled), ("/v1/next", b"")]
