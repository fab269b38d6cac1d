"""The embedded log: one SQLite file, for one machine.

``EmbeddedLog`` puts the parts together: ``ingest.log.sqlite_writer`` appends by group commit in one thread,
``ingest.log.sqlite_reader`` reads with one statement per call, ``ingest.log.sqlite_file`` knows the format. Several
processes may open the file and append; SQLite's locks admit one commit at a time. ``trim`` is the retention.
"""

import asyncio
import os
import sqlite3
import stat
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from ingest.log.partitions import PARTITIONS, Limits, Places, take_in_order
from ingest.log.sqlite_file import FILE_NAME, connect, create, table_name
from ingest.log.sqlite_reader import FileReader
from ingest.log.sqlite_writer import FileAppender, GroupWriter, checkpoint
from meters.log import Entry, Record, Refused, TryAgain

# Retention. The oldest records of a partition are removed a few at a time, so that appending goes on in between.
# Times never decrease within a partition, so bisection finds the end of what is too old. The newest record always
# stays: the next offset and the lowest time for the next record are read from it.

# Removing a record reads every page of its value; this many hold the write lock for milliseconds only.
RECORDS_PER_STEP = 256

_BOUNDS = 'SELECT (SELECT min("offset") FROM {table}), (SELECT max("offset") FROM {table})'
_TIMESTAMP = 'SELECT timestamp_us FROM {table} WHERE "offset" = ?'
_DELETE = 'DELETE FROM {table} WHERE "offset" < ?'


def trim(path: Path, table: str, older_than_us: int, busy_wait_s: float) -> int:
    """Remove the records ingested before the instant; how many. Raises sqlite3.Error with a part removed."""
    with closing(connect(path, busy_wait_s)) as writer, closing(connect(path, busy_wait_s)) as copier:
        start, end = _bounds(writer, table)
        keep = _first_kept(writer, table, start, end, older_than_us)
        for step in range(start, keep, RECORDS_PER_STEP):
            below = min(step + RECORDS_PER_STEP, keep)
            writer.execute(_DELETE.format(table=table), (below,))
            checkpoint(writer, copier)
    return keep - start


def _bounds(connection: sqlite3.Connection, table: str) -> tuple[int, int]:
    start, newest = connection.execute(_BOUNDS.format(table=table)).fetchone()
    return (0, 0) if newest is None else (start, newest + 1)


def _first_kept(connection: sqlite3.Connection, table: str, start: int, end: int, older_than_us: int) -> int:
    def timestamp_us(offset: int) -> int:
        row = connection.execute(_TIMESTAMP.format(table=table), (offset,)).fetchone()
        return int(row[0]) if row else 0  # another trimmer was here first

    candidates = range(start, max(start, end - 1))
    return start + bisect_left(candidates, older_than_us, key=timestamp_us)


# The log.

# A waiting reader polls for commits of other processes, first often, because under load the next commit is near, then
# more and more rarely: an idle reader costs one hundredth of a core, and its first record waits 20 ms at most.
POLL_S_MIN = 0.001
POLL_S_MAX = 0.020


def _require_writable(path: Path, limits: Limits) -> None:
    """Raises TryAgain for a file that this user may only read: SQLite would open it and refuse the first event."""
    for part in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        if part.exists() and not os.access(part, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            status = part.stat()
            raise TryAgain(
                f"{part} cannot be written by user {os.geteuid()}: it is user {status.st_uid}'s with mode "
                f"{stat.S_IMODE(status.st_mode):04o}; give it to the user that the server runs as (chown, chmod 600)",
                limits.retry_after_s,
            )


class EmbeddedLog:
    """The log in ``directory``/log.sqlite. See ``meters.log.Log`` for what the methods promise."""

    def __init__(
        self, directory: Path, partitions: Mapping[str, int] | None, clock_us: Callable[[], int], limits: Limits
    ) -> None:
        """Open the log, or make it with so many partitions by stream (None: as they are).

        Raises TryAgain, Refused; PositionLost when what is there is damaged.
        """
        self._path = directory / FILE_NAME
        self._limits = limits
        _require_writable(self._path, limits)
        try:
            create(self._path, partitions or PARTITIONS, limits.lock_wait_s_max)
        except (sqlite3.Error, OSError) as error:
            raise TryAgain(f"the log cannot be opened: {error}", limits.retry_after_s) from error
        self._reader = FileReader(self._path, limits.lock_wait_s_max)
        self._places = Places({stream: count for stream, (_, count) in self._reader.streams().items()})
        if partitions and self._places.partitions != dict(partitions):
            self._reader.close()
            raise Refused(f"the log has the partitions {self._places.partitions}, not {dict(partitions)}")
        self._writer = GroupWriter(FileAppender(self._path, clock_us, limits), limits, "log-writer")

    async def append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        """Make the entries durable and return their offsets. Raises TryAgain, Refused."""
        return await self.submit(stream, entries) if entries else []

    def submit(self, stream: str, entries: Sequence[Entry]) -> "asyncio.Future[list[int]]":
        """Queue the entries and return the future of their offsets. Raises TryAgain, Refused."""
        self._places.check_entries(stream, entries, self._limits)
        return self._writer.submit(stream, entries)

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """The next records from the positions. Raises PositionLost, TryAgain."""
        deadline_s = time.monotonic() + wait_s
        pause_s = POLL_S_MIN
        version = self._reader.version()
        records = self._read_now(stream, positions, bytes_max)
        while not records and (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, POLL_S_MAX)
            if (seen := self._reader.version()) != version:
                version = seen
                records = self._read_now(stream, positions, bytes_max)
        return records

    def starts(self, stream: str) -> dict[int, int]:
        """The offset of the oldest record, by partition."""
        return {partition: self._reader.bounds(stream, partition)[0] for partition in self._places.of(stream)}

    def ends(self, stream: str) -> dict[int, int]:
        """The offset the next record will get, by partition."""
        return {partition: self._reader.bounds(stream, partition)[1] for partition in self._places.of(stream)}

    def identity(self, stream: str) -> str:
        """The stream's name for itself, made with it."""
        self._places.of(stream)
        return self._reader.streams()[stream][0]

    def trim(self, stream: str, older_than_us: int) -> int:
        """Remove the oldest records, those ingested before the instant, and return how many. Raises TryAgain.

        The newest record of a partition always stays, because it carries the next offset. The space is used
        again; the file does not shrink.
        """
        try:
            return sum(
                trim(self._path, table_name(stream, partition), older_than_us, self._limits.lock_wait_s_max)
                for partition in self._places.of(stream)
            )
        except sqlite3.Error as error:
            raise TryAgain(f"the log cannot be trimmed now: {error}", self._limits.retry_after_s) from error

    def close(self) -> None:
        """Commit what is queued, then close the file."""
        self._writer.close()
        self._reader.close()

    def _read_now(self, stream: str, positions: Mapping[int, int], bytes_max: int) -> list[Record]:
        self._places.check_all(stream, positions)
        found = {place[0]: self._reader.fetch(stream, *place, bytes_max) for place in positions.items()}
        if len(found) == 1:
            return next(iter(found.values()))[0]
        waiting = {partition: deque(records) for partition, (records, _) in found.items()}
        return take_in_order(waiting, lambda partition: found[partition][1], bytes_max)
