"""The short way of an ordinary read against the ASGI way of the same read: one meaning, one set of answers."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from ingest.gateway.proxy import BUFFER_BYTES
from ingest.limits import RELAYED_MAX
from meters.fast_paths import FastRead
from tests.support.servers.gateway import PATIENCE_S, RunningGateway, receive_all
from tests.support.waiting import eventually

BALANCES = "/v1/customer-meters/?customer_id=1"
ID = "00000000-0000-4000-8000-00000000000f"
BALANCE = f"GET /v1/customer-meters/{ID} HTTP/1.1\r\nhost: h\r\n\r\n".encode()
NOT_SHORT = {"polar-version": "2026-04"}
"""A header that changes nothing, except that the request takes the ASGI way."""

Answering = Callable[[socket.socket, int], None]


def whole(body: bytes, *, status: str = "200 OK", headers: bytes = b"") -> Answering:
    """The answer that says this, each time."""
    head = b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n" % (status.encode(), headers, len(body))
    return lambda connection, _: connection.sendall(head + body)


class Asked:
    """The query API: takes requests one by one, on any number of connections, and answers as it is told."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.requests: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close the listener and every connection. May be called twice."""
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # or a thread that accepts goes on
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close every connection."""
        while self._open:
            with self._open.pop() as one, contextlib.suppress(OSError):  # the other side may have done so
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        request = b""
        try:
            while piece := connection.recv(65536):
                request += piece
                if request.endswith(b"\r\n\r\n"):
                    self.requests.append(request)
                    request = b""
                    self.answering(connection, len(self.requests))
        except OSError:
            return


@pytest.fixture
def api() -> Iterator[Asked]:
    """A query API that answers everything with ``{}``."""
    running = Asked(whole(b"{}"))
    yield running
    running.close()


@pytest.fixture
def gateway(api: Asked) -> Iterator[RunningGateway]:
    """A gateway before it, with a connection to it that an earlier request left behind."""
    with RunningGateway(upstream=api.address) as running:
        assert running.client.get("/v1/customers/").status_code == 200
        yield running


@pytest.fixture
def no_asgi(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the ASGI application answers with 500."""

    async def never(*_: object) -> None:
        raise AssertionError("the ASGI application was asked")

    monkeypatch.setattr(type(gateway.gateway), "_serve", never)


@pytest.mark.parametrize("read", FastRead)
@pytest.mark.usefixtures("no_asgi")
def test_reads_that_memory_answers_take_the_short_way(gateway: RunningGateway, api: Asked, read: FastRead) -> None:
    """With any query; the query API is asked for the path as it was sent."""
    path = read.value.format(id=ID, external_id="a%2Fb%20c")
    for query in ("", "?external_customer_id=ann"):
        assert gateway.client.get(path + query).status_code == 200
        assert api.requests[-1].startswith(f"GET {path}{query} HTTP/1.1\r\n".encode())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/customers/", f"/v1/customers/{ID}", f"/v1/meters/{ID}/quantities", "/v1/customer-meters/0b1f",
        f"/v1/customer-meters/{ID.upper()}", f"/v1/customers/external/a/{ID}/state", "/livez",
    ],
)
@pytest.mark.usefixtures("no_asgi")
def test_other_reads_take_the_long_way(gateway: RunningGateway, path: str) -> None:
    """Also those whose id is in another form."""
    assert gateway.client.get(path).status_code == 500


@pytest.mark.parametrize(
    "headers",
    [
        NOT_SHORT, {"prefer": "wait=5"}, {"log-position": "0:7"}, {"origin": "https://shop.example"},
        {"connection": "close"}, {"expect": "x"},
    ],
)
@pytest.mark.usefixtures("no_asgi")
def test_what_has_more_to_say_takes_the_other(gateway: RunningGateway, headers: dict[str, str]) -> None:
    """A head with anything that has to be answered, waited for or understood."""
    assert gateway.client.get(BALANCES, headers=headers).status_code == 500


@pytest.mark.parametrize(
    "answering",
    [
        whole(b'{"items":[]}', headers=b"as-of: 0:7\r\ncontent-type: application/json\r\nserver: api\r\ndate: x\r\n"),
        whole(b'{"error":"Unauthorized"}', status="401 Unauthorized", headers=b"www-authenticate: Bearer\r\n"),
        whole(b"", status="404 Not Found", headers=b"x-one: 1\r\nx-one: 2\r\nconnection: x-hop\r\nx-hop: 1\r\n"),
        whole(b"x" * (BUFFER_BYTES * 3)),
        whole(b"", status="599 Odd"),
    ],
)
def test_both_ways_give_the_same_answers(gateway: RunningGateway, api: Asked, answering: Answering) -> None:
    """Status, headers and body do not depend on the way, nor does what the API hears."""
    api.answering = answering
    short = gateway.client.get(BALANCES, headers={"x-custom": "1", "keep-alive": "5"})
    usual = gateway.client.get(BALANCES, headers={"x-custom": "1", "keep-alive": "5"} | NOT_SHORT)

    assert (short.status_code, short.content) == (usual.status_code, usual.content)
    assert shown(short.headers.multi_items()) == shown(usual.headers.multi_items())
    assert heard(api.requests[-2]) == heard(api.requests[-1]) - {b"polar-version: 2026-04"}


