"""What each customer used of one meter since the newest reset, in memory, beside what was used since the beginning.

A window holds what *arrived* since its reset, so an event that arrives late belongs to the newest window, and one that
arrived before the reset and is read after it does not. Most rows of most rounds belong to the newest window. So a
meter whose values add up keeps, for a customer with a reset, what lies *before* the window and takes it off the whole;
the others (min, max, unique) keep what lies inside. Either way a round costs a comparison of times, as arrays.
"""

import threading
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.totals import Integers, MeterTotals, Rows, longer
from aggregator.view import EVER, Consumption, Total
from meters.aggregation import mean
from meters.amount import EXACT
from meters.timestamp import instant_of, microseconds_of

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
