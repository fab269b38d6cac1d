"""How batches travel: over HTTP to ``/v1/events/ingest``, as every server of this contract takes them.

Nothing here depends on one server. Compression is tried once with a body worth it; a server that answers such a body
with a 4xx before it ever took one gets the same body plain, and no other kind from then on.
"""

import contextlib
import encodings.idna  # noqa: F401 - see ``lifecycle``: the first look-up of a host would import it, in a thread
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol
from zlib import compressobj

import httpx

from ingest.client.answer import Failed, Outcome, Refused, Taken, Unavailable, read_answer

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
