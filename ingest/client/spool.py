"""The client's spool: events on disk until they are acknowledged.

``Spool`` is a SQLite file for each process, with a ``Journal`` in front. ``append`` writes an event to the journal;
from then on the event survives the end of the process, and a power cut once the system has written its pages. Most
events are acknowledged while they are in the journal. When the journal is full, the rest moves into SQLite in one
transaction.

A process owns both files by SQLite's exclusive lock, so processes that share a directory never wait for each other. A
file that can be locked belongs to a process that ended; ``spools`` finds such files, and the new owner sends their
events.
"""

import contextlib
import errno
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from io import FileIO
from itertools import islice
from pathlib import Path
from zlib import crc32

from ingest.client.lifecycle import abandon

# The journal. Writing a line is several times cheaper than a SQLite transaction. A line is ``+NUMBER EVENT``, or
# ``-NUMBER LAST``: the events from NUMBER to LAST are not needed any more. Before the line of an event stands
# ``#NUMBER CHECKSUM``, the CRC-32 of that line. Earlier versions wrote no such lines and pass over them, so an event
# without one counts as it is. A line that its process did not finish has no newline; a part lost in a power cut reads
# as zeros, which no event contains. Neither counts as an event. The file is emptied when nothing in it is needed. It
# has no lock of its own: the lock of the spool's SQLite file protects it, too.

logger = logging.getLogger(__name__)

JOURNAL_SUFFIX = ".journal"  # "-journal" would be SQLite's own

_EVENTS_MAX = 10_000  # needed ones: some 30 ms to move, and more than wait while a server keeps up
_BYTES_MAX = 16 << 20  # of what is needed and what is not: read within a tenth of a second by who takes it over

Row = tuple[int, bytes]


