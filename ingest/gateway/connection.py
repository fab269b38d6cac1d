"""One HTTP/1.1 connection: uvicorn's protocol with deadlines, header limits and a fast path for ingestion.

``GatewayProtocol`` limits request heads, answers what is not HTTP/1.1, and notes since when a client is late, for the
sweep of ``ingest.gateway.server``. It sends a request one of three ways:

* an ordinary POST of events: an ``Exchange``, which collects the body, calls the endpoint once and writes the answer
  at once;
* an ordinary read: ``ingest.gateway.proxy.Relay``;
* any other request: ASGI (``ingest.gateway.app``).

The fast paths exist because the scope, task and messages of an ASGI request cost as much as checking fifty events.
All ways end in the same endpoint, with the same answers.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ingest import metrics, responses
from ingest.admission.batching import Opened
from ingest.gateway.app import IngestEndpoint
from ingest.gateway.header_cache import KnownHead, known_head, ordinary_headers
from ingest.gateway.proxy import Relay
from ingest.limits import CONNECTIONS_MAX, HEAD_BYTES_MAX, PIPELINED_MAX
from ingest.responses import Answer

# The fast path. It takes a POST of events that has a length and nothing unusual in its head. Other requests, and
# those of clients that leave answers unread, take the ASGI path, which waits where it must.
#
# To uvicorn an exchange is the connection's request cycle: uvicorn asks it whether the answer is complete before it
# starts the next request, and whether to keep the connection. A request that arrives before the answer waits in
# uvicorn's queue.

URLS = frozenset({b"/v1/events/ingest", b"/v1/events/ingest/"})

HeaderList = list[tuple[bytes, bytes]]


def ordinary(method: bytes, url: bytes, headers: HeaderList) -> dict[bytes, bytes] | None:
    """The headers of an ordinary ingest request by name; None for any other request."""
    if url not in URLS or method != b"POST":
        return None
    by_name = ordinary_headers(headers)
    return by_name if by_name is not None and b"content-length" in by_name else None


class _Nobody:
    """Stands where uvicorn wakes a task; an exchange has none that waits for its body."""

    def set(self) -> None:
        """Wake nobody."""


class _Last:
    """The bytes of the answer that was written last: requests that were taken together hear the same, in a row."""

    def __init__(self) -> None:
        self._last: tuple[Answer | None, HeaderList, bool, bytes] = (None, [], False, b"")

    def written(self, found: Answer, default_headers: HeaderList, keep: bool) -> bytes:
        """See ``answers.written``. The server makes other default headers each second."""
        answer, headers, kept, data = self._last
        if answer is not found or headers is not default_headers or kept is not keep:
            data = responses.written(found, default_headers, keep=keep)
            self._last = found, default_headers, keep, data
        return data


_last = _Last()


class ExchangeConnection(Protocol):
    """The client's connection, as an exchange uses it."""

    def write_answer(self, data: bytes, *, keep_alive: bool) -> None:
        """Send the bytes of a whole answer, and close the connection unless it is kept alive."""
        ...

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        ...


