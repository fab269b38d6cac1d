"""What nobody should send: each is a clear refusal or a closed connection, never a 2xx, and others are still served."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from ingest.gateway.connection import Exchange
from ingest.limits import HEAD_BYTES_MAX, MEBIBYTE, PIPELINED_MAX
from tests.support.servers.gateway import PATIENCE_S, RunningGateway, event, receive_all
from tests.support.waiting import eventually

BODY = json.dumps({"events": [event()]}).encode()


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """A gateway that waits longer for a client than a test looks away, and takes no large bodies."""
    with RunningGateway(body_bytes_max=1_000_000) as running:
        yield running


@pytest.fixture
def impatient() -> Iterator[RunningGateway]:
    """One that soon loses patience with bodies, for those who wait until it does."""
    with RunningGateway(body_deadline_s=1.0) as running:
        yield running
        assert running.lines() == []
        eventually(lambda: running.ingest(content=BODY).status_code == 200)


@pytest.fixture(autouse=True)
def _nothing_is_written_and_good_clients_are_served(gateway: RunningGateway) -> Iterator[None]:
    """After each of these the log is as it was, and a good request is answered."""
    before = len(gateway.lines())
    yield
    assert len(gateway.lines()) == before
    assert gateway.ingest(content=BODY).status_code == 200


def request(gateway: RunningGateway, *headers: str, body: bytes = BODY, length: int | None = None) -> bytes:
    """A request to ingest, as bytes, with a good token; a length of -1 leaves the Content-Length out."""
    lines = ["POST /v1/events/ingest HTTP/1.1", "host: x", f"authorization: Bearer {gateway.secret}", *headers]
    if length != -1:
        lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def statuses(answer: bytes) -> list[int]:
    """Every status in what was received."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def exchange(gateway: RunningGateway, data: bytes) -> list[int]:
    """The statuses that bytes are answered with until the gateway closes the connection."""
    with gateway.connect() as connection:
        with contextlib.suppress(ConnectionError):  # cut while it was sent: there may be an answer all the same
            connection.sendall(data)
        return statuses(receive_all(connection))


def cut(connection: socket.socket, data: bytes) -> bool:
    """Send, and say whether the other side has had enough."""
    try:
        connection.sendall(data)
    except ConnectionError:
        return True
    return False


CLOSE = "connection: close"
CHUNKED = "transfer-encoding: chunked"
LIVEZ = f"GET /livez HTTP/1.1\r\nhost: x\r\n{CLOSE}\r\n\r\n".encode()

# name | headers, body, length | statuses
FRAMINGS: list[tuple[str, list[str], bytes, int | None, list[int]]] = [
    ("both lengths", [CHUNKED], BODY, None, [400]),
    ("both lengths, hidden request", [CHUNKED], b"0\r\n\r\nGET /livez HTTP/1.1\r\nhost: x\r\n\r\n", None, [400]),
    ("chunked", [CHUNKED], b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), -1, [411]),
    ("chunk extension", [CHUNKED], b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(BODY), b"a" * 30_000, BODY), -1, [411]),
    ("unknown coding", ["transfer-encoding: gzip, chunked"], b"0\r\n\r\n", -1, [411]),
    ("two lengths", ["content-length: 1"], BODY, None, [400]),
    ("the same length twice", [f"content-length: {len(BODY)}"], BODY, None, [400]),
    ("no length", [], b"", -1, [411]),
    ("negative length", [], BODY, -5, [400]),
    ("length of words", ["content-length: many"], BODY, -1, [400]),
    ("length beyond 64 bits", ["content-length: 99999999999999999999"], BODY, -1, [400]),
    ("length over the limit", [], b"", 1_000_001, [413]),
    ("two tokens", ["authorization: x"], BODY, None, [400]),
    ("two hosts", ["host: y"], BODY, None, [400]),
    ("CR in a header", ["x: a\rb"], BODY, None, [400]),
    ("NUL in a header", ["x: a\0b"], BODY, None, [400]),
    ("space before the colon", ["x : a"], BODY, None, [400]),
    ("folded header", ["x: a", "  b"], BODY, None, [400]),
]


@pytest.mark.parametrize(("headers", "body", "length", "expected"), [row[1:] for row in FRAMINGS],
                         ids=[row[0] for row in FRAMINGS])  # fmt: skip
