"""What the query API may ask of the aggregator.

The aggregator owns the store; the API is a guest in the same process, because DuckDB's file has one owner. The
guest reads through ``read`` (a snapshot with the position it is true for), decides through ``decide`` (a record in
the control stream, true once the round that applied it has committed) and waits through ``wait_for``.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from decimal import Decimal
from typing import Protocol

import duckdb
import msgspec
import numpy as np
import numpy.typing as npt

from meters.catalogue import Catalogue, Change
from meters.ledger import Ledger

EVER = int(np.iinfo(np.int64).min)
"""Before every time, in microseconds since 1970: where a window begins that has no reset, when nothing arrived yet."""


class Unavailable(Exception):
    """The view cannot answer now; the same question may be answered after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Snapshot(msgspec.Struct, frozen=True):
    """One consistent reading of the store: run any number of SELECTs; all see the same commit."""

    connection: duckdb.DuckDBPyConnection
    as_of: Mapping[int, int]  # usage.events positions, {partition: next offset}


class Total(msgspec.Struct, frozen=True):
    """What one customer used of one meter since the beginning of the log, exact."""

    count: int
    sum: Decimal
    min: Decimal | None
    max: Decimal | None


class Consumption(msgspec.Struct, frozen=True):
    """What one customer used of one meter in the newest window, exact. ``count`` are the events considered."""

    count: int
    value: Decimal
    last_at: datetime | None  # when the newest of them arrived


class View(Protocol):
    """The aggregator, as its guests see it."""

    @property
    def catalogue(self) -> Catalogue:
        """Organizations, tokens, customers and meters as of the last commit. Read only."""
        ...

    def read(self) -> AbstractContextManager[Snapshot]:
        """A snapshot of the store, for a thread of its own. Blocking calls; never held across an await."""
        ...

    @property
    def ledger(self) -> Ledger:
        """Credits and resets as of the last commit. Read only."""
        ...

    async def decide(self, *changes: Change) -> None:
        """Write changes to the control stream, all or none, and return when they are true everywhere in here.

        They are one record. Raises TryAgain, Unavailable, and Refused where it is larger than the log takes.
        """
        ...

    async def informed(self, timeout_s: float) -> bool:
        """Whether every decision that is durable now is true in here within the time. Raises TryAgain."""
        ...

    @property
    def control_position(self) -> int:
        """The ``usage.control`` position of the last commit."""
        ...

    def outbox(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """A small transaction on the tables of webhooks, for a thread of its own. Raises Unavailable."""
        ...

    async def wait_for(self, position: Mapping[int, int], timeout_s: float) -> bool:
        """Whether the view reached the ``usage.events`` position within the time."""
        ...

    async def present(self, timeout_s: float) -> bool:
        """Whether the view has, within the time, everything that is in the log when this is asked. Raises TryAgain."""
        ...

    def numbers(self, organization_id: str, external_customer_id: str | None, customer_id: str | None) -> list[int]:
        """The numbers under which a customer's events are stored (``events.subject``): none, one or two."""
        ...

    def total(self, meter_id: str, subjects: list[int]) -> Total | None:
        """The meter's running total over these numbers, from memory (count, sum, avg, min, max meters).

        None while the meter is still being counted, and for ``unique`` meters: ask the store then.
        """
        ...

    def by_quarters(self, meter_id: str, bounds: Sequence[tuple[datetime, datetime]]) -> list[Total] | None:
        """Everyone's total of the meter by the events' own times, in each span that begins and ends on quarter hours.

        None while the meter is still being counted, for ``unique`` meters, and where a span begins so early that no
        chart can: ask the store then.
        """
        ...

    def consumed(self, meter_id: str, subjects: list[int], since: datetime | None) -> Consumption | None:
        """The meter's value over what arrived from these numbers since a time, from memory.

        None where memory does not have it: while the meter is still being counted, for another time than the
        newest reset of the customer, and for more distinct values than are kept. Ask the store then.
        """
        ...

    def arrivals(self, meter_id: str) -> npt.NDArray[np.int64] | None:
        """When the newest event of each number arrived that the meter counts, in us; EVER where none did.

        None while the meter is still being counted.
        """
        ...

    def amounts(self, meter_id: str) -> npt.NDArray[np.float64] | None:
        """What each number used in its window, as the nearest double, to put long lists in order by.

        None for ``unique`` meters, and while the meter is still being counted.
        """
        ...

    @property
    def as_of(self) -> Mapping[int, int]:
        """The ``usage.events`` positions of the last commit, for answers that come from memory."""
        ...