class Exchange:
    """One request and its answer."""

    message_event = _Nobody()

    def __init__(
        self, endpoint: IngestEndpoint, connection: ExchangeConnection, default_headers: HeaderList, *, keep_alive: bool
    ) -> None:
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self._endpoint, self._connection = endpoint, connection
        self._default_headers = default_headers
        self._pieces: list[bytes] = []
        self._held = 0
        self._opened: Opened | None = None

    def begin(self, headers: dict[bytes, bytes], length: int, before: Opened | None = None) -> Opened | None:
        """The head is whole, and announces a body of so many bytes; it may be refused without it.

        ``before`` is what an earlier request with the same head got from here: None where it was refused.
        """
        endpoint = self._endpoint
        opened = endpoint.open_again(before, headers, length) if before else endpoint.open(headers, length)
        if isinstance(opened, Answer):
            self.answer(opened)
        else:
            self._opened = opened
        return self._opened

    def add(self, piece: bytes) -> None:
        """Another piece of the body."""
        if self.response_complete:
            return
        if not self._endpoint.in_flight.take(len(piece)):
            self.answer(responses.busy())
            return
        self._held += len(piece)
        self._pieces.append(piece)

    def complete(self) -> None:
        """The body is whole: ask the endpoint, unless there is an answer already."""
        if self.response_complete or self._opened is None:
            return
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        self._endpoint.intake.take(self._opened, body, self.answer)

    def abandon(self) -> None:
        """The client is gone before its body was whole."""
        self.disconnected = True
        self._give_back()

    def answer(self, found: Answer) -> None:
        """Send the whole answer, once, and let go of the body."""
        self._give_back()
        self.response_complete = True
        metrics.count_request(found.status)
        if self.disconnected:
            return
        keep = self.keep_alive and responses.CLOSE not in found.headers
        self._connection.write_answer(_last.written(found, self._default_headers, keep), keep_alive=keep)
        self._connection.on_response_complete()

    def _give_back(self) -> None:
        self._endpoint.in_flight.give_back(self._held)
        self._held = 0
        self._pieces = []


# The protocol. uvicorn alone waits for headers without a time limit, of any size, and accepts HTTP/0.9. A request
# with a long head, or of another version, is answered and cut here.

