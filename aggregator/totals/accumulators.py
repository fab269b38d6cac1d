"""Accumulators: one meter's totals as arrays, with exact sums.

``MeterTotals`` keeps what each customer number used since the first event. ``MeterWindows`` adds what each used since
its newest reset. ``MeterQuarters`` keeps what all customers together used in each quarter hour, for charts.
``DistinctValues`` keeps the values of a ``unique`` meter. ``running.py`` feeds them with the rows of each batch.

A query over the store takes milliseconds and grows with the history; reading a total here takes microseconds. The
totals are derived data: they are counted from the store when the aggregator starts or a meter is created, and then
updated after each commit.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Context, Decimal
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.view import EVER, Consumption, Total
from meters.aggregation import mean
from meters.exact import DECIMALS, EXACT
from meters.timestamps import KEPT_FROM, instant_of, microseconds_of

# Totals since the first event.
#
# A sum is stored as two columns of 64-bit integers, whole units and units of 10^-12, so a batch's thousands of
# additions are a few array operations, and nothing is rounded. A value too large for that (beyond 9 million in units
# of 10^-12) is kept as a Python integer beside the columns, which has no limit.

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


# Usage since the newest reset.
#
# A window holds what *arrived* since its reset: an event with an old timestamp that arrives late belongs to the
# newest window, and an event that arrived before the reset but is read after it does not. Most rows of most batches
# belong to the newest window. So a meter whose values can be subtracted keeps, for a customer with a reset, what lies
# *before* the window, and subtracts it from the total. The other meters (min, max, unique) keep what lies inside the
# window. Either way a batch costs one comparison of times, as arrays.

ADDING = frozenset({"count", "sum", "avg"})
DISTINCT_MAX = 1_000_000
"""Values and customers of a ``unique`` meter that are kept: in 260 MB where they are UUIDs, in 400 MB at most. Without
this bound a meter of request ids would keep every id there ever was."""
IDENTITY_LENGTH_MAX = 64  # characters of a value that is kept as it is; longer ones are kept as a 128-bit hash


class Kept(Protocol):
    """What is kept by customer number: totals, or distinct values. The contributions are made for it."""

    def add(self, subjects: Rows, contributions: Any, rows: Rows) -> None:
        """Move on by the chosen rows."""

    def copy(self, subject: int, other: Any) -> None:
        """Take over what another one has of a customer."""

    def clear(self, subject: int) -> None:
        """Forget a customer."""


class DistinctValues:
    """The values that customers used of a ``unique`` meter: a set for each customer number, while they are few.

    Where they are more than DISTINCT_MAX nothing is kept any more and nothing is known: the store is asked instead.
    """

    def __init__(self) -> None:
        self._values: dict[int, set[str | bytes]] = {}
        self._counts: dict[int, int] = {}
        self._held = 0  # values and customers
        self._is_known = True

    def add(self, subjects: Rows, identities: pa.Array, rows: Rows) -> None:
        """Take in the chosen rows; equal ones are put together before Python sees them."""
        if not self._is_known:
            return
        table = pa.table({"subject": subjects[rows], "identity": identities.take(pa.array(rows))})
        pairs = table.group_by(["subject", "identity"]).aggregate([([], "count_all")]).to_pydict()
        for subject, identity, count in zip(pairs["subject"], pairs["identity"], pairs["count_all"], strict=True):
            self._keep(subject, () if identity is None else (_short(identity),), count)
        self._forget_many()

    def _keep(self, subject: int, identities: Iterable[str | bytes], count: int) -> None:
        if subject not in self._counts:
            self._counts[subject], self._values[subject] = 0, set()
            self._held += 1
        values = self._values[subject]
        self._held -= len(values)
        values.update(identities)
        self._held += len(values)
        self._counts[subject] += count

    def _forget_many(self) -> None:
        if self._held > DISTINCT_MAX or not self._is_known:
            self._values, self._counts, self._held, self._is_known = {}, {}, 0, False

    def copy(self, subject: int, other: "DistinctValues") -> None:
        """Take over what another one has of a customer."""
        self.clear(subject)
        self._is_known = self._is_known and other._is_known
        if self._is_known and subject in other._counts:
            self._keep(subject, other._values[subject], other._counts[subject])
        self._forget_many()

    def clear(self, subject: int) -> None:
        """Forget a customer."""
        if self._counts.pop(subject, None) is not None:
            self._held -= 1 + len(self._values.pop(subject))

    def value(self, subjects: list[int]) -> tuple[int, Decimal] | None:
        """Events considered, and distinct values, of several numbers as one customer; None where nothing is known."""
        if not self._is_known:
            return None
        found = set[str | bytes]().union(*(self._values.get(subject, ()) for subject in subjects))
        return sum(self._counts.get(subject, 0) for subject in subjects), Decimal(len(found))


def _short(identity: str) -> str | bytes:
    if len(identity) <= IDENTITY_LENGTH_MAX:
        return identity
    return blake2b(identity.encode(), digest_size=16).digest()


class MeterWindows:
    """One meter, by customer number. One thread begins windows; adding and reading may come from any."""

    def __init__(self, func: str) -> None:
        self._func = func
        self._lock = threading.Lock()
        self._whole: Kept = _kept(func)
        self._apart: Kept = _kept(func)  # before the window where values add up, inside of it elsewhere
        self._since = np.zeros(0, np.int64)
        self._newest = np.zeros(0, np.int64)
        self.is_windowed = False

    def add(self, subjects: Rows, contributions: Any, rows: Rows, arrived: Integers) -> None:
        """Move on by the chosen rows: whose they are, what they contribute, and when each row arrived, in us."""
        if len(rows) == 0:
            return
        every = len(rows) == len(subjects)
        chosen, times = (subjects, arrived) if every else (subjects[rows], arrived[rows])
        with self._lock:
            self._grow(int(chosen.max()) + 1)
            np.maximum.at(self._newest, chosen, times)
            self._whole.add(subjects, contributions, rows)
            if self.is_windowed:
                since = self._since[chosen]
                apart = times < since if self._func in ADDING else (since != EVER) & (times >= since)
                if apart.any():
                    self._apart.add(subjects, contributions, rows[apart])

    def _grow(self, rows: int) -> None:
        have = len(self._newest)
        if rows > have:
            self._newest = longer(self._newest, max(rows - have, have // 8, 1024), EVER)
        if self.is_windowed and len(self._since) < len(self._newest):  # nearly no meter has windows
            self._since = longer(self._since, len(self._newest) - len(self._since), EVER)

    def _begins(self, subject: int) -> int:
        return int(self._since[subject]) if subject < len(self._since) else EVER

    def is_elsewhere(self, subject: int, since: int) -> bool:
        """Whether the customer's window begins at another time than this."""
        return self._begins(subject) != since

    def has_rows(self, subject: int, since: int) -> bool:
        """Whether something arrived from the customer at or after this time."""
        return since != EVER and subject < len(self._newest) and int(self._newest[subject]) >= since

    def begin_windows(self, begins: Mapping[int, int], inside: "MeterWindows | None" = None) -> bool:
        """Begin the customers' windows at these times. ``inside`` has what arrived since, if anything did.

        False, and nothing is done, where there is none and something arrived after all.
        """
        with self._lock:
            if inside is None and any(self.has_rows(subject, since) for subject, since in begins.items()):
                return False
            self.is_windowed = self.is_windowed or bool(begins)
            for subject, since in begins.items():
                self._grow(subject + 1)
                self._since[subject] = since
                self._set_apart(subject, since, inside._whole if inside is not None else _kept(self._func))
        return True

    def _set_apart(self, subject: int, since: int, inside: Kept) -> None:
        if since == EVER:
            self._apart.clear(subject)
        elif self._func in ADDING:
            self._apart.copy(subject, self._whole)
            assert isinstance(self._apart, MeterTotals)
            assert isinstance(inside, MeterTotals)
            self._apart.take_away(subject, inside)
        else:
            self._apart.copy(subject, inside)

    def total(self, subjects: list[int]) -> Total | None:
        """Since the beginning; None for distinct values, which have no such total."""
        with self._lock:
            return self._whole.total(subjects) if isinstance(self._whole, MeterTotals) else None

    def arrivals(self) -> Integers:
        """When the newest row of each customer number arrived, in us."""
        with self._lock:
            return self._newest.copy()

    def amounts(self) -> npt.NDArray[np.float64] | None:
        """What each customer number used in its window, as doubles; None for distinct values."""
        with self._lock:
            if not (isinstance(self._whole, MeterTotals) and isinstance(self._apart, MeterTotals)):
                return None
            size = len(self._newest)
            if self._func not in ADDING:
                whole, inside = self._whole.extremes(size), self._apart.extremes(size)
                return np.where(longer(self._since, size - len(self._since), EVER) == EVER, whole, inside)
            amounts = self._whole.sums(size) - self._apart.sums(size)
            if self._func == "avg":
                amounts /= np.maximum(self._whole.counts(size) - self._apart.counts(size), 1)
            return amounts

    def consumed(self, subjects: list[int], since: int) -> Consumption | None:
        """In the window that begins at ``since``.

        None if that is not where these customers' windows begin, or for more distinct values than are kept.
        """
        with self._lock:
            known = [subject for subject in subjects if subject < len(self._newest) and self._newest[subject] != EVER]
            if not known:
                return Consumption(0, Decimal(0), None)
            if any(self._begins(subject) != since for subject in known):
                return None
            last = max(int(self._newest[subject]) for subject in known)
            found = self._value(known, since)
        return None if found is None else Consumption(*found, instant_of(last))

    def _value(self, subjects: list[int], since: int) -> tuple[int, Decimal] | None:
        inside = self._whole if since == EVER or self._func in ADDING else self._apart
        if isinstance(inside, DistinctValues):
            return inside.value(subjects)
        assert isinstance(inside, MeterTotals)
        found = inside.total(subjects)
        if self._func not in ADDING:
            return found.count, (found.min if self._func == "min" else found.max) or Decimal(0)
        if since != EVER:
            assert isinstance(self._apart, MeterTotals)
            before = self._apart.total(subjects)
            found = Total(found.count - before.count, EXACT.subtract(found.sum, before.sum), None, None)
        value = {"count": Decimal(found.count), "sum": found.sum}.get(self._func)
        return found.count, mean(found.sum, found.count) if value is None else value