class Journal:
    """The file, and in memory what is needed of it. Every method but ``drop`` raises OSError when the disk fails."""

    def __init__(self, spool: Path) -> None:
        self._path = Path(f"{spool}{JOURNAL_SUFFIX}")
        self._path.touch(mode=0o600)
        self._file = FileIO(self._path, "r+")
        self._descriptor = self._file.fileno()
        *lines, unfinished = self._file.readall().split(b"\n")
        self._bytes = self._file.seek(-len(unfinished), os.SEEK_END)
        self.needed: dict[int, bytes] = _needed(lines)

    def append(self, number: int, line: bytes) -> None:
        """Write one event; its number is larger than any before."""
        event = b"+%d %b" % (number, line)
        self._write(b"#%d %d\n%b\n" % (number, crc32(event), event))
        self.needed[number] = line

    def is_full(self) -> bool:
        """Whether what is needed should move elsewhere, so that the file can be emptied."""
        return len(self.needed) >= _EVENTS_MAX or self._bytes >= _BYTES_MAX

    def after(self, number: int, limit: int) -> list[Row]:
        """The next events that are needed after a number, in order."""
        return list(islice((row for row in self.needed.items() if row[0] > number), limit))

    def settle(self, numbers: Sequence[int]) -> None:
        """These events, which were needed until now, are needed no more."""
        if len(numbers) < len(self.needed):
            self._write(b"".join(b"-%d %d\n" % each for each in ranges(numbers)))
        for number in numbers:
            del self.needed[number]
        if not self.needed:
            self.clear()

    def clear(self) -> None:
        """Nothing in it is needed."""
        self.needed.clear()
        self._file.truncate(0)
        self._bytes = self._file.seek(0)

    def remove(self) -> None:
        """Close the file, and delete it."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _write(self, lines: bytes) -> None:
        written = os.write(self._descriptor, lines)
        if written != len(lines):
            self._file.seek(self._bytes)
            with contextlib.suppress(OSError):  # or what is there of these would be read as lines behind the next ones
                self._file.truncate()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += written


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """These numbers, first to last: in one piece if they are one, or else one by one."""
    first, last = min(numbers), max(numbers)
    return [(first, last)] if last - first + 1 == len(numbers) else [(number, number) for number in numbers]


def _needed(lines: Iterable[bytes]) -> dict[int, bytes]:
    """What the lines of a journal leave to be done."""
    needed: dict[int, bytes] = {}
    checksum = b""  # of the next line
    for line in lines:
        number, _, rest = line.partition(b" ")
        if 0 in line or not number[1:].isdigit():
            logger.warning("a line of a spool's journal is damaged")
        elif number[:1] == b"+" and checksum.isdigit() and int(checksum) != crc32(line):
            logger.error("an event in a spool's journal is damaged and is not sent", extra={"number": int(number[1:])})
        elif number[:1] == b"+":
            needed[int(number)] = rest
        elif number[:1] == b"-" and rest.isdigit():
            for settled in range(-int(number), int(rest) + 1):
                needed.pop(settled, None)
        checksum = rest if number[:1] == b"#" else b""
    return needed


# The SQLite file. Its events are older than those of the journal. Events may contain prompts, so only the file's user
# may read it, whatever the permissions of the directory. A connection must not cross a fork: the child forgets it
# without closing, and makes a file of its own.

SPOOL_SUFFIX = ".spool"
_WAL = "-wal"  # SQLite's name for its write-ahead log
_CHECKPOINT_PAGES = 4000  # 16 MiB of it: two syncs for some 50,000 events
_ATTEMPTS = 5  # at making a file that nobody else takes for abandoned
_MAKING_S = 60.0  # an empty file this old is no longer being made: its process ended in between


class SpoolBroken(Exception):
    """The disk is full or fails: hold the event elsewhere and try again later."""


def fingerprint(base_url: str, token: str, destination: str = "") -> str:
    """Names whose events a file holds, so that none is ever sent to another server or organization."""
    address = base_url.rstrip("/")
    whose = (address, token, destination) if destination else (address, token)
    return sha256("\n".join(whose).encode()).hexdigest()[:16]


class Spool:
    """One file, opened at the first use. One thing at a time: the outbox's turns see to that."""

    def __init__(self, directory: Path, owner: str, path: Path | None = None) -> None:
        self.directory, self._owner, self._path = directory, owner, path
        self._opened: tuple[sqlite3.Connection, Journal] | None = None

    def append(self, number: int, line: bytes) -> None:
        """Write one event; its number is larger than any before. Raises SpoolBroken."""
        _, journal = self._opened or self._open()
        if journal.is_full():
            self._fold()
        try:
            journal.append(number, line)
        except OSError as error:
            raise SpoolBroken(str(error)) from error

    def append_all(self, rows: Sequence[Row]) -> None:
        """Write several events, all or none, into the SQLite file. Raises SpoolBroken."""
        self._fold(rows)

    def read(self, after: int, limit: int) -> list[Row]:
        """The next events after a number, in order. Raises SpoolBroken."""
        connection, journal = self._opened or self._open()
        try:
            sql = "SELECT number, line FROM events WHERE number > ? ORDER BY number LIMIT ?"
            rows = connection.execute(sql, (after, limit)).fetchall()
        except sqlite3.Error as error:
            raise SpoolBroken(str(error)) from error
        return rows + journal.after(rows[-1][0] if rows else after, limit - len(rows))

    def delete(self, numbers: Sequence[int]) -> None:
        """Forget these events; some or none when it raises SpoolBroken."""
        connection, journal = self._opened or self._open()
        recent = [number for number in numbers if number in journal.needed]
        try:
            if recent:
                journal.settle(recent)
            if len(recent) < len(numbers):
                with _transaction(connection, "PRAGMA synchronous = NORMAL"):
                    connection.executemany("DELETE FROM events WHERE number BETWEEN ? AND ?", ranges(numbers))
        except (sqlite3.Error, OSError) as error:
            raise SpoolBroken(str(error)) from error

    def is_empty(self) -> bool:
        """Whether nothing waits in it. Raises SpoolBroken."""
        return self._opened is None or not self.read(-1, 1)

    def close(self) -> None:
        """Give the file up; an empty one is removed. What it holds is for the next process. Raises SpoolBroken, and has
        given it up all the same."""
        if self._opened is None or self._path is None:
            return
        connection, journal = self._opened
        try:
            is_empty = self.is_empty()
            if not is_empty:
                self._fold()
            journal.remove()
            if is_empty:
                self._path.unlink(missing_ok=True)  # while it is locked, so that nobody has just put something in
            connection.close()
            if is_empty:
                Path(f"{self._path}{_WAL}").unlink(missing_ok=True)
        except (SpoolBroken, sqlite3.Error, OSError) as error:
            journal.drop()
            raise SpoolBroken(str(error)) from error
        finally:
            self._opened = None

    def forget(self) -> None:
        """After a fork, in the child: everything is the parent's. Closing SQLite's file here would damage it."""
        if self._opened is not None:
            connection, journal = self._opened
            abandon(connection)
            journal.drop()
        self._opened = self._path = None

    def claim(self) -> bool:
        """Open an existing file; False when its process lives or just makes it, or when it cannot be read."""
        assert self._path is not None
        try:
            if _is_being_made(self._path):
                return False
            self._opened = _connect(self._path)
        except (sqlite3.OperationalError, FileNotFoundError):
            return False
        except (sqlite3.DatabaseError, OSError) as error:
            logger.error("a spool cannot be read", extra={"path": str(self._path), "cause": str(error)})
            return False
        return True

    def _open(self) -> tuple[sqlite3.Connection, Journal]:
        """A new file. For a moment it is there, empty, and not locked: whoever looks for abandoned files leaves it
        alone for a while. Should it be taken and removed all the same, it is tried again under another name."""
        problem = "no file can be kept in the directory"
        for _ in range(_ATTEMPTS):
            path = self.directory / f"{self._owner}-{os.urandom(8).hex()}{SPOOL_SUFFIX}"
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                connection, journal = _connect(path)
                if path.exists():
                    self._opened, self._path = (connection, journal), path
                    return connection, journal
                connection.close()
                journal.remove()
            except (sqlite3.Error, OSError) as error:
                problem = str(error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        raise SpoolBroken(problem)

    def _fold(self, more: Sequence[Row] = ()) -> None:
        """Move what the journal holds, and more, into the SQLite file; when it has reached the disk the journal lets go
        of it."""
        connection, journal = self._opened or self._open()
        try:
            with _transaction(connection, "PRAGMA synchronous = FULL"):
                rows = [*journal.needed.items(), *more]
                connection.executemany("INSERT OR REPLACE INTO events VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise SpoolBroken(str(error)) from error
        with contextlib.suppress(OSError):  # events that stay in both places are found once
            journal.clear()


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, manner: str) -> Iterator[None]:
    connection.execute(manner)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _connect(path: Path) -> tuple[sqlite3.Connection, Journal]:
    """The file, locked, and its journal, without what a process that was killed in ``_fold`` had in both."""
    uri = f"{path.absolute().as_uri()}?mode=rw"  # a file that SQLite made would be readable by others
    connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, line BLOB NOT NULL)")
        connection.execute("COMMIT")
        journal = Journal(path)
        newest = connection.execute("SELECT coalesce(max(number), -1) FROM events").fetchone()[0]
        if in_both := [number for number in journal.needed if number <= newest]:
            journal.settle(in_both)
    except BaseException:
        connection.close()
        raise
    return connection, journal


