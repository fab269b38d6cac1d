"""Connections that a gateway lends, because only reads come on them: answered without a process between.

Between two requests a gateway hands over the connection itself, as a descriptor (``ingest.lending`` says when, and the
words of the two). Here each request is looked at before it is taken off the socket. One that can be answered at once
(``at_once``), and has nothing in its head that would concern a gateway, is answered; before any other the connection
goes back, with all its bytes still in it: events, half a head, a refusal, a question for the store, two requests in one
piece. So does a connection that is silent for a while, and each one when this process stops. What limits clients stays
the gateway's affair, but for one thing: who does not read an answer is cut here.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import httptools
import structlog

from aggregator.api.at_once import AtOnce
from meters.access import API_VERSION_DEFAULT

CONNECTIONS_MAX = 64
"""Held at once, as many as a gateway has questions out: each may have a read of 3 ms ready in one turn of the loop. The
gateway answers the others."""

HEAD_BYTES_MAX = 16 * 1024
"""Looked at of a request; the head of a read is far smaller."""

SILENT_S = 5.0
"""After so long without a request a connection goes back to the gateway, whose deadline then begins."""

UNREAD_S = 30.0
"""An answer that is not taken within this is cut off, and its connection with it."""

SWEEP_S = 1.0
GATEWAYS_WAITING_MAX = 16

_CONCERNS_GATEWAY = frozenset({
    b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"polar-version", b"origin", b"prefer",
    b"proxy-connection",
})  # fmt: skip
_HEAD = (
    b"HTTP/1.1 200 OK\r\n%sas-of: %s\r\ncontent-type: application/json\r\npolar-version: "
    + API_VERSION_DEFAULT
    + b"\r\ncontent-length: %d\r\n\r\n%s"
)

logger = structlog.get_logger("aggregator.api.borrowed")

DefaultHeaders = Callable[[], list[tuple[bytes, bytes]]]


class Borrowed:
    """All connections that are here, from all gateways.

    ``default_headers`` are those of the process's server; ``answered`` hears of each answer.
    """

    def __init__(self, at_once: AtOnce, default_headers: DefaultHeaders, answered: Callable[[], None]) -> None:
        self.at_once = at_once
        self.default_headers, self.answered = default_headers, answered
        self.connections: set[_Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._channels: dict[int, socket.socket] = {}
        self._listener: socket.socket | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    def listen(self, path: Path) -> None:
        """Take what gateways lend from now on, at a unix socket that only this user may open."""
        path.unlink(missing_ok=True)  # left over from a process that was killed
        self._listener = listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(GATEWAYS_WAITING_MAX)
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)
        self._sweep()

    def close(self) -> None:
        """Give everything back and take nothing more."""
        if self._listener is None:
            return
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._accept()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        for channel in list(self._channels.values()):
            with contextlib.suppress(OSError):  # of a gateway that is gone
                channel.shutdown(socket.SHUT_RD)  # what was lent until now can be read, and nothing more is lent
                while self._borrow(channel):
                    pass
            for connection in self._of(channel):
                connection.give_back()
            self._end(channel)

    def _accept(self) -> None:
        """Every gateway that waits."""
        assert self._listener is not None
        with contextlib.suppress(OSError):  # there is none, it is gone again, or no descriptors are left
            while True:
                channel, _ = self._listener.accept()
                channel.setblocking(False)
                self._channels[channel.fileno()] = channel
                self._loop.add_reader(channel, self._hear, channel)

    def _hear(self, channel: socket.socket) -> None:
        """Take all that a gateway lends; one that ended has ended with its connections, and nobody is told twice."""
        try:
            while self._borrow(channel):
                pass
        except BlockingIOError:
            return
        for connection in self._of(channel):
            connection.close()
        self._end(channel)

    def _borrow(self, channel: socket.socket) -> bool:
        """Take one connection; False at the end of the channel. Raises BlockingIOError when there is none now."""
        try:
            said, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        except BlockingIOError:
            raise
        except OSError:
            return False
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
            connection = _Connection(self, channel, socket.socket(fileno=descriptor), said[0])
            self.connections.add(connection)
            if len(self.connections) > CONNECTIONS_MAX:
                connection.give_back()
        return bool(said)

    def _of(self, channel: socket.socket) -> "list[_Connection]":
        return [one for one in self.connections if one.channel is channel]

    def _end(self, channel: socket.socket) -> None:
        self._loop.remove_reader(channel)
        self._channels.pop(channel.fileno(), None)
        channel.close()

    def _sweep(self) -> None:
        now_s = self._loop.time()
        for connection in list(self.connections):
            connection.look_at_clock(now_s)
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)


class _Connection:
    """One of them. ``times`` says how often it was lent before."""

    def __init__(self, borrowed: Borrowed, channel: socket.socket, connection: socket.socket, times: int) -> None:
        self.channel = channel
        self._borrowed, self._socket, self._times = borrowed, connection, times
        self._loop = asyncio.get_running_loop()
        self._since_s = self._loop.time()  # of the last request
        self._unsent = b""
        connection.setblocking(False)
        self._loop.add_reader(connection, self._look)

    def give_back(self) -> None:
        """To the gateway; a connection with half an answer in it, or whose gateway takes nothing, is closed."""
        if not self._unsent:
            with contextlib.suppress(OSError):
                socket.send_fds(self.channel, [bytes([self._times + 1])], [self._socket.fileno()])
        self.close()

    def close(self) -> None:
        """Let go of this process's descriptor."""
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._borrowed.connections.discard(self)

    def look_at_clock(self, now_s: float) -> None:
        """End a silence, or a wait for a client that does not read."""
        if self._unsent and now_s - self._since_s > UNREAD_S:
            self.close()
        elif not self._unsent and now_s - self._since_s > SILENT_S:
            self.give_back()

    def _look(self) -> None:
        """There is something to read: take it if it is a request that is answered now."""
        try:
            piece = self._socket.recv(HEAD_BYTES_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:  # the client hung up
            self.close()
            return
        answer = None
        try:
            answer = self._answer(piece)
        except Exception as error:  # the bytes are still there: left with this process it would be asked for ever
            logger.error("borrowed_read_failed", reason=repr(error))
        if answer is None:
            self.give_back()
            return
        self._socket.recv(len(piece))
        self._since_s = self._loop.time()
        self._borrowed.answered()
        self._send(answer)

    def _answer(self, piece: bytes) -> bytes | None:
        request = _read(piece)
        found = self._borrowed.at_once.answer(request.url, request.headers) if request is not None else None
        if found is None:
            return None
        as_of, body = found
        own = b"".join([b"%s: %s\r\n" % header for header in self._borrowed.default_headers()])
        return _HEAD % (own, as_of, len(body), body)

    def _send(self, answer: bytes) -> None:
        try:
            sent = self._socket.send(answer)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        is_waiting, self._unsent = bool(self._unsent), answer[sent:]
        if self._unsent and not is_waiting:  # no further request is looked at until the client has this answer
            self._loop.remove_reader(self._socket)
            self._loop.add_writer(self._socket, self._send_on)
        elif is_waiting and not self._unsent:
            self._loop.remove_writer(self._socket)
            self._loop.add_reader(self._socket, self._look)

    def _send_on(self) -> None:
        self._send(self._unsent)


class _Request:
    """What the parser found in a piece."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = 0  # messages

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self.headers.append((name.lower(), value))

    def on_message_complete(self) -> None:
        """The end of a request."""
        self.complete += 1


def _read(piece: bytes) -> _Request | None:
    """The one whole GET that the piece is, if nothing in its head is a gateway's to look at."""
    request = _Request()
    parser = httptools.HttpRequestParser(request)
    try:
        parser.feed_data(piece)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    if request.complete != 1 or not piece.endswith(b"\r\n\r\n"):
        return None
    is_plain = parser.get_method() == b"GET" and parser.get_http_version() == "1.1"
    headers = dict(request.headers)
    is_usual = headers.get(b"connection", b"keep-alive").lower() == b"keep-alive" and b"host" in headers
    return request if is_plain and is_usual and _CONCERNS_GATEWAY.isdisjoint(headers) else None
