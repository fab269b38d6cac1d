"""What a report lists, and when it says that both sides are equal."""

from datetime import UTC, datetime
from decimal import Decimal

import msgspec

from aggregator.reconcile.html import page
from aggregator.reconcile.report import DIFFERENCES_MAX, Cause, Check, Difference, Repair, Report


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
