"""The client's transport over HTTP, and what the server's answers mean.

``HttpTransport`` posts a batch to ``/v1/events/ingest``. ``read_answer`` maps an answer to an outcome: ``Taken``,
``Refused`` (a 422 about single events), ``Unavailable`` (wait) or ``Failed`` (perhaps the fault of this batch).
``Transport`` is the protocol that other transports implement (``ingest.client.kafka``).
"""

import contextlib
import encodings.idna  # noqa: F401 - see ``lifecycle``: the first look-up of a host would import it, in a thread
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple, Protocol
from zlib import compressobj

import httpx
import msgspec

# Answers, as a pure function. Only a 2xx acknowledges. The ``detail`` of a 422 names events by index, which will
# never be accepted; if it names none, halving the batch finds them. What concerns the sender or the server as a whole
# (no connection, 401, 429, 503) waits and loses nothing; some of these may still be caused by the events, which shows
# when other batches succeed. Anything else may be the fault of this batch, or of the server: see ``Failed``.

class Detail(NamedTuple):
    """Why one event was refused, in the server's words."""

    type: str
    loc: tuple[str | int, ...]
    msg: str


class Taken(msgspec.Struct, frozen=True):
    """The events are durable at the server. ``duplicates`` of them it knew already."""

    duplicates: int = 0


class Unavailable(msgspec.Struct, frozen=True):
    """Nothing can be sent now, whatever it is. ``retry_after_s`` is the server's wish.

    ``may_be_events``: so it looks as well where something in these events is not let through, or breaks the server.
    """

    cause: str
    retry_after_s: float | None = None
    may_be_events: bool = False


class Failed(msgspec.Struct, frozen=True):
    """This request went wrong; another one might not. ``is_final`` when repeating it cannot help."""

    cause: str
    is_final: bool


class Refused(msgspec.Struct, frozen=True):
    """Some events will not be taken: those in ``details``, by index; nobody knows which when it is empty.

    ``ahead_s`` is how far this machine's clock is ahead of the server's, as far as can be told.
    """

    cause: str
    details: dict[int, Detail] = {}
    ahead_s: float = 0.0


Outcome = Taken | Unavailable | Failed | Refused

_WAITING = frozenset({401, 402, 403, 404, 405, 407, 408, 421, 423, 425, 429, 502, 503, 504})
"""Statuses that say nothing of the events: credentials, address, rate, an overloaded or absent server."""

_AMBIGUOUS = frozenset({403, 408, 502, 503, 504})
"""Those that a firewall gives to a text it does not like, and a proxy when a request breaks the server behind it."""


def read_answer(status: int, headers: Mapping[str, str], body: bytes, now: datetime) -> Outcome:
    """What an HTTP answer means. Header names are looked up in lower case."""
    cause = f"HTTP {status}"
    if 200 <= status < 300:
        return Taken(_duplicates(body))
    if status == 422:
        return Refused(cause, _details(body), _ahead_s(headers, now))
    if status == 413:
        return Refused(cause)
    if status in _WAITING or 300 <= status < 400:
        return Unavailable(cause, _retry_after_s(headers, now), status in _AMBIGUOUS)
    return Failed(cause, is_final=400 <= status < 500)


class _Counts(msgspec.Struct):
    duplicates: int = 0


class _Entry(msgspec.Struct):
    loc: list[str | int]
    type: str = ""
    msg: str = ""


class _Refusal(msgspec.Struct):
    detail: list[_Entry]


def _duplicates(body: bytes) -> int:
    try:
        return msgspec.json.decode(body, type=_Counts).duplicates
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return 0  # a proxy's 204, a newer server: the status is what counts


def _details(body: bytes) -> dict[int, Detail]:
    """The first complaint about each event that is named as ``["body", "events", index, ...]``."""
    try:
        entries = msgspec.json.decode(body, type=_Refusal).detail
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}
    found: dict[int, Detail] = {}
    for entry in entries:
        if len(entry.loc) < 3 or entry.loc[1] != "events" or not isinstance(entry.loc[2], int):
            return {}  # something else is wrong, too: trust no index
        found.setdefault(entry.loc[2], Detail(entry.type, tuple(entry.loc), entry.msg))
    return found


def _retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds, or a date (RFC 9110)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    until = _date(value)
    return None if until is None else max(0.0, (until - now).total_seconds())


