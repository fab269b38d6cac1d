"""The store's database file: its tables, and how it is opened, checked and claimed by one writer.

``open_file`` creates the file if it is missing, checks that it belongs to this log and this layout, and claims the
next writer epoch, which fences an older writer. ``Unopenable`` means that the file cannot be used as it is and names
the command to run; ``NotNow`` means that the machine cannot serve the file at the moment and a retry may succeed.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import duckdb

# The tables.
#
# Everything in the file is derived from the log and can be rebuilt. There is no PRIMARY KEY, UNIQUE constraint or
# index on purpose: identities are checked in memory before a row is written (``aggregator.decode.identities``), and
# DuckDB's indexes cost more than that check, grow with every row, and have returned no rows after a crash.
# Amounts are not stored: queries read them from the metadata text, so a new meter counts past events as it counts
# future ones.
#
# The two long texts are compressed with zstd. The result is as small as what DuckDB would choose by itself, at half
# the cost of a checkpoint, because DuckDB tries no other method first.
#
# A dead letter may be a whole record of 24 MiB. DuckDB handles 2,048 values of a column at once, whatever their size,
# and a hundred such values exceed its memory. So ``dead_letters`` has the beginning of the bytes, and ``dead_rests``
# has the rest in parts (``aggregator.decode.dedup``).
#
# A file of another layout is refused and left unchanged; ``meterstream rebuild`` rebuilds the store from the log.

VERSION = 5

TABLES = """
CREATE TABLE about (version INTEGER, writer_epoch BIGINT);
CREATE TABLE streams (stream VARCHAR, identity VARCHAR);
CREATE TABLE positions (
    stream VARCHAR, log_partition INTEGER, next_offset BIGINT,
    last_us BIGINT, -- the log's time of the record before, NULL where not known
    stored BIGINT, duplicates BIGINT, conflicts BIGINT, dead BIGINT
);
CREATE TABLE organizations (number INTEGER, id VARCHAR);
CREATE TABLE subjects (number INTEGER, organization INTEGER, kind VARCHAR, text VARCHAR);
CREATE TABLE events (
    seq BIGINT, log_partition INTEGER, log_offset BIGINT, line INTEGER,
    id_hi UBIGINT, id_lo UBIGINT, content UBIGINT,
    organization INTEGER, subject INTEGER, name VARCHAR, source VARCHAR,
    timestamp TIMESTAMP, ingested_at TIMESTAMP,
    external_id VARCHAR USING COMPRESSION zstd, parent VARCHAR, member_id VARCHAR, external_member_id VARCHAR,
    metadata VARCHAR USING COMPRESSION zstd, awkward VARCHAR
);
CREATE TABLE pending (
    id_hi UBIGINT, id_lo UBIGINT, organization INTEGER, parent VARCHAR,
    parent_hi UBIGINT, parent_lo UBIGINT, other_hi UBIGINT, other_lo UBIGINT
);
CREATE TABLE hierarchy (
    id_hi UBIGINT, id_lo UBIGINT, parent_hi UBIGINT, parent_lo UBIGINT,
    root_hi UBIGINT, root_lo UBIGINT, depth INTEGER
);
CREATE TABLE dead_letters (
    number BIGINT, log_partition INTEGER, log_offset BIGINT, line INTEGER, organization_id VARCHAR,
    reason VARCHAR, detail VARCHAR, raw BLOB, raw_bytes INTEGER, -- of all its parts
    ingested_at TIMESTAMP, replayed_at TIMESTAMP
);
CREATE TABLE dead_rests (log_partition INTEGER, log_offset BIGINT, line INTEGER, part INTEGER, raw BLOB);
CREATE VIEW tallies AS
    SELECT log_partition, stored, duplicates, conflicts, dead FROM positions WHERE stream = 'usage.events';
