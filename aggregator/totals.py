"""What every customer used of every meter since the beginning, in memory, exact.

A query over the store costs milliseconds and grows with history; a total read here costs microseconds. Totals are a
view: counted from the store when the aggregator starts or a meter is made, and moved on by the rows of each round
after that round has committed.

A sum is two columns of 64-bit integers, whole units and 10^-12 units, so that a round's thousands of additions are a
few array operations and no digit is ever rounded. A value too large for that (beyond 9 million, in 10^-12 units) goes
to a Python integer beside the columns, which has no end.
"""

import threading
from collections.abc import Sequence
from decimal import Context, Decimal
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.view import Total
from meters.amount import DECIMALS

Integers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]
ONE = 10**DECIMALS  # of the smallest units in a whole one
LOOPED_MAX = 16  # customer numbers that are added up one by one, 2 us each; as arrays any number takes 30 us
_LARGEST, _LEAST = np.iinfo(np.int64).max, np.iinfo(np.int64).min
_NONE_YET = {"min": _LARGEST, "max": _LEAST}
_EXACT = Context(prec=80)


class Amounts(NamedTuple):
    """One property's amounts in some rows, in 10^-12 units, prepared once for all meters that read it.

    ``whole`` and ``fraction`` are ``units`` divided by 10^12; there is no ``fraction`` where every amount is whole, as
    those of tokens and seconds are. ``large`` marks the rows that do not fit 64 bits; their 128 bits stand in ``high``
    and ``low``.
    """

    low: Integers
    high: Integers
    whole: Integers
    fraction: Integers | None
    large: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, column: pa.Array) -> "Amounts":
        """From decimals with 12 places; what stands in rows that are null does not matter."""
        words = np.frombuffer(column.buffers()[1], "<i8")[2 * column.offset : 2 * (column.offset + len(column))]
        low, high = np.ascontiguousarray(words[0::2]), np.ascontiguousarray(words[1::2])
        fits = (high == low >> 63) & (low < _LARGEST) & (low > _LEAST)  # the high word only repeats the sign
        whole, fraction = np.divmod(low, ONE)
        return cls(low, high, whole, fraction if fraction.any() else None, None if fits.all() else ~fits)

    def units(self, row: int) -> int:
        """One row, of any size."""
        return int(self.high[row]) << 64 | int(self.low[row]) % 2**64


