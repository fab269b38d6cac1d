"""What was used of every meter in each quarter hour, by everyone together, in memory, exact.

A chart asks for a month by the day. Read from the events that is a pass over all of them, and grows with history; read
from quarter hours it is three thousand additions, which numpy makes at once. Hours, days and months of every time zone
begin and end on a quarter hour, so these serve them all.

They are counted as the totals of customers are, in the same columns: the quarter hours that have events are numbered in
order of first sight, and such a number stands where a customer's would. Events may carry any time that has passed. All
quarter hours before KEPT_FROM, which no chart shows, share one number: else a client with a wrong clock would fill the
memory.
"""

import threading
from collections.abc import Sequence
from datetime import datetime

import numpy as np

from aggregator.totals import Amounts, Integers, MeterTotals, Rows
from aggregator.view import Total
from meters.timestamp import microseconds_of
from meters.window import KEPT_FROM

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
