"""What every customer used of every meter since the beginning, in memory, exact.

A query over the store costs milliseconds and grows with history; a total read here costs microseconds. Totals are a
view: computed from the store when the aggregator starts or a meter is made, and moved on by each round's grouped
results after that round has committed.

A sum is a 128-bit integer of 10^-12 units, kept as two columns of 64 bits, so that a round's thousands of additions
are a few array operations and no digit is ever rounded. A sum that comes near the end of 128 bits moves to a Python
integer, which has no end.
"""

import threading
from decimal import Context, Decimal
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.view import Total

Rows = npt.NDArray[np.int64]
UNIT = Decimal(1).scaleb(-12)
_WIDE = np.int64(1 << 61)  # high words beyond this leave the columns: two such could overflow when added
_LOW = (1 << 64) - 1
_EXACT = Context(prec=80)


class Words(NamedTuple):
    """Signed 128-bit integers as columns: high words (signed) and low words (unsigned)."""

    hi: npt.NDArray[np.int64]
    lo: npt.NDArray[np.uint64]

    @classmethod
    def zeros(cls, rows: int) -> "Words":
        """So many zeros."""
        return cls(np.zeros(rows, np.int64), np.zeros(rows, np.uint64))

    @classmethod
    def of(cls, column: pa.ChunkedArray | pa.Array) -> "Words":
        """The unscaled integers of a decimal128 column; nulls read as zero."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        array = array.fill_null(Decimal(0)) if array.null_count else array
        raw = np.frombuffer(array.buffers()[1], dtype="<u8")[2 * array.offset : 2 * (array.offset + len(array))]
        return cls(raw[1::2].astype(np.int64), raw[0::2].copy())

    @classmethod
    def from_integers(cls, values: list[int]) -> "Words":
        """From Python integers that fit 128 bits."""
        hi = np.array([value >> 64 for value in values], np.int64)
        return cls(hi, np.array([value & _LOW for value in values], np.uint64))

    def integer(self, row: int) -> int:
        """One row as a Python integer."""
        return (int(self.hi[row]) << 64) | int(self.lo[row])

    def less(self, other: "Words") -> npt.NDArray[np.bool_]:
        """Row by row: self < other."""
        return (self.hi < other.hi) | ((self.hi == other.hi) & (self.lo < other.lo))

    def at(self, rows: npt.NDArray[np.intp]) -> "Words":
        """The chosen rows."""
        return Words(self.hi[rows], self.lo[rows])

    def put(self, rows: npt.NDArray[np.intp], values: "Words") -> None:
        """Write the chosen rows."""
        self.hi[rows], self.lo[rows] = values.hi, values.lo

    def plus(self, other: "Words") -> "Words":
        """Row by row sum; the caller keeps both below the point where it could overflow."""
        lo = self.lo + other.lo
        return Words(self.hi + other.hi + (lo < other.lo), lo)


class Grouped(NamedTuple):
    """One meter's result for one round: a row per customer number, each number once."""

    subject: npt.NDArray[np.intp]
    count: Rows
    sum: Words
    min: Words
    max: Words

    @classmethod
    def of(cls, table: pa.Table) -> "Grouped":
        """From a query's columns subject, count, sum, min, max (decimals with 12 places, null where no number)."""
        return cls(
            table.column("subject").to_numpy().astype(np.intp),
            table.column("count").to_numpy().astype(np.int64),
            *(Words.of(table.column(name)) for name in ("sum", "min", "max")),
        )


class MeterTotals:
    """One meter's totals, a row per customer number. One thread adds; readers see a round or the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = np.zeros(0, np.int64)
        self._sum, self._min, self._max = Words.zeros(0), Words.zeros(0), Words.zeros(0)
        self._wide: dict[int, int] = {}

    def add(self, grouped: Grouped) -> None:
        """Move the totals on by one round."""
        if len(grouped.subject):
            with self._lock:
                self._add(grouped)

    def _add(self, grouped: Grouped) -> None:
        rows = grouped.subject
        self._grow(int(rows.max()) + 1)
        known = self._count[rows] > 0
        self._lower(self._min, grouped.min, known, rows)
        self._raise(self._max, grouped.max, known, rows)
        wide = (np.abs(self._sum.hi[rows]) >= _WIDE) | (np.abs(grouped.sum.hi) >= _WIDE)
        if wide.any() or self._wide:
            self._add_wide(grouped, wide)
        else:
            self._sum.put(rows, self._sum.at(rows).plus(grouped.sum))
        self._count[rows] += grouped.count

    def add_integers(self, subject: int, count: int, total: int, least: int, most: int) -> None:
        """Move one customer's totals on by a sum of any size, in 10^-12 units."""
        one = np.array([subject], np.intp)
        small = Words.from_integers([0])
        bounds = Words.from_integers([least]), Words.from_integers([most])
        self.add(Grouped(one, np.array([count], np.int64), small, *bounds))
        with self._lock:
            self._wide[subject] = self._wide.get(subject, 0) + total

    def _add_wide(self, grouped: Grouped, wide: npt.NDArray[np.bool_]) -> None:
        for row, subject in enumerate(grouped.subject.tolist()):
            if wide[row] or subject in self._wide:
                self._wide[subject] = self._wide.get(subject, 0) + grouped.sum.integer(row)
            else:
                one = np.array([subject], np.intp)
                self._sum.put(one, self._sum.at(one).plus(grouped.sum.at(np.array([row], np.intp))))

    def _lower(self, kept: Words, new: Words, known: npt.NDArray[np.bool_], rows: npt.NDArray[np.intp]) -> None:
        better = ~known | new.less(kept.at(rows))
        kept.put(rows[better], new.at(np.flatnonzero(better)))

    def _raise(self, kept: Words, new: Words, known: npt.NDArray[np.bool_], rows: npt.NDArray[np.intp]) -> None:
        better = ~known | kept.at(rows).less(new)
        kept.put(rows[better], new.at(np.flatnonzero(better)))

    def _grow(self, rows: int) -> None:
        have = len(self._count)
        if rows <= have:
            return
        more = max(rows - have, have // 2, 1024)
        self._count = np.concatenate([self._count, np.zeros(more, np.int64)])
        self._sum, self._min, self._max = (
            Words(*(np.concatenate(pair) for pair in zip(words, Words.zeros(more), strict=True)))
            for words in (self._sum, self._min, self._max)
        )

    def total(self, subjects: list[int]) -> Total:
        """The total over the customer numbers given, as one customer."""
        with self._lock:
            return self._total(subjects)

    def _total(self, subjects: list[int]) -> Total:
        count, units = 0, 0
        least: list[int] = []
        most: list[int] = []
        for subject in subjects:
            if subject < len(self._count) and self._count[subject]:
                count += int(self._count[subject])
                units += self._sum.integer(subject) + self._wide.get(subject, 0)
                least.append(self._min.integer(subject))
                most.append(self._max.integer(subject))
        return Total(count, _amount(units), _amount(min(least)) if least else None, _amount(max(most)) if most else None)


def _amount(units: int) -> Decimal:
    return _EXACT.multiply(Decimal(units), UNIT)