class MeterTotals:
    """One meter's totals, a row per customer number. One thread adds; readers see all of a round or nothing."""

    def __init__(self, func: str) -> None:
        self._func = func
        self._lock = threading.Lock()
        self._count = np.zeros(0, np.int64)
        self._whole = np.zeros(0, np.int64)
        self._fraction = np.zeros(0, np.int64)
        self._extreme = np.zeros(0, np.int64)
        self._large: dict[int, list[int]] = {}

    def add(self, subjects: Rows, amounts: Amounts | None, rows: Rows) -> None:
        """Move the totals on by the chosen rows: whose they are, and how much (None for a meter that counts)."""
        if len(rows) == 0:
            return
        with self._lock:
            chosen = subjects if len(rows) == len(subjects) else subjects[rows]
            self._grow(int(chosen.max()) + 1)
            np.add.at(self._count, chosen, 1)
            if amounts is not None:
                self._add_amounts(subjects, chosen, amounts, rows)

    def _add_amounts(self, subjects: Rows, chosen: Rows, amounts: Amounts, rows: Rows) -> None:
        if amounts.large is not None:
            large = rows[amounts.large[rows]]
            for row in large.tolist():
                self._add_large(int(subjects[row]), amounts.units(row))
            rows = rows[~amounts.large[rows]]
            chosen = subjects[rows]
        every = len(rows) == len(subjects)
        if self._func == "min":
            np.minimum.at(self._extreme, chosen, amounts.low if every else amounts.low[rows])
        elif self._func == "max":
            np.maximum.at(self._extreme, chosen, amounts.low if every else amounts.low[rows])
        else:
            np.add.at(self._whole, chosen, amounts.whole if every else amounts.whole[rows])
            if amounts.fraction is not None:
                np.add.at(self._fraction, chosen, amounts.fraction if every else amounts.fraction[rows])
                self._carry(chosen)

    def _carry(self, chosen: Rows) -> None:
        """Fractions that reached one become whole. A customer of several rows is set to the same as often."""
        carry, fraction = np.divmod(self._fraction[chosen], ONE)
        if carry.any():
            self._whole[chosen] = self._whole[chosen] + carry
            self._fraction[chosen] = fraction

    def _add_large(self, subject: int, units: int) -> None:
        kept = self._large.setdefault(subject, [])
        if self._func in ("min", "max"):
            kept.append(units)
            self._large[subject] = [min(kept) if self._func == "min" else max(kept)]
        else:
            self._large[subject] = [sum(kept) + units]

    def _grow(self, rows: int) -> None:
        have = len(self._count)
        if rows <= have:
            return
        more = max(rows - have, have // 8, 1024)
        self._count = longer(self._count, more, 0)
        if self._func in _NONE_YET:
            self._extreme = longer(self._extreme, more, _NONE_YET[self._func])
        elif self._func != "count":
            self._whole, self._fraction = longer(self._whole, more, 0), longer(self._fraction, more, 0)

    def total(self, subjects: Sequence[int]) -> Total:
        """The total over the customer numbers given, as one customer."""
        if len(subjects) > LOOPED_MAX:
            return self.total_of(np.array(subjects, np.intp))
        with self._lock:
            known = [subject for subject in subjects if subject < len(self._count) and self._count[subject] > 0]
            count = sum([int(self._count[subject]) for subject in known])
            large = [units for subject in known for units in self._large.get(subject, ())] if self._large else []
            if self._func in _NONE_YET:
                return self._extremes([int(self._extreme[row]) for row in known], large, count)
            units = sum(large)
            if self._func != "count":
                units += sum([int(self._whole[row]) * ONE + int(self._fraction[row]) for row in known])
        return Total(count, _amount(units), None, None)

    def total_of(self, rows: Rows) -> Total:
        """The same of any number of rows. Of many a copy is made, and added up while others go on."""
        if len(rows) <= LOOPED_MAX:
            return self.total(rows.tolist())
        with self._lock:
            rows = rows[rows < len(self._count)]
            count, extreme = self._count[rows], self._extreme[rows] if self._func in _NONE_YET else self._extreme
            adding = [column[rows] for column in (self._whole, self._fraction) if len(column)]
            large = [units for row in rows.tolist() for units in self._large.get(row, ())] if self._large else []
        if self._func in _NONE_YET:
            found = extreme[extreme != _NONE_YET[self._func]]
            edges = [int(found.min()), int(found.max())] if len(found) else []
            return self._extremes(edges, large, int(count.sum()))
        units = sum(large) + sum(exact_sum(column) * one for column, one in zip(adding, (ONE, 1), strict=False))
        return Total(int(count.sum()), _amount(units), None, None)

    def sums(self, size: int) -> npt.NDArray[np.float64]:
        """The sum of each of ``size`` customer numbers as the nearest double: to put them in order by."""
        with self._lock:
            found = np.zeros(size)
            whole = self._count if self._func == "count" else self._whole
            found[: len(whole)] = whole[:size]
            if self._func != "count":
                found[: len(whole)] += self._fraction[:size] / ONE
            for subject, units in self._large.items():
                found[subject] += units[0] / ONE
        return found

    def counts(self, size: int) -> Integers:
        """How many were added of each of ``size`` customer numbers."""
        with self._lock:
            found = np.zeros(size, np.int64)
            found[: len(self._count)] = self._count[:size]
        return found

    def extremes(self, size: int) -> npt.NDArray[np.float64]:
        """The least or the greatest of each of ``size`` customer numbers as the nearest double; 0 where nothing is."""
        with self._lock:
            found = np.full(size, np.nan)
            known = self._extreme[:size]
            found[: len(known)] = np.where(known == _NONE_YET[self._func], np.nan, known / ONE)
            further = np.fmin if self._func == "min" else np.fmax
            for subject, units in self._large.items():
                found[subject] = further(found[subject], units[0] / ONE)
        found[np.isnan(found)] = 0.0
        return found

    def copy(self, subject: int, other: "MeterTotals") -> None:
        """Take over what another one has of a customer."""
        with self._lock:
            self._grow(subject + 1)
            self._count[subject] = _held(other._count, subject, 0)
            if self._func in _NONE_YET:
                self._extreme[subject] = _held(other._extreme, subject, _NONE_YET[self._func])
            elif self._func != "count":
                self._whole[subject] = _held(other._whole, subject, 0)
                self._fraction[subject] = _held(other._fraction, subject, 0)
            self._large.pop(subject, None)
            if subject in other._large:
                self._large[subject] = list(other._large[subject])

    def clear(self, subject: int) -> None:
        """Forget a customer."""
        self.copy(subject, MeterTotals(self._func))

    def take_away(self, subject: int, other: "MeterTotals") -> None:
        """Take what another one has of a customer off: for meters whose values add up."""
        with self._lock:
            self._grow(subject + 1)
            self._count[subject] -= _held(other._count, subject, 0)
            if self._func != "count":
                self._whole[subject] -= _held(other._whole, subject, 0)
                self._fraction[subject] -= _held(other._fraction, subject, 0)
            for units in other._large.get(subject, ()):
                self._add_large(subject, -units)

    def _extremes(self, found: list[int], large: list[int], count: int) -> Total:
        edges = [*[units for units in found if units != _NONE_YET[self._func]], *large]
        least, most = (min(edges), max(edges)) if edges else (0, 0)
        return Total(count, Decimal(0), _amount(least) if edges else None, _amount(most) if edges else None)


def exact_sum(column: Integers) -> int:
    """The sum of 64-bit integers, of any size: their halves are added apart, which 2^31 of them do not overflow."""
    return (int((column >> 32).sum()) << 32) + int((column & 0xFFFF_FFFF).sum())


def longer(column: Integers, more: int, fill: int) -> Integers:
    """The column with so many more rows, filled."""
    return np.concatenate([column, np.full(more, fill, np.int64)])


def _held(column: Integers, row: int, default: int) -> int:
    return int(column[row]) if row < len(column) else default


def _amount(units: int) -> Decimal:
    return _EXACT.scaleb(Decimal(units), -DECIMALS)
