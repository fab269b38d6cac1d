"""Write the embedded log: the writer thread with its group commit, and the appender that it feeds.

``GroupWriter`` queues the entries of all callers. Its thread takes what queued during the last commit, hands the
group to an ``Appender`` as a ``Batch`` for each partition, and resolves the futures of the callers. ``FileAppender``
writes a group in one SQLite transaction and runs the checkpoints when nobody waits.

One sync of the disk costs the same for one entry as for a thousand, so groups make appending cheap under load. There
is no timer: a single entry is committed at once.
"""

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from ingest.log.partitions import Limits, next_stamp
from ingest.log.sqlite_file import PAGE_BYTES, connect, pack, same_file, table_name
from meters.log import Entry, Refused, TryAgain

# Group commit. A caller gets offsets only after ``Appender.commit`` returned. Any error there is TryAgain for the
# whole group, because a failed commit may or may not have reached the disk. All callers of one event loop are
# answered with one call into the loop.

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


# The appender. Offsets are dense and have no counter of their own: the next offset is that of the newest record plus
# one. The lowest time for the next record comes from the newest record of each partition (``next_stamp``). So
# retention never removes the newest record.
#
# After any error the connections are dropped and the next group opens new ones, because the state of a transaction
# whose sync failed is not reliable. Opening first copies the WAL into the file: a failed sync may have left pages
# that the system shows but the disk never got, and a commit behind such pages would be lost with them in a power
# loss. The WAL then begins anew, unless a reader is in a transaction at that moment. In that case commits behind such
# pages are lost if the power fails before a later checkpoint. This is accepted: waiting for readers would stop all
# writers, and a checkpoint that restarts the WAL may copy beside another connection's commit.

# A checkpoint delays commits by 3 to 8 ms for each MiB: larger ones delay longer and save little.
CHECKPOINT_BYTES = 4 << 20
# The least that a commit adds to the WAL besides its values: the last leaf of the table, written again.
COMMIT_BYTES = PAGE_BYTES
# Deleting the file under a running log deletes acknowledged records in any case; a second more changes nothing.
SAME_FILE_CHECK_S = 1.0

# The SELECT reads the table it inserts into, so SQLite completes it first; `key` counts the heads from 0. A piece of
# an empty blob is NULL.
_INSERT = """WITH newest AS MATERIALIZED (
    SELECT next_stamp(:stream, :now_us, coalesce(max(timestamp_us), 0)) AS stamp_us FROM ({newest})
)
INSERT INTO {table}
SELECT (SELECT coalesce(max("offset") + 1, 0) FROM {table}) + head.key, (SELECT stamp_us FROM newest),
    json_extract(head.value, '$[0]'), json_extract(head.value, '$[1]'), json_extract(head.value, '$[4]'),
    coalesce(substr(:joined, json_extract(head.value, '$[2]'), json_extract(head.value, '$[3]')), x'')
FROM json_each(:heads) AS head"""

_NEWEST = 'SELECT * FROM (SELECT timestamp_us FROM {table} ORDER BY "offset" DESC LIMIT 1)'

_encode = msgspec.json.Encoder().encode


class FileAppender:
    """Writes groups into the file. For one thread."""

    def __init__(self, path: Path, clock_us: Callable[[], int], limits: Limits) -> None:
        self._path = path
        self._clock_us = clock_us
        self._limits = limits
        self._connection: sqlite3.Connection | None = None
        self._copier: sqlite3.Connection | None = None
        self._wal_bytes = 0
        self._checked_s = 0.0
        self._status: os.stat_result | None = None
        self._newest = ""  # SQL for the newest times of all partitions

    def commit(self, batches: Mapping[PartitionName, Batch]) -> dict[PartitionName, int]:
        """Write every batch in one transaction and return the first offset of each. Raises sqlite3.Error, OSError."""
        try:
            connection = self._open()
            now_us = self._clock_us()
            with _transaction(connection, needed=len(batches) > 1):
                firsts = {
                    place: _insert(connection, place, batch, now_us, self._newest) for place, batch in batches.items()
                }
        except BaseException:
            self.close()
            raise
        self._wal_bytes += sum(batch.value_bytes + COMMIT_BYTES for batch in batches.values())
        return firsts

    def tidy(self) -> None:
        """Copy the WAL into the file when it has grown enough. What cannot be copied stays safe in the WAL."""
        if self._wal_bytes >= CHECKPOINT_BYTES:
            try:
                self._checkpoint()
            except (sqlite3.Error, OSError):
                self.close()

    def close(self) -> None:
        """Drop the connections; the next commit opens others."""
        for connection in (self._connection, self._copier):
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
        self._connection = self._copier = None

    def _open(self) -> sqlite3.Connection:
        now_s = time.monotonic()
        if self._connection is None:
            self._connection = connect(self._path, self._limits.lock_wait_s_max)
            self._connection.create_function("next_stamp", 3, next_stamp, deterministic=True)
            self._copier = connect(self._path, self._limits.lock_wait_s_max)
            self._status, self._checked_s = os.stat(self._path), now_s
            self._checkpoint()
            self._newest = _newest_of(self._connection)
        if now_s - self._checked_s > SAME_FILE_CHECK_S:
            self._checked_s = now_s
            if self._status is None or not same_file(self._path, self._status):
                raise OSError(f"{self._path.name} was replaced")
        return self._connection

    def _checkpoint(self) -> None:
        if self._connection is not None and self._copier is not None:
            self._wal_bytes = 0
            checkpoint(self._connection, self._copier)


def _newest_of(connection: sqlite3.Connection) -> str:
    """Return the SELECT of the newest time of each partition. A log never gets more partitions."""
    streams = connection.execute("SELECT name, partitions FROM streams").fetchall()
    tables = [table_name(stream, partition) for stream, count in streams for partition in range(count)]
    return " UNION ALL ".join([_NEWEST.format(table=table) for table in tables])


def _insert(connection: sqlite3.Connection, place: PartitionName, batch: Batch, now_us: int, newest: str) -> int:
    """Append one batch; the offset of its first record."""
    statement = _INSERT.format(table=table_name(*place), newest=newest)
    heads, joined = _encode(batch.heads).decode(), b"".join(batch.values)
    values = {"stream": place[0], "now_us": now_us, "heads": heads, "joined": joined}
    last = connection.execute(statement, values).lastrowid
    assert last is not None
    return last + 1 - len(batch.heads)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, *, needed: bool) -> Iterator[None]:
    """A transaction around several statements; a single statement is one by itself."""
    if needed:
        connection.execute("BEGIN IMMEDIATE")
    yield
    if needed:
        connection.execute("COMMIT")


def checkpoint(writer: sqlite3.Connection, copier: sqlite3.Connection) -> None:
    """Copy the WAL into the file while ``writer`` holds the write lock, so that no commit runs beside it.

    Readers are not waited for: what they still look at is copied the next time. Raises sqlite3.Error.
    """
    writer.execute("BEGIN IMMEDIATE")
    try:
        copier.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    finally:
        writer.execute("ROLLBACK")
