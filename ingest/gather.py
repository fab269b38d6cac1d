"""Requests that come together are written together: one record for each partition, not one for each request.

A record costs the log, its brokers and every reader something, whatever is in it. A body of a hundred events is twelve
records in as many partitions of Kafka, and a body of one event is one, too short to be packed. So while appends are
under way, what comes meanwhile is gathered and goes into the next one, the lines of an organization for a partition as
one record. Whoever comes alone is written at once, and nobody waits for company.

A request is answered when the append of its lines has returned, never before; what an append raises, all of its
requests hear. Only a refusal, which is final, is of one request's making: then each is appended by itself.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ingest import telemetry
from meters.log import USAGE_EVENTS, Entry, Log, Refused

UNDER_WAY_MAX = 2
"""Appends at once: one that the disk or the brokers work on, and one that waits for them."""

RECORD_BYTES_MAX = 256 * 1024
"""Of lines put together: by then a record's own cost is forgotten, and it is far from what any broker takes."""

GROUP_BYTES_MAX = 1024 * 1024
"""Of what is gathered: more is appended at once, however many appends are under way."""

Position = Mapping[int, int]


class _Request(NamedTuple):
    """Its entries, and the future of the position behind them."""

    entries: Sequence[Entry]
    written: "asyncio.Future[Position]"


class Gather:
    """In front of a log's stream of events, for one event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: list[_Request] = []
        self._waiting_bytes = 0
        self._under_way: set[asyncio.Task[None]] = set()

    async def append(self, entries: Sequence[Entry]) -> Position:
        """Make a request's entries durable; by partition, the position behind them. Raises what ``Log.append`` does."""
        loop = asyncio.get_running_loop()
        request = _Request(entries, loop.create_future())
        if not self._waiting and len(self._under_way) < UNDER_WAY_MAX:
            loop.call_soon(self._begin)  # with whatever else this round of the loop brings
        self._waiting.append(request)
        self._waiting_bytes += sum([len(entry.value) for entry in entries])
        if self._waiting_bytes >= GROUP_BYTES_MAX:
            self._begin()
        return await request.written

    def _begin(self) -> None:
        if not self._waiting:
            return
        requests, self._waiting, self._waiting_bytes = self._waiting, [], 0
        task = asyncio.get_running_loop().create_task(self._write(requests))
        self._under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        if len(self._under_way) < UNDER_WAY_MAX:
            self._begin()

    async def _write(self, requests: Sequence[_Request]) -> None:
        try:
            await self._append(requests)
        except Refused as error:
            if len(requests) == 1:
                _fail(requests, error)
            else:
                for request in requests:
                    await self._write([request])
        except Exception as error:
            _fail(requests, error)

    async def _append(self, requests: Sequence[_Request]) -> None:
        entries, places = together([request.entries for request in requests])
        began_s = time.perf_counter()
        offsets = await self._log.append(USAGE_EVENTS, entries)
        telemetry.APPEND_SECONDS.observe(time.perf_counter() - began_s)
        for request, its in zip(requests, places, strict=True):
            if not request.written.done():  # or whoever waited for it is gone
                request.written.set_result({entries[place].partition: offsets[place] + 1 for place in its})


def together(requests: Sequence[Sequence[Entry]]) -> tuple[list[Entry], list[list[int]]]:
    """The entries of requests as few entries, in the same order; for each request, which of them have its lines."""
    if len(requests) == 1:
        return list(requests[0]), [list(range(len(requests[0])))]
    made: list[list[Entry]] = []
    newest: dict[tuple[int, str | None, bool, bool], tuple[int, int]] = {}  # by kind: which one, and its bytes
    places: list[list[int]] = []
    for entries in requests:
        places.append([])
        for entry in entries:
            kind = entry.partition, entry.organization_id, entry.admitted, entry.distinct_keys
            place, held = newest.get(kind, (-1, RECORD_BYTES_MAX))
            if held + len(entry.value) > RECORD_BYTES_MAX:
                place, held = len(made), 0
                made.append([])
            made[place].append(entry)
            newest[kind] = place, held + len(entry.value)
            places[-1].append(place)
    return [_one(entries) for entries in made], places


def _one(entries: list[Entry]) -> Entry:
    first = entries[0]
    if len(entries) == 1:
        return first
    value = b"\n".join([entry.value for entry in entries])
    return Entry(value, first.partition, first.organization_id, first.admitted, first.distinct_keys)


def _fail(requests: Sequence[_Request], error: Exception) -> None:
    for request in requests:
        if not request.written.done():
            request.written.set_exception(error)
