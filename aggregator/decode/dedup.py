"""Deduplicate a batch against the identity index, and keep dead letters as columns.

``judge`` sorts rows into new, duplicate and suspect, from what the identity index says. ``step`` then compares the
suspects with their stored first writes and returns the ``Effects`` of the transaction: new rows, dead letters and
tallies. Everything here is pure: the writer thread reads the store in between and commits the result.

The first write of an identity wins for ever. A later row with the same bytes is a duplicate and is only counted. A
row with other bytes but the same meaning (keys in another order, another spelling of a time) is a duplicate as well.
A row with another meaning is a conflict: it becomes a dead letter and is never billed.
"""

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aggregator.decode.columns import Batch
from aggregator.decode.identities import Keys, Words, repeats
from meters.exact import decode_tokens

# Dead letters: lines that cannot be counted, with everything needed to fix and replay them.
#
# There are usually none. But a producer can cause as many as a record has lines, and a sender as many as a request
# has events. So ``Letters`` packs them into columns as they come, and no later step handles them one by one.

PACKED_AT_ONCE = 10_000
PART_BYTES = 16 << 10  # of a letter in one row of the store: DuckDB has 2,048 of them in memory at once, so 32 MiB
TEXT = pa.dictionary(pa.int32(), pa.string())  # the same few texts, a million times
SCHEMA = pa.schema(
    [("log_partition", pa.int32()), ("log_offset", pa.int64()), ("line", pa.int32()),
     ("organization_id", TEXT), ("reason", TEXT), ("detail", TEXT), ("raw", pa.binary()),
     ("ingested_at", pa.timestamp("us"))]
)  # fmt: skip
_REST = pa.schema([*list(SCHEMA)[:3], ("part", pa.int32()), ("raw", pa.binary())])
LetterPlace = tuple[int, int, int]
"""Partition, offset and line: where in the log. It names a dead letter for ever, also in a store made anew."""


class DeadLetter(NamedTuple):
    """A line that cannot be counted: a row of ``SCHEMA``."""

    partition: int
    offset: int
    line: int
    organization_id: str | None
    reason: str
    detail: str
    raw: bytes
    ingested_at_us: int


class Letters:
    """Takes dead letters one by one and gives them as a table."""

    def __init__(self) -> None:
        self._packed: list[pa.RecordBatch] = []
        self._loose: list[DeadLetter] = []

    def add(self, letter: DeadLetter) -> None:
        """One more."""
        self._loose.append(letter)
        if len(self._loose) >= PACKED_AT_ONCE:
            self._pack()

    def table(self) -> pa.Table:
        """All of them, in the order in which they came."""
        self._pack()
        return pa.Table.from_batches(self._packed, SCHEMA)

    def _pack(self) -> None:
        if self._loose:
            self._packed.append(columns(list(zip(*self._loose, strict=True))))
            self._loose = []