def test_a_request_that_can_be_read_in_two_ways_is_refused(
    gateway: RunningGateway, headers: list[str], body: bytes, length: int | None, expected: list[int]
) -> None:
    """One answer, no 2xx, and nothing after it is taken for a second request."""
    assert exchange(gateway, request(gateway, CLOSE, *headers, body=body, length=length)) == expected


def test_an_endless_chunk_extension_is_not_read(gateway: RunningGateway) -> None:
    """411 at the head, and the connection is closed: how much of the answer arrives is the network's affair."""
    body = b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(BODY), b"a" * 3_000_000, BODY)
    assert exchange(gateway, request(gateway, CHUNKED, body=body, length=-1)) in ([411], [])


def test_a_read_of_two_tokens_is_refused(gateway: RunningGateway) -> None:
    """Or the gateway would count it for one of them, and the query API answer it for the other."""
    for line in ("authorization: x", "host: y"):
        data = request(gateway, line, length=-1, body=b"").replace(b"POST /v1/events/ingest", b"GET /v1/meters/")
        assert exchange(gateway, data) == [400]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /livez\r\n\r\n",
        b"GET /livez HTTP/0.9\r\nhost: x\r\n\r\n",
        b"GET /livez HTTP/2.0\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /livez HTTP/1.1\nhost: x\n\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET livez HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0" * 1000,
    ],
)
def test_what_is_no_http_1_1_is_a_bad_request(gateway: RunningGateway, data: bytes) -> None:
    """Other versions, bare line feeds, no Host, no path, TLS: 400 or the connection is closed."""
    assert exchange(gateway, data) in ([400], [])


def test_a_token_with_a_line_break_is_no_token(gateway: RunningGateway) -> None:
    """What would smuggle a header is refused by the parser, or ends the token."""
    head = f"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\n{CLOSE}\r\nauthorization: Bearer {gateway.secret}"
    smuggled = f"{head}\n\rx: y\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY
    split = f"{head[:-4]}\r\nx: {head[-4:]}\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY
    assert exchange(gateway, smuggled) == [400]
    assert exchange(gateway, split) == [401]


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_head_of_a_megabyte_is_cut(gateway: RunningGateway, pieces: int) -> None:
    """431 or a closed connection, whether it comes at once or bit by bit."""
    filler = b"x: " + b"a" * (1_000_000 // pieces) + b"\r\n"
    with gateway.connect() as connection:
        try:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + filler * pieces + b"\r\n")
        except ConnectionError:
            return  # cut while it was sent
        assert statuses(receive_all(connection)) in ([431], [])


def test_a_head_just_over_the_limit_is_told_so(gateway: RunningGateway) -> None:
    """431 with a body that says how much is allowed."""
    with gateway.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n")
        answer = receive_all(connection)
    assert statuses(answer) == [431]
    assert str(HEAD_BYTES_MAX).encode() in answer


