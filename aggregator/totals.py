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

Integers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]
ONE = 10**12  # 10^-12 units in a whole one
_NONE_YET = {"min": np.iinfo(np.int64).max, "max": np.iinfo(np.int64).min}
_EXACT = Context(prec=80)


class Values(NamedTuple):
    """The values that one meter counts in some rows: whose they are, and how much in 10^-12 units.

    ``units`` is None for a meter that only counts. ``large`` are the rows whose value does not fit 64 bits, as
    (customer number, units); they are not among the others, but counted like them.
    """

    subject: Rows
    units: Integers | None = None
    large: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, subject: npt.NDArray[np.int32], amounts: pa.Array | None) -> "Values":
        """From customer numbers and decimals with 12 places, none of them null."""
        rows = subject.astype(np.intp)
        if amounts is None:
            return cls(rows)
        words = np.frombuffer(amounts.buffers()[1], "<i8")[2 * amounts.offset : 2 * (amounts.offset + len(amounts))]
        low, high = words[0::2], words[1::2]
        small = (high == low >> 63) & ~np.isin(low, tuple(_NONE_YET.values()))  # the high word only repeats the sign
        if small.all():
            return cls(rows, low)
        large = [(int(rows[row]), int(high[row]) << 64 | int(low[row]) % 2**64) for row in np.flatnonzero(~small)]
        return cls(rows[small], low[small], large)


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

    def add(self, values: Values) -> None:
        """Move the totals on."""
        with self._lock:
            self._add(values)

    def _add(self, values: Values) -> None:
        rows = values.subject
        if len(rows):
            self._grow(int(rows.max()) + 1)
            np.add.at(self._count, rows, 1)
            if values.units is not None:
                self._add_units(rows, values.units)
        for subject, units in values.large:
            self._grow(subject + 1)
            self._count[subject] += 1
            self._add_large(subject, units)

    def _add_units(self, rows: Rows, units: Integers) -> None:
        if self._func == "min":
            np.minimum.at(self._extreme, rows, units)
        elif self._func == "max":
            np.maximum.at(self._extreme, rows, units)
        else:
            whole, fraction = np.divmod(units, ONE)
            np.add.at(self._whole, rows, whole)
            np.add.at(self._fraction, rows, fraction)
            carry = self._fraction[rows] // ONE
            if carry.any():
                touched = np.unique(rows)
                carry = self._fraction[touched] // ONE
                self._whole[touched] += carry
                self._fraction[touched] -= carry * ONE

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
        more = max(rows - have, have // 2, 1024)
        self._count = _longer(self._count, more, 0)
        if self._func in _NONE_YET:
            self._extreme = _longer(self._extreme, more, _NONE_YET[self._func])
        elif self._func != "count":
            self._whole, self._fraction = _longer(self._whole, more, 0), _longer(self._fraction, more, 0)

    def total(self, subjects: list[int]) -> Total:
        """The total over the customer numbers given, as one customer."""
        with self._lock:
            known = [subject for subject in subjects if subject < len(self._count) and self._count[subject]]
            count = sum(int(self._count[subject]) for subject in known)
            large = [units for subject in known for units in self._large.get(subject, [])]
            if self._func in _NONE_YET:
                return self._extremes(known, large, count)
            units = sum(large)
            if self._func != "count":
                units += sum(int(self._whole[subject]) * ONE + int(self._fraction[subject]) for subject in known)
        return Total(count, _amount(units), None, None)

    def _extremes(self, known: list[int], large: list[int], count: int) -> Total:
        none_yet = _NONE_YET[self._func]
        found = [int(self._extreme[s]) for s in known if self._extreme[s] != none_yet] + large
        least, most = (min(found), max(found)) if found else (0, 0)
        return Total(count, Decimal(0), _amount(least) if found else None, _amount(most) if found else None)


def _longer(column: Integers, more: int, fill: int) -> Integers:
    return np.concatenate([column, np.full(more, fill, np.int64)])


def _amount(units: int) -> Decimal:
    return _EXACT.scaleb(Decimal(units), -12)