def _kept(func: str) -> Kept:
    return DistinctValues() if func == "unique" else MeterTotals(func)


def window_begin_us(instant: datetime | None) -> int:
    """Where a window begins, as it is kept here; None is EVER."""
    return EVER if instant is None else microseconds_of(instant)


# Usage of all customers by quarter hour.
#
# A chart shows, for example, a month by the day. From stored events that needs a pass over all of them; from quarter
# hours it needs three thousand additions, which numpy does at once. Hours, days and months of every time zone begin
# on a quarter hour, so quarter hours serve all of them.
#
# Quarter hours that have events are numbered in order of first appearance, and the number takes the place of a
# customer number in ``MeterTotals``. Events may carry any past timestamp. All quarter hours before KEPT_FROM, which
# no chart shows, share one number; otherwise a client with a wrong clock would fill the memory.

QUARTER_US = 15 * 60 * 1_000_000
_BEFORE = microseconds_of(KEPT_FROM) // QUARTER_US - 1  # stands for all that are not kept
_DENSE_MAX = 100_000  # quarter hours from the first to the last of a round, three years, up to which a table finds them


class Calendar:
    """Numbers the quarter hours. Called by the writer and by threads that count history."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[int, int] = {}
        self._order: tuple[Integers, Rows] | None = None  # the quarters sorted, and their numbers

    def numbers(self, times: Integers) -> Rows:
        """The number of each time's quarter hour; ``times`` are microseconds since 1970."""
        quarters: Integers = np.maximum(times // QUARTER_US, _BEFORE)
        first = int(quarters.min()) if len(quarters) else 0
        if len(quarters) and int(quarters.max()) - first < _DENSE_MAX:
            places = quarters - first
            found = np.flatnonzero(np.bincount(places))
            table: Rows = np.zeros(int(found[-1]) + 1, np.intp)
            table[found] = self._number((found + first).tolist())
            return table[places]
        found, places = np.unique(quarters, return_inverse=True)
        numbers: Rows = np.array(self._number(found.tolist()), np.intp)[places]
        return numbers

    def _number(self, quarters: Sequence[int]) -> list[int]:
        with self._lock:
            known = len(self._numbers)
            numbers = [self._numbers.setdefault(quarter, len(self._numbers)) for quarter in quarters]
            if len(self._numbers) != known:
                self._order = None
        return numbers

    def within(self, begins: datetime, ends: datetime) -> Rows:
        """The numbers of the quarter hours in ``[begins, ends)``, from KEPT_FROM on, that have events, in order."""
        with self._lock:
            if self._order is None:
                quarters = np.array(list(self._numbers), np.int64)
                order = np.argsort(quarters)
                self._order = quarters[order], order
            quarters, numbers = self._order
        first, last = (microseconds_of(moment) // QUARTER_US for moment in (begins, ends))
        return numbers[np.searchsorted(quarters, first) : np.searchsorted(quarters, last)]


class MeterQuarters:
    """One meter by quarter hour."""

    def __init__(self, func: str, calendar: Calendar) -> None:
        self._totals, self._calendar = MeterTotals(func), calendar

    def add(self, quarters: Rows, amounts: Amounts | None, rows: Rows) -> None:
        """Move on by the chosen rows: the number of each row's quarter hour, and how much it contributes."""
        self._totals.add(quarters, amounts, rows)

    def total(self, begins: datetime, ends: datetime) -> Total:
        """Everyone's total in ``[begins, ends)``, from KEPT_FROM on, which begins and ends on quarter hours."""
        return self._totals.total_of(self._calendar.within(begins, ends))
