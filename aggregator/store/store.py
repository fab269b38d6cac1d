"""The store: one DuckDB file, one writer, one transaction for each batch.

``Store.commit`` writes a whole ``Round``: events, hierarchy, dead letters, tallies, control records and log positions
change together or not at all. The transaction compares the positions and the writer epoch before it sets them, so a
replaced writer or an already applied batch cannot commit. ``read`` opens a snapshot for queries, ``outbox`` a small
transaction on the webhook tables, and ``checkpoint`` folds the write-ahead log into the file.

DuckDB may raise an error from COMMIT for a transaction that is durable, and a failed instance may still answer
queries. So errors in and after COMMIT are never interpreted: ``commit`` raises ``Doubt``, and the caller opens a new
instance and asks it for its positions.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from aggregator.decode.columns import Batch
from aggregator.decode.dedup import SAID, Effects, LetterPlace, Tally, numbered, rests
from aggregator.decode.directory import Directory
from aggregator.decode.identities import Keys, Seen
from aggregator.store import hierarchy
from aggregator.store.database import BEGIN, MODEST, Settings, another, explaining, is_the_end, open_file
from aggregator.view import Snapshot, Unavailable
from meters.catalogue.catalogue import DeadLetterReplayed, decode_changes
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Record, format_position

# ``Slot`` passes one Arrow table after another to DuckDB under a fixed name.
#
# Registering a table creates a view, which costs a millisecond; a statement over a new view is planned again, which
# costs two more. For a batch of a few thousand events that is as much as the events cost. A slot is registered once
# and shows its current table whenever a statement runs, so a statement over it stays prepared.
#
# DuckDB plans a statement over the store's own tables again each time it runs, prepared or not. The few statements of
# a batch gain nothing from the optimizer, so it is switched off for them (``as_written``).

def as_written(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Another connection to the file, which executes statements as they are written."""
    with contextlib.ExitStack() as undo:
        made = another(connection)
        undo.callback(made.close)  # an instance that is half open would be in the next opener's way
        made.execute("PRAGMA disable_optimizer")
        undo.pop_all()
    return made


