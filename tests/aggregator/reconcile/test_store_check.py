"""The store against itself."""

import asyncio
from pathlib import Path

import pytest

from aggregator.reconcile.report import Cause
from meters.event import event_id, identity
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.records import ORGANIZATION, decisions, entry, line, organization
from tests.support.servers.stopped_installation import Left


def test_every_meter_and_customer_is_compared(left: Left) -> None:
    """The totals that the next start shows are recounted from the raw events, for each customer."""
    check = left.check("store")

    assert check.differences == []
    compared = {counted.what: counted.compared for counted in check.counted}
    assert compared["customers, meter meter-sum"] == 4
    assert compared["hours, meter meter-count"] >= 1
    assert compared["identities, each once"] == 18


def test_events_so_old_that_no_chart_shows_them_are_counted(left: Left) -> None:
    """Their hours are not kept, so they are not compared; what a customer used has them."""
    before = {one.what: one.compared for one in left.check("store").counted}
    with left.log() as log:
        old = [line(f"old-{year}", timestamp=f"{year}-12-31T23:59:59Z", metadata={"n": 7}) for year in (1999, 2021)]
        asyncio.run(log.append(USAGE_EVENTS, [entry(*old)]))
    left.count()

    check = left.check("store")

    assert check.differences == []
    after = {one.what: one.compared for one in check.counted}
    assert after["identities, each once"] == before["identities, each once"] + 2
    assert after["hours, meter meter-sum"] == before["hours, meter meter-sum"]


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


@pytest.mark.parametrize(
    ("statement", "cause"),
    [
        ("DELETE FROM hierarchy", Cause.LOST),
        ("DELETE FROM pending", Cause.LOST),
        ("UPDATE hierarchy SET depth = depth + 1", Cause.CHANGED),
        ("UPDATE hierarchy SET root_lo = root_lo - 1", Cause.CHANGED),
        ("UPDATE hierarchy SET parent_hi = id_hi, parent_lo = id_lo", Cause.CHANGED),
        ("UPDATE hierarchy SET id_lo = id_lo - 1", Cause.UNFOUNDED),
    ],
)
def test_events_that_are_not_below_their_parents_are_named(tmp_path: Path, statement: str, cause: Cause) -> None:
    """Children of a root by either name of it, a grandchild, and one whose parent never came."""
    root = event_id(*identity(ORGANIZATION, "root"))
    lines = [
        line("root"), line("child", parent_id="root"), line("other", parent_id=root), line("leaf", parent_id="child"),
        line("orphan", parent_id="never"),
    ]  # fmt: skip
    left = Left(tmp_path)
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(*lines)]))
    left.count()
    assert left.check("store").differences == []

    left.spoil(statement)

    found = [one for one in left.check("store").differences if one.where.startswith("hierarchy, event ")]
    assert cause in {one.cause for one in found}
