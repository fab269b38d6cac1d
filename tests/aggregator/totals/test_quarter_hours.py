"""Quarter hours are kept for every chart that may be asked for, and for no other time."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import numpy as np
import pyarrow as pa

from aggregator.totals.accumulators import Amounts, Calendar, MeterQuarters
from meters.timestamps import KEPT_FROM, START_MIN, Interval, bucket, microseconds_of, zone_names

QUARTER = timedelta(minutes=15)


def counted(times: list[datetime], calendar: Calendar) -> MeterQuarters:
    """A sum of ones, an event at each of the times."""
    quarters = MeterQuarters("sum", calendar)
    amounts = Amounts.of(pa.array([Decimal(1)] * len(times), pa.decimal128(38, 12)))
    numbers = calendar.numbers(np.array([microseconds_of(time) for time in times], np.int64))
    quarters.add(numbers, amounts, np.arange(len(times)))
    return quarters


def test_no_chart_begins_before_what_is_kept() -> None:
    """In any time zone, by any unit: the year that holds the earliest start begins later."""
    begins = [bucket(START_MIN, interval, name)[0] for name in zone_names() for interval in Interval]
    assert min(begins) >= KEPT_FROM


def test_times_of_which_no_chart_can_be_asked_cost_one_row_together() -> None:
    """A million events of a million quarter hours in the middle ages take no more memory than one."""
    ancient = [datetime(5, 1, 1, tzinfo=UTC) + number * QUARTER for number in range(2_000)]
    quarters = Calendar().numbers(np.array([microseconds_of(time) for time in ancient], np.int64))
    assert set(quarters.tolist()) == {0}


def test_old_times_leave_what_is_charted_as_it_is() -> None:
    """Beside them, on both sides of where charts may begin, every quarter hour has its own sum."""
    edge = [KEPT_FROM - timedelta(microseconds=1), KEPT_FROM, KEPT_FROM + QUARTER, KEPT_FROM + QUARTER]
    quarters = counted([datetime(1999, 12, 31, tzinfo=UTC), *edge, datetime(2026, 3, 1, tzinfo=UTC)], Calendar())
    spans = [(KEPT_FROM, KEPT_FROM + QUARTER), (KEPT_FROM + QUARTER, KEPT_FROM + 2 * QUARTER)]
    assert [quarters.total(begins, ends).sum for begins, ends in spans] == [1, 2]
    assert quarters.total(KEPT_FROM, datetime(2027, 1, 1, tzinfo=UTC)).count == 4
