"""Where not all of what is counted here is forwarded, the rest is no difference, and is not sent by a repair."""

import contextlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregator.forward.feed_client import ROLLUP_NAME
from aggregator.forward.state import State
from aggregator.reconcile.polar_reader import midnight
from aggregator.reconcile.report import Cause, Check, Difference, Repair
from deploy.server.data import DataDirectory
from meters.timestamps import MICROSECOND
from tests.support.polar.two_servers import NOON, TwoSides, call, numbered

DAY = timedelta(days=1)
CALLS = '{"conjunction":"and","clauses":[{"property":"name","operator":"eq","value":"call"}]}'


def only(check: Check) -> Difference:
    """The one difference there is."""
    assert len(check.differences) == 1, check.differences
    return check.differences[0]


def switched(sides: TwoSides, path: Path) -> None:
    """The application told both sides until yesterday; since then it tells this one, which forwards."""
    times = [NOON - DAY + timedelta(minutes=number) for number in range(4)]
    sides.here.send(*(call(f"before{number}", at=at) for number, at in enumerate(times)))
    a_moment = timedelta(milliseconds=3)  # each side was told for itself
    sides.there.send(*(call(f"own{number}", at=at + a_moment) for number, at in enumerate(times)))
    sides.there.send(call("never told here", 7, at=NOON - DAY))
    sides.begin(DataDirectory(path), NOON - timedelta(hours=1))
    sides.here.send(call("a1"), call("a2", at=NOON + DAY), call("late", at=NOON - DAY / 2))
    sides.taken()


def test_what_came_before_forwarding_began_is_no_difference(sides: TwoSides, tmp_path: Path) -> None:
    """Neither what is here and was not forwarded, nor what the application sent to Polar itself."""
    switched(sides, tmp_path)
    sides.forward(lambda event: None if event["external_id"].startswith("before") else event)

    check = sides.check()

    assert check.differences == []
    assert any(note.startswith("events are forwarded since ") for note in check.notes)


def test_what_is_lost_after_forwarding_began_is_sent_and_nothing_else(sides: TwoSides, tmp_path: Path) -> None:
    """A late event of a day before it, too; the events that were there before are not sent a second time."""
    switched(sides, tmp_path)
    sides.forward(lambda event: event if event["external_id"] == "a1" else None)

    differences = sides.check().differences
    done = sides.repair(differences)
    sides.there.send()

    assert [(one.cause, one.where.split(":")[0]) for one in differences] == [(Cause.LOST, "late"), (Cause.LOST, "a2")]
    assert done is not None
    assert "2 events were new there, 0" in done.what
    assert sides.check().differences == []


def test_nothing_is_repaired_where_nobody_knows_when_forwarding_began(sides: TwoSides) -> None:
    """Events that seem lost may have been sent another way before: they are listed, and the reason is given."""
    sides.chosen = {"polar_from": "now"}
    sides.here.send(*numbered(4))

    report = sides.prove("apply")

    assert {one.cause for one in report.differences} == {Cause.LOST}
    assert {one.repair for one in report.differences} == {Repair.DECIDE}
    assert all("where forwarding began is not known" in done.what for done in report.done)
    assert sides.there.api.get("/v1/events/")["items"] == []


def test_nothing_is_repaired_by_the_books_of_another_server(sides: TwoSides, tmp_path: Path) -> None:
    """Tests that only the sandbox was to get are not sent to production before the forwarder itself turned there."""
    sides.books = DataDirectory(tmp_path)
    with contextlib.closing(State(sides.books.forwarding)) as state:
        state.turn_to("https://sandbox-api.polar.sh")
    sides.here.send(call("test"))

    in_doubt = only(sides.check())
    with contextlib.closing(State(sides.books.forwarding)) as state:
        state.turn_to(sides.there.url)

    assert (in_doubt.cause, in_doubt.repair) == (Cause.LOST, Repair.DECIDE)
    assert "are those of https://sandbox-api.polar.sh" in in_doubt.payload["doubt"]
    assert only(sides.check()).repair is Repair.SEND


@pytest.mark.parametrize(
    "chosen", [{"polar_events": "call"}, {"polar_filter": CALLS}, {"polar_meter": "just calls"}], ids=min
)
def test_what_is_not_selected_is_no_difference(sides: TwoSides, chosen: dict[str, str]) -> None:
    """Quantities are those of what is selected, and one that is lost is found; balances of a part are not judged."""
    sides.here.meter("just calls", [{"property": "name", "operator": "eq", "value": "call"}])
    sides.chosen = chosen
    for side in (sides.here, sides.there):
        side.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})
    sides.here.send(*numbered(6), {**call("other", 50), "name": "other"})
    sides.forward(lambda event: event if event["name"] == "call" else None)

    check = sides.check()
    sides.here.send(call("lost", 3))
    lost = only(sides.check())

    assert check.differences == []
    assert any(note.startswith("tokens: in 1 balances the usage") for note in check.notes)
    assert (lost.cause, lost.where.split(":")[0]) == (Cause.LOST, "lost")


def test_sums_of_a_window_that_is_not_over_are_not_missed(sides: TwoSides) -> None:
    """Usage came in long before the settle window, and its sum is sent when its own window ends: a day, here."""
    sides.chosen, settle = {"polar_rollup_seconds": 86_400}, timedelta(minutes=15)
    sides.only_sums()
    summed = [("name", ROLLUP_NAME), ("meter", sides.here.meter_id("tokens"))]
    clauses = [{"property": name, "operator": "eq", "value": value} for name, value in summed]
    sides.there.patch(f"/v1/meters/{sides.there.meter_id('tokens')}", {
        "filter": {"conjunction": "and", "clauses": clauses}, "aggregation": {"func": "sum", "property": "value"},
    })  # fmt: skip
    for side in (sides.here, sides.there):
        side.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})
    sides.there.send({**call("sum"), "name": ROLLUP_NAME, "metadata": {**dict(summed), "value": 0}})
    is_over = midnight(datetime.now(UTC)) + DAY + settle
    sides.here.send(call("late", 5))

    assert sides.check(settle, is_over - MICROSECOND).differences == []
    assert {one.cause for one in sides.check(settle, is_over).differences} == {Cause.UNKNOWN, Cause.LATE}
