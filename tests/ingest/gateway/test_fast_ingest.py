"""The short way of an ordinary request against the ASGI way of the same request: one meaning, one set of answers."""

import gzip
import json
import socket
from typing import Any

import pytest

from ingest.limits import HEAD_BYTES_MAX
from tests.support.servers.gateway import RunningGateway, receive_all
from tests.support.waiting import eventually

EVENT = {"name": "call", "external_customer_id": "ann", "metadata": {"tokens": 1}}
NOT_SHORT = {"polar-version": "2026-04"}
"""A header that changes nothing, except that the request takes the ASGI way."""
CHANGING = {"date", "log-position"}


def body(*events: Any) -> bytes:
    """A request's body."""
    return json.dumps({"events": list(events)}).encode()


REQUESTS: list[tuple[bytes, dict[str, str]]] = [
    (body(EVENT, EVENT), {}),
    (body(), {}),
    (body(EVENT, {"name": 5}), {}),
    (body(EVENT, {"name": 5}), {"prefer": "handling=lenient"}),
    (body(EVENT | {"external_id": "one"}), {"prefer": "return=representation"}),
    (gzip.compress(body(EVENT)), {"content-encoding": "gzip"}),
    (b"no gzip", {"content-encoding": "gzip"}),
    (body(EVENT), {"content-encoding": "br"}),
    (b"", {}),
    (b"{", {}),
    (b" " * 2_000, {"content-length": "99999999"}),
    (body(EVENT), {"authorization": "Bearer polar_oat_wrong"}),
    (body(EVENT), {"authorization": ""}),
    (body(EVENT), {"connection": "close"}),
]


def posted(gateway: RunningGateway, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Send a request as bytes; status, headers but those that change, and body of the answer."""
    named = {"host": "test", "content-length": str(len(content)), **gateway.authorization, **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(f"POST /v1/events/ingest HTTP/1.1\r\n{head}\r\n".encode() + content)
        reader = connection.makefile("rb")
        status = int(reader.readline().split()[1])
        lines = iter(lambda: reader.readline().strip().decode(), "")
        found = dict(line.split(": ", 1) for line in lines)
        answer = reader.read(int(found["content-length"]))
    return status, {name: value for name, value in found.items() if name not in CHANGING}, answer


def test_both_ways_give_the_same_answers() -> None:
    """Status, headers and body do not depend on the way, nor does what is logged, and nothing is held afterwards."""
    with RunningGateway() as gateway, RunningGateway() as other:
        for content, headers in REQUESTS:
            assert posted(gateway, content, headers) == posted(other, content, headers | NOT_SHORT), (content, headers)
            assert len(gateway.lines()) == len(other.lines())
        assert eventually(lambda: gateway.gateway.endpoint.in_flight.bytes == 0)


def test_an_ordinary_request_takes_the_short_way(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered without the ASGI application; the same request with something unusual is not."""

    async def never(*_: object) -> None:
        raise AssertionError("the ASGI application was asked")

    monkeypatch.setattr(type(gateway.gateway), "_serve", never)
    assert posted(gateway, body(EVENT), {})[0] == 200
    assert posted(gateway, body(EVENT), NOT_SHORT)[0] == 500


def test_a_body_in_pieces_is_one_body(gateway: RunningGateway) -> None:
    """However the network cuts a body, and whatever follows it on the connection, each request has one answer."""
    content = body(*[EVENT] * 50)
    head = f"POST /v1/events/ingest HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {gateway.secret}\r\n"
    request = f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        twice = request + request
        for start in range(0, len(twice), 700):
            connection.sendall(twice[start : start + 700])
        reader = connection.makefile("rb")
        for _ in range(2):
            assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
            lines = list(iter(lambda: reader.readline().strip(), b""))
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
            assert json.loads(reader.read(length)) == {"inserted": 50, "duplicates": 0}


def test_a_client_that_leaves_within_its_body_holds_nothing(gateway: RunningGateway) -> None:
    """What came of the body is let go of."""
    head = f"POST /v1/events/ingest HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {gateway.secret}\r\n"
    in_flight = gateway.gateway.endpoint.in_flight
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(f"{head}content-length: 5000\r\n\r\n".encode() + b"x" * 1000)
        assert eventually(lambda: in_flight.bytes == 1000)
    assert eventually(lambda: in_flight.bytes == 0)


BEHIND = {
    "garbage": b"garbage\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    "another version": b"GET /livez HTTP/0.9\r\nhost: x\r\n\r\n",
    "an endless head": b"GET /livez HTTP/1.1\r\nx: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n",
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("headers", [{}, NOT_SHORT], ids=["short way", "ASGI"])
def test_what_came_whole_is_answered_whatever_follows_it(behind: bytes, headers: dict[str, str]) -> None:
    """Its events may be in the log, so its sender hears of them; then the connection ends."""
    with RunningGateway() as gateway:
        content = body(EVENT)
        named = {"host": "test", "content-length": str(len(content)), **gateway.authorization, **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
                connection.sendall(f"POST /v1/events/ingest HTTP/1.1\r\n{head}\r\n".encode() + content + behind)
                answer = receive_all(connection)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b'{"inserted":1,"duplicates":0}')
        assert len(gateway.lines()) == 3