def shown(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """All of them but the second in which it was said, in any order."""
    return sorted(header for header in headers if header[0] != "date")


def heard(request: bytes) -> set[bytes]:
    """A request's lines."""
    return set(request.split(b"\r\n"))


def test_the_first_read_opens_a_connection_and_others_use_it(gateway: RunningGateway, api: Asked) -> None:
    """However many come, one after the other."""
    for _ in range(20):
        assert gateway.client.get(BALANCES).json() == {}
    assert api.connections == 1


def test_a_read_that_is_broken_off_is_asked_again(gateway: RunningGateway, api: Asked) -> None:
    """By the ASGI way, on another connection: the API may have been started again."""
    before = len(api.requests)

    def second_time(connection: socket.socket, number: int) -> None:
        if number == before + 1:
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
            connection.shutdown(socket.SHUT_RDWR)
        else:
            whole(b'{"second":1}')(connection, number)

    api.answering = second_time
    assert gateway.client.get(BALANCES).json() == {"second": 1}


def test_an_api_that_is_away_is_a_503(gateway: RunningGateway, api: Asked) -> None:
    """As by the other way, with when to come again."""
    api.close()
    answer = gateway.client.get(BALANCES)
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


def test_an_api_that_falls_silent_is_a_504(
    gateway: RunningGateway, api: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the same time as by the other way, and its connection is not used again."""
    monkeypatch.setattr("ingest.gateway.proxy.PASSTHROUGH_ANSWER_DEADLINE_S", 0.05)
    api.answering = lambda *_: None
    assert gateway.client.get(BALANCES).status_code == 504
    monkeypatch.undo()
    api.answering = whole(b"{}")
    assert gateway.client.get(BALANCES).json() == {}
    assert api.connections == 2


def test_reads_in_one_piece_are_answered_in_order(gateway: RunningGateway, api: Asked) -> None:
    """Pipelined reads, of either way, and a request with events between."""
    api.answering = lambda connection, _: whole(api.requests[-1].split()[1])(connection, 0)
    paths = [f"/v1/{'customers' if number % 3 else 'orders'}/external/{number}/state" for number in range(12)]
    with gateway.connect() as client:
        client.sendall(b"".join(b"GET %s HTTP/1.1\r\nhost: h\r\n\r\n" % path.encode() for path in paths))
        told = b""
        while told.count(b"HTTP/1.1 200 OK") < len(paths) or not told.endswith(paths[-1].encode()):
            piece = client.recv(65536)
            assert piece, told
            told += piece
    assert [part[-1].decode() for part in map(bytes.split, told.split(b"HTTP/1.1 ")[1:])] == paths


def test_a_client_that_leaves_keeps_nothing(gateway: RunningGateway, api: Asked) -> None:
    """Its answer is thrown away, and the connection to the API used by the next read."""
    arrived, go_on = threading.Event(), threading.Event()

    def late(connection: socket.socket, number: int) -> None:
        arrived.set()
        go_on.wait(PATIENCE_S)
        whole(b"{}")(connection, number)

    api.answering = late
    with gateway.connect() as client:
        client.sendall(BALANCE)
        assert arrived.wait(PATIENCE_S)
    go_on.set()
    eventually(lambda: gateway.server.relay._out == 0)
    assert gateway.client.get(BALANCES).status_code == 200
    assert api.connections == 1


def test_few_are_out_at_once(gateway: RunningGateway, api: Asked) -> None:
    """More take the ASGI way, where each organization has its share; all are answered."""
    go_on = threading.Event()

    def late(connection: socket.socket, number: int) -> None:
        go_on.wait(PATIENCE_S)
        whole(b"{}")(connection, number)

    clients = [socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) for _ in range(RELAYED_MAX + 5)]
    api.answering = late
    before = len(api.requests)
    for client in clients:
        client.sendall(BALANCE)
    assert eventually(lambda: len(api.requests) == before + len(clients))
    assert gateway.server.relay._out <= RELAYED_MAX
    go_on.set()
    for client in clients:
        with client:
            assert client.recv(65536).endswith(b"{}")
    assert gateway.server.relay._out == 0


def test_a_quota_of_requests_leaves_nothing_to_the_short_way(api: Asked) -> None:
    """It is counted in one place."""
    with RunningGateway(upstream=api.address, requests_per_minute=2) as gateway:
        statuses = [gateway.client.get(BALANCES, headers=gateway.authorization).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_the_connection_ends_when_a_stop_came_meanwhile(gateway: RunningGateway, api: Asked) -> None:
    """The answer is finished, and says that it is the last."""
    arrived, go_on = threading.Event(), threading.Event()

    def late(connection: socket.socket, number: int) -> None:
        arrived.set()
        go_on.wait(PATIENCE_S)
        whole(json.dumps({"n": 1}).encode())(connection, number)

    api.answering = late
    with gateway.connect() as client:
        client.sendall(BALANCE)
        assert arrived.wait(PATIENCE_S)
        gateway.server.should_exit = True
        assert eventually(lambda: not gateway.server.servers or not gateway.server.servers[0].is_serving())
        go_on.set()
        answer = receive_all(client)
    assert b"connection: close" in answer
    assert answer.endswith(b'{"n": 1}')
