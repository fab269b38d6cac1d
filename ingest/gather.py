"""Requests that come together are written together: one record for each partition, not one for each request.

A record costs the log, its brokers and every reader something, whatever is in it. A body of a hundred events is twelve
records in as many partitions of Kafka, and a body of one event is one, too short to be packed. So while an append to
a partition is under way, what comes for it meanwhile is gathered and goes into the next one, the lines of an
organization as one record. Whoever comes alone is written at once, and nobody waits for company. A second append at a
time would leave no disk idle for a moment, but two small ones cost more than one: on the embedded log a tenth of a
gateway's CPU.

A request is answered when the appends of its lines have returned, never before; what an append raises, all of its
requests hear. Only a refusal, which is final, is of one request's making: then each is appended by itself. A partition
whose broker is away holds up those who write to it, and nobody else: each has a lane of its own.

Nothing here is a task: a request may have entries in every lane, and a task costs more than what it would do for one.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from ingest import telemetry
from meters.log import USAGE_EVENTS, Entry, Log, Refused

RECORD_BYTES_MAX = 256 * 1024
"""Of lines put together: by then a record's own cost is forgotten, and it is far from what any broker takes."""

GROUP_BYTES_MAX = 1024 * 1024
"""Of what is gathered: more is appended at once, whatever is under way."""

Tell = Callable[[Mapping[int, int] | Exception], None]
"""Hears, by partition, the position behind a request's lines, or why they may not be there."""

logger = logging.getLogger("ingest.gather")


class Gather:
    """In front of a log's stream of events, for one event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lanes: dict[int, _Lane] = {}

    def put(self, entries: Sequence[Entry], tell: Tell) -> None:
        """Make a request's entries durable, one or more and at most one for a partition, and tell it.

        What is told instead is what ``Log.append`` raises.
        """
        request = _Request(len(entries), tell)
        for entry in entries:
            self._lane(entry.partition).put(entry, request)

    def append(self, entries: Sequence[Entry]) -> "asyncio.Future[Mapping[int, int]]":
        """The same, for a task. Raises what ``Log.append`` does."""
        told: asyncio.Future[Mapping[int, int]] = asyncio.get_running_loop().create_future()
        self.put(entries, functools.partial(_resolve, told))
        return told

    def _lane(self, partition: int) -> "_Lane":
        lane = self._lanes.get(partition)
        if lane is None:
            lane = self._lanes[partition] = _Lane(self._log)
        return lane


class _Request:
    """What is known of a request's entries."""

    __slots__ = ("failure", "left", "position", "tell")

    def __init__(self, entries: int, tell: Tell) -> None:
        self.left, self.tell = entries, tell
        self.position: dict[int, int] = {}
        self.failure: Exception | None = None

    def written(self, partition: int, offset: int) -> None:
        """One of them is durable."""
        self.position[partition] = offset + 1
        self._count()

    def failed(self, error: Exception) -> None:
        """One of them may not be."""
        self.failure = error
        self._count()

    def _count(self) -> None:
        self.left -= 1
        if self.left:
            return
        try:
            self.tell(self.position if self.failure is None else self.failure)
        except Exception:  # the others of its group are to be told all the same
            logger.exception("a request could not be told")


_Group = list[tuple[Entry, _Request]]


class _Lane:
    """What waits for one partition."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: _Group = []
        self._waiting_bytes = 0
        self._under_way = 0

    def put(self, entry: Entry, request: _Request) -> None:
        """Wait in line."""
        if not self._waiting and not self._under_way:
            asyncio.get_running_loop().call_soon(self._begin)  # with whatever else this round of the loop brings
        self._waiting.append((entry, request))
        self._waiting_bytes += len(entry.value)
        if self._waiting_bytes >= GROUP_BYTES_MAX:
            self._begin()

    def _begin(self) -> None:
        if self._waiting:
            group, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._write(group)

    def _write(self, group: _Group) -> None:
        self._under_way += 1
        try:
            entries, places = together([entry for entry, _ in group])
            told = functools.partial(self._told, group, places, time.perf_counter())
            asyncio.ensure_future(self._log.submit(USAGE_EVENTS, entries)).add_done_callback(told)
        except Exception as error:
            self._under_way -= 1
            self._fail(group, error)

    def _told(self, group: _Group, places: Sequence[int], began_s: float, offsets: "asyncio.Future[list[int]]") -> None:
        self._under_way -= 1
        try:
            found = offsets.result()
        except Exception as error:
            self._fail(group, error)
        else:
            telemetry.APPEND_SECONDS.observe(time.perf_counter() - began_s)
            for (entry, request), place in zip(group, places, strict=True):
                request.written(entry.partition, found[place])
        if not self._under_way:
            self._begin()

    def _fail(self, group: _Group, error: Exception) -> None:
        if isinstance(error, Refused) and len(group) > 1:
            for one in group:
                self._write([one])
        else:
            for _, request in group:
                request.failed(error)


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


def _resolve(told: "asyncio.Future[Mapping[int, int]]", outcome: Mapping[int, int] | Exception) -> None:
    if told.done():  # whoever waited is gone
        return
    if isinstance(outcome, Exception):
        told.set_exception(outcome)
    else:
        told.set_result(outcome)
