"""A window begins with the microsecond of its reset: what arrived in it counts, what arrived before does not."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from aggregator.totals.accumulators import Amounts, MeterWindows

SINCE_US = 1_800_000_000_000_000
AMOUNTS = [Decimal(1), Decimal(7), Decimal(4)]


@pytest.mark.parametrize(
    ("func", "value"), [("count", 2), ("sum", 11), ("avg", "5.5"), ("min", 4), ("max", 7), ("unique", 2)]
)
def test_usage_in_the_very_microsecond_of_a_reset_is_inside(func: str, value: object) -> None:
    """For every kind of meter: of three rows one arrived before, one with and one after the reset."""
    amounts = pa.array(AMOUNTS, pa.decimal128(38, 12))
    used = {"unique": amounts.cast(pa.string()), "count": None}.get(func, Amounts.of(amounts))
    windows = MeterWindows(func)
    assert windows.begin_windows({0: SINCE_US})
    arrived = np.array([SINCE_US - 1, SINCE_US, SINCE_US + 1])
    windows.add(np.zeros(3, np.intp), used, np.arange(3), arrived)

    found = windows.consumed([0], SINCE_US)
    assert found is not None
    assert (found.count, found.value) == (2, Decimal(str(value)))
    assert windows.has_rows(0, SINCE_US + 1)
    assert not windows.has_rows(0, SINCE_US + 2)
