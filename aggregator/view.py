"""The View protocol: how the API, the webhooks and the service read the aggregator, and the values that it returns.

``View`` gives the catalogue, the ledger, the directory and the running totals in memory; opens a ``Snapshot`` of the
store; appends decisions to the log; and waits for log positions. ``engine/supervisor.py`` implements it. Readers
depend on this module instead of on the engine, so the engine can change, and tests can supply their own view.
``Unavailable`` means that the view cannot answer now and the caller should retry.
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

from meters.catalogue.catalogue import Catalogue, Change, Names
from meters.ledger.ledger import Ledger
from meters.meter import Meter

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
    """What was used of one meter, exact: by those, and in the time, that were asked for."""

    count: int
    sum: Decimal
    min: Decimal | None
    max: Decimal | None


class Consumption(msgspec.Struct, frozen=True):
    """What one customer used of one meter in the newest window, exact. ``count`` are the events considered."""

    count: int
    value: Decimal
    last_at: datetime | None  # when the newest of them arrived


class OrganizationNumbers(Protocol):
    """The numbers of one organization's customers, by the name that events use."""

    @property
    def external(self) -> Mapping[str, int]:
        """Numbers by ``external_customer_id``."""
        ...

    @property
    def customer(self) -> Mapping[str, int]:
        """Numbers by ``customer_id``."""
        ...


class DirectoryView(Protocol):
    """The numbers under which events are stored (columns ``organization`` and ``subject`` of ``events``)."""

    @property
    def organizations(self) -> Mapping[str, OrganizationNumbers]:
        """Customer numbers by organization id."""
        ...

    def find(self, organization_id: str, names: Names) -> list[int]:
        """Return the numbers of a customer's names, as far as events carry them."""
        ...


class TotalsView(Protocol):
    """The running totals. A method returns None where memory does not have the answer: query the store instead.

    Memory has the totals of one definition of a meter. While a meter is being changed, a caller may still hold the
    definition before, or hold the new one already, and gets None: so no answer is of two definitions.
    """

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """Return the meter's total over these customer numbers, since the first event."""
        ...

    def by_quarters(self, meter: Meter, bounds: Sequence[tuple[datetime, datetime]]) -> list[Total] | None:
        """Return the total of all customers in each span. A span begins and ends on a quarter hour."""
        ...

    def consumed(self, meter: Meter, subjects: list[int], since: datetime | None) -> Consumption | None:
        """Return what one customer used since its newest reset, which was at ``since``."""
        ...

    def arrivals(self, meter: Meter) -> npt.NDArray[np.int64] | None:
        """Return the newest arrival for each customer number, in microseconds since 1970 (EVER: no event)."""
        ...

    def amounts(self, meter: Meter) -> npt.NDArray[np.float64] | None:
        """Return the nearest double of what each customer number used in its window, for sorting."""
        ...


class View(Protocol):
    """The aggregator, as the API and the webhooks see it from inside its process.

    The store's file has one owner, so its readers share the owner's process. ``read`` gives a snapshot with the log
    position that it reflects. ``decide`` appends a record to the control stream and returns once the batch that
    applied the record has committed. The properties raise Unavailable while no engine is running.
    """

    @property
    def catalogue(self) -> Catalogue:
        """Organizations, tokens, customers and meters at the last commit. Do not modify."""
        ...

    @property
    def ledger(self) -> Ledger:
        """Credits and resets at the last commit. Do not modify."""
        ...

    @property
    def directory(self) -> DirectoryView:
        """Numbers of organizations and customers. Do not modify."""
        ...

    @property
    def totals(self) -> TotalsView:
        """Running totals at the last commit. Do not modify."""
        ...

    @property
    def as_of(self) -> Mapping[int, int]:
        """The ``usage.events`` position that answers from memory reflect."""
        ...

    @property
    def control_position(self) -> int:
        """The ``usage.control`` offset behind the last decision that is applied."""
        ...

    @property
    def newest_stamp_us(self) -> int:
        """The newest time (microseconds since 1970) that one of our own processes put on a record that was read.

        The clock of this machine may be behind it. Times that another Kafka producer chose are not part of it.
        """
        ...

    def read(self) -> AbstractContextManager[Snapshot]:
        """Open a snapshot of the store. Its calls block: use it in a thread, and never across an await."""
        ...

    def outbox(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """Open a short transaction on the webhook tables. Its calls block: use it in a thread. Raises Unavailable."""
        ...

    async def decide(self, *changes: Change) -> None:
        """Append the changes as one record, all or none, and wait until they are applied.

        Raises TryAgain, Unavailable, and Refused where the record is larger than the log accepts.
        """
        ...

    async def informed(self, timeout_s: float) -> bool:
        """Wait until every decision that is durable now is applied; False after the timeout. Raises TryAgain."""
        ...

    async def wait_for(self, position: Mapping[int, int], timeout_s: float) -> bool:
        """Wait until the view reflects a ``usage.events`` position; False after the timeout."""
        ...

    async def present(self, timeout_s: float) -> bool:
        """Wait until every event that is in the log now is counted; False after the timeout. Raises TryAgain."""
        ...
