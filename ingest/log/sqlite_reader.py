"""Read the embedded log: one SQL statement for each read.

``FileReader.read`` walks from the requested position from record to record until the bytes are used up, and returns
the records. One statement sees one state of the file. No transaction stays open between calls, because an open reader
would keep the WAL from starting over.

Every result is checked: offsets must follow one another from the requested position, and values must have the lengths
they were stored with.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec

from ingest.log.sqlite_file import connect, same_file, table_name, unpack
from meters.log import PositionLost, Record, TryAgain

# Each record of a read takes about 300 bytes of objects besides its value: 15 MB at most.
RECORDS_MAX = 50_000

_FETCH = """WITH RECURSIVE run(place, bytes) AS (
    SELECT "offset", length FROM {table} WHERE "offset" = :position
    UNION ALL
    SELECT "offset", bytes + length FROM run JOIN {table} ON "offset" = place + 1
    WHERE bytes + length <= :bytes_max
    LIMIT :records_max
)
SELECT (SELECT min("offset") FROM {table}), (SELECT max("offset") + 1 FROM {table}),
    json_array(json_group_array("offset"), json_group_array(timestamp_us), json_group_array(length(value)),
        json_group_array(organization_id), json_group_array(admitted), json_group_array(length)),
    CAST(group_concat(value, '') AS BLOB)
FROM {table} WHERE "offset" BETWEEN :position AND (SELECT max(place) FROM run)"""

_BOUNDS = """SELECT (SELECT min("offset") FROM {table}), (SELECT max("offset") + 1 FROM {table})"""

# The columns: offsets, timestamps, stored lengths, organizations, admitted, plain lengths.
_Columns = tuple[list[int], list[int], list[int], list[str | None], list[int], list[int]]
_columns = msgspec.json.Decoder(_Columns)


class FileReader:
    """Reads from the file on a connection of its own. For any thread; calls take turns."""

    def __init__(self, path: Path, busy_wait_s: float) -> None:
        self._path = path
        self._busy_wait_s = busy_wait_s
        self._turn = threading.Lock()  # guards what follows
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._status: os.stat_result | None = None

    def fetch(self, stream: str, partition: int, position: int, bytes_max: int) -> tuple[list[Record], bool]:
        """The records from ``position``, one if there is any, else no more than the bytes; and whether there are more.

        Raises PositionLost, TryAgain.
        """
        arguments = {"position": position, "bytes_max": bytes_max, "records_max": RECORDS_MAX}
        with self._use() as connection:
            statement = _FETCH.format(table=table_name(stream, partition))
            start, end, heads, joined = connection.execute(statement, arguments).fetchone()
        where = f"{stream} partition {partition}"
        if joined is None:
            _check_position(where, position, start or 0, end or 0)
            return [], False
        records = _records(where, partition, position, _columns.decode(heads), joined)
        return records, position + len(records) < end

    def bounds(self, stream: str, partition: int) -> tuple[int, int]:
        """The offset of the oldest record and of the next one."""
        with self._use() as connection:
            start, end = connection.execute(_BOUNDS.format(table=table_name(stream, partition))).fetchone()
        return start or 0, end or 0

    def streams(self) -> dict[str, tuple[str, int]]:
        """Identity and number of partitions, by stream."""
        with self._use() as connection:
            rows = connection.execute("SELECT name, identity, partitions FROM streams").fetchall()
        return {name: (identity, partitions) for name, identity, partitions in rows}

    def version(self) -> int:
        """A number that changes when anyone has committed to the file since. PositionLost if it is another file."""
        with self._use() as connection:
            if self._status is None or not same_file(self._path, self._status):
                raise PositionLost(f"{self._path.name} was deleted or replaced while it was read")
            (version,) = connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def close(self) -> None:
        """Wait for the call that is running, then drop the connection. Later calls raise TryAgain."""
        with self._turn:
            self._closed = True
            self._drop()

    @contextlib.contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one caller; dropped after any error. SQLite's errors stop here."""
        with self._turn:
            if self._closed:
                raise TryAgain("the log is closed")
            try:
                if self._connection is None:
                    self._connection = connect(self._path, self._busy_wait_s)
                    self._status = os.stat(self._path)
                yield self._connection
            except (sqlite3.OperationalError, OSError) as error:  # locked, disk full, I/O: may pass
                self._drop()
                raise TryAgain(f"the log cannot be read now: {error}") from error
            except sqlite3.Error as error:  # malformed, not a database: will not
                self._drop()
                raise PositionLost(f"the log is damaged: {error}") from error

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def _check_position(where: str, position: int, start: int, end: int) -> None:
    """Why there is no record at the position: nothing wrong if it is the end, PositionLost if not."""
    if position == end:
        return
    if position > end:
        raise PositionLost(f"{where} ends at {end}, before {position}: it was replaced or cut back")
    if position < start:
        raise PositionLost(f"{where} starts at {start}: retention removed {position}")
    raise PositionLost(f"{where} has no record {position} between {start} and {end}: it is damaged")


def _records(where: str, partition: int, position: int, columns: _Columns, joined: bytes) -> list[Record]:
    offsets, timestamps, lengths, organizations, admitted, plain = columns
    cuts = [0, *accumulate(lengths)]
    if offsets != list(range(position, position + len(offsets))) or cuts[-1] != len(joined):
        raise PositionLost(f"{where} is damaged after {position}: offsets or lengths do not add up")
    try:
        values = [unpack(joined[start:end], length) for (start, end), length in zip(pairwise(cuts), plain, strict=True)]
    except ValueError as error:
        raise PositionLost(f"{where} is damaged after {position}: {error}") from error
    return [
        Record(partition, offset, timestamp, value, organization, admission >= 1, admission == 2)
        for offset, timestamp, value, organization, admission in zip(
            offsets, timestamps, values, organizations, admitted, strict=True
        )
    ]