CREATE TABLE control (log_offset BIGINT, value VARCHAR);
CREATE TABLE webhook_causes (
    number BIGINT, organization_id VARCHAR, subject INTEGER, customer_id VARCHAR, change VARCHAR, caused_at TIMESTAMP
);
CREATE TABLE webhook_messages (
    id VARCHAR, endpoint_id VARCHAR, organization_id VARCHAR, type VARCHAR, customer_id VARCHAR,
    body VARCHAR USING COMPRESSION zstd, caused_at TIMESTAMP, created_at TIMESTAMP, due_at TIMESTAMP,
    attempts INTEGER, status VARCHAR, settled_at TIMESTAMP
);
CREATE TABLE webhook_attempts (
    id VARCHAR, message_id VARCHAR, endpoint_id VARCHAR, organization_id VARCHAR, number INTEGER,
    started_at TIMESTAMP, took_ms INTEGER, status_code INTEGER, outcome VARCHAR
);
"""


# Opening the file.

_NO_AUTOMATIC_CHECKPOINT = "1TB"  # larger than any write-ahead log we let grow; checkpoints are ours to schedule
_READABLE_FROM = "v1.5.0"  # the oldest DuckDB that is allowed here has to open what the newest one wrote
ROW_GROUP_ROWS = 10_240
"""A round of so many rows is written to the file at once, and only its place to the write-ahead log. Files made with
other sizes are read and written as they are."""

_ATTACH = f"ATTACH ? AS store (ROW_GROUP_SIZE {ROW_GROUP_ROWS})"
_ATTACH_TO_READ = f"ATTACH ? AS store (ROW_GROUP_SIZE {ROW_GROUP_ROWS}, READ_ONLY)"
_USE = "USE store"
BEGIN = f"{_USE}; BEGIN"
"""How a transaction begins on a cursor that DuckDB made."""

REBUILD = "meterstream rebuild"
_NEWER = "start the Meterstream that made it"
_OTHER_LOG = (
    "bring back the right log, or name it with --data or --log; if there is none any more, run meterstream rebuild, "
    "which counts this one and keeps the old store beside the new one"
)
_OWNER = "run this as the user that the server runs as, or give that user the file with chown"
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_STILL_OPEN = "is already attached"  # in this process, by whoever is about to let go


class Unopenable(Exception):
    """The file cannot be used as it is: what was ``found``, and what will ``heal`` it. The message says both."""

    def __init__(self, found: str, heal: str = REBUILD) -> None:
        super().__init__(f"{found}: {f'run {heal}' if heal == REBUILD else heal}")
        self.found, self.heal = found, heal


class OlderLayout(Unopenable):
    """The file is of an earlier version, which can still use it; this one makes it again from a log that has all."""


class NotNow(Exception):
    """The file cannot be opened just now, for a reason outside of it, such as a full disk: try again later."""


class Settings(NamedTuple):
    """How much of the machine the store may use."""

    memory_limit: str = "448MB"  # for what it keeps of the file, and for queries; more goes to its directory
    threads: int = 2


MODEST = Settings()


def open_file(path: Path, identities: Mapping[str, str], settings: Settings) -> tuple[duckdb.DuckDBPyConnection, int]:
    """The file, and the writer epoch that is ours now. ``identities`` maps each stream to its identity.

    Raises Unopenable, NotNow.
    """
    with contextlib.ExitStack() as undo, explaining(path):
        if not path.exists():
            _make(path, identities, settings)
        connection = _connect(path, settings)
        undo.callback(connection.close)  # an instance that is half open would be in the next opener's way
        _check(connection, identities)
        epoch = _claim_epoch(connection)
        undo.pop_all()
    return connection, epoch


def identities_in(path: Path) -> dict[str, str]:
    """Which streams the file says it was made from, whatever its layout. Changes nothing. Raises Unopenable, NotNow."""
    with explaining(path), contextlib.closing(_connect(path, MODEST, read_only=True)) as connection:
        return dict(connection.execute("SELECT stream, identity FROM streams").fetchall())


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Around whatever reads a file just opened: says what an error means. Raises Unopenable, NotNow."""
    try:
        yield
    except (duckdb.Error, OSError) as error:
        raise _explained(path, error) from error


