"""What the aggregator shows its guests: a snapshot, totals, and that it cannot answer now.

The ``View`` itself, by which they ask, is a protocol in ``api/desk.py``.
"""

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal

import duckdb
import msgspec
import numpy as np

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
