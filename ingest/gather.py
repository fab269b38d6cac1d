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
import operator
import time
from collections.abc import Callable, Mapping, Sequence

from ingest import telemetry
from meters.log import USAGE_EVENTS, Entry, Log, Refused

RECORD_BYTES_MAX = 256 * 1024
"""Of lines put together: by then a record's own cost is forgotten, and it is far from what any broker takes."""

GROUP_BYTES_MAX = 1024 * 1024
"""Of what is gathered: more is appended at once, whatever is under way."""

Outcome = Mapping[int, int] | Exception
"""By partition, the position behind lines, or why they may not be there."""
Tell = Callable[[Outcome], None]
TellSome = Callable[[Sequence[int], Outcome], None]
"""Hears of which requests, by number, the outcome is."""

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
        mask = sum(1 << entry.partition for entry in entries)
        self.put_together(entries, [mask], lambda _, outcome: tell(outcome))

    def put_together(self, entries: Sequence[Entry], masks: Sequence[int], tell: TellSome) -> None:
        """The same for requests that have lines in the same entries.

        ``masks`` are the sum of ``1 << partition`` for each request: it waits for its own partitions, and no others.
        """
        requests = _Requests(masks, tell)
        for entry in entries:
            self._lane(entry.partition).put(entry, requests)

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


class _Requests:
    """What is known of entries and the requests that have lines in them."""

    __slots__ = ("_awaited", "_failures", "_position", "_tell", "_waiting")

    def __init__(self, masks: Sequence[int], tell: TellSome) -> None:
        self._waiting = list(enumerate(masks))
        self._awaited = functools.reduce(operator.or_, masks)
        self._position: dict[int, int] = {}
        self._failures: dict[int, Exception] = {}
        self._tell = tell

    def written(self, partition: int, offset: int) -> None:
        """One of the entries is durable."""
        self._position[partition] = offset + 1
        self._heard(partition)

    def failed(self, partition: int, error: Exception) -> None:
        """One of them may not be."""
        self._failures[partition] = error
        self._heard(partition)

    def _heard(self, partition: int) -> None:
        self._awaited &= ~(1 << partition)
        ready = [one for one in self._waiting if not one[1] & self._awaited] if self._awaited else self._waiting
        if ready:  # before anybody is told, who may append again
            self._waiting = [one for one in self._waiting if one[1] & self._awaited] if self._awaited else []
        for partition, error in list(self._failures.items()):
            self._say([number for number, mask in ready if mask >> partition & 1], error)
            ready = [one for one in ready if not one[1] >> partition & 1]
        self._say([number for number, _ in ready], self._position)

    def _say(self, numbers: Sequence[int], outcome: Outcome) -> None:
        try:
            if numbers:
                self._tell(numbers, outcome)
        except Exception:  # the others of its group are to be told all the same
            logger.exception("a request could not be told")


_Group = list[tuple[Entry, _Requests]]


class _Lane:
    """What waits for one partition."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: _Group = []
        self._waiting_bytes = 0
        self._under_way = 0

    def put(self, entry: Entry, requests: _Requests) -> None:
        """Wait in line."""
        if not self._waiting and not self._under_way:
            asyncio.get_running_loop().call_soon(self._begin)  # with whatever else this round of the loop brings
        self._waiting.append((entry, requests))
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
            for (entry, requests), place in zip(group, places, strict=True):
                requests.written(entry.partition, found[place])
        if not self._under_way:
            self._begin()

    def _fail(self, group: _Group, error: Exception) -> None:
        if isinstance(error, Refused) and len(group) > 1:
            for one in group:
                self._write([one])
        else:
            for entry, requests in group:
                requests.failed(entry.partition, error)


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


def _resolve(told: "asyncio.Future[Mapping[int, int]]", outcome: Outcome) -> None:
    if told.done():  # whoever waited is gone
        return
    if isinstance(outcome, Exception):
        told.set_exception(outcome)
    else:
        told.set_result(outcome)
