"""What a report lists, and when it says that both sides are equal."""

import json
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest

from aggregator.reconcile.html import page
from aggregator.reconcile.report import DIFFERENCES_MAX, Cause, Check, Difference, Repair, Report, report_json


def report_of(*causes: Cause) -> Report:
    """One check that found these."""
    check = Check(name="upstream", sides="ours and theirs")
    for number, cause in enumerate(causes):
        check.add(Difference(check="upstream", cause=cause, where=f"number {number}", what="", repair=Repair.NOTHING))
    return Report(made_at=datetime(2026, 3, 1, tzinfo=UTC), as_of="0:1", since=None, until=None, checks=[check])


def test_any_number_of_explained_differences_is_equal() -> None:
    """There may be one for each balance: the digits of doubles are nobody's error, however many customers there are."""
    report = report_of(*[Cause.ROUNDING] * (DIFFERENCES_MAX + 1))

    assert report.is_equal
    assert len(report.differences) == DIFFERENCES_MAX
    assert "1,001 small differences are explained" in page(report)


def test_explained_differences_do_not_crowd_out_the_others() -> None:
    """What is wrong is listed behind any number of them, and counted by itself."""
    report = report_of(*[Cause.ROUNDING] * (DIFFERENCES_MAX + 1), Cause.LOST)

    assert not report.is_equal
    assert report.differences[-1].cause is Cause.LOST
    assert "1 difference found" in page(report)


def test_differences_beyond_those_listed_are_counted() -> None:
    """A thousand are listed, and the page says how many more there are."""
    report = report_of(*[Cause.LOST] * (DIFFERENCES_MAX + 5))

    assert len(report.differences) == DIFFERENCES_MAX
    assert "5 more are not listed" in page(report)


def lost(cents: Decimal | None, **quantities: int) -> Difference:
    """A difference of these quantities."""
    return Difference(
        check="log", cause=Cause.LOST, where="", what="", repair=Repair.REBUILD, cents=cents,
        quantities={name: Decimal(amount) for name, amount in quantities.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("differences", "cents", "shown"),
    [
        ([lost(None, tokens=5)], None, "<b>unknown</b>money at stake"),  # no price is known
        ([lost(Decimal(5), tokens=5)], 5, "<b>$0.05</b>money at stake"),
        ([lost(Decimal(0), tokens=0)], 0, "<b>$0.00</b>money at stake"),
        ([lost(Decimal(5), tokens=5), lost(None, calls=1)], 5, "<b>$0.05 or more</b>money at stake"),
        ([lost(None)], 0, "<b>$0.00</b>money at stake"),  # no quantity of any meter is at stake
        ([], 0, "<b>$0.00</b>money at stake"),
    ],
)
def test_money_that_nobody_knows_is_unknown(
    differences: list[Difference], cents: int | None, shown: str
) -> None:
    """And never $0.00, on the page and for a program."""
    report = msgspec.structs.replace(report_of(), checks=[Check(name="log", sides="", differences=differences)])
    assert report.cents == cents
    assert json.loads(report_json(report))["cents"] == (None if cents is None else str(cents))
    assert shown in page(report)


def test_money_at_stake_is_told_to_the_last_cent() -> None:
    """However much it is; what is too much and what is too little both count."""
    cents = Decimal("1" * 31 + ".25")
    differences = [
        Difference(check="log", cause=Cause.LOST, where="", what="", repair=Repair.REBUILD, cents=each)
        for each in (cents, Decimal("-0.01"), cents.copy_negate())
    ]
    report = msgspec.structs.replace(report_of(), checks=[Check(name="log", sides="", differences=differences)])

    assert report.cents == Decimal("2" * 31 + ".51")
    assert f"<b>${int('2' * 29):,}.23</b>" in page(report)