@contextlib.contextmanager
def optimizing(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Around statements that join or search. After an error in there nobody uses the connection again."""
    connection.execute("PRAGMA enable_optimizer")
    yield
    connection.execute("PRAGMA disable_optimizer")


class Slot:
    """Holds the table that a statement will read. All tables of a slot have one schema."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
        self.table = table
        connection.register(name, self)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """The table, as Arrow's own protocol between libraries hands it over."""
        return self.table.__arrow_c_stream__(requested_schema)


class Prepared:
    """A statement that changes rows by what a slot shows. Prepared when the first table tells its schema."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, sql: str) -> None:
        self._connection, self._name, self._sql = connection, name, sql
        self._slot: Slot | None = None

    def __call__(self, table: pa.Table) -> int:
        """Execute it with this table in the slot; how many rows changed."""
        if self._slot is None:
            self._slot = Slot(self._connection, self._name, table)
            self._connection.execute(f"PREPARE with_{self._name} AS {self._sql}")
        self._slot.table = table
        row = self._connection.execute(f"EXECUTE with_{self._name}").fetchone()
        self._slot.table = table.slice(0, 0)  # or a round's memory would be held until the next
        return int(row[0]) if row else 0


# The transaction.
#
# The engine starts checkpoints on its own schedule; DuckDB's automatic checkpoint would block the writer every few
# batches.

_READERS_PATIENCE_S = 10.0  # an interrupted query ends in milliseconds; what takes longer does not read any more
_INTERRUPT_AGAIN_S = 0.02  # a reader between two statements cannot be interrupted, so it is tried again
_INSERT_EVENTS = """INSERT INTO events SELECT
    seq, log_partition, log_offset, line, id_hi, id_lo, content, organization, subject, name, 'user',
    timestamp, ingested_at, external_id, parent, member_id, external_member_id, metadata, awkward FROM arriving"""
_MOVE_ON = """UPDATE positions SET next_offset = after, last_us = m.last_us, stored = positions.stored + m.stored,
    duplicates = positions.duplicates + m.duplicates, conflicts = positions.conflicts + m.conflicts,
    dead = positions.dead + m.dead
FROM moves AS m WHERE positions.stream = m.stream AND positions.log_partition = m.log_partition
    AND next_offset = before AND epoch = (SELECT writer_epoch FROM about)"""
_MOVES = pa.schema(
    [("stream", pa.string()), ("log_partition", pa.int32()), ("before", pa.int64()), ("after", pa.int64()),
     ("last_us", pa.int64()), ("epoch", pa.int64()), *((name, pa.int64()) for name in Tally._fields)]
)  # fmt: skip
_REPLAYED = str(DeadLetterReplayed.__struct_config__.tag).encode()  # decoding every decision would take seconds
_STORED = f"""SELECT DISTINCT ON (asked.number) {", ".join(SAID)}
FROM events e JOIN asked ON e.id_hi = asked.hi AND e.id_lo = asked.lo ORDER BY asked.number, seq"""  # noqa: S608 - our names
IDENTITIES_AT_ONCE = 4_000_000  # 100 MB, and some hundred more while they are put in order


class Doubt(Exception):
    """Whether the transaction is durable is not known: drop this instance, reopen, read the positions."""


class Replaced(Exception):
    """Another writer took over, or the positions are not the expected ones: stop, do not retry."""


class StillRead(Exception):
    """A reader did not let go, so this process cannot open the file again: only another one begins anew."""


class Round(NamedTuple):
    """Everything one transaction writes: a batch, what the step made of it, and control records beside it."""

    batch: Batch
    effects: Effects
    control: Sequence[Record]  # decisions: changes as JSON, a line each
    events_from: Mapping[int, int]
    control_from: int
    causes: pa.Table | None = None  # of webhooks (``aggregator.engine.change_events``)


class Store:
    """The open file. ``commit`` and ``checkpoint`` are for the writer's threads; ``read`` for any thread."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, epoch: int, path: Path | None = None) -> None:
        """``path`` is where the file lies, for who writes: another file there means another writer."""
        self._connection = connection
        self._file = None if path is None else (path, path.stat().st_ino)
        self._readers: set[duckdb.DuckDBPyConnection] = set()
        self._readers_changed = threading.Condition()
        self._closing = False
        self.is_dead = False  # DuckDB gave up on its instance; whoever writes has to open another
        self.epoch = epoch
        self._any_pending = hierarchy.any_pending(connection)
        row = connection.execute("SELECT coalesce(max(seq) + 1, 0) FROM events").fetchone()
        self.next_seq: int = row[0] if row else 0
        row = connection.execute("SELECT coalesce(max(number) + 1, 0) FROM dead_letters").fetchone()
        self._next_dead: int = row[0] if row else 0
        row = connection.execute("SELECT coalesce(max(number) + 1, 0) FROM webhook_causes").fetchone()
        self._next_cause: int = row[0] if row else 0
        self._replayed: dict[LetterPlace, datetime] = {}
        self._note_replayed(self.control(_REPLAYED))
        self._writing = writing = as_written(connection)
        self._insert_events = Prepared(writing, "arriving", _INSERT_EVENTS)
        self._insert_control = Prepared(writing, "decided", "INSERT INTO control SELECT * FROM decided")
        self._insert_subjects = Prepared(writing, "numbered", "INSERT INTO subjects SELECT * FROM numbered")
        self._insert_dead = Prepared(writing, "buried", "INSERT INTO dead_letters SELECT * FROM buried")
        self._insert_rests = Prepared(writing, "buried_rests", "INSERT INTO dead_rests SELECT * FROM buried_rests")
        self._move_on = Prepared(writing, "moves", _MOVE_ON)

    @classmethod
    def open(cls, path: Path, identities: Mapping[str, str], settings: Settings = MODEST) -> "Store":
        """Open or make the file, check that it belongs to this log, and claim the next writer epoch.

        ``identities`` maps each stream to its identity. Raises Unopenable with the way on in its message, NotNow.
        """
        connection, epoch = open_file(path, identities, settings)
        try:
            with explaining(path):
                return cls(connection, epoch, path)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Let go of the file, as soon as nobody reads any more; queries that run are interrupted.

        DuckDB keeps an instance while anyone holds a part of it, and lets nobody else in this process open the file.
        Raises StillRead when waiting was in vain.
        """
        deadline = time.monotonic() + _READERS_PATIENCE_S
        try:
            with self._readers_changed:
                self._closing = True
                while self._readers and time.monotonic() < deadline:
                    for reader in self._readers:
                        reader.interrupt()
                    self._readers_changed.wait(_INTERRUPT_AGAIN_S)
                if self._readers:
                    raise StillRead(f"{len(self._readers)} readers of the store did not end when it was closed")
        finally:
            with contextlib.closing(self._connection):
                self._writing.close()

    def positions(self, stream: str) -> dict[int, int]:
        """{partition: next offset} of the last commit."""
        return _positions(self._connection, stream)

    def control(self, holding: bytes = b"") -> Iterator[bytes]:
        """Every control record applied so far that holds the text, in order; never all of them in memory."""
        with contextlib.closing(self.cursor()) as connection:
            sql = "SELECT value FROM control WHERE contains(value, ?) ORDER BY log_offset"
            for part in connection.sql(sql, params=[holding.decode()]).to_arrow_reader(10_000):
                yield from (value.encode() for value in part.column(0).to_pylist())

    def directory(self) -> Directory:
        """The numbers given so far."""
        directory = Directory()
        organizations = {}
        for number, organization_id in self._connection.execute(
            "SELECT number, id FROM organizations ORDER BY number"
        ).fetchall():
            organizations[number] = directory.restore_organization(number, organization_id)
        cursor = self._connection.execute("SELECT number, organization, kind, text FROM subjects ORDER BY number")
        while rows := cursor.fetchmany(100_000):
            for number, organization, kind, text in rows:
                directory.restore_subject(number, organizations[organization], kind, text)
        return directory

    def seen(self) -> Seen:
        """The index of all stored identities, read in parts because all of them at once take much memory."""
        seen = Seen(self._file[0].parent if self._file else None)
        relation = self._connection.sql("SELECT id_hi, id_lo, content FROM events")
        for part in relation.to_arrow_reader(IDENTITIES_AT_ONCE):
            seen.add(Keys(*(np.asarray(column, np.uint64) for column in part.columns)))
        return seen

    def stored(self, keys: Keys) -> pa.Table:
        """What the rows of these identities say, in their order. One scan of the identity columns, however many."""
        if not len(keys.hi):
            return pa.table({})
        asked = pa.table({"number": np.arange(len(keys.hi)), "hi": keys.hi, "lo": keys.lo})
        self._connection.register("asked", asked)
        said = self._connection.sql(_STORED).to_arrow_table()
        self._connection.unregister("asked")
        return said

    def tallies(self) -> dict[str, int]:
        """Lines so far by what became of them: stored, duplicates, conflicts, dead."""
        row = another(self._connection).execute("SELECT sum(COLUMNS(* EXCLUDE log_partition)) FROM tallies").fetchone()
        return {name: int(count or 0) for name, count in zip(Tally._fields, row or Tally(), strict=True)}

    def last_read(self, stream: str) -> dict[int, tuple[int, int]]:
        """{partition: (offset, the log's time in microseconds since 1970)} of the last records that were read."""
        rows = self._connection.execute(
            "SELECT log_partition, next_offset - 1, last_us FROM positions WHERE stream = ? AND last_us IS NOT NULL",
            [stream],
        ).fetchall()
        return {partition: (offset, last_us) for partition, offset, last_us in rows}

    def read_through(self) -> None:
        """Read every value, so that a damaged block is found: each has a checksum. Raises duckdb.Error."""
        tables = self._connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
        for (table,) in tables:
            self._connection.execute(f"SELECT bit_xor(hash(t)) FROM {table} t").fetchall()  # noqa: S608 (our tables)

    def commit(self, round_: Round, seen: Seen, organization_ids: Mapping[int, str]) -> pa.Table:
        """Write a round, all of it, and return its event rows with their sequence numbers.

        Raises Replaced when the stored positions or the epoch are not the expected ones, Doubt on anything else.
        """
        self._check_file()
        rows = self._numbered(round_.effects.rows)
        try:
            self._writing.execute("BEGIN")
            self._write(round_, rows, seen, organization_ids)
            self._writing.execute("COMMIT")
        except duckdb.Error as error:
            raise Doubt(str(error)) from error
        self.next_seq += rows.num_rows
        self._next_dead += round_.effects.dead.num_rows
        return rows

    def _check_file(self) -> None:
        """The epoch tells a writer of the same file; a successor on a restored or moved copy has a file of its own."""
        if self._file is None:
            return
        path, inode = self._file
        try:
            if path.stat().st_ino == inode:
                return
        except FileNotFoundError:
            pass
        raise Replaced(f"another file is at {path}: another writer took over, or the store was restored meanwhile")

    def _numbered(self, rows: pa.Table) -> pa.Table:
        seq = pa.array(np.arange(self.next_seq, self.next_seq + rows.num_rows, dtype=np.int64))
        return rows.append_column("seq", seq) if rows.num_columns else rows

    def _write(self, round_: Round, rows: pa.Table, seen: Seen, organization_ids: Mapping[int, str]) -> None:
        connection = self._writing
        self._move(round_)
        if round_.control:
            decisions = [record for record in round_.control if record.value]  # a marker decides nothing
            if decisions:
                self._insert_control(_control_table(decisions))
            self._mark_replayed([record.value for record in decisions])
        if round_.batch.organizations:
            connection.executemany("INSERT INTO organizations VALUES (?, ?)", round_.batch.organizations)
        if round_.batch.subjects:
            self._insert_subjects(_subjects_table(round_.batch.subjects))
        if rows.num_rows:
            self._insert_events(rows)
            named = hierarchy.children(rows, dict(organization_ids))
            if named or self._any_pending:
                with optimizing(connection):
                    hierarchy.resolve(connection, seen, round_.effects.keys, named)
                self._any_pending = hierarchy.any_pending(connection)
        self._bury(round_.effects.dead)
        if round_.causes is not None:
            connection.register("caused", round_.causes)
            numbered = "INSERT INTO webhook_causes SELECT ? + row_number() OVER (), * FROM caused"
            connection.execute(numbered, [self._next_cause])
            connection.unregister("caused")
            self._next_cause += round_.causes.num_rows + 1

    def _move(self, round_: Round) -> None:
        """Compare and set: the epoch is ours and every position is where this round began. Counts the lines."""
        batch, tallies = round_.batch, round_.effects.tallies
        moves = [
            (USAGE_EVENTS, partition, round_.events_from.get(partition, 0), offset, _time_us(batch.last[partition]),
             self.epoch, *tallies.get(partition, Tally()))
            for partition, offset in batch.positions.items()
        ]  # fmt: skip
        if round_.control:
            before, last = round_.control_from, round_.control[-1]
            moves.append((USAGE_CONTROL, 0, before, last.offset + 1, _time_us(last), self.epoch, *Tally()))
        if self._move_on(pa.Table.from_arrays(list(zip(*moves, strict=True)), schema=_MOVES)) != len(moves):
            expected = f"{format_position(round_.events_from)}, writer epoch {self.epoch}"
            raise Replaced(f"another writer was here: the store is not where this one left it ({expected})")

    def _mark_replayed(self, values: Sequence[bytes]) -> None:
        for place in self._note_replayed(values):
            self._writing.execute(
                """UPDATE dead_letters SET replayed_at = ?
                   WHERE log_partition = ? AND log_offset = ? AND line = ? AND replayed_at IS NULL""",
                [self._replayed[place], *place],
            )

    def _note_replayed(self, values: Iterable[bytes]) -> list[LetterPlace]:
        """Remember the dead letters that records settle: they may be read before those, when a store is rebuilt."""
        changes = (change for value in values if _REPLAYED in value for change in decode_changes(value))
        settled = [change for change in changes if isinstance(change, DeadLetterReplayed)]
        places = [(change.log_partition, change.log_offset, change.line) for change in settled]
        for place, change in zip(places, settled, strict=True):
            self._replayed.setdefault(place, change.replayed_at.replace(tzinfo=None))
        return places

    def _bury(self, dead: pa.Table) -> None:
        if dead.num_rows:
            self._insert_dead(numbered(dead, self._next_dead, self._replayed))
            self._insert_rests(rests(dead))

    @contextlib.contextmanager
    def read(self) -> Iterator[Snapshot]:
        """A consistent snapshot on a connection of its own. Raises Unavailable when the store is closed or dead."""
        connection = self._reader()
        try:
            connection.execute(BEGIN)
            yield Snapshot(connection, _positions(connection, USAGE_EVENTS))
        except Exception as error:
            self.is_dead |= is_the_end(error)
            if self._closing or self.is_dead:
                raise Unavailable("the store is being opened again") from error
            raise
        finally:
            self._let_go(connection)

    def _let_go(self, connection: duckdb.DuckDBPyConnection) -> None:
        with self._readers_changed:  # or ``close`` would interrupt what is closed already
            connection.close()
            self._readers.discard(connection)
            self._readers_changed.notify_all()

    def _reader(self) -> duckdb.DuckDBPyConnection:
        with self._readers_changed:
            if self._closing:
                raise Unavailable("the store is being opened again")
            connection = self._connection.cursor()
            self._readers.add(connection)
        return connection

    @contextlib.contextmanager
    def outbox(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A small transaction of its own on the tables of webhooks, which no round but adds to.

        Raises Unavailable where it cannot be made true; what it did is then to be done again.
        """
        connection = self._reader()
        try:
            connection.execute(BEGIN)
            yield connection
            connection.execute("COMMIT")
        except duckdb.Error as error:
            self.is_dead |= is_the_end(error)
            raise Unavailable(f"the outbox cannot be written now: {error}") from error
        finally:
            self._let_go(connection)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Another connection to the same file, for a thread of its own."""
        return another(self._connection)

    def checkpoint(self, merges_max: int = 0) -> bool:
        """Fold the write-ahead log into the file; False when DuckDB asks to try later. Raises Doubt.

        ``merges_max`` bounds how many runs of small row groups are rewritten as large ones meanwhile. A table that is
        being rewritten takes no rows, so a round waits for as long.
        """
        try:
            with contextlib.closing(another(self._connection)) as connection:
                connection.execute("SET GLOBAL max_vacuum_tasks = ?", [merges_max])
                connection.execute("CHECKPOINT")
        except duckdb.TransactionException:
            return False
        except duckdb.Error as error:
            raise Doubt(str(error)) from error
        return True


def prepare_partitions(store: Store, stream: str, partitions: Sequence[int]) -> None:
    """Give every partition of a stream a position, once."""
    with contextlib.closing(store.cursor()) as connection:
        connection.execute("BEGIN")
        have = set(_positions(connection, stream))
        for partition in sorted(set(partitions) - have):
            connection.execute("INSERT INTO positions VALUES (?, ?, 0, NULL, 0, 0, 0, 0)", [stream, partition])
        connection.execute("COMMIT")


def _positions(connection: duckdb.DuckDBPyConnection, stream: str) -> dict[int, int]:
    rows = connection.execute("SELECT log_partition, next_offset FROM positions WHERE stream = ?", [stream]).fetchall()
    return dict(rows)


def _time_us(record: Record) -> int | None:
    """When the log took the record. None for one without a value: it may stand for a hole, which has no time."""
    return record.timestamp_us if record.value else None


def _control_table(control: Sequence[Record]) -> pa.Table:
    texts = pa.array([record.value for record in control], pa.binary()).cast(pa.string())
    return pa.table({"log_offset": pa.array([record.offset for record in control], pa.int64()), "value": texts})


def _subjects_table(subjects: Sequence[tuple[int, int, str, str]]) -> pa.Table:
    types = {"number": pa.int32(), "organization": pa.int32(), "kind": pa.string(), "text": pa.string()}
    columns = zip(types.items(), zip(*subjects, strict=True), strict=True)
    return pa.table({name: pa.array(list(column), type) for (name, type), column in columns})
