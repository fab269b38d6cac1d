"""Requests that come together are written together: one record for each partition, not one for each request.

A record costs the log, its brokers and every reader something, whatever is in it. A body of a hundred events is twelve
records in as many partitions of Kafka, and a body of one event is one, too short to be packed. So while appends to a
partition are under way, what comes for it meanwhile is gathered and goes into the next one, the lines of an
organization as one record. Whoever comes alone is written at once, and nobody waits for company.

A request is answered when the appends of its lines have returned, never before; what an append raises, all of its
requests hear. Only a refusal, which is final, is of one request's making: then each is appended by itself. A partition
whose broker is away holds up those who write to it, and nobody else: each has a lane of its own.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ingest import telemetry
from meters.log import USAGE_EVENTS, Entry, Log, Refused

UNDER_WAY_MAX = 2
"""Appends to a partition at once: one that the disk or the brokers work on, and one that waits for them."""

RECORD_BYTES_MAX = 256 * 1024
"""Of lines put together: by then a record's own cost is forgotten, and it is far from what any broker takes."""

GROUP_BYTES_MAX = 1024 * 1024
"""Of what is gathered: more is appended at once, however many appends are under way."""


class Gather:
    """In front of a log's stream of events, for one event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lanes: dict[int, _Lane] = {}

    async def append(self, entries: Sequence[Entry]) -> Mapping[int, int]:
        """Make a request's entries durable, at most one for a partition; by partition, the position behind them.

        Raises what ``Log.append`` does.
        """
        offsets = [self._lane(entry.partition).put(entry) for entry in entries]
        position: dict[int, int] = {}
        failure: Exception | None = None
        for entry, offset in zip(entries, offsets, strict=True):
            try:
                position[entry.partition] = await offset + 1
            except Exception as error:  # heard of each, raised once
                failure = error
        if failure is not None:
            raise failure
        return position

    def _lane(self, partition: int) -> "_Lane":
        lane = self._lanes.get(partition)
        if lane is None:
            lane = self._lanes[partition] = _Lane(self._log)
        return lane


class _Waiting(NamedTuple):
    """An entry, and the future of its record's offset."""

    entry: Entry
    offset: "asyncio.Future[int]"


class _Lane:
    """What waits for one partition."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._under_way: set[asyncio.Task[None]] = set()

    def put(self, entry: Entry) -> "asyncio.Future[int]":
        """Wait in line."""
        loop = asyncio.get_running_loop()
        one = _Waiting(entry, loop.create_future())
        if not self._waiting and len(self._under_way) < UNDER_WAY_MAX:
            loop.call_soon(self._begin)  # with whatever else this round of the loop brings
        self._waiting.append(one)
        self._waiting_bytes += len(entry.value)
        if self._waiting_bytes >= GROUP_BYTES_MAX:
            self._begin()
        return one.offset

    def _begin(self) -> None:
        if not self._waiting:
            return
        group, self._waiting, self._waiting_bytes = self._waiting, [], 0
        task = asyncio.get_running_loop().create_task(self._write(group))
        self._under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        if len(self._under_way) < UNDER_WAY_MAX:
            self._begin()

    async def _write(self, group: Sequence[_Waiting]) -> None:
        try:
            await self._append(group)
        except Refused as error:
            if len(group) == 1:
                _fail(group, error)
            else:
                for one in group:
                    await self._write([one])
        except Exception as error:
            _fail(group, error)

    async def _append(self, group: Sequence[_Waiting]) -> None:
        entries, places = together([one.entry for one in group])
        began_s = time.perf_counter()
        offsets = await self._log.append(USAGE_EVENTS, entries)
        telemetry.APPEND_SECONDS.observe(time.perf_counter() - began_s)
        for one, place in zip(group, places, strict=True):
            if not one.offset.done():  # or whoever waited for it is gone
                one.offset.set_result(offsets[place])


def together(waiting: Sequence[Entry]) -> tuple[list[Entry], list[int]]:
    """A partition's entries as few entries, each kind in the same order; for each, which of them has its lines."""
    if len(waiting) == 1:
        return list(waiting), [0]
    made: list[list[Entry]] = []
    newest: dict[tuple[str | None, bool, bool], tuple[int, int]] = {}  # by kind: which one, and its bytes
    places: list[int] = []
    for entry in waiting:
        kind = entry.organization_id, entry.admitted, entry.distinct_keys
        place, held = newest.get(kind, (-1, RECORD_BYTES_MAX))
        if held + len(entry.value) > RECORD_BYTES_MAX:
            place, held = len(made), 0
            made.append([])
        made[place].append(entry)
        newest[kind] = place, held + len(entry.value)
        places.append(place)
    return [_one(entries) for entries in made], places


def _one(entries: list[Entry]) -> Entry:
    first = entries[0]
    if len(entries) == 1:
        return first
    value = b"\n".join([entry.value for entry in entries])
    return Entry(value, first.partition, first.organization_id, first.admitted, first.distinct_keys)


def _fail(group: Sequence[_Waiting], error: Exception) -> None:
    for one in group:
        if not one.offset.done():
            one.offset.set_exception(error)