def columns(values: Sequence[Sequence[object]]) -> pa.RecordBatch:
    """Dead letters whose columns are ``values``, in the order of ``SCHEMA``."""
    arrays = [pa.array(column, field.type) for column, field in zip(values, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def numbered(letters: pa.Table, first: int, replayed: dict[LetterPlace, datetime]) -> pa.Table:
    """The rows of the table ``dead_letters``: in the order of the log, with numbers from ``first`` on."""
    letters = letters.unify_dictionaries().sort_by([(name, "ascending") for name in SCHEMA.names[:3]])
    numbers = pa.array(np.arange(first, first + letters.num_rows))
    raw = SCHEMA.get_field_index("raw")
    begun = letters.set_column(raw, "raw", pc.binary_slice(letters["raw"], 0, PART_BYTES))
    begun = begun.add_column(raw + 1, "raw_bytes", pc.binary_length(letters["raw"]))
    return begun.add_column(0, "number", numbers).append_column("replayed_at", _replayed_at(letters, replayed))


def rests(letters: pa.Table) -> pa.Table:
    """The rows of the table ``dead_rests``: what a row of ``dead_letters`` does not take, in parts."""
    long = letters.filter(pc.greater(pc.binary_length(letters["raw"]), PART_BYTES))
    rows = [
        (*place, part, raw[start : start + PART_BYTES])
        for *place, raw in zip(*(long[name].to_pylist() for name in (*SCHEMA.names[:3], "raw")), strict=True)
        for part, start in enumerate(range(PART_BYTES, len(raw), PART_BYTES))
    ]
    if not rows:
        return _REST.empty_table()
    values = zip(*rows, strict=True)
    return pa.table([pa.array(list(one), type) for one, type in zip(values, _REST.types, strict=True)], schema=_REST)


def _replayed_at(letters: pa.Table, replayed: dict[LetterPlace, datetime]) -> pa.Array:
    if not replayed:
        return pa.nulls(letters.num_rows, pa.timestamp("us"))
    places = zip(*(column.to_pylist() for column in letters.columns[:3]), strict=True)
    return pa.array([replayed.get(place) for place in places], pa.timestamp("us"))


# Deduplication. A different external id that has the same 128-bit hash as a stored one is a conflict, too.

CONFLICT = "conflict"
METADATA, TIMESTAMP = "metadata", "timestamp"
SAID = ("external_id", "name", "subject", TIMESTAMP, "parent", "member_id", "external_member_id", METADATA)
"""The columns of what an event says, which a repetition of it says as well."""
Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]


class Tally(NamedTuple):
    """Lines of one partition by what became of them. Their sum is the number of lines read."""

    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    dead: int = 0


class Judged(NamedTuple):
    """The batch as one table with its identities, and what the index says of them."""

    table: pa.Table
    keys: Keys
    new: Flags
    suspects: Rows  # rows of known identity whose bytes differ
    firsts: Rows  # the first rows in this batch of the suspects' identities, each once
    first_of: Rows  # for each suspect which of these it is
    is_stored: Flags  # for each of these whether its first write is in the store, not in this batch

    @property
    def stored_firsts(self) -> Keys:
        """Identities of suspects whose first write is in the store."""
        return self.keys.take(self.firsts[self.is_stored])


class Effects(NamedTuple):
    """What one transaction writes, besides the numbers and control records of the batch."""

    rows: pa.Table
    keys: Keys
    dead: pa.Table  # of ``aggregator.decode.dedup``
    tallies: dict[int, Tally]


def join(batch: Batch) -> tuple[pa.Table, Keys]:
    """The chunks of a batch as one table (a chunk stays a chunk) and one set of identities."""
    table = pa.Table.from_batches([chunk.rows for chunk in batch.chunks])
    columns = zip(*(chunk.keys for chunk in batch.chunks), strict=True)
    return table, Keys(*(np.concatenate(column) for column in columns))


def judge(table: pa.Table, keys: Keys, found: Flags, content: Words) -> Judged:
    """Sort the rows into new, duplicate and suspect. ``found`` and ``content`` come from the index of the seen."""
    inside = repeats(keys.hi, keys.lo)
    new = inside.first & ~found
    expected = np.where(found, content, keys.content[inside.of])
    suspects = np.flatnonzero(~new & (keys.content != expected))
    firsts, first_of = np.unique(inside.of[suspects], return_inverse=True)
    return Judged(table, keys, new, suspects, firsts, first_of, found[firsts])


def step(batch: Batch, judged: Judged, stored: pa.Table) -> Effects:
    """Decide. ``stored`` has what is said (``SAID``) by the first writes of ``judged.stored_firsts``, in order."""
    dead, conflicts = batch.dead, judged.suspects
    if len(judged.suspects):
        conflicts = judged.suspects[~_repeated(batch, judged, stored)]
        dead = pa.concat_tables([dead, _contradictions(batch, judged.table, conflicts)])
    rows = judged.table if judged.new.all() else judged.table.filter(pa.array(judged.new))
    keys = judged.keys if judged.new.all() else judged.keys.take(np.flatnonzero(judged.new))
    return Effects(rows, keys, dead, _tallies(judged, conflicts, batch.dead))


def nothing(batch: Batch) -> Effects:
    """The effects of a batch without a single countable row."""
    keys = Keys(*(np.zeros(0, np.uint64) for _ in range(3)))
    return Effects(pa.table({}), keys, batch.dead, _with_dead({}, batch.dead))


def _repeated(batch: Batch, judged: Judged, stored: pa.Table) -> Flags:
    """For each suspect whether it says what the first of its identity says, in other bytes.

    A first write may be large and have any number of suspects, so it is compared where it is and not copied to each.
    """
    said = judged.table.select(SAID)
    firsts = said.take(judged.firsts[~judged.is_stored])
    here = firsts.num_rows
    if stored.num_rows != judged.is_stored.sum():
        raise AssertionError("the index knows an event that the store does not have")
    if stored.num_rows:
        firsts = pa.concat_tables([firsts, stored.cast(firsts.schema)])
    place = np.where(judged.is_stored, here + np.cumsum(judged.is_stored), np.cumsum(~judged.is_stored)) - 1
    said_by_all = pa.concat_tables([firsts, said.take(judged.suspects)]).combine_chunks()
    first_rows, suspect_rows = place[judged.first_of], firsts.num_rows + np.arange(len(judged.suspects))
    stamped = np.concatenate([chunk.stamped for chunk in batch.chunks])[judged.suspects]
    same = np.ones(len(suspect_rows), np.bool_)
    for name in SAID[:-1]:
        same &= _equal(said_by_all[name], suspect_rows, first_rows) | (~stamped if name == TIMESTAMP else False)
    metadata = said_by_all[METADATA]
    differ_in_metadata_only = same & ~_equal(metadata, suspect_rows, first_rows)
    same[differ_in_metadata_only] = _mean_the_same(
        metadata, suspect_rows[differ_in_metadata_only], first_rows[differ_in_metadata_only]
    )
    return same


def _equal(column: pa.ChunkedArray, suspect_rows: Rows, first_rows: Rows) -> Flags:
    """Row by row. Values are compared by numbers given to them, so none is copied; two that are missing are equal."""
    (codes,) = column.dictionary_encode("encode").chunks
    numbers: npt.NDArray[np.int32] = codes.indices.to_numpy()
    same: Flags = numbers[suspect_rows] == numbers[first_rows]
    return same


def _mean_the_same(metadata: pa.ChunkedArray, suspect_rows: Rows, first_rows: Rows) -> list[bool]:
    """Row by row. Each of ``first_rows`` is read once, however many are compared with it."""
    same = [False] * len(suspect_rows)
    for first, pairs in groupby(np.argsort(first_rows, kind="stable").tolist(), lambda pair: first_rows[pair]):
        meaning = _meaning(metadata[int(first)])
        for pair in pairs:
            same[pair] = _meaning(metadata[int(suspect_rows[pair])]) == meaning
    return same


def _meaning(metadata: pa.StringScalar) -> object:
    """With every number as it was sent: 0.10 and 0.1 are told apart, the sender changed it; so are 0.1 and "0.1"."""
    return decode_tokens(metadata.as_buffer().to_pybytes())


def _contradictions(batch: Batch, table: pa.Table, rows: Rows) -> pa.Table:
    """The dead letters of rows in conflict."""
    told = table.select(["log_partition", "log_offset", "line", "external_id", "ingested_at"]).take(rows)
    partitions, offsets, lines, ids, ingested = (column.to_pylist() for column in told.columns)
    begins = np.cumsum([0, *(len(chunk.raws) for chunk in batch.chunks)])
    owners = np.searchsorted(begins, rows, "right") - 1
    raws = [batch.chunks[owner].raws[row] for owner, row in zip(owners, rows - begins[owners], strict=True)]
    details = [f"external_id {id!r} was taken before with other content; the first one counts" for id in ids]
    values = (
        partitions, offsets, lines, [batch.chunks[owner].organization_id for owner in owners.tolist()],
        [CONFLICT] * len(rows), details, raws, ingested,
    )  # fmt: skip
    return pa.Table.from_batches([columns(values)])


def _tallies(judged: Judged, conflicts: Rows, dead: pa.Table) -> dict[int, Tally]:
    partitions = judged.table.column("log_partition").to_numpy()
    in_conflict = np.zeros(len(partitions), np.bool_)
    in_conflict[conflicts] = True
    tallies: dict[int, Tally] = {}
    for partition in np.unique(partitions).tolist():
        here = partitions == partition
        stored = int((here & judged.new).sum())
        contrary = int((here & in_conflict).sum())
        tallies[partition] = Tally(stored, int(here.sum()) - stored - contrary, contrary, 0)
    return _with_dead(tallies, dead)


def _with_dead(tallies: dict[int, Tally], dead: pa.Table) -> dict[int, Tally]:
    partitions, counts = np.unique(dead["log_partition"].to_numpy(), return_counts=True)
    for partition, count in zip(partitions.tolist(), counts.tolist(), strict=True):
        tallies[partition] = tallies.get(partition, Tally())._replace(dead=count)
    return tallies
