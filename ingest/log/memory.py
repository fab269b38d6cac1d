"""The log in memory: an implementation of the port for tests and simulations.

``MemoryLog`` keeps its records on a ``Disk``, which outlives it: a second log on one disk plays a second process, or
the process after a crash. A disk can be set to full, so that a test can check how its subject handles TryAgain.
"""

import asyncio
import threading
import time
import uuid
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from ingest.log.partitions import PARTITIONS, Limits, Places, next_stamp, take_in_order
from meters.log import Entry, PositionLost, Record, TryAgain


class Partition:
    """Records without a gap, the first of them at offset ``start``."""

    def __init__(self) -> None:
        self.start = 0
        self.records: list[Record] = []

    @property
    def end(self) -> int:
        """The offset the next record will get."""
        return self.start + len(self.records)

    @property
    def newest_us(self) -> int:
        """The time of the newest record; 0 where there is none."""
        return self.records[-1].timestamp_us if self.records else 0

    def append(self, entry: Entry, number: int, time_us: int) -> int:
        """Put the entry at the end; its offset."""
        offset = self.end
        said = entry.organization_id, entry.admitted, entry.distinct_keys
        self.records.append(Record(number, offset, time_us, entry.value, *said))
        return offset

    def read(self, position: int, bytes_max: int) -> list[Record]:
        """The records from the position: one if there is any, else no more than the bytes. Raises PositionLost."""
        if not self.start <= position <= self.end:
            raise PositionLost(f"{position} is not between {self.start} and {self.end}: retention, or another stream")
        found: list[Record] = []
        for record in self.records[position - self.start :]:
            bytes_max -= len(record.value)
            if bytes_max < 0 and found:
                break
            found.append(record)
        return found

    def trim(self, older_than_us: int) -> int:
        """Remove the oldest, those before the instant, but never the newest; how many."""
        removed = bisect_left(self.records[:-1], older_than_us, key=lambda record: record.timestamp_us)
        del self.records[:removed]
        self.start += removed
        return removed


class Disk:
    """What outlives a log object. ``changed`` guards it and wakes readers; while ``full``, appends are TryAgain."""

    def __init__(self, partitions: Mapping[str, int] | None = None) -> None:
        self.places = Places(partitions or PARTITIONS)
        self.streams = {
            stream: [Partition() for _ in range(count)] for stream, count in self.places.partitions.items()
        }
        self.identities = {stream: uuid.uuid4().hex for stream in self.streams}
        self.changed = threading.Condition()
        self.full = False

    @property
    def newest_us(self) -> int:
        """The time of the newest record of all; 0 where there is none."""
        return max(partition.newest_us for partitions in self.streams.values() for partition in partitions)


class MemoryLog:
    """A log on the disk. See ``meters.log.Log`` for what the methods promise."""

    def __init__(self, disk: Disk, clock_us: Callable[[], int], limits: Limits) -> None:
        self._disk = disk
        self._clock_us = clock_us
        self._limits = limits
        self._closed = False

    async def append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        """Keep the entries and return their offsets. Raises TryAgain, Refused."""
        return await self.submit(stream, entries)

    def submit(self, stream: str, entries: Sequence[Entry]) -> "asyncio.Future[list[int]]":
        """Keep the entries and return the future of their offsets. Raises TryAgain, Refused."""
        kept: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        kept.set_result(self._keep(stream, entries))
        return kept

    def _keep(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        self._disk.places.check_entries(stream, entries, self._limits)
        with self._disk.changed:
            self._check_open()
            if self._disk.full:
                raise TryAgain("the disk is full", self._limits.retry_after_s)
            partitions = self._disk.streams[stream]
            time_us = next_stamp(stream, self._clock_us(), self._disk.newest_us)
            offsets = [partitions[entry.partition].append(entry, entry.partition, time_us) for entry in entries]
            self._disk.changed.notify_all()
            return offsets

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """The next records from the positions. Raises PositionLost, TryAgain."""
        deadline_s = time.monotonic() + wait_s
        with self._disk.changed:
            while not (records := self._read_now(stream, positions, bytes_max)):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return []
                self._disk.changed.wait(left_s)
            return records

    def starts(self, stream: str) -> dict[int, int]:
        """The offset of the oldest record, by partition."""
        return {number: partition.start for number, partition in self._partitions(stream)}

    def ends(self, stream: str) -> dict[int, int]:
        """The offset the next record will get, by partition."""
        return {number: partition.end for number, partition in self._partitions(stream)}

    def identity(self, stream: str) -> str:
        """The stream's name for itself, made with the disk."""
        self._partitions(stream)
        return self._disk.identities[stream]

    def trim(self, stream: str, older_than_us: int) -> int:
        """Remove the oldest records, those ingested before the instant, but never the newest; how many."""
        with self._disk.changed:
            return sum(partition.trim(older_than_us) for _, partition in self._partitions(stream))

    def close(self) -> None:
        """Wake whoever waits; later calls raise TryAgain. The disk stays as it is."""
        with self._disk.changed:
            self._closed = True
            self._disk.changed.notify_all()

    def _read_now(self, stream: str, positions: Mapping[int, int], bytes_max: int) -> list[Record]:
        self._check_open()
        self._disk.places.check_all(stream, positions)
        held = self._disk.streams[stream]
        waiting = {partition: deque(held[partition].read(at, bytes_max)) for partition, at in positions.items()}
        reached = {partition: at + len(waiting[partition]) for partition, at in positions.items()}
        return take_in_order(waiting, lambda partition: reached[partition] < held[partition].end, bytes_max)

    def _partitions(self, stream: str) -> list[tuple[int, Partition]]:
        self._check_open()
        return [(number, self._disk.streams[stream][number]) for number in self._disk.places.of(stream)]

    def _check_open(self) -> None:
        if self._closed:
            raise TryAgain("the log is closed", self._limits.retry_after_s)
