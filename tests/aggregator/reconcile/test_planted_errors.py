"""Eight errors, planted one by one: each is found, has its cause, and is repaired; then everything agrees again."""

import json
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from aggregator.reconcile.report import Cause, Check, Difference, Repair, Report
from tests.aggregator.reconcile.test_ledger_check import ledger_of_ann
from tests.support.polar.two_servers import NOON, TwoSides, call, numbered
from tests.support.servers.stopped_installation import Left

ROOT = "(SELECT seq FROM events WHERE external_id = 'root' LIMIT 1)"
PAID = {"property": "tier", "operator": "ne", "value": "free"}
GOLD = {"property": "tier", "operator": "eq", "value": "gold"}


def only(report: Report) -> Difference:
    """The one difference there is."""
    assert len(report.differences) == 1, report.differences
    return report.differences[0]


def written(data: Path) -> list[str]:
    """The sentences of the record of repairs."""
    lines = (data / "reconcile" / "repairs.jsonl").read_text().splitlines()
    return [done["what"] for line in lines for done in json.loads(line)["done"]]


@pytest.fixture
def summed(sides: TwoSides) -> TwoSides:
    """Two servers whose meters are sums, so that an event can be taken back."""
    sides.only_sums()
    return sides


@pytest.mark.parametrize(
    ("planted", "cause", "events"),
    [
        (f"DELETE FROM events WHERE seq = {ROOT}", Cause.LOST, 1),
        (f"INSERT INTO events SELECT * FROM events WHERE seq = {ROOT}", Cause.DOUBLED, 1),
        (f"UPDATE events SET metadata = '{{\"tokens\":12}}' WHERE seq = {ROOT}", Cause.CHANGED, 1),
        ("DELETE FROM events WHERE date_trunc('hour', ingested_at) = '2026-03-01 11:00'", Cause.LOST, 7),
    ],
    ids=["removed row", "doubled row", "changed quantity", "missing hour"],
)
def test_what_is_wrong_with_a_store_is_repaired(left: Left, planted: str, cause: Cause, events: int) -> None:
    """The log check names it with its cause; the repair makes the store again, and a second one finds nothing."""
    left.spoil(planted)

    in_log = next(check for check in left.prove().checks if check.name == "log")
    repaired, again = left.prove("apply"), left.prove("apply")

    assert [(found.cause, found.count, found.repair) for found in in_log.differences] == [
        (cause, events, Repair.REBUILD)
    ]
    assert cause in {found.cause for found in repaired.mended}
    assert [done.repair for done in repaired.done] == [Repair.REBUILD]
    assert repaired.is_equal
    assert again.is_equal
    assert again.done == []
    assert written(left.data.path) == [repaired.done[0].what]


def test_a_balance_off_by_one_credit_is_repaired(tmp_path: Path) -> None:
    """A credit that is not what the log says is named with customer, meter and amount, and mended from the log."""
    left = ledger_of_ann(tmp_path)
    left.spoil("UPDATE control SET value = replace(value, '50', '51') WHERE log_offset = 4")

    (difference,) = left.check("ledger").differences
    repaired = left.prove("apply")

    assert difference.cause is Cause.CHANGED
    assert difference.where == "meter m, customer ann, credit c2"
    assert difference.quantities == {"meter m": Decimal(1)}
    assert [done.repair for done in repaired.done] == [Repair.REBUILD]
    assert repaired.is_equal


def test_a_balance_off_by_one_credit_at_polar_is_named_for_a_person(sides: TwoSides) -> None:
    """Nobody can grant it there from here: the plan says where how much is missing; once granted, all agrees."""
    grant = {}
    for side, units in ((sides.here, (100, 1)), (sides.there, (100,))):
        customer = side.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})["id"]
        grant[side] = f"/v1/customers/{customer}/credits"
        for unit in units:
            side.post(grant[side], {"meter_id": side.meter_id("tokens"), "units": unit})
    sides.here.send(*numbered(4))
    sides.forward()

    found = sides.prove("apply")
    sides.there.post(grant[sides.there], {"meter_id": sides.there.meter_id("tokens"), "units": 1})

    assert (only(found).cause, only(found).where) == (Cause.LOST, "tokens, customer ann")
    (left,) = found.done
    assert left.what == "Not done: tokens, customer ann (tokens -1): give it by hand on the side that lacks it"
    assert sides.prove().differences == []


