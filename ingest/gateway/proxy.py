"""The proxy to the query API: pooled connections, streaming, and a fast relay for reads.

``Upstream`` keeps connections to the query API in the aggregator, over a unix socket or an http(s) address. It sends
a whole request, so that a slow client occupies the gateway and not the aggregator, and streams the answer. ``Relay``
forwards ordinary reads (``meters.fast_paths``) without ASGI: one write to the query API, one write to the client.

While the aggregator is away the answer is 503 with Retry-After: reads wait, ingestion goes on. The HTTP client is
made for this one hop (no redirects, no cookies, no decoding); ``benchmarks/passthrough.py`` shows what a general
client costs.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Protocol, cast
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ingest import metrics, responses
from ingest.gateway.header_cache import ordinary_headers
from ingest.limits import (
    PASSTHROUGH_ANSWER_DEADLINE_S,
    PASSTHROUGH_CONNECTIONS_MAX,
    PASSTHROUGH_CONNECTIONS_OF_ONE_MAX,
    PASSTHROUGH_IDLE_DEADLINE_S,
    RELAYED_MAX,
)
from ingest.responses import WITH_BODY, Answer, Headers, Message, Send, send_answer
from meters.fast_paths import FAST_PATHS

# Connections to the query API, and requests passed on through ASGI.

HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"expect",
})  # fmt: skip
FRAMING = frozenset({b"host", b"content-length"})  # whatever a client's `Connection` says, these belong to the message
NOT_PASSED_BACK = HOP_BY_HOP | {b"date", b"server"}  # the gateway's own server says these

PORTS = {"http": 80, "https": 443}  # of an address that names none
CONNECT_DEADLINE_S = 1.0  # a local socket answers in microseconds or not at all, TLS in three round trips
IDLE_S = 2.0  # kept connections are used within this, well before the other side lets go of them (5 s)
BUFFER_BYTES = 256 * 1024  # of an answer held for a client that reads more slowly than the API writes
SLOT_S_MAX = 10.0  # a question waits in line for a slot; behind so many slow ones it may as well come again
RETRY_AFTER_S = 1  # an aggregator restarts in about a second

logger = logging.getLogger("ingest.passthrough")


class ViewUnavailable(Exception):
    """The query API cannot be reached, or broke off before it answered."""


class Crowded(Exception):
    """So many requests are at the query API that this one did not get there."""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection to the query API, one request at a time.

    What arrives is parsed and kept at once; whoever waits is woken once for all that came together. Most answers come
    in one piece, so most requests wait once.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.idle_since_s = 0.0
        self.closed = False
        self.reusable = False  # whether the next request may use this connection
        self.asked = False  # whether an answer is awaited, or comes
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._tell: Callable[[], None] | None = None
        self._writable = True
        self.begin()

    def begin(self) -> None:
        """Forget the last answer."""
        self.status = 0  # until the head is whole
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = self.reusable = self.asked = False
        self._chunks: list[bytes] = []
        self._buffered = 0

    async def ask(self, request: bytes) -> None:
        """Send the request and wait for the answer's head. Raises ViewUnavailable, TimeoutError."""
        self.asked = True
        self.transport.write(request)
        while not (self._writable or self.closed):
            await self._news(PASSTHROUGH_IDLE_DEADLINE_S)
        while not (self.status or self.closed):
            await self._news(PASSTHROUGH_ANSWER_DEADLINE_S)
        if not self.status:
            raise ViewUnavailable

    def ask_and_tell(self, request: bytes, tell: Callable[[], None]) -> None:
        """Send the request, and call whenever something arrives or the connection is lost."""
        self.asked, self._tell = True, tell
        self.transport.write(request)

    def forget_to_tell(self) -> None:
        """Call nobody any more."""
        self._tell = None

    @property
    def settled(self) -> bool:
        """Whether the answer is whole, or will not be soon: it is broken off, or so long that it waits for a reader."""
        return self.complete or self.closed or self._buffered > BUFFER_BYTES

    def body(self) -> bytes:
        """What has arrived of the body, and was not taken."""
        arrived, self._chunks, self._buffered = self._chunks, [], 0
        return arrived[0] if len(arrived) == 1 else b"".join(arrived)

    async def piece(self) -> bytes:
        """What has arrived of the body, at least a byte unless it is complete. Raises ViewUnavailable, TimeoutError."""
        while not (self._chunks or self.complete):
            if self.closed:
                raise ViewUnavailable
            await self._news(PASSTHROUGH_IDLE_DEADLINE_S)
        arrived = self.body()
        if not self.complete and not self.closed:
            self.transport.resume_reading()
        return arrived

    def close(self) -> None:
        """Let go of the socket."""
        self.closed = True
        self.transport.abort()

    async def _news(self, deadline_s: float) -> None:
        """Wait until something happens here. Raises TimeoutError."""
        waiter = self._waiter = self._loop.create_future()
        timer = self._loop.call_later(deadline_s, _expire, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._tell is not None:
            self._tell()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer; of none that was asked for, and the connection is closed."""
        if self.complete or not self.asked:  # nobody asked for it, so nobody may ever take it for an answer
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
        if self._buffered > BUFFER_BYTES and not self.complete:
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The query API, or this side, let go."""
        self.closed = True
        self._wake()

    def pause_writing(self) -> None:
        """The query API reads more slowly than the request is written."""
        self._writable = False

    def resume_writing(self) -> None:
        """It has caught up."""
        self._writable = True
        self._wake()

    # the parser calls these

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Some of its body."""
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        """It is whole."""
        self.complete = True
        self.reusable = bool(self._parser.should_keep_alive())


def _expire(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class _Slots:
    """So many questions are asked at once, and so many by one asker; more wait for their turn."""

    def __init__(self) -> None:
        self.all = asyncio.Semaphore(PASSTHROUGH_CONNECTIONS_MAX)
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def one_of(self, asker: str) -> AsyncIterator[None]:
        """Hold one, of the asker's own first. Raises Crowded after SLOT_S_MAX."""
        own = self._own.setdefault(asker, asyncio.Semaphore(PASSTHROUGH_CONNECTIONS_OF_ONE_MAX))
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(SLOT_S_MAX):
                    await held.enter_async_context(own)
                    await held.enter_async_context(self.all)
            except TimeoutError as error:
                raise Crowded from error
            yield


class Upstream:
    """The query API at ``unix:PATH`` or ``http[s]://HOST:PORT``, with the connections kept to it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.startswith("https:") else None
        self._is_distrust_said = False
        self._idle: list[Connection] = []
        self._slots = _Slots()

    async def pass_on(self, scope: Message, path: bytes, body: bytes, send: Send, asker: str = "") -> int:
        """Ask for ``path`` what the request of the asker asks, and send back the answer; its status.

        An answer that breaks off or falls silent in the middle is left unfinished, and the server cuts the connection:
        half an answer is never taken for a whole one.
        """
        try:
            async with self._slots.one_of(asker):
                return await self._pass_on(scope, path, body, send)
        except Crowded:
            return await send_answer(send, _crowded())

    async def _pass_on(self, scope: Message, path: bytes, body: bytes, send: Send) -> int:
        try:
            connection = await self._ask(scope["method"], request_of(scope, path, body))
        except ViewUnavailable:
            return await send_answer(send, _away())
        except TimeoutError:
            return await send_answer(send, responses.no_answer())
        try:
            await _stream(connection, scope["method"], send)
            self.keep(connection, scope["method"])
        except (ViewUnavailable, TimeoutError):
            connection.close()
        except BaseException:
            connection.close()
            raise
        return connection.status

    async def get(self, path: str, deadline_s: float) -> bytes | None:
        """The body of a plain GET that was answered with 200 in time, else None."""
        try:
            async with asyncio.timeout(deadline_s):
                connection = await self._ask("GET", b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode())
                try:
                    body = b""
                    while not connection.complete:
                        body += await connection.piece()
                    body += await connection.piece()
                finally:
                    connection.close()
        except (ViewUnavailable, TimeoutError):
            return None
        return body if connection.status == 200 else None

    def close(self) -> None:
        """Let go of the kept connections."""
        while self._idle:
            self._idle.pop().close()

    async def _ask(self, method: str, request: bytes) -> Connection:
        """A connection on which the answer has begun. Raises ViewUnavailable, TimeoutError."""
        kept = self.kept()
        if kept is not None:
            try:
                return await _exchange(kept, request)
            except ViewUnavailable:
                # The other side may let go of a kept connection at any moment. A read can simply be asked again.
                if method not in ("GET", "HEAD"):
                    raise
        return await _exchange(await self._connect(), request)

    def kept(self) -> Connection | None:
        """A connection that an earlier request left behind; None where there is none."""
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and now_s - connection.idle_since_s < IDLE_S:
                connection.begin()
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection, method: str) -> None:
        """Leave the connection to another request, if its answer is whole and it may be used again."""
        if method != "HEAD" and connection.reusable and not connection.closed:
            connection.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        kind, _, path = self._address.partition(":")
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                if kind == "unix":
                    return (await loop.create_unix_connection(Connection, path))[1]
                parts = urlsplit(self._address)
                host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
                return (await loop.create_connection(Connection, host, port, ssl=self._tls))[1]
        except (OSError, TimeoutError) as error:
            if isinstance(error, ssl.SSLError):
                self._say_distrust(error)
            raise ViewUnavailable from error

    def _say_distrust(self, error: ssl.SSLError) -> None:
        """Log why TLS failed, once: it is a matter of settings, and reads come by the thousand."""
        if not self._is_distrust_said:
            self._is_distrust_said = True
            logger.warning(
                "no read is passed on: there is no TLS with %s (%s). An aggregator speaks http only; let a proxy "
                "before it speak https, with a certificate for this name that the system or SSL_CERT_FILE vouches for",
                self._address, error,
            )  # fmt: skip


def _away() -> Answer:
    detail = "The query API is not reachable just now. Events are accepted meanwhile."
    return responses.unavailable("ViewUnavailable", detail, RETRY_AFTER_S)


def _crowded() -> Answer:
    detail = "Too many requests are at the query API already. Events are accepted meanwhile."
    return responses.unavailable("TooManyQueries", detail, RETRY_AFTER_S)


def end_to_end(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes] = HOP_BY_HOP) -> Headers:
    """The headers that concern more than one connection, without those that are dropped anyway."""
    headers = tuple(headers)
    for name, value in headers:
        if name == b"connection":
            dropped |= {token.strip().lower() for token in value.split(b",")} - FRAMING
    return tuple([header for header in headers if header[0] not in dropped])


def request_of(scope: Mapping[str, Any], path: bytes, body: bytes) -> bytes:
    """The request to the query API, as bytes."""
    target = path + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    lines = [b"%s %s HTTP/1.1" % (scope["method"].encode(), target)]
    lines += [b"%s: %s" % header for header in end_to_end(scope["headers"], HOP_BY_HOP | {b"content-length"})]
    if body or scope["method"] in WITH_BODY:
        lines.append(b"content-length: %d" % len(body))  # of what follows here, whatever was said there
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def _exchange(connection: Connection, request: bytes) -> Connection:
    """Send the request and wait for the answer's head; the connection is closed if there is none."""
    try:
        await connection.ask(request)
    except BaseException:
        connection.close()
        raise
    return connection


async def _stream(connection: Connection, method: str, send: Send) -> None:
    """Send the answer on as it comes. The server cuts a client that does not read."""
    headers = end_to_end(connection.headers, NOT_PASSED_BACK)
    await send({"type": "http.response.start", "status": connection.status, "headers": headers})
    if method == "HEAD" or connection.status in (204, 304):
        await send({"type": "http.response.body", "body": b""})
        return
    more = True
    while more:
        more = not connection.complete
        await send({"type": "http.response.body", "body": await connection.piece(), "more_body": more})


# The relay. Applications read balances very often, and as an ASGI request such a read costs a task, a dozen
# coroutines and three messages.
#
# Only reads with nothing unusual in their heads are relayed, and only while few of them are out. On any outcome other
# than a complete, ordinary response, the request is retried through ASGI, which is safe for a read. Only the ASGI
# path decides how long to wait, what to answer when the API is away, how to stream, and how many requests an
# organization may have out or make in a minute. With a limit per minute, nothing is relayed.

_UNUSUAL = frozenset({b"content-length", b"prefer", b"log-position"})  # which have to be read, or waited for
_WITHOUT_BODY = frozenset({204, 304})


class RelayConnection(Protocol):
    """The client's connection, as a relayed read uses it."""

    def write_answer(self, data: bytes, *, keep_alive: bool) -> None:
        """Send the bytes of a whole answer, and close the connection unless it is kept alive."""
        ...

    def start_asgi(self, cycle: RequestResponseCycle) -> None:
        """Serve the request through the ASGI application."""
        ...


class Relay:
    """The reads of one gateway that are out at the query API."""

    def __init__(self, upstream: Upstream, *, is_open: bool) -> None:
        self._upstream = upstream
        self._is_open = is_open
        self._out = 0

    def take(self, cycle: RequestResponseCycle, client: RelayConnection) -> bool:
        """Relay the request and return True if it is an ordinary read; False leaves it to the caller."""
        if not self._is_open or self._out >= RELAYED_MAX or not _ordinary(cycle):
            return False
        upstream = self._upstream.kept()
        if upstream is None:
            return False
        self._out += 1
        read = _RelayedRead(self, cycle, client, upstream)
        upstream.ask_and_tell(request_of(cycle.scope, cycle.scope["raw_path"], b""), read.told)
        return True

    def give_back(self, upstream: Connection) -> None:
        """A read came back, with a whole answer or without."""
        self._out -= 1
        if upstream.complete:
            self._upstream.keep(upstream, "GET")
        else:
            upstream.close()


class _RelayedRead:
    """One read that is out."""

    def __init__(
        self, relay: Relay, cycle: RequestResponseCycle, client: RelayConnection, upstream: Connection
    ) -> None:
        self._relay, self._cycle, self._client, self._upstream = relay, cycle, client, upstream
        self._timer = asyncio.get_running_loop().call_later(PASSTHROUGH_ANSWER_DEADLINE_S, self._expire)

    def told(self) -> None:
        """Something happened on the connection to the query API."""
        upstream = self._upstream
        if not upstream.settled:
            return
        self._timer.cancel()
        found = Answer(upstream.status, upstream.body(), end_to_end(upstream.headers, _NOT_PASSED_BACK))
        is_whole = upstream.complete and found.status not in _WITHOUT_BODY
        self._give_back()
        if is_whole:
            self._answer(found)
        elif not self._cycle.disconnected:
            self._client.start_asgi(self._cycle)

    def _expire(self) -> None:
        self._give_back()
        self._answer(responses.no_answer())

    def _give_back(self) -> None:
        self._upstream.forget_to_tell()
        self._relay.give_back(self._upstream)

    def _answer(self, found: Answer) -> None:
        cycle = self._cycle
        metrics.count_passed_on(found.status)
        cycle.response_complete = True
        if not cycle.disconnected:
            data = responses.written(found, cycle.default_headers, keep=cycle.keep_alive)
            self._client.write_answer(data, keep_alive=cycle.keep_alive)
            cycle.on_response()


_NOT_PASSED_BACK = NOT_PASSED_BACK | {b"content-length"}


def _ordinary(cycle: RequestResponseCycle) -> bool:
    scope = cycle.scope
    if scope["method"] != "GET" or not cycle.keep_alive or FAST_PATHS.fullmatch(scope["raw_path"]) is None:
        return False
    headers = ordinary_headers(scope["headers"])  # type: ignore[arg-type]  # a list, as uvicorn makes it
    return (
        headers is not None
        and headers.get(b"connection", b"keep-alive").lower() == b"keep-alive"
        and _UNUSUAL.isdisjoint(headers)
    )
