"""The short way of an ordinary ingest request: from the connection to the endpoint, and one write back.

Nearly every request is a POST of events with a length and without anything unusual in its head. As an ASGI request it
costs a scope, a task that wakes for each piece of the body, an event, and two messages on the way back: as much as
checking fifty events. Here its pieces are collected as they come, the endpoint is asked once, and the answer is one
write. Whatever has more to say in its head takes the ASGI way, and so do requests of clients that leave answers unread,
since an answer waits there; both end in the same endpoint, with the same answers.

To uvicorn an exchange is the connection's cycle: it asks whether the answer is complete before it starts the next
request, and whether to keep the connection. A request that follows before the answer waits in uvicorn's own line.
"""

from typing import Protocol

from ingest import answers, telemetry
from ingest.answers import Answer
from ingest.endpoint import IngestEndpoint
from ingest.heads import ordinary_headers
from ingest.request import Opened

URLS = frozenset({b"/v1/events/ingest", b"/v1/events/ingest/"})

Headers = list[tuple[bytes, bytes]]


def ordinary(method: bytes, url: bytes, headers: Headers) -> dict[bytes, bytes] | None:
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
        self._last: tuple[Answer | None, Headers, bool, bytes] = (None, [], False, b"")

    def written(self, found: Answer, default_headers: Headers, keep: bool) -> bytes:
        """See ``answers.written``. The server makes other default headers each second."""
        answer, headers, kept, data = self._last
        if answer is not found or headers is not default_headers or kept is not keep:
            data = answers.written(found, default_headers, keep=keep)
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
        self, endpoint: IngestEndpoint, connection: ExchangeConnection, default_headers: Headers, *, keep_alive: bool
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
            self.answer(answers.busy())
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
        telemetry.count_request(found.status)
        if self.disconnected:
            return
        keep = self.keep_alive and answers.CLOSE not in found.headers
        self._connection.write_answer(_last.written(found, self._default_headers, keep), keep_alive=keep)
        self._connection.on_response_complete()

    def _give_back(self) -> None:
        self._endpoint.in_flight.give_back(self._held)
        self._held = 0
        self._pieces = []