KNOWN_TIMES_MAX = 8  # heads of a connection that are remembered: a client whose heads differ gains nothing
OFFER_BYTES = 4096  # of a head are searched for an offer of HTTP/2
# Java's client offers HTTP/2 on every first request. The parser would stop at the offer, before the body. A server
# may decline an offer, so it is hidden from the parser.
_H2C_OFFER = re.compile(rb"^((?:[^\r\n]+\r\n)+)upgrade:[ \t]*h2c(?=\r\n)", re.IGNORECASE)
REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class GatewayProtocol(HttpToolsProtocol):
    """See the module."""

    connections_max = CONNECTIONS_MAX  # GatewayServer sets both in a class of its own
    endpoint: IngestEndpoint
    relay: Relay

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head, or send the client away."""
        self.head_since_s: float | None = self.loop.time()  # None while no head is awaited
        self.head_bytes = 0
        self.in_message = False  # between the end of a head and the end of its body
        self.unread_since_s: float | None = None  # a body still arrives though its request is answered
        self.blocked_since_s: float | None = None  # the client does not read
        self.idle_since_s: float | None = None  # every request is answered, and none has begun since
        self.exchange: Exchange | None = None  # the message under way, if it is an ordinary ingest request
        self.answering: Exchange | RequestResponseCycle | None = None  # the one whose turn it is, or was last
        self.body_since_s: float | None = None  # its body still arrives
        self.known: KnownHead | None = None  # the head of an ordinary ingest request, of the last that was remembered
        self.known_opened: Opened | None = None  # what the last request with that head might send, if anything
        self.known_times_left = KNOWN_TIMES_MAX
        self.body_left = 0  # bytes of a body behind a known head, which the parser does not see
        self.piece = b""  # of data that begins with a message, until the parser had its head
        self.ending = False  # nothing more is read: the answer that is under way is the last
        super().connection_made(transport)
        if len(self.connections) > self.connections_max:
            self.cut("connections", responses.unavailable("Busy", "Too many connections.", 1))

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and measure what it holds of an unfinished head; it need not see a known one."""
        if self.ending:
            return
        if self.body_left:
            self._go_on(data)
            return
        if self.head_since_s is None and not self.in_message:
            if self.known is not None and self._begin_known(self.known, data):
                return
            self.piece = data
            self.head_since_s = self.loop.time()
            self.head_bytes = 0
        self.head_bytes += len(data)
        if self.head_since_s is not None and b"h2c" in data[:OFFER_BYTES]:
            data = _H2C_OFFER.sub(rb"\1x-declined: h2c", data, count=1)
        super().data_received(data)
        self.piece = b""
        if self.head_since_s is not None and self.head_bytes > HEAD_BYTES_MAX:
            self.cut("head", _long_head())

    def on_message_begin(self) -> None:
        """A head begins, maybe behind a body in the same piece: from here on it is awaited, and the parser's alone."""
        super().on_message_begin()
        if self.head_since_s is None:
            self.head_since_s, self.head_bytes = self.loop.time(), 0

    def on_headers_complete(self) -> None:
        """A head is whole: measure it once more, since it may have come in one piece."""
        self.head_since_s = None
        self.in_message = True
        head_bytes = len(self.url) + sum([len(name) + len(value) for name, value in self.headers])
        if head_bytes > HEAD_BYTES_MAX:
            self.cut("head", _long_head())
        elif self.parser.get_http_version() not in ("1.1", "1.0"):
            self.cut("head", responses.bad_request("HTTP/1.1 is spoken here."))
        elif self.parser.should_upgrade() and _has_body(self.headers):  # which the parser would take for a request
            self.cut("head", responses.bad_request("A request with a body cannot offer another protocol (Upgrade)."))
        elif len(self.pipeline) >= PIPELINED_MAX:
            self.cut("pipeline")
        if not self._is_over() and not self._begin_exchange():
            super().on_headers_complete()
        self.piece = b""

    def _begin_known(self, known: KnownHead, data: bytes) -> bool:
        """Begin a request without the parser, if its head is the known one; False leaves the data to the parser."""
        found = known.find(data)
        if found is None or len(data) - found[1] > found[0] or not found[0]:  # another request may follow
            return False
        if self.blocked_since_s is not None or self.pipeline or self.transport.is_closing():
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        self.body_left, begin = found
        self.in_message = True
        self._unset_keepalive_if_required()
        self._begin(known.headers, self.body_left, keep_alive=True)
        if len(data) > begin:
            self._go_on(data[begin:])
        return True

    def _go_on(self, data: bytes) -> None:
        """More of a body behind a known head, and what follows it."""
        self._unset_keepalive_if_required()  # the request may be refused, and so answered, already
        mine, rest = (data, b"") if len(data) <= self.body_left else (data[: self.body_left], data[self.body_left :])
        self.body_left -= len(mine)
        self.on_body(mine)
        if not self.body_left:
            self.on_message_complete()
        if rest and not self._is_over():
            self.data_received(rest)

    def _begin_exchange(self) -> bool:
        """Take the short way if the request is an ordinary one, the first in line, and the client reads its answers."""
        self.exchange = None
        if self.idle_since_s is not None:  # the request before was answered within this piece of data
            self._unset_keepalive_if_required()
            return False  # thousands of refusals may fit into a piece, and are written only after it
        if self.blocked_since_s is not None:  # the ASGI way waits with its answer, and holds what follows
            return False
        headers = ordinary(self.parser.get_method(), self.url, self.headers)
        if headers is None or self.parser.get_http_version() != "1.1":
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        keep_alive = self.parser.should_keep_alive()
        if self.piece and keep_alive and self.known_times_left:
            self.known_times_left -= 1
            self.known, self.known_opened = known_head(self.piece, headers), None
        self._begin(headers, int(headers[b"content-length"]), keep_alive=keep_alive)
        return True

    def _begin(self, headers: dict[bytes, bytes], length: int, *, keep_alive: bool) -> None:
        self.body_since_s = self.loop.time()
        default_headers = self.server_state.default_headers
        self.exchange = exchange = Exchange(self.endpoint, self, default_headers, keep_alive=keep_alive)
        self.cycle = self.answering = exchange  # type: ignore[assignment]
        if self.known is not None and headers is self.known.headers:
            self.known_opened = exchange.begin(headers, length, self.known_opened)
        else:
            exchange.begin(headers, length)

    def _unsupported_upgrade_warning(self) -> None:
        """What came behind an offer without a body is lost, so what follows may be the middle of a request."""
        if not self.transport.is_closing():
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.answering = cycle
        if self.blocked_since_s is not None or not self.relay.take(cycle, self):
            super()._start_asgi_task(cycle, app)

    def start_asgi(self, cycle: RequestResponseCycle) -> None:
        """Serve a request through the ASGI application after all."""
        super()._start_asgi_task(cycle, self.app)

    def write_answer(self, data: bytes, *, keep_alive: bool) -> None:
        """Send the bytes of a whole answer, and close the connection unless it is kept alive."""
        self.transport.write(data)
        if not keep_alive:
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        """Bytes of a body, unless the request was cut."""
        if self._is_over():
            return
        if self.exchange is not None:
            self.exchange.add(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a body, unless the request was cut."""
        self.in_message = False
        self.unread_since_s = None
        if self._is_over():
            return  # a body that was held is let go of when the connection is lost
        self.body_since_s = None
        if self.cycle.response_complete:
            self._await_next()
        elif self.exchange is None:
            super().on_message_complete()
        else:
            self.exchange.complete()

    def _await_next(self) -> None:
        """Begin to wait for the next request, unless that has begun already."""
        if self.idle_since_s is None:
            self.idle_since_s = self.loop.time()

    def _unset_keepalive_if_required(self) -> None:
        """Something came. A timer for each request would cost more than the sweep's look at when that was."""
        self.idle_since_s = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: let go of a body that will not become whole."""
        if self.exchange is not None and self.body_since_s is not None:
            self.exchange.abandon()
        if self.answering is not None:  # uvicorn tells the last request in line only
            self.answering.disconnected = True
        super().connection_lost(exc)

    def body_late(self) -> None:
        """A body took too long: answer, and close."""
        self.body_since_s = None
        if self.exchange is not None and not self.exchange.response_complete:
            self.exchange.answer(responses.timed_out())

    def on_response_complete(self) -> None:
        """An answer was sent; what is left of the body has to come soon, and is thrown away."""
        self.server_state.total_requests += 1
        if self.in_message:
            self.unread_since_s = self.loop.time()
        if self.transport.is_closing():
            return
        self.idle_since_s = None
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._await_next()
        if self.pipeline:  # a client that sends on all the same, faster than it is answered
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to bytes that are no HTTP."""
        self.cut("head", responses.bad_request("This is no HTTP/1.1 request."))

    def pause_writing(self) -> None:
        """The client does not read its answer."""
        self.blocked_since_s = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self.blocked_since_s = None
        super().resume_writing()

    def abandon(self) -> None:
        """End the connection with what the client leaves unread."""
        metrics.CONNECTIONS_CUT.labels("unread").inc()
        self.transport.abort()

    def cut(self, reason: str, answer: Answer | None = None) -> None:
        """Close the connection, with an answer unless another one is under way."""
        if self.transport.is_closing():
            return
        metrics.CONNECTIONS_CUT.labels(reason).inc()
        if answer is not None and self._has_whole_request():  # it may be in the log: its sender has to hear of it
            self.head_since_s, self.ending = None, True
            self.answering.keep_alive = False  # type: ignore[union-attr]
            self.pipeline.clear()
            return
        if answer is None or (self.cycle is not None and not self.cycle.response_complete):
            self.transport.abort()
            return
        others = [header for header in answer.headers if header != responses.CLOSE]
        headers = (*others, responses.CLOSE, (b"content-length", b"%d" % len(answer.body)))
        head = b"HTTP/1.1 %d %s\r\n" % (answer.status, REASONS[answer.status])
        self.transport.write(head + b"".join([b"%s: %s\r\n" % header for header in headers]) + b"\r\n" + answer.body)
        self.transport.close()

    def _has_whole_request(self) -> bool:
        """Whether a request that came whole waits for its answer; what is queued behind it has not begun."""
        answering = self.answering
        if answering is None or answering.response_complete:
            return False
        return self.body_since_s is None if isinstance(answering, Exchange) else not answering.more_body

    def _is_over(self) -> bool:
        return self.ending or self.transport.is_closing()


def _has_body(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


def _long_head() -> Answer:
    return responses.problem(431, "RequestHeaderFieldsTooLarge", f"A head may have {HEAD_BYTES_MAX} bytes.")
