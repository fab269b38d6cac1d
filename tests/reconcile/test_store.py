"""The store against itself."""

import pytest

from aggregator.reconcile.report import Cause
from tests.reconcile.planting import Left


def test_every_meter_and_customer_is_compared(left: Left) -> None:
    """The totals that the next start shows are recounted from the raw events, for each customer."""
    check = left.check("store")

    assert check.differences == []
    compared = {counted.what: counted.compared for counted in check.counted}
    assert compared["customers, meter meter-sum"] == 4
    assert compared["hours, meter meter-count"] >= 1
    assert compared["identities, each once"] == 18


@pytest.mark.parametrize(
    ("statement", "cause", "named"),
    [
        ("DELETE FROM events WHERE seq = 3", Cause.LOST, "sequence numbers from 0"),
        ("UPDATE events SET seq = seq + 1 WHERE seq > 5", Cause.LOST, "sequence numbers from 0"),
        ("UPDATE positions SET stored = stored + 1 WHERE stream = 'usage.events'", Cause.LOST, "partition 0"),
        ("UPDATE positions SET next_offset = 3 WHERE stream = 'usage.events'", Cause.DOUBLED, "partition 0"),
        ("DELETE FROM dead_letters WHERE number = 1", Cause.LOST, "dead letters"),
        ("DELETE FROM control WHERE log_offset = 1", Cause.LOST, "decisions"),
        ("DELETE FROM subjects WHERE number = 1", Cause.UNFOUNDED, "events"),
        ("INSERT INTO subjects SELECT * FROM subjects WHERE number = 1", Cause.DOUBLED, "subjects"),
    ],
)
def test_bookkeeping_that_does_not_add_up_is_named(left: Left, statement: str, cause: Cause, named: str) -> None:
    """Numbers with gaps, tallies that say otherwise, positions behind the rows, rows of nobody."""
    left.spoil(statement)

    found = {(difference.cause, difference.where) for difference in left.check("store").differences}

    assert (cause, named) in found
