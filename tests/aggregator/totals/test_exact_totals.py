"""Running totals are exact whatever is added, in whatever order."""

from decimal import Context, Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.totals.accumulators import LOOPED_MAX, Amounts, MeterTotals, exact_sum

EXACT = Context(prec=100)
amounts = st.one_of(
    st.integers(-(10**38) + 1, 10**38 - 1),
    st.integers(-20, 20).map(lambda n: n * 10**11),
    st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 0]),
).map(lambda units: EXACT.scaleb(Decimal(units), -12))
rounds = st.lists(st.lists(st.tuples(st.integers(0, 3), amounts), max_size=8), max_size=6)


def added(func: str, rounds: list[list[tuple[int, Decimal]]]) -> MeterTotals:
    """The totals after these rounds of (customer number, amount)."""
    totals = MeterTotals(func)
    for rows in rounds:
        subjects = np.array([subject for subject, _ in rows], np.intp)
        column = pa.array([amount for _, amount in rows], pa.decimal128(38, 12))
        amounts = None if func == "count" else Amounts.of(column)
        totals.add(subjects, amounts, np.arange(len(rows)))
    return totals


@pytest.mark.parametrize("func", ["count", "sum", "min", "max"])
@given(rounds=rounds, subjects=st.sets(st.integers(0, 4), min_size=1))
def test_totals_equal_plain_decimals(
    func: str, rounds: list[list[tuple[int, Decimal]]], subjects: set[int]
) -> None:
    """Count, sum, least and greatest are those of a list of decimals, also beyond 64 and beyond 128 bits."""
    total = added(func, rounds).total(sorted(subjects))
    mine = [amount for rows in rounds for subject, amount in rows if subject in subjects]

    assert len(mine) == total.count
    if func == "sum":
        expected = Decimal(0)
        for amount in mine:
            expected = EXACT.add(expected, amount)
        assert expected == total.sum
    if func in ("min", "max"):
        expected_extreme = (min(mine) if func == "min" else max(mine)) if mine else None
        assert expected_extreme == (total.min if func == "min" else total.max)


@pytest.mark.parametrize("func", ["count", "sum", "min", "max"])
@given(rounds=rounds, subjects=st.sets(st.integers(0, 4), min_size=1))
def test_many_rows_at_once_are_the_same_as_one_by_one(
    func: str, rounds: list[list[tuple[int, Decimal]]], subjects: set[int]
) -> None:
    """Additions of arrays lose nothing, and numbers that nobody has add nothing."""
    totals = added(func, rounds)
    nobody = range(1_000_000, 1_000_000 + LOOPED_MAX)
    assert totals.total(sorted(subjects)) == totals.total([*sorted(subjects), *nobody])
    assert totals.total(sorted(subjects)) == totals.total_of(np.array([*nobody, *subjects], np.intp))


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_sums_of_large_integers_do_not_overflow(numbers: list[int]) -> None:
    """64 bits hold each of them, not all together."""
    assert exact_sum(np.array(numbers, np.int64)) == sum(numbers)


def test_ten_times_a_tenth_is_one() -> None:
    """The sum that doubles get wrong."""
    assert Decimal(1) == added("sum", [[(0, Decimal("0.1"))] * 10]).total([0]).sum


def test_ten_million_small_amounts_are_exact() -> None:
    """Their fractions alone are more than 64 bits hold."""
    rows, rounds, amount = np.arange(1_000_000), 10, Decimal("0.999999999999")
    assert amount * len(rows) * rounds * 10**12 > 2**63
    totals, amounts = MeterTotals("sum"), Amounts.of(pa.array([amount], pa.decimal128(38, 12)).take(pa.array(rows * 0)))
    for _ in range(rounds):
        totals.add(rows * 0, amounts, rows)
    assert totals.total([0]).sum == amount * len(rows) * rounds