def test_a_doubled_event_at_polar_is_taken_back(summed: TwoSides) -> None:
    """Where sums alone count it, an event with the opposite number takes it back; a third copy later, too."""
    summed.here.send(*numbered(6))
    summed.forward()
    for copy in ("second", "third"):
        summed.there.send(*({**event, "external_id": copy} for event in numbered(6) if event["external_id"] == "e4"))

        planned, repaired, again = summed.prove("plan"), summed.prove("apply"), summed.prove("apply")

        assert (only(planned).cause, only(planned).repair) == (Cause.DOUBLED, Repair.CORRECT)
        assert only(planned).quantities == {"tokens": Decimal(4)}
        told = "Corrected at Polar: 1 events take others back or stand for them, 0 it had already."
        assert repaired.done[0].what == told  # the second look may come before Polar has counted it
        assert (again.differences, again.done) == ([], [])


def test_a_doubled_event_that_is_counted_is_left_to_a_person(sides: TwoSides) -> None:
    """A meter that counts events cannot be told of one less: it is said why, in the record too, and nothing is sent."""
    sides.here.send(*numbered(6))
    sides.forward()
    sides.forward(lambda event: {**event, "external_id": "other"} if event["external_id"] == "e4" else None)

    repaired = sides.prove("apply")

    assert (only(repaired).cause, only(repaired).repair) == (Cause.DOUBLED, Repair.DECIDE)
    (left,) = repaired.done
    assert left.what.startswith("Not done: call of ann, ")
    assert "(calls +1, tokens +4): credit the customer: Polar cannot remove an event" in left.what
    assert written(sides.here.data.path)[-1] == left.what


@pytest.mark.parametrize(
    ("cause", "spoilt"),
    [
        (Cause.LATE, {"timestamp": (NOON + timedelta(days=1)).isoformat()}),
        (Cause.CHANGED, {"metadata": {"tokens": 6}}),
    ],
)
def test_an_event_that_polar_has_otherwise_is_replaced(
    summed: TwoSides, cause: Cause, spoilt: dict[str, object]
) -> None:
    """In another period, or with another quantity: that one is taken back, and the right one sent in its place."""
    summed.here.send(*numbered(6))
    summed.forward(lambda event: {**event, **spoilt} if event["external_id"] == "e3" else event)

    found, repaired, again = summed.prove(), summed.prove("apply"), summed.prove("apply")

    assert (only(found).cause, only(found).repair) == (cause, Repair.CORRECT)
    assert "Corrected at Polar: 2 events" in repaired.done[0].what
    assert (again.differences, again.done) == ([], [])


def test_the_rounding_of_doubles_needs_no_repair(sides: TwoSides) -> None:
    """The digits that a double loses are listed with their cause, and the verdict is: equal."""
    sides.here.send(call("a", 0.1), call("b", 0.2))
    sides.forward(lambda event: {**event, "metadata": {"tokens": event["metadata"]["tokens"] + 1e-12}})

    report = sides.prove("apply")

    assert {found.cause for found in report.differences} == {Cause.ROUNDING}
    assert report.is_equal
    assert report.done == []


def test_a_filter_that_invoices_read_differently_is_named_until_it_is_changed(sides: TwoSides) -> None:
    """The plan says which meter and what to do; with values of one type compared on both sides, all agrees."""
    as_billed = {"conjunction": "or", "clauses": [PAID, {"property": "tier", "operator": "eq", "value": 3}]}
    meters = {
        sides.here: sides.here.meter("paid", [PAID], func="sum", property="tokens"),
        # what makes the other server count as an invoice does: a number is not "free" either
        sides.there: sides.there.meter("paid", [as_billed], func="sum", property="tokens"),
    }
    sides.here.send(call("a", 5, tier="free"), call("b", 7, tier="gold"), call("c", 11, tier=3))
    sides.forward()

    found = sides.prove("apply")
    for side, meter in meters.items():
        side.patch(f"/v1/meters/{meter}", {"filter": {"conjunction": "and", "clauses": [GOLD]}})

    assert {difference.cause for difference in found.differences} == {Cause.FILTER_SEMANTICS}
    assert all("compares values of one type" in left.what for left in found.done)
    assert any(left.what.startswith("Not done: paid, filter (paid +11): ") for left in found.done)
    assert sides.prove().differences == []


def test_nothing_is_wrong_with_an_untouched_installation(left: Left) -> None:
    """No difference, nothing to do, nothing written down."""
    report = left.prove("apply")

    assert [check.differences for check in report.checks if isinstance(check, Check)] == [[], [], [], []]
    assert report.done == []
    assert not (left.data.path / "reconcile" / "repairs.jsonl").exists()
