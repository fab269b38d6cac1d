"""What is captured and not yet acknowledged, on disk: a SQLite file for each process.

A process owns its file by SQLite's exclusive lock, held while the file is open. So processes that share a directory
never wait for one another, and a file that can be locked belongs to nobody: its process is gone, killed perhaps, and
whoever locks it takes over the events, ids and all. An event is in the file when ``append`` returns, and survives the
end of the process in whatever way; it survives a power cut once the system has written its pages.

A connection must not cross a fork: the child forgets it, without closing, and makes a file of its own.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from ingest.client.lifecycle import abandon

logger = logging.getLogger(__name__)

SUFFIX = ".spool"
_JOURNAL = "-wal"  # SQLite's name for it
_PAGE_BYTES = 2048  # an insert writes one page: larger ones cost more, smaller ones split events
_CHECKPOINT_PAGES = 4000  # 8 MiB of journal: two disk syncs for some 4000 events
_UNSYNCED_MAX = 300  # events, somewhat under a megabyte of journal
_ATTEMPTS = 5  # at making a file that nobody else takes for abandoned

Row = tuple[int, bytes]


class SpoolBroken(Exception):
    """The disk is full or fails: hold the event elsewhere and try again later."""


def fingerprint(base_url: str, token: str) -> str:
    """Names whose events a file holds, so that none is ever sent to another server or organization."""
    return sha256(f"{base_url}\n{token}".encode()).hexdigest()[:16]


class Spool:
    """One file, opened at the first use. Not for several threads at once: the outbox's lock guards it."""

    def __init__(self, directory: Path, owner: str, path: Path | None = None) -> None:
        self.directory, self._owner, self._path = directory, owner, path
        self._connection: sqlite3.Connection | None = None
        self._unsynced = 0

    def append(self, number: int, line: bytes) -> None:
        """Write one event. Raises SpoolBroken."""
        connection = self._connection or self._open()
        try:
            connection.execute("INSERT INTO events VALUES (?, ?)", (number, line))
            self._unsynced += 1
        except sqlite3.Error as error:
            raise SpoolBroken(str(error)) from error

    def append_all(self, rows: Sequence[Row]) -> None:
        """Write several events, all or none. Raises SpoolBroken."""
        self._together("INSERT INTO events VALUES (?, ?)", rows)

    def read(self, after: int, limit: int) -> list[Row]:
        """The next events after a number, in order. Raises SpoolBroken."""
        connection = self._connection or self._open()
        try:
            sql = "SELECT number, line FROM events WHERE number > ? ORDER BY number LIMIT ?"
            return connection.execute(sql, (after, limit)).fetchall()
        except sqlite3.Error as error:
            raise SpoolBroken(str(error)) from error

    def delete(self, numbers: Sequence[int]) -> None:
        """Forget these events, all or none. Raises SpoolBroken."""
        first, last = min(numbers), max(numbers)
        if last - first + 1 == len(numbers):
            self._together("DELETE FROM events WHERE number BETWEEN ? AND ?", [(first, last)])
        else:
            self._together("DELETE FROM events WHERE number = ?", [(number,) for number in numbers])

    def is_empty(self) -> bool:
        """Whether nothing waits in it. Raises SpoolBroken."""
        return self._connection is None or not self.read(-1, 1)

    def sync(self) -> None:
        """Bring the journal to the disk, from a thread of its own and without the lock: a checkpoint, which has to,
        then finds little left to do and keeps nobody waiting."""
        if self._path is None or self._unsynced < _UNSYNCED_MAX:
            return
        self._unsynced = 0
        with contextlib.suppress(OSError):
            journal = os.open(f"{self._path}{_JOURNAL}", os.O_RDONLY)
            try:
                os.fsync(journal)
            finally:
                os.close(journal)  # of the journal: closing the file itself would give up SQLite's lock on it

    def close(self) -> None:
        """Give the file up; an empty one is removed. What it holds is for the next process."""
        if self._connection is None or self._path is None:
            return
        try:
            is_empty = self.is_empty()
            if is_empty:
                self._path.unlink(missing_ok=True)  # while it is locked, so that nobody has just put something in
            self._connection.close()
            if is_empty:
                Path(f"{self._path}{_JOURNAL}").unlink(missing_ok=True)
        except (SpoolBroken, sqlite3.Error, OSError) as error:
            logger.warning("the spool could not be closed in order", extra={"cause": str(error)})
        self._connection = None

    def forget(self) -> None:
        """After a fork, in the child: the connection is the parent's. Closing it here would damage the file."""
        if self._connection is not None:
            abandon(self._connection)
        self._connection = self._path = None

    def claim(self) -> bool:
        """Open an existing file; False when its process lives, or when it cannot be read."""
        assert self._path is not None
        try:
            self._connection = _connect(self._path)
        except sqlite3.OperationalError:
            return False
        except sqlite3.DatabaseError as error:
            logger.error("a spool cannot be read", extra={"path": str(self._path), "cause": str(error)})
            return False
        return True

    def _open(self) -> sqlite3.Connection:
        """A new file. For a moment it is there and not locked: whoever looks for abandoned files just then takes it,
        finds nothing and removes it. Then it is tried again under another name."""
        problem = "no file can be kept in the directory"
        for _ in range(_ATTEMPTS):
            path = self.directory / f"{self._owner}-{os.urandom(8).hex()}{SUFFIX}"
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                connection = _connect(path)
                if path.exists():
                    self._connection, self._path = connection, path
                    return connection
                connection.close()
            except (sqlite3.Error, OSError) as error:
                problem = str(error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        raise SpoolBroken(problem)

    def _together(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        connection = self._connection or self._open()
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(statement, rows)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise SpoolBroken(str(error)) from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, line BLOB NOT NULL)")
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def spools(directory: Path, owners: Sequence[str]) -> list[Spool]:
    """The files of these owners, not opened; ``claim`` tells which of them belong to nobody."""
    for owner in owners:
        for journal in directory.glob(f"{owner}-*{SUFFIX}{_JOURNAL}"):  # of a file that was removed a moment too early
            if not Path(str(journal).removesuffix(_JOURNAL)).exists():
                journal.unlink(missing_ok=True)
    return [Spool(directory, owner, path) for owner in owners for path in sorted(directory.glob(f"{owner}-*{SUFFIX}"))]
