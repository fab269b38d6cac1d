"""The embedded log's file: format, pragmas and compression.

    log.sqlite       streams(name, identity, partitions), and one table per stream and partition
    log.sqlite-wal   commits that are durable but not yet copied into the file; part of the log
    log.sqlite-shm   SQLite's index of the WAL; created again when it is missing

``create`` makes the file and ``connect`` opens a connection to it with the right pragmas; ``pack`` and ``unpack``
compress values. Three decisions shape this module:

* One statement per group. Python releases its interpreter lock around every step of a SQLite statement, and under
  load each release can cost milliseconds. So all values of a group travel in one blob, with their heads as JSON.
* No checkpoint while anybody writes. Up to SQLite 3.51.2 a checkpoint beside another connection's commit can lose
  pages of the WAL (sqlite.org/wal.html, "The WAL-Reset Bug"). Automatic checkpoints are off, and ours run under
  SQLite's write lock.
* No memory mapping. An I/O error under a mapping is a SIGBUS that kills the process; through read() it is an error.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

import zstandard

from meters.log import Refused

# Compression. Events of one sender resemble each other, so zstd makes them 5 to 15 times smaller, and packing costs
# less than writing and syncing the difference. A value that is too short to gain is stored as it is. Lengths tell
# which: a packed value is shorter than its plain length, which is stored beside it.

PACK_BYTES_MIN = 1024  # a shorter value gains little and costs a call
LEVEL = 1  # 0.3 us for an event of 300 bytes; higher levels cost more than the disk saves


class _Packers(threading.local):
    """A compressor and a decompressor for each thread: they must not be shared."""

    def __init__(self) -> None:
        self.pack = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress
        self.unpack = zstandard.ZstdDecompressor().decompress


_packers = _Packers()


def pack(value: bytes) -> bytes:
    """The value as it is stored: packed if that makes it shorter."""
    if len(value) < PACK_BYTES_MIN:
        return value
    packed = _packers.pack(value)
    return packed if len(packed) < len(value) else value


def unpack(stored: bytes, length: int) -> bytes:
    """The value of ``length`` bytes that was stored. Raises ValueError when these bytes are not it."""
    if len(stored) == length:
        return stored
    try:
        value: bytes = _packers.unpack(stored, max_output_size=length)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(value) != length:
        raise ValueError(f"{len(value)} bytes instead of {length}")
    return value


# The file.

FILE_NAME = "log.sqlite"
FORMAT = 1  # PRAGMA user_version; a change of the tables below raises it
APPLICATION_ID = 0x4D54524C  # "MTRL", so that `file log.sqlite` tells what it is

# SQLite 3.38 is the first with JSON built in and with a group_concat that keeps every byte of a blob.
SQLITE_VERSION_MIN = (3, 38, 0)
# 8 KiB measured best: 4 KiB pages cost twice the system calls for a 30 KB value, and larger pages make the smallest
# commit (which writes at least one page) dearer without making large commits cheaper.
PAGE_BYTES = 8192
# Enough for the leaves and the root of the tree while a group is written; the values pass through.
CACHE_KIBIBYTES = 8192
# A reader that held the WAL open for long lets it grow; a later checkpoint shrinks it to this size.
WAL_BYTES_KEPT = 64 << 20

_PRAGMAS = (
    "journal_mode = WAL",  # as it was made; a copy made by VACUUM INTO comes back without it
    "synchronous = FULL",  # a commit returns after the WAL is on the disk
    "wal_autocheckpoint = 0",  # see above
    f"journal_size_limit = {WAL_BYTES_KEPT}",
    f"cache_size = -{CACHE_KIBIBYTES}",
    "temp_store = MEMORY",  # a full /tmp must not refuse events
    "secure_delete = OFF",  # trimming need not overwrite what it frees
    "mmap_size = 0",
)

_CREATE_STREAMS = (
    "CREATE TABLE streams (name TEXT PRIMARY KEY, identity TEXT NOT NULL, partitions INTEGER NOT NULL) WITHOUT ROWID"
)
_CREATE_RECORDS = """CREATE TABLE {table} (
    "offset" INTEGER PRIMARY KEY, timestamp_us INTEGER NOT NULL,
    organization_id TEXT, admitted INTEGER NOT NULL, length INTEGER NOT NULL, value BLOB NOT NULL)"""


def table_name(stream: str, partition: int) -> str:
    """The table of one partition, ``usage_events_0``. Only for streams of the closed list, so safe inside SQL."""
    return f"{stream.replace('.', '_')}_{partition}"


def connect(path: Path, busy_wait_s: float) -> sqlite3.Connection:
    """A connection as every user of the file must have it. Raises sqlite3.Error, Refused for a foreign file."""
    address = f"{path.absolute().as_uri()}?mode=rw"  # never made by accident: that is for `create`
    # Autocommit: a statement is a transaction unless told otherwise. The owner sees to one thread at a time.
    connection = sqlite3.connect(
        address, uri=True, timeout=busy_wait_s, isolation_level=None, check_same_thread=False
    )
    try:
        _refuse_foreign(connection)
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_foreign(connection: sqlite3.Connection) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if (application, version) != (APPLICATION_ID, FORMAT):
        raise Refused(f"not a log of format {FORMAT} (application id {application:#x}, format {version})")


def create(path: Path, partitions: Mapping[str, int], busy_wait_s: float) -> None:
    """Make the file with its streams unless it is there; several processes may try at once.

    When this returns, the file's name survives a loss of power too. Raises sqlite3.Error, OSError, Refused.
    """
    if sqlite3.sqlite_version_info < SQLITE_VERSION_MIN:
        raise Refused(f"the log needs SQLite {SQLITE_VERSION_MIN}, this Python has {sqlite3.sqlite_version}")
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not path.exists():
            fcntl.flock(directory, fcntl.LOCK_EX)  # one creator at a time; released by the close
            if not path.exists():
                _create_beside(path, partitions, busy_wait_s)
        os.fsync(directory)
    finally:
        os.close(directory)


def _create_beside(path: Path, partitions: Mapping[str, int], busy_wait_s: float) -> None:
    """Make the file under another name and rename it: whoever dies on the way leaves nothing half made."""
    unfinished = path.with_suffix(".unfinished")
    for leftover in path.parent.glob(f"{unfinished.name}*"):  # its journal too, or SQLite would roll it back
        leftover.unlink()
    with contextlib.closing(sqlite3.connect(unfinished, timeout=busy_wait_s, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute(_CREATE_STREAMS)
        for stream, count in partitions.items():
            connection.execute("INSERT INTO streams VALUES (?, ?, ?)", (stream, uuid.uuid4().hex, count))
            for partition in range(count):
                connection.execute(_CREATE_RECORDS.format(table=table_name(stream, partition)))
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
    unfinished.rename(path)


COPY_BUSY_WAIT_S = 30.0


def copy_log(path: Path, target: Path) -> None:
    """Copy the log of one moment into a file that is not there, while others write. Its pages are checked.

    A reader does not stop appends; the WAL grows until the copy is made. Raises sqlite3.Error, OSError, Refused.
    """
    with contextlib.closing(connect(path, COPY_BUSY_WAIT_S)) as connection:
        connection.execute("VACUUM INTO ?", [str(target)])
    with contextlib.closing(sqlite3.connect(target)) as copied:
        ((found,),) = copied.execute("PRAGMA quick_check(1)").fetchall()
    if found != "ok":
        raise OSError(f"the copy of {path.name} is damaged: {found}")
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def same_file(path: Path, status: os.stat_result) -> bool:
    """Whether the path still leads to the file that ``status`` was taken of: an open file can be deleted."""
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False
