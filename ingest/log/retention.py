"""Retention: remove the oldest records of a partition, a few at a time, so that appending goes on between.

Times never go backwards within a partition, so what is older than an instant is a prefix, and its end is found
by bisection. The newest record always stays: the next offset and the clock's floor are read from it.
"""

import sqlite3
from bisect import bisect_left
from contextlib import closing
from pathlib import Path

from ingest.log.appender import checkpoint
from ingest.log.sqlite_file import connect

# Removing a record reads every page of its value; this many keep the write lock for milliseconds only.
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
