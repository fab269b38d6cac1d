"""Streams, partitions and limits that every kind of log shares.

``Limits`` bounds one open log, with a reason for each figure. ``Places`` knows which partitions each stream has, and
raises ``NoSuchPartition`` or ``Refused`` for others. ``take_in_order`` merges records of several partitions by their
time of ingestion, so that a rebuild reads events in the order in which they were first counted.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from meters.log import LATEST_US, USAGE_CONTROL, USAGE_EVENTS, Entry, NoSuchPartition, Record, Refused

# Limits. A caller may set others.

MEBIBYTE = 1 << 20


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one open log. Beyond ``value_bytes_max`` an entry is Refused, beyond a queue's bound it is TryAgain."""

    # A request body is at most 10 MiB, and an event of 39 bytes, the shortest, gets an id of 50 more.
    value_bytes_max: int = 24 * MEBIBYTE
    # Under half a second of writing at the slowest rate measured, so a full queue empties within one retry.
    queue_bytes_max: int = 64 * MEBIBYTE
    # Under a second of writing, one small entry a request; each costs about 1 KiB of objects besides its value.
    queue_entries_max: int = 32_768
    # A commit of this size takes tens of milliseconds; larger groups would only make the first in them wait.
    group_bytes_max: int = 8 * MEBIBYTE
    # What a client of a full or failing log is asked to wait: about what a full queue needs to empty.
    retry_after_s: float = 1.0
    # Another process's commit or checkpoint takes milliseconds; one that holds the lock for so long is stuck.
    lock_wait_s_max: float = 5.0


# Streams and partitions.

# One partition keeps the order of all records; more of them help only when there are several readers.
PARTITIONS: Mapping[str, int] = {USAGE_EVENTS: 1, USAGE_CONTROL: 1}


class Places:
    """The partitions by stream, and the questions asked before anything is done with them."""

    def __init__(self, partitions: Mapping[str, int]) -> None:
        self.partitions = dict(partitions)

    def of(self, stream: str) -> range:
        """The partitions of the stream. Raises Refused if there is no such stream."""
        if stream not in self.partitions:
            raise Refused(f"no stream {stream!r}")
        return range(self.partitions[stream])

    def check(self, stream: str, partition: int) -> None:
        """Raises NoSuchPartition, or Refused if there is no such stream."""
        if partition not in self.of(stream):
            raise NoSuchPartition(f"{stream} has no partition {partition}")

    def check_all(self, stream: str, partitions: Iterable[int]) -> None:
        """Raises Refused if there is no such stream, or one of the partitions is not there."""
        self.of(stream)
        for partition in partitions:
            self.check(stream, partition)

    def check_entries(self, stream: str, entries: Sequence[Entry], limits: Limits) -> None:
        """Raises Refused if one of the entries, or all together, can never be taken."""
        for entry in entries:
            self.check(stream, entry.partition)
            if len(entry.value) > limits.value_bytes_max:
                raise Refused(f"a value of {len(entry.value)} bytes is over {limits.value_bytes_max}")
        if len(entries) > 1 and sum(len(entry.value) for entry in entries) > limits.queue_bytes_max:
            raise Refused(f"the entries are over {limits.queue_bytes_max} bytes together")


def next_stamp(stream: str, now: int, newest: int) -> int:
    """Return the time of new records: the clock's, and never before the newest time that is known in the log.

    Both are whole numbers of one unit, microseconds or milliseconds, and so is the result.

    While the clock is behind that time, every decision gets a later one than all records before it, and the events
    after it get the decision's. So a reset divides the events before it from those after it, whatever the clock says.
    """
    if now >= newest:
        return now
    return newest + (stream == USAGE_CONTROL)


def take_in_order(
    waiting: Mapping[int, deque[Record]], has_more: Callable[[int], bool], bytes_max: int
) -> list[Record]:
    """Take records of several partitions by the time of their ingestion: at least one, else no more than the bytes.

    Of an id that stands in two partitions the first one read counts for ever, so a store that is made again has to read
    in the order in which the first one did. A partition's own order comes first. Where a partition that has more runs
    out, the taking ends: what comes next there may be older than what waits elsewhere.
    """
    heads = [(_turn_us(records[0]), partition) for partition, records in waiting.items() if records]
    heapq.heapify(heads)
    taken: list[Record] = []
    while heads:
        partition = heads[0][1]
        records = waiting[partition]
        if taken and len(records[0].value) > bytes_max:
            break
        taken.append(records.popleft())
        bytes_max -= len(taken[-1].value)
        if records:
            heapq.heapreplace(heads, (_turn_us(records[0]), partition))
        elif has_more(partition):
            break
        else:
            heapq.heappop(heads)
    return taken


def _turn_us(record: Record) -> int:
    """A record whose time means nothing is next at once: waiting for its time, it would hold up its partition."""
    return record.timestamp_us if record.timestamp_us < LATEST_US else 0
