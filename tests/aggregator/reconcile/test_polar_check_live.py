"""A comparison while both sides go on: what moves meanwhile is no difference, and nothing is taken back for it."""

from datetime import timedelta

import pytest

from aggregator.reconcile.report import Cause, Check, Difference, Repair
from deploy.reconcile.run import confirmed
from tests.support.polar.readers import Interrupted, Overlapping
from tests.support.polar.two_servers import NOON, TwoSides, call, numbered

LISTING = {"source": "user", "sorting": "timestamp", "page": 1}


def many(sides: TwoSides) -> None:
    """More events than a page of a list has, on one day, of which one is lost: so the day is listed."""
    sides.here.send(*(call(f"m{number}", number, at=NOON + timedelta(seconds=number)) for number in range(150)))
    sides.forward(lambda event: None if event["external_id"] == "m7" else event)


def both(sides: TwoSides, *events: dict[str, object]) -> None:
    """Events come in here and are forwarded at once."""
    sides.here.send(*events)
    sides.there.send(*events)


def only(check: Check) -> Difference:
    """The one difference there is."""
    assert len(check.differences) == 1, check.differences
    return check.differences[0]


def test_an_event_on_two_pages_is_one(sides: TwoSides) -> None:
    """An earlier event that comes in between two pages of a list moves the others on: none of them is doubled."""
    many(sides)
    earlier = call("earlier", at=NOON - timedelta(hours=1))
    reader = Interrupted(sides.there.api, "/v1/events/", lambda: both(sides, earlier), **LISTING)

    found = only(sides.watch(there=reader))

    assert reader.has_happened
    assert (found.cause, found.where.split(":")[0]) == (Cause.LOST, "m7")


def test_what_a_page_leaves_out_is_not_missed(sides: TwoSides) -> None:
    """Where pages overlap and leave out, the list is read from its other end too, and nothing is lost or doubled."""
    many(sides)

    found = only(sides.watch(there=Overlapping(sides.there.api)))

    assert (found.cause, found.where.split(":")[0]) == (Cause.LOST, "m7")


def test_what_comes_in_while_a_day_is_listed_is_not_unfounded(sides: TwoSides) -> None:
    """An event that both sides get after one of them was listed is no difference, and the day's sums wait."""
    many(sides)
    reader = Interrupted(sides.here.api, "/v1/feed/", lambda: both(sides, call("new", 5)))

    found = only(sides.watch(here=reader))

    assert reader.has_happened
    assert (found.cause, found.where.split(":")[0]) == (Cause.LOST, "m7")


@pytest.mark.parametrize("side", ["here", "there"])
def test_sums_that_move_while_they_are_read_are_not_judged(sides: TwoSides, side: str) -> None:
    """Usage of a day long past that comes in between two reads, whichever is first, is left to the next run."""
    both(sides, *numbered(6))
    api = getattr(sides, side).api
    reader = Interrupted(api, "/quantities", lambda: both(sides, call("new", 5)))

    check = sides.watch(**{side: reader})

    assert reader.has_happened
    assert check.differences == []


def test_what_a_second_look_does_not_find_is_not_taken_back(sides: TwoSides) -> None:
    """A correction is sent for what is found twice in the same way; of the rest it is said that nothing was done."""
    sides.only_sums()
    sides.here.send(*numbered(6))
    sides.forward()
    sides.there.send(call("copy", 4, at=NOON + timedelta(days=1, minutes=4)))
    report = sides.prove()
    sure, nothing_to_say = confirmed(sides.session, sides.task, report)
    sides.prove("apply")

    still, unsure = confirmed(sides.session, sides.task, report)

    assert [(one.cause, one.repair) for one in sure] == [(Cause.DOUBLED, Repair.CORRECT)]
    assert (nothing_to_say, still) == (None, [])
    assert unsure is not None
    assert unsure.what.startswith("Not corrected at Polar: 1 events")