def test_a_target_of_a_megabyte_is_cut(gateway: RunningGateway) -> None:
    """A long path is a long head."""
    assert exchange(gateway, b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n") in ([431], [])


# ---- slowness


def test_a_slow_body_is_given_up(impatient: RunningGateway) -> None:
    """A Content-Length that promises more than comes is 408, and the connection is closed."""
    with impatient.connect() as connection:
        connection.sendall(request(impatient, body=BODY, length=len(BODY) + 1))
        assert statuses(receive_all(connection)) == [408]


def test_a_client_that_hangs_up_in_its_body_is_nobody(gateway: RunningGateway) -> None:
    """Half a body is no request; the bytes held are given back."""
    with gateway.connect() as connection:
        connection.sendall(request(gateway, body=BODY[:20], length=len(BODY)))
        eventually(lambda: gateway.gateway.endpoint.in_flight.bytes == 20)
    eventually(lambda: gateway.gateway.endpoint.in_flight.bytes == 0)


def test_more_than_the_promised_body_is_no_part_of_it(gateway: RunningGateway) -> None:
    """A Content-Length that promises too little cuts the JSON short (422); what follows is no request."""
    assert exchange(gateway, request(gateway, body=BODY, length=10)) == [422]



def test_a_refused_body_may_not_trickle_for_ever(impatient: RunningGateway) -> None:
    """Who was answered before the body came (401) has to be done with it soon."""
    with impatient.connect() as connection:
        connection.sendall(b"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n")
        assert statuses(connection.recv(65536)) == [401]
        eventually(lambda: cut(connection, b"x"))


def test_a_refused_body_is_thrown_away_and_the_connection_goes_on(gateway: RunningGateway) -> None:
    """A 401 for a large body that does come leaves a connection in order."""
    body = b"x" * 500_000
    refused = b"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert exchange(gateway, refused + body + LIVEZ) == [401, 200]


@pytest.mark.parametrize("unusual", [[], ["origin: x"]], ids=["short way", "ASGI"])
def test_a_client_that_is_silent_after_a_refusal_is_let_go(unusual: list[str]) -> None:
    """Silence ends a connection, be it that the body came with its head or only after the refusal (401)."""
    with RunningGateway(idle_deadline_s=1) as gateway, gateway.connect() as at_once, gateway.connect() as after:
        head = request(gateway, *unusual, body=b"", length=len(BODY)).replace(b"Bearer ", b"Bearer not ")
        at_once.sendall(head + BODY)
        after.sendall(head)
        assert statuses(after.recv(65536)) == [401]
        after.sendall(BODY)
        assert statuses(receive_all(at_once)) == [401]
        assert statuses(receive_all(after)) == []


def test_two_hundred_slow_clients_do_not_stand_in_the_way() -> None:
    """Half heads, half bodies and silence: good clients are answered meanwhile, and the slow ones are cut in time."""
    with RunningGateway(head_deadline_s=1.0, body_deadline_s=1.0) as gateway, contextlib.ExitStack() as slow:
        half_body = request(gateway, body=BODY[:10], length=len(BODY))
        openings = [b"", b"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\n", half_body]
        connections = [slow.enter_context(gateway.connect()) for _ in range(200)]
        for number, connection in enumerate(connections):
            connection.sendall(openings[number % len(openings)])
        assert gateway.client.get("/livez").status_code == 200
        assert gateway.client.get("/readyz").status_code == 200
        assert {tuple(statuses(receive_all(connection))) for connection in connections} == {(408,)}
        assert gateway.lines() == []


def test_a_client_that_does_not_read_is_cut() -> None:
    """Answers that pile up unread end the connection instead of filling memory."""
    with RunningGateway(write_deadline_s=0.5) as gateway, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gateway.port))
        connection.settimeout(PATIENCE_S)
        echoed = request(gateway, body=b'["%s"]' % (b"x" * 16_000)) * 100
        eventually(lambda: cut(connection, echoed))


@contextlib.contextmanager
def unread(gateway: RunningGateway) -> Iterator[tuple[socket.socket, Any]]:
    """A client with little room for answers, and the gateway's end of its connection."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(1)
        connection.connect(("127.0.0.1", gateway.port))
        connections = gateway.server.server_state.connections
        yield connection, eventually(lambda: next(iter(connections), None))


def test_refusals_that_nobody_reads_are_not_held() -> None:
    """Heads without a token, as many as go: the gateway reads no further, or cuts, before it holds a megabyte."""
    heads = b"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" * 1000
    held = 0
    with RunningGateway() as gateway, unread(gateway) as (connection, there):
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(100):
                connection.sendall(heads)
                held = max(held, there.transport.get_write_buffer_size())
        eventually(lambda: there.flow.write_paused or there.transport.is_closing())
        held = max(held, there.transport.get_write_buffer_size())
    assert held < MEBIBYTE


def test_answers_that_nobody_reads_are_waited_with(caplog: pytest.LogCaptureFixture) -> None:
    """One request after another, each with a large answer: once those are stuck the next one waits, and is no error
    when the client has gone."""
    with RunningGateway() as gateway, unread(gateway) as (connection, there):
        echoed = request(gateway, body=b'["%s"]' % (b"x" * 16_000))

        def ask() -> int:
            before = there.cycle
            connection.sendall(echoed)
            eventually(lambda: there.cycle is not before)
            eventually(lambda: there.cycle.response_complete or not isinstance(there.cycle, Exchange))
            return int(there.server_state.total_requests)

        eventually(lambda: ask() and there.flow.write_paused)
        assert ask() == ask()
        eventually(lambda: there.flow.read_paused)
        assert there.transport.get_write_buffer_size() < MEBIBYTE
        connection.close()
        eventually(lambda: not there.server_state.connections and not there.tasks)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_connection_is_not_closing_for_ever() -> None:
    """A little that nobody reads, too little to hold anything up, does not keep a silent client's connection."""
    with RunningGateway(idle_deadline_s=1, write_deadline_s=0.5) as gateway:
        echoed = request(gateway, body=b'["%s"]' % (b"x" * 16_000))
        state = gateway.server.server_state

        def left_unread() -> int:
            with unread(gateway) as (connection, there):
                def ask() -> int:
                    before = state.total_requests
                    cut(connection, echoed)
                    eventually(lambda: state.total_requests > before or there.transport.is_closing())
                    return -1 if there.transport.is_closing() else int(there.transport.get_write_buffer_size())

                held: int = eventually(ask)
                eventually(lambda: not state.connections)
            return max(held, 0)  # none where it was silent for too long before: the next connection may be quicker

        assert 0 < eventually(left_unread) < HIGH_WATER_LIMIT