def _ahead_s(headers: Mapping[str, str], now: datetime) -> float:
    at_server = _date(headers.get("date", ""))
    return 0.0 if at_server is None else (now - at_server).total_seconds()


def _date(value: str) -> datetime | None:
    try:
        instant = parsedate_to_datetime(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


# HTTP. Nothing here depends on one server. Compression is tried with the first body worth it. If the server answers a
# compressed body with a 4xx before it ever accepted one, that body is sent again uncompressed. If that is accepted,
# all later bodies are uncompressed, too.

PATH = "/v1/events/ingest"

_GZIP_LEVEL = 1  # events repeat their keys: the first level already makes them five times smaller
_GZIP_WINDOW_BITS = 31  # zlib's way of asking for a gzip header
_GZIP_BODY_BYTES_MIN = 1400  # what fits into one packet is not worth the work

_CUT_OFF = (httpx.ReadTimeout, httpx.WriteTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""There was a connection, and whoever is behind it did not answer this request."""


class Transport(Protocol):
    """Sends batches, from several threads at once.

    Where neither the address nor the token says whose the events are, the string ``destination`` does: what is left in
    a spool is then sent by none but clients of the same destination.
    """

    def send(self, lines: Sequence[bytes]) -> Outcome:
        """Send events, a JSON object each; what became of them. Blocks, and does not raise."""

    def after_fork(self) -> None:
        """In the child: make new connections, and leave the parent's alone."""

    def close(self) -> None:
        """Give connections up."""


class HttpTransport:
    """Batches as JSON bodies, over a pool of connections."""

    def __init__(self, token: str, base_url: str, *, timeout_s: float, connections: int, gzip: bool) -> None:
        self._url = base_url.rstrip("/") + PATH
        self._headers = {"authorization": f"Bearer {token}", "content-type": "application/json",
                         "user-agent": "meterstream-client", "accept": "application/json"}  # fmt: skip
        self._timeout, self._connections = httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)), connections
        self._compresses, self._knows_compression = gzip, False
        self._begin()

    def _begin(self) -> None:
        """The state of one process."""
        self._client = self._connect()
        self._lock = threading.Lock()
        self._sending = 0
        self._is_closed = False

    def send(self, lines: Sequence[bytes]) -> Outcome:
        """Post one body; what the answer says of its events."""
        with self._lock:
            if self._is_closed:
                return Unavailable("closed")
            self._sending += 1
        try:
            return self._sent(lines)
        finally:
            with self._lock:
                self._sending -= 1
            self._leave()

    def _sent(self, lines: Sequence[bytes]) -> Outcome:
        body = b'{"events":[' + b",".join(lines) + b"]}"
        try:
            if not self._compresses or len(body) < _GZIP_BODY_BYTES_MIN:
                return self._post(body, {})
            outcome = self._post(_gzip(body), {"content-encoding": "gzip"})
            if isinstance(outcome, Taken):
                self._knows_compression = True
            elif not self._knows_compression and _may_be_compression(outcome):
                outcome = self._post(body, {})
                self._compresses = not isinstance(outcome, Taken)  # the body was good, so it was the compression
            return outcome
        except (httpx.HTTPError, OSError) as error:
            return Unavailable(type(error).__name__, may_be_events=isinstance(error, _CUT_OFF))

    def after_fork(self) -> None:
        """A new pool; the old one's sockets belong to the parent."""
        self._begin()

    def close(self) -> None:
        """Close the pool, once nothing is being sent: what is connecting meanwhile would never be closed."""
        self._is_closed = True
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            is_last = self._is_closed and not self._sending
        if is_last:
            with contextlib.suppress(Exception):
                self._client.close()

    def _connect(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=self._connections, max_keepalive_connections=self._connections)
        return httpx.Client(timeout=self._timeout, limits=limits, headers=self._headers)

    def _post(self, body: bytes, headers: dict[str, str]) -> Outcome:
        answer = self._client.post(self._url, content=body, headers=headers)
        return read_answer(answer.status_code, answer.headers, answer.content, datetime.now(UTC))


def _gzip(body: bytes) -> bytes:
    packer = compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW_BITS)
    return packer.compress(body) + packer.flush()


def _may_be_compression(outcome: Outcome) -> bool:
    """A refusal of the body as a whole; one that names events has read them."""
    if isinstance(outcome, Refused):
        return not outcome.details
    return isinstance(outcome, Failed) and outcome.is_final