def _is_being_made(path: Path) -> bool:
    """Empty and new: SQLite writes its first page under the lock that keeps the file."""
    status = path.stat()
    return status.st_size == 0 and abs(time.time() - status.st_mtime) < _MAKING_S


def spools(directory: Path, owners: Sequence[str]) -> list[Spool]:
    """The files of these owners, not opened; ``claim`` tells which of them belong to nobody."""
    for owner in owners:
        for log in directory.glob(f"{owner}-*{SPOOL_SUFFIX}{_WAL}"):  # of a file that was removed a moment too early
            if not Path(str(log).removesuffix(_WAL)).exists():
                log.unlink(missing_ok=True)
        for journal in directory.glob(f"{owner}-*{SPOOL_SUFFIX}{JOURNAL_SUFFIX}"):
            _bring_back(Path(str(journal).removesuffix(JOURNAL_SUFFIX)), journal)
    return [
        Spool(directory, owner, path)
        for owner in owners
        for path in sorted(directory.glob(f"{owner}-*{SPOOL_SUFFIX}"))
    ]


def strangers(directory: Path, owners: Sequence[str]) -> list[Spool]:
    """The files of other servers and tokens, not opened. Nobody sends them who does not know their owner."""
    found = sorted(directory.glob(f"*-*{SPOOL_SUFFIX}"))
    return [Spool(directory, "", path) for path in found if path.name.partition("-")[0] not in owners]


def _bring_back(path: Path, journal: Path) -> None:
    """Make the SQLite file anew of which only the journal is there: somebody removed it, and the events are needed."""
    with contextlib.suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)
        os.utime(path, (0, 0))  # nobody is making it
        if journal.exists():
            logger.warning("a spool's file was missing: its journal is taken over", extra={"path": str(path)})