def test_connections_have_a_limit() -> None:
    """One too many is told to come back; the others go on."""
    with RunningGateway(connections_max=3) as gateway:
        others = [socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE_S) for _ in range(3)]
        try:
            for connection in others:
                connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
                assert statuses(connection.recv(65536)) == [200]
            with gateway.connect() as connection:
                answer = receive_all(connection)
            assert statuses(answer) == [503]
            assert b"retry-after: " in answer
        finally:
            for connection in others:
                connection.close()


# ---- other protocols, and requests ahead


def test_a_client_that_asks_for_another_protocol_is_served_in_this_one(gateway: RunningGateway) -> None:
    """Java's client offers h2c with every request; it gets HTTP/1.1."""
    with RunningGateway() as other, other.connect() as connection:
        upgrade = ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAARAAAAAAAIAAAAA"]
        connection.sendall(request(other, *upgrade))
        assert statuses(connection.recv(65536)) == [200]


OFFERS = ["upgrade: foo", "upgrade: foo, h2c", "upgrade: websocket", "upgrade: TLS/1.2"]
SMUGGLED = b"GET /v1/meters/?smuggled=1 HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("line", ["POST /v1/events/ingest", "POST /v1/meters/", "GET /v1/meters/"])
def test_a_body_behind_an_offer_of_another_protocol_is_no_request(
    gateway: RunningGateway, offer: str, line: str
) -> None:
    """The parser does not read it as a body: 400 and closed, wherever it begins."""
    whole = request(gateway, "connection: Upgrade", offer, body=SMUGGLED)
    whole = whole.replace(b"POST /v1/events/ingest", line.encode())
    head = whole.removesuffix(SMUGGLED)
    assert exchange(gateway, whole) == [400]
    with gateway.connect() as connection:
        connection.sendall(head)
        answered = receive_all(connection)
        cut(connection, SMUGGLED)
        assert statuses(answered + receive_all(connection)) == [400]


def test_what_follows_an_offer_of_another_protocol_is_no_request(gateway: RunningGateway) -> None:
    """An offer without a body is declined: one answer, and the connection ends, since the parser lost what follows."""
    offer = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
    assert exchange(gateway, offer + request(gateway, body=b"", length=len(SMUGGLED)) + SMUGGLED) == [200]
    empty = request(gateway, "connection: Upgrade", "upgrade: websocket", body=b"")
    assert exchange(gateway, empty + LIVEZ) == [422]


def test_pipelined_requests_are_answered_in_order(gateway: RunningGateway) -> None:
    """Good, bad, good on one connection."""
    bad = request(gateway, body=b"{")
    assert exchange(gateway, LIVEZ.replace(CLOSE.encode(), b"x: y") + bad + LIVEZ) == [200, 422, 200]


@pytest.mark.parametrize("ahead", ["livez", "ingest"])
def test_requests_without_end_are_not_held(gateway: RunningGateway, ahead: str) -> None:
    """A client may send some requests ahead; one that sends far more than it is answered is cut off."""
    one = LIVEZ.replace(CLOSE.encode(), b"x: y") if ahead == "livez" else request(gateway, body=b'{"events":[]}')
    with gateway.connect() as connection:
        connection.sendall(one * PIPELINED_MAX)
        received = b""
        while len(statuses(received)) < PIPELINED_MAX:
            received += connection.recv(65536)
        many = 100 * PIPELINED_MAX
        assert cut(connection, one * many) or len(statuses(receive_all(connection))) < many
