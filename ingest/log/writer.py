"""Group commit: many tasks wait, one thread writes.

A commit costs the same sync of the disk for one entry as for a thousand, so whatever queued while the last
commit ran goes into the next one. There is no timer: a lonely entry is committed at once, and groups grow only
as far as the disk is slower than the callers.

The thread hands a group to its ``Appender`` and answers every waiter of the group with one call into the
waiter's event loop. A waiter gets offsets only after ``Appender.commit`` has returned; any error there is
TryAgain for the whole group, because a failed commit may or may not have reached the disk.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from ingest.log.limits import Limits
from ingest.log.packing import pack
from meters.log import Entry, Refused, TryAgain

PartitionName = tuple[str, int]  # stream, number


class Batch:
    """What one group adds to one partition: the values as they are stored, end to end, and a head for each.

    A head is (organization_id, 1 if admitted and 2 if its keys are distinct besides, where the stored value starts
    counted from 1, its length in bytes, the length of the plain value).
    """

    def __init__(self) -> None:
        self.heads: list[tuple[str | None, int, int, int, int]] = []
        self.values: list[bytes] = []
        self.value_bytes = 0

    def add(self, entry: Entry) -> None:
        """Put the entry at the end."""
        stored = pack(entry.value)
        start = self.value_bytes + 1
        said = entry.admitted + (entry.admitted and entry.distinct_keys)
        self.heads.append((entry.organization_id, said, start, len(stored), len(entry.value)))
        self.values.append(stored)
        self.value_bytes += len(stored)


class Appender(Protocol):
    """The one who writes, used by the writer's thread alone."""

    def commit(self, batches: Mapping[PartitionName, Batch]) -> dict[PartitionName, int]:
        """Make the batches durable and return the first offset of each. Any exception means: not acknowledged."""
        ...

    def tidy(self) -> None:
        """Whatever can be done while nobody waits for it. Never raises."""
        ...

    def close(self) -> None:
        """Let go of the files. Never raises."""
        ...


class Waiter(msgspec.Struct, eq=False):
    """What was submitted at once: its entries, and the future that gets their offsets."""

    stream: str
    entries: Sequence[Entry]
    value_bytes: int
    future: asyncio.Future[list[int]]


Outcome = list[int] | TryAgain | Refused


class GroupWriter:
    """A bounded queue and the thread that empties it."""

    def __init__(self, appender: Appender, limits: Limits, name: str) -> None:
        self._appender = appender
        self._limits = limits
        self._queue: queue.SimpleQueue[Waiter | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the three below
        self._bytes = 0
        self._entries = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, stream: str, entries: Sequence[Entry]) -> "asyncio.Future[list[int]]":
        """Queue the entries and return the future of their offsets. Raises TryAgain when full or closed."""
        value_bytes = sum(len(entry.value) for entry in entries)
        waiter = Waiter(stream, entries, value_bytes, asyncio.get_running_loop().create_future())
        with self._lock:
            self._admit(len(entries), value_bytes)
            self._queue.put(waiter)
        return waiter.future

    def close(self) -> None:
        """Commit what is queued, then end the thread. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _admit(self, entries: int, value_bytes: int) -> None:
        limits = self._limits
        if self._closed:
            raise TryAgain("the log is closed", limits.retry_after_s)
        full = self._entries + entries > limits.queue_entries_max or self._bytes + value_bytes > limits.queue_bytes_max
        if full and self._entries:  # an empty queue takes whatever it is given, or it would never be taken
            raise TryAgain("the log's queue is full", limits.retry_after_s)
        self._entries += entries
        self._bytes += value_bytes

    def _run(self) -> None:
        last = False
        while not last:
            group, last = self._next_group()
            if group:
                answer(zip([waiter.future for waiter in group], self._commit(group), strict=True))
                self._release(group)
                self._appender.tidy()
        self._appender.close()

    def _next_group(self) -> tuple[list[Waiter], bool]:
        """Everything that waits, up to the size of a group; and whether it was the last."""
        group: list[Waiter] = []
        group_bytes = 0
        waiter = self._queue.get()
        while waiter is not None:
            group.append(waiter)
            group_bytes += waiter.value_bytes
            if group_bytes >= self._limits.group_bytes_max:
                return group, False
            try:
                waiter = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _commit(self, group: list[Waiter]) -> list[Outcome]:
        batches: dict[PartitionName, Batch] = {}
        try:
            places = [_place(waiter, batches) for waiter in group]
            firsts = self._appender.commit(batches)
        except Exception as error:  # whatever it was, nobody may be told yes, and the thread must live
            return [TryAgain(f"the log could not write: {error}", self._limits.retry_after_s) for _ in group]
        return [[firsts[place] + index for place, index in each] for each in places]

    def _release(self, group: list[Waiter]) -> None:
        with self._lock:
            self._entries -= sum(len(waiter.entries) for waiter in group)
            self._bytes -= sum(waiter.value_bytes for waiter in group)


def _place(waiter: Waiter, batches: dict[PartitionName, Batch]) -> list[tuple[PartitionName, int]]:
    """Add the waiter's entries to their batches; where each one went."""
    places = []
    for entry in waiter.entries:
        place = (waiter.stream, entry.partition)
        batch = batches.get(place)
        if batch is None:
            batch = batches[place] = Batch()
        places.append((place, len(batch.heads)))
        batch.add(entry)
    return places


def answer(outcomes: Iterable[tuple[asyncio.Future[list[int]], Outcome]]) -> None:
    """Tell every caller, from any thread: one call into each event loop, however many of its tasks wait."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[list[int]], Outcome]]] = {}
    for future, outcome in outcomes:
        by_loop.setdefault(future.get_loop(), []).append((future, outcome))
    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to be told
            loop.call_soon_threadsafe(_resolve, answers)


def _resolve(answers: list[tuple[asyncio.Future[list[int]], Outcome]]) -> None:
    for future, outcome in answers:
        if future.done():  # its task was cancelled
            continue
        if isinstance(outcome, list):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
