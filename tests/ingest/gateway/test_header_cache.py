"""A head that is known again: nothing differs from what the parser would have made of it."""

import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ingest.gateway.connection import KNOWN_TIMES_MAX
from ingest.gateway.header_cache import LENGTH_DIGITS_MAX, KnownHead, known_head
from tests.support.servers.gateway import RunningGateway, event
from tests.support.waiting import eventually

BEFORE = b"POST /v1/events/ingest HTTP/1.1\r\nhost: t\r\nContent-Length: "
BEHIND = b"\r\nauthorization: Bearer a\r\n\r\n"


def known() -> KnownHead:
    """The head of one request, remembered."""
    found = known_head(BEFORE + b"17" + BEHIND + b'{"events": []}', {})
    assert found is not None
    return found


@given(st.integers(0, 10**LENGTH_DIGITS_MAX - 1), st.binary(max_size=50))
def test_another_length_is_the_same_head(length: int, body: bytes) -> None:
    """The length is read, and where the body begins."""
    digits = b"%d" % length
    head = BEFORE + digits + BEHIND
    assert known().find(head + body) == (length, len(head))


@pytest.mark.parametrize("data", [
    b"",
    BEFORE,
    BEFORE + b"17",
    BEFORE + b"17" + BEHIND[:-1],
    BEFORE + BEHIND,
    BEFORE + b"+17" + BEHIND,
    BEFORE + b"1_7" + BEHIND,
    BEFORE + b"17 " + BEHIND,
    BEFORE + b"1" * (LENGTH_DIGITS_MAX + 1) + BEHIND,
    BEFORE + b"17" + BEHIND.replace(b"a", b"b", 1),
    b"\r\n" + BEFORE + b"17" + BEHIND,
    BEFORE.replace(b"t", b"u") + b"17" + BEHIND,
])  # fmt: skip
def test_what_differs_is_another_head(data: bytes) -> None:
    """In one byte, in length, or because it is not whole yet."""
    assert known().find(data) is None


@pytest.mark.parametrize("data", [
    b"",
    BEFORE + b"17\r\n",
    b"POST / HTTP/1.1\r\nhost: t\r\n\r\ncontent-length: 5\r\n\r\n",
])  # fmt: skip
def test_a_head_without_end_or_length_is_not_remembered(data: bytes) -> None:
    """What stands in a body is none of its lengths."""
    assert known_head(data, {}) is None


# ---- on a connection


class Connection:
    """One connection to a gateway."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        self._socket = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")

    def request(self, content: bytes, **headers: str) -> bytes:
        """The bytes of a request."""
        named = {"host": "t", "content-length": str(len(content)), **self._gateway.authorization, **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        return f"POST /v1/events/ingest HTTP/1.1\r\n{head}\r\n".encode() + content

    def send(self, *pieces: bytes) -> None:
        """Send them one by one."""
        for piece in pieces:
            self._socket.sendall(piece)

    def answer(self) -> tuple[int, Any]:
        """Status and body of the next answer."""
        status = int(self._reader.readline().split()[1])
        lines = iter(lambda: self._reader.readline().strip().decode().lower(), "")
        length = int(dict(line.split(": ", 1) for line in lines)["content-length"])
        return status, json.loads(self._reader.read(length))

    def close(self) -> None:
        """Hang up."""
        self._reader.close()
        self._socket.close()


@pytest.fixture
def connection(gateway: RunningGateway) -> Iterator[Connection]:
    """One on which a head is known."""
    made = Connection(gateway)
    for _ in range(2):  # the first one began before anything was sent
        made.send(made.request(body(1)))
        assert made.answer() == (200, {"inserted": 1, "duplicates": 0})
    yield made
    made.close()


def body(events: int, **fields: Any) -> bytes:
    """A body of so many events."""
    return json.dumps({"events": [event(**fields)] * events}).encode()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what the parser was given."""
    seen: list[int] = []
    feed = HttpToolsProtocol.data_received

    def count(protocol: HttpToolsProtocol, data: bytes) -> None:
        seen.append(len(data))
        feed(protocol, data)

    monkeypatch.setattr(HttpToolsProtocol, "data_received", count)
    return seen


def test_a_known_head_is_not_parsed_again(connection: Connection, parsed: list[int]) -> None:
    """Whatever the length of the body, in one piece or in several; a head that differs is parsed."""
    for events in (1, 2, 300, 1):
        content = connection.request(body(events))
        connection.send(content[:-5], content[-5:])
        assert connection.answer() == (200, {"inserted": events, "duplicates": 0})
    assert not parsed
    connection.send(connection.request(body(1), **{"x-other": "1"}))
    assert connection.answer()[0] == 200
    assert len(parsed) == 1


def test_every_request_has_its_answer_however_they_are_cut(gateway: RunningGateway) -> None:
    """Good and bad ones, with this head and with others, alone and many at once: as if each had a connection."""
    choose = random.Random(7)
    kinds: list[tuple[bytes, dict[str, str]]] = [
        (body(3), {}), (body(40), {}), (body(1, name=""), {}), (b"{", {}), (b"", {}), (body(2), {"x-other": "1"}),
        (body(2), {"polar-version": "2026-04"}), (body(1), {"authorization": "Bearer wrong"}),
        (body(1, name=5), {"prefer": "handling=lenient"}), (b"x" * 3, {"content-encoding": "gzip"}),
    ]  # fmt: skip

    def alone(kind: tuple[bytes, dict[str, str]]) -> tuple[int, Any]:
        one = Connection(gateway)
        one.send(one.request(kind[0], **kind[1]))
        try:
            return one.answer()
        finally:
            one.close()

    expected = [alone(kind) for kind in kinds]
    for _ in range(100):
        connection = Connection(gateway)
        chosen = choose.choices(range(len(kinds)), [8, 4] + [1] * (len(kinds) - 2), k=6)
        groups, ahead = [chosen[:1], chosen[1:2], chosen[2:3], chosen[3:]], 0
        asked = [b"".join([connection.request(kinds[kind][0], **kinds[kind][1]) for kind in group]) for group in groups]
        for group, data, following in zip(groups, asked, [*asked[1:], b""], strict=True):
            left, ahead = data[ahead:], choose.choice([0, choose.randrange(len(following))]) if following else 0
            left += following[:ahead]  # the next one begins in the same piece
            cuts = sorted(choose.sample(range(len(left)), min(len(left), choose.randrange(4))))
            connection.send(*[left[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(left)], strict=True)])
            assert [connection.answer() for _ in group] == [expected[kind] for kind in group]
        connection.close()


