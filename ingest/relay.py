"""The short way of an ordinary read: from the connection to the query API and back, and one write for each.

Balances are asked for before nearly everything that an application does. As an ASGI request one costs a task, a dozen
coroutines and three messages, twice what the query API needs to find the answer. Here the request is written to a kept
connection of ``ingest.passthrough``, and the answer, once it is whole, to the client, in the turn in which it arrives.

Only reads take it that the query API answers from memory (``meters.fast_paths``), with nothing unusual in their heads,
while few of them are out. Whatever comes of one but a whole answer of ordinary size, the ASGI way asks again, which may
be done because it is a read: how long to wait, what to say of an API that is away, and streams are decided there alone.
So is how many questions one organization may have out, and how many in a minute: where the latter is limited nothing
is relayed.
"""

import asyncio
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ingest import answers, telemetry
from ingest.answers import Answer
from ingest.heads import ordinary_headers
from ingest.limits import PASSTHROUGH_ANSWER_DEADLINE_S, RELAYED_MAX
from ingest.passthrough import NOT_PASSED_BACK, Connection, Upstream, end_to_end, request_of
from meters.fast_paths import FAST_PATHS

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
        self._answer(answers.no_answer())

    def _give_back(self) -> None:
        self._upstream.forget_to_tell()
        self._relay.give_back(self._upstream)

    def _answer(self, found: Answer) -> None:
        cycle = self._cycle
        telemetry.count_passed_on(found.status)
        cycle.response_complete = True
        if not cycle.disconnected:
            data = answers.written(found, cycle.default_headers, keep=cycle.keep_alive)
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
