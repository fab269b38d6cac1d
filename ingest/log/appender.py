"""The writing end of the embedded log: one transaction per group, and checkpoints while nobody waits.

Offsets, dense and without a counter of their own, come from the newest record: its offset plus one. So does the
clock's floor. That is why retention never removes the newest record of a partition.

After any error the connections are dropped and the next group opens others: what SQLite thinks of a transaction
whose sync failed is not to be built upon. Whoever opens them, after an error or another process's death, first
copies the WAL into the file. A sync that failed may have left pages that the system shows but the disk never got,
and a commit written behind such pages would go with them when the power goes. Once they are copied the WAL begins
anew, unless a reader is in a transaction just then: what is acknowledged behind such pages meanwhile is lost if the
power goes before a later checkpoint has copied it, too. That is left as it is: to wait for readers would hold up
everybody, and a checkpoint that starts the WAL over may copy beside another's commit.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from ingest.log.limits import Limits
from ingest.log.sqlite_file import PAGE_BYTES, connect, same_file, table_name
from ingest.log.writer import Batch, PartitionName

# A checkpoint holds up whoever comes meanwhile, 3 to 8 ms for each MiB: larger ones stall longer and save little.
CHECKPOINT_BYTES = 4 << 20
# What a commit adds to the WAL besides its values, at least: the last leaf of the table, written again.
COMMIT_BYTES = PAGE_BYTES
# Who deletes the file under a running log has deleted what was acknowledged; a second more changes nothing.
SAME_FILE_CHECK_S = 1.0

# The SELECT reads the table it inserts into, so SQLite completes it first; `key` counts the heads from 0. A piece of
# an empty blob is NULL.
_INSERT = """INSERT INTO {table}
SELECT (SELECT coalesce(max("offset") + 1, 0) FROM {table}) + head.key,
    max(:now_us, coalesce((SELECT timestamp_us FROM {table} ORDER BY "offset" DESC LIMIT 1), :now_us)),
    json_extract(head.value, '$[0]'), json_extract(head.value, '$[1]'), json_extract(head.value, '$[4]'),
    coalesce(substr(:joined, json_extract(head.value, '$[2]'), json_extract(head.value, '$[3]')), x'')
FROM json_each(:heads) AS head"""

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

    def commit(self, batches: Mapping[PartitionName, Batch]) -> dict[PartitionName, int]:
        """Write every batch in one transaction and return the first offset of each. Raises sqlite3.Error, OSError."""
        try:
            connection = self._open()
            now_us = self._clock_us()
            with _transaction(connection, needed=len(batches) > 1):
                firsts = {place: _insert(connection, place, batch, now_us) for place, batch in batches.items()}
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
            self._copier = connect(self._path, self._limits.lock_wait_s_max)
            self._status, self._checked_s = os.stat(self._path), now_s
            self._checkpoint()
        if now_s - self._checked_s > SAME_FILE_CHECK_S:
            self._checked_s = now_s
            if self._status is None or not same_file(self._path, self._status):
                raise OSError(f"{self._path.name} was replaced")
        return self._connection

    def _checkpoint(self) -> None:
        if self._connection is not None and self._copier is not None:
            self._wal_bytes = 0
            checkpoint(self._connection, self._copier)


def _insert(connection: sqlite3.Connection, place: PartitionName, batch: Batch, now_us: int) -> int:
    """Append one batch; the offset of its first record."""
    statement = _INSERT.format(table=table_name(*place))
    values = {"now_us": now_us, "heads": _encode(batch.heads).decode(), "joined": b"".join(batch.values)}
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