def ask(path: str, *headers: str) -> bytes:
    """A head, as far as these lines."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: t", *headers]).encode()


def test_the_parser_keeps_a_head_that_it_has_begun(gateway: RunningGateway, connection: Connection) -> None:
    """What follows a beginning is its end, however much it looks like a known head."""
    first = connection.request(body(1))
    connection.send(first + ask("/evil", "x-value: "))
    assert connection.answer()[0] == 200
    before = len(gateway.lines())
    connection.send(connection.request(body(2)))
    assert connection.answer()[0] == 400  # a second Host header
    assert len(gateway.lines()) == before


def test_the_end_of_a_head_is_no_head(gateway: RunningGateway) -> None:
    """Two requests with the same end and other tokens are of the tokens that each of them shows."""
    connection = Connection(gateway)
    content = body(1)
    end = f"\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
    for secret, status in ((gateway.secret, 200), ("wrong", 401)) * 2:
        head = f"POST /v1/events/ingest HTTP/1.1\r\nauthorization: Bearer {secret}"
        connection.send(ask("/v1/other") + b"\r\n\r\n" + head.encode())
        assert connection.answer()[0] == 503  # nobody is there to be asked
        connection.send(end)
        assert connection.answer()[0] == status
    connection.close()


@pytest.mark.parametrize("cut", [1, 20, 60, 100])
def test_heads_in_two_pieces_are_heads(gateway: RunningGateway, cut: int) -> None:
    """Each piece ends within the head of the next request, again and again."""
    connection = Connection(gateway)
    request = connection.request(body(1))
    connection.send(request + request[:cut])
    for _ in range(2 * KNOWN_TIMES_MAX):
        assert connection.answer() == (200, {"inserted": 1, "duplicates": 0})
        connection.send(request[cut:] + request[:cut])
    connection.answer()
    connection.send(request[cut:])
    connection.answer()
    connection.send(request)
    assert connection.answer()[0] == 200
    connection.close()


def test_a_refused_body_has_its_time_to_arrive() -> None:
    """The wait for a next request begins when the body has come."""
    with RunningGateway(idle_deadline_s=1, body_bytes_max=1000) as gateway:
        connection = Connection(gateway)
        for _ in range(3):
            connection.send(connection.request(body(1)))
            assert connection.answer()[0] == 200
        refused = connection.request(b" " * 2000)
        connection.send(refused[:-1000])
        assert connection.answer()[0] == 413
        (protocol,) = gateway.server.server_state.connections
        connection.send(refused[-1000:-500])
        eventually(lambda: protocol.body_left == 500)  # type: ignore[union-attr]
        assert protocol.idle_since_s is None  # type: ignore[union-attr]
        connection.send(refused[-500:])
        eventually(lambda: protocol.idle_since_s is not None)  # type: ignore[union-attr]
        connection.send(connection.request(body(1)))
        assert connection.answer()[0] == 200
        connection.close()


def test_a_token_counts_as_it_is_now() -> None:
    """A head is known; what its token may do is asked each time."""
    with RunningGateway() as gateway:
        connection = Connection(gateway)
        for _ in range(3):
            connection.send(connection.request(body(1)))
            assert connection.answer()[0] == 200
        gateway.revoke(gateway.token)
        eventually(lambda: gateway.gateway.tail.catalogue.tokens[gateway.token.sha256].revoked_at)
        connection.send(connection.request(body(1)))
        assert connection.answer()[0] == 401
        connection.close()


def test_a_body_behind_a_known_head_has_its_limits() -> None:
    """It is late (408), or longer than a body may be (413); whoever hangs up within it holds nothing."""
    with RunningGateway(body_deadline_s=0.5, body_bytes_max=1000) as gateway:
        in_flight = gateway.gateway.endpoint.in_flight
        for content, status in ((body(1)[:-1] + b" " * 1000 + b"}", 413), (body(1), 408), (body(1), 0)):
            connection = Connection(gateway)
            for _ in range(3):
                connection.send(connection.request(body(1)))
                assert connection.answer()[0] == 200
            connection.send(connection.request(content)[:-1])
            if status:
                assert connection.answer()[0] == status
            else:
                eventually(lambda: in_flight.bytes == len(body(1)) - 1)
            connection.close()
            eventually(lambda: in_flight.bytes == 0)


def test_heads_that_differ_each_time_are_not_remembered_for_ever(gateway: RunningGateway, parsed: list[int]) -> None:
    """After some of them a connection tries no more."""
    connection = Connection(gateway)
    count = KNOWN_TIMES_MAX + 2
    for number in range(count + 3):
        connection.send(connection.request(body(1), **{"x-request": str(min(number, count))}))
        assert connection.answer()[0] == 200
    assert len(parsed) == count + 3
    connection.close()
