"""Dead letters as columns: lines that cannot be counted, with everything needed to mend and replay them.

Nearly always there are none. But a producer can make as many as a record has lines, and a sender as many as a request
has, so they are packed as they come, and no step after that takes them one by one.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