def _connect(path: Path, settings: Settings, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """The file, attached to an empty database: only so its row groups get another size than they have by themselves."""
    with contextlib.ExitStack() as undo:
        connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": settings.memory_limit,
                "threads": settings.threads,
                "temp_directory": f"{path}.tmp",
                "checkpoint_threshold": _NO_AUTOMATIC_CHECKPOINT,
                "storage_compatibility_version": _READABLE_FROM,  # of a new file; one that is there keeps its own
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        undo.callback(connection.close)
        connection.execute(_ATTACH_TO_READ if read_only else _ATTACH, [str(path)])
        connection.execute(_USE)
        undo.pop_all()
    return connection


def another(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Another connection to the same file; DuckDB's own would be one to the empty database."""
    with contextlib.ExitStack() as undo:
        made = connection.cursor()
        undo.callback(made.close)  # an instance that is half open would be in the next opener's way
        made.execute(_USE)
        undo.pop_all()
    return made


def is_the_end(error: Exception) -> bool:
    """Whether the database serves nobody any more until it is opened again; DuckDB says so in two ways."""
    return isinstance(error, duckdb.FatalException) or "has been invalidated" in str(error)


def _make(path: Path, identities: Mapping[str, str], settings: Settings) -> None:
    """Make the file under another name and rename it: whoever dies on the way leaves nothing half made."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    for leftover in (unfinished, _write_ahead_log(unfinished), _write_ahead_log(path)):
        leftover.unlink(missing_ok=True)
    with contextlib.closing(_connect(unfinished, settings)) as connection:
        _create(connection, identities)
    unfinished.rename(path)


def _write_ahead_log(path: Path) -> Path:
    return path.with_name(f"{path.name}.wal")


def _check(connection: duckdb.DuckDBPyConnection, identities: Mapping[str, str]) -> None:
    (version,) = connection.execute("SELECT version FROM about").fetchone() or (None,)
    has = f"the store has layout {version}, this program has {VERSION}"
    if version is not None and version > VERSION:
        raise Unopenable(has, _NEWER)
    if version != VERSION:
        raise OlderLayout(has)
    stored = dict(connection.execute("SELECT stream, identity FROM streams").fetchall())
    for stream, identity in identities.items():
        if stored.get(stream) != identity:
            was = f"the store was made from another {stream} stream ({stored.get(stream)}, the log has {identity})"
            raise Unopenable(was, _OTHER_LOG)


def _create(connection: duckdb.DuckDBPyConnection, identities: Mapping[str, str]) -> None:
    connection.execute("BEGIN")
    for statement in TABLES.split(";"):
        if statement.strip():
            connection.execute(statement)
    connection.execute("INSERT INTO about VALUES (?, 0)", [VERSION])
    connection.executemany("INSERT INTO streams VALUES (?, ?)", list(identities.items()))
    connection.execute("COMMIT")
    connection.execute("CHECKPOINT")


def _claim_epoch(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.execute("UPDATE about SET writer_epoch = writer_epoch + 1 RETURNING writer_epoch").fetchone()
    return row[0] if row else 0


def _explained(path: Path, error: Exception) -> Exception:
    """What an error while opening means. DuckDB tells the system's reasons by their text alone."""
    text = str(error).splitlines()[0]
    passing = any(why in text for why in (*map(os.strerror, _PASSING), _STILL_OPEN))
    if isinstance(error, duckdb.OutOfMemoryException) or passing:
        return NotNow(f"{path} cannot be opened now ({text})")
    if "Could not set lock" in text:
        return Unopenable(f"{text}; {path} is in use by another process", "stop that one first")
    if os.strerror(errno.EACCES) in text:
        return Unopenable(f"{path} cannot be opened ({text})", _OWNER)
    return Unopenable(f"{path} cannot be opened ({text})")
