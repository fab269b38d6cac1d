"""Our server against another one that plays the Polar organization: every planted error is found, named and mended."""

from datetime import timedelta
from decimal import Decimal
from functools import reduce
from operator import add
from pathlib import Path

import pytest

from aggregator.reconcile import polar_check
from aggregator.reconcile.report import Cause, Check, Difference, Repair
from deploy.server.data import DataDirectory
from tests.support.polar.readers import AddedAsDoubles, WithItsOwn
from tests.support.polar.two_servers import NOON, TwoSides, call, item, numbered
from tests.support.servers.installation import Installation, meterstream

DAY = timedelta(days=1)


def only(check: Check) -> Difference:
    """The one difference there is."""
    assert len(check.differences) == 1, check.differences
    return check.differences[0]


def test_what_was_handed_on_is_equal(sides: TwoSides) -> None:
    """Events, quantities by day and customers' meters agree; reserved metadata and decimals do not disturb."""
    sides.here.send(*numbered(30), {**call("llm", "12.5"), "metadata": {
        "tokens": 0.1, "_cost": {"amount": 0.25, "currency": "usd"},
        "_llm": {"vendor": "v", "model": "m", "input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
    }})  # fmt: skip
    sides.forward()

    check = sides.check()

    assert check.differences == []
    compared = {counted.what: counted for counted in check.counted}
    assert compared["tokens, by day"].here == compared["tokens, by day"].there == "435.1"


def test_a_lost_event_is_named_and_sent_again(sides: TwoSides) -> None:
    """What Polar lacks is named with its quantity; a repair sends it once, a second one finds nothing to do."""
    sides.here.send(*numbered(12))
    sides.forward(lambda event: None if event["external_id"] == "e7" else event)

    difference = only(sides.check())
    done = sides.repair([difference])
    again = sides.repair([difference])

    assert difference.cause is Cause.LOST
    assert difference.where.startswith("e7: call of bob")
    assert difference.quantities == {"calls": Decimal(-1), "tokens": Decimal(-7)}
    assert done is not None
    assert "1 events were new there, 0" in done.what
    assert again is not None
    assert "0 events were new there, 1" in again.what
    sides.there.send()
    assert sides.check().differences == []


def test_an_event_that_waits_for_its_parent_is_not_lost(sides: TwoSides) -> None:
    """Polar counts it and does not list it, for ever where its parent stays here: a note, nothing to repair."""
    sides.chosen = {"polar_events": "call"}
    children = [call(f"child{number}", number) | {"parent_id": "trace"} for number in range(3)]
    sides.here.send({**call("trace"), "name": "trace"}, *children, call("alone"))
    sides.forward(lambda event: event if event["name"] == "call" else None)

    check = sides.check()

    assert check.differences == []
    assert any(note.startswith("3 events whose parents ") for note in check.notes)


def test_a_lost_event_with_a_parent_is_lost(sides: TwoSides) -> None:
    """Its hour lacks what it counts, and what waits for a parent in another hour is told apart from it."""
    later = NOON + timedelta(hours=2)
    waits = call("waits", 5, at=later) | {"parent_id": "never"}
    sides.here.send(call("lost", 7) | {"parent_id": "parent"}, waits, call("parent"))
    sides.forward(lambda event: None if event["external_id"] == "lost" else event)

    difference = only(sides.check())
    sides.repair([difference])
    sides.there.send()

    assert (difference.cause, difference.where.split(":")[0]) == (Cause.LOST, "lost")
    assert difference.quantities == {"calls": Decimal(-1), "tokens": Decimal(-7)}
    assert sides.check().differences == []


def test_a_missing_hour_is_one_difference(sides: TwoSides) -> None:
    """Everything of an hour that did not arrive is told as that hour, and mended as a whole."""
    sides.here.send(*(call(f"h{number}", at=NOON + timedelta(minutes=number)) for number in range(90)))
    sides.forward(lambda event: event if "T13" in event["timestamp"] else None)

    difference = only(sides.check())
    sides.repair([difference])

    assert (difference.cause, difference.count, difference.repair) == (Cause.LOST, 60, Repair.SEND)
    assert difference.window == (NOON, NOON + timedelta(hours=1))
    sides.there.send()
    assert sides.check().differences == []


def test_a_refused_event_leaves_the_others_of_its_hour_to_be_sent(sides: TwoSides, tmp_path: Path) -> None:
    """The one that Polar does not take is a person's, with its words; the rest is sent."""
    sides.books = DataDirectory(tmp_path)
    sides.here.send(*(call(f"h{number}", at=NOON + timedelta(minutes=number)) for number in range(5)))
    sides.taken(item("h3", condemned="Customer not found."))

    by_repair = {one.repair: one for one in sides.check().differences}
    done = sides.repair(list(by_repair.values()))

    assert {repair: one.count for repair, one in by_repair.items()} == {Repair.SEND: 4, Repair.DECIDE: 1}
    assert by_repair[Repair.DECIDE].where.startswith("h3: ")
    assert "Polar refuses it: Customer not found." in by_repair[Repair.DECIDE].what
    assert "Polar refuses it" not in by_repair[Repair.SEND].what
    assert done is not None
    assert "4 events were new there, 0" in done.what


def test_an_event_that_the_forwarder_holds_back_is_late(sides: TwoSides, tmp_path: Path) -> None:
    """It was read from the feed and is not sent yet, for its time is in the future or Polar failed with it: a repair
    does not send it past a pause."""
    sides.books = DataDirectory(tmp_path)
    sides.here.send(call("parked"), call("lost", at=NOON + timedelta(minutes=1)))
    sides.taken(item("parked", due_us=99))

    found = sides.check().differences

    assert {(one.cause, one.repair, one.where.split(":")[0]) for one in found} == {
        (Cause.LATE, Repair.WAIT, "parked"), (Cause.LOST, Repair.SEND, "lost"),
    }  # fmt: skip


def test_an_event_that_nothing_takes_back_leaves_the_others_of_its_hour_to_be(sides: TwoSides) -> None:
    """Three doubles are taken back; the one that no meter counts stays there, and a person is told."""
    sides.only_sums()
    uncounted = {**call("uncounted"), "metadata": {}}
    sides.here.send(*numbered(6), *(call(f"c{number}") for number in range(3)), uncounted)
    sides.forward()
    sides.there.send(*(call(f"copy{number}") for number in range(3)), {**uncounted, "external_id": "copy"})

    report = sides.prove("apply")

    assert [(one.cause, one.repair, one.count) for one in report.mended] == [
        (Cause.DOUBLED, Repair.CORRECT, 3), (Cause.DOUBLED, Repair.DECIDE, 1),
    ]  # fmt: skip
    assert [(one.repair, one.count) for one in report.differences] == [(Repair.DECIDE, 1)]


def test_a_late_event_is_named_with_both_periods(sides: TwoSides) -> None:
    """An event that counts there on another day is one event that moved, not one lost and one too many."""
    sides.here.send(*numbered(6))
    later = (NOON + DAY).isoformat()
    sides.forward(lambda event: {**event, "timestamp": later} if event["external_id"] == "e0" else event)

    difference = only(sides.check())

    assert difference.cause is Cause.LATE
    assert f"{NOON:%Y-%m-%dT}" in difference.what
    assert f"{NOON + DAY:%Y-%m-%dT}" in difference.what


def test_a_changed_quantity_is_named_with_both_contents(sides: TwoSides) -> None:
    """An event whose quantity is another one there."""
    sides.here.send(*numbered(6))
    sides.forward(lambda event: {**event, "metadata": {"tokens": 6}} if event["external_id"] == "e5" else event)

    difference = only(sides.check())

    assert difference.cause is Cause.CHANGED
    assert difference.quantities == {"tokens": Decimal(1)}


@pytest.mark.parametrize("more", [{}, dict.fromkeys(map(str, range(40)), "x" * 500)], ids=["short", "long"])
def test_a_conflict_is_told_from_a_change(sides: TwoSides, more: dict[str, str]) -> None:
    """Where the other content was refused here as a contradiction, that is the reason, wherever its line has the id."""
    sides.here.send(*numbered(4))
    contrary = call("e2", 99, at=NOON + timedelta(days=2, minutes=2), **more)
    sides.here.send(dict(reversed(contrary.items())))
    sides.forward(lambda event: {**event, "metadata": {"tokens": 99}} if event["external_id"] == "e2" else event)

    assert only(sides.check()).cause is Cause.CONFLICT


def test_a_filter_that_is_read_differently_is_named_with_its_events(sides: TwoSides) -> None:
    """A number is no text for a balance, and "not free" for an invoice: the events and the quantity are named."""
    not_free = {"property": "tier", "operator": "ne", "value": "free"}
    sides.here.meter("paid", [not_free], func="sum", property="tokens")
    # what makes the other server count as an invoice does: a number is not "free" either
    as_billed = {"conjunction": "or", "clauses": [not_free, {"property": "tier", "operator": "eq", "value": 3}]}
    sides.there.meter("paid", [as_billed], func="sum", property="tokens")
    sides.here.send(call("a", 5, tier="free"), call("b", 7, tier="gold"), call("c", 11, tier=3))
    sides.forward()

    found = [difference for difference in sides.check().differences if difference.where.startswith("paid, ")]

    assert {difference.cause for difference in found} == {Cause.FILTER_SEMANTICS}
    of_day = next(difference for difference in found if difference.window)
    assert of_day.quantities == {"paid": Decimal(11)}
    assert of_day.events[0].startswith("c: call of ann")
    assert "invoices" in of_day.what


def test_what_is_on_its_way_is_no_difference(sides: TwoSides) -> None:
    """Within the settle window nothing is missed, neither as an event nor in a quantity."""
    sides.here.send(*numbered(6))

    assert sides.check(settle=timedelta(hours=1)).differences == []
    assert len(sides.check().differences) == 3


def test_many_events_are_narrowed_down_with_few_requests(sides: TwoSides) -> None:
    """One event of five thousand is found without listing the others."""
    for start in range(0, 5000, 2500):
        sides.here.send(*(
            call(f"m{number}", at=NOON + timedelta(seconds=3 * number)) for number in range(start, start + 2500)
        ))  # fmt: skip
    sides.forward(lambda event: None if event["external_id"] == "m3210" else event)

    check = sides.check()

    assert only(check).where.startswith("m3210: ")
    requests = int(check.notes[-1].split(" requests")[0])
    assert requests < 45


@pytest.mark.parametrize("apart_s", [70, 2], ids=["in a day", "in an hour"])
def test_a_changed_event_is_found_beside_a_lost_one(sides: TwoSides, apart_s: int) -> None:
    """On a day, and in an hour, with too many events to list, and also where both together leave the sum as it was."""
    midnight = NOON - timedelta(hours=12)
    sides.here.send(*(call(f"m{number}", at=midnight + timedelta(seconds=apart_s * number)) for number in range(1200)))
    change = {"m154": None, "m1029": {"metadata": {"tokens": 20}}}
    sides.forward(lambda event: None if (new := change.get(event["external_id"], {})) is None else event | new)

    found = sides.check().differences

    assert {(one.cause, one.where.split(":")[0]) for one in found} == {(Cause.LOST, "m154"), (Cause.CHANGED, "m1029")}


def test_what_moved_to_another_customer_is_named_with_both(sides: TwoSides) -> None:
    """Neither a count nor a sum of the day says so; whose it is, a person has to tell."""
    who = "ann", "bob"
    sides.here.send(*(call(f"m{n}", at=NOON + timedelta(seconds=n), customer=who[n % 2]) for n in range(1100)))
    sides.forward(lambda event: event | ({"external_customer_id": "bob"} if event["external_id"] == "m600" else {}))

    check = sides.check()
    difference = only(check)

    assert (difference.cause, difference.repair) == (Cause.CHANGED, Repair.DECIDE)
    assert difference.where.startswith("m600: call of ann")
    assert "the customer: ann here, bob over there" in difference.what
    compared = {counted.what: counted for counted in check.counted}
    assert compared["quantities, by day and customer"].different == 4


def test_customers_that_are_not_compared_are_counted(sides: TwoSides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many for the requests, those with most events are compared, and a note says how many."""
    monkeypatch.setattr(polar_check, "REQUESTS_MAX", 4)
    sides.here.send(*numbered(5), call("last", customer="cem"))
    sides.forward()

    notes = sides.check().notes

    assert "compared customer by customer: the 2 with most events, of 3" in notes


def test_balances_that_stand_on_one_side_are_told(sides: TwoSides) -> None:
    """A customer whom only one side knows has a balance there alone."""
    sides.here.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})
    sides.there.post("/v1/customers/", {"external_id": "bob", "email": "bob@example.com"})
    sides.here.send(*numbered(4))
    sides.forward()

    check = sides.check()

    assert check.differences == []
    told = "balances that stand {} alone, and are not compared: calls of {}, tokens of {}"
    assert {told.format("here", "ann", "ann"), told.format("over there", "bob", "bob")} <= {*check.notes}


def test_meters_of_one_name_are_compared_each_with_its_own(sides: TwoSides) -> None:
    """Whatever the order in which they were made; a lost event is told for those that count it."""
    of_name = [{"property": "name", "operator": "eq", "value": "other"}]
    large = [{"property": "tokens", "operator": "gte", "value": 3}]
    for side, filters in ((sides.here, (of_name, large)), (sides.there, (large, of_name))):
        side.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})
        for clauses in filters:
            side.meter("tokens", clauses, func="sum", property="tokens")
    sides.here.send(*numbered(6))
    sides.forward()
    assert sides.check().differences == []

    sides.here.send(call("lost", 7))

    lost = only(sides.check())
    assert (lost.cause, lost.quantities["calls"]) == (Cause.LOST, -1)
    counting = {name: amount for name, amount in lost.quantities.items() if name.startswith("tokens (")}
    assert list(counting.values()) == [-7, -7]


def test_a_largest_value_is_another_one_because_of_a_lost_event(sides: TwoSides) -> None:
    """Of the balance that follows from it nothing is said besides; that of another customer is told."""
    for side in (sides.here, sides.there):
        for who in ("ann", "bob"):
            side.post("/v1/customers/", {"external_id": who, "email": f"{who}@example.com"})
        side.meter("peak", func="max", property="tokens")
    sides.here.send(call("a1", 5), call("a2", 9), call("b1", 3, customer="bob"))
    sides.forward(lambda event: None if event["external_id"] == "a2" else event)
    assert only(sides.check()).where.startswith("a2: ")

    bob = sides.there.api.get("/v1/customers/external/bob")["id"]
    sides.there.post(f"/v1/customers/{bob}/resets", {"meter_ids": "all"})

    late = [one.where for one in sides.check().differences if one.cause is Cause.LATE]
    assert late == ["calls, customer bob", "peak, customer bob", "tokens, customer bob"]


@pytest.mark.parametrize(
    ("amounts", "has_balance"),
    [([0.1, 0.2, -0.3], True), ([-100, 33.3, 33.3, 33.3, 0.1], True), ([-1e8, 33333333.3, 66666666.6, 0.1], False)],
    ids=["small", "used up", "large"],
)
def test_what_doubles_leave_of_a_sum_that_cancels_out_is_rounding(
    sides: TwoSides, amounts: list[float], has_balance: bool
) -> None:
    """A credit note and the usage that makes up for it are nothing here, and next to nothing in doubles."""
    for side in (sides.here, sides.there) if has_balance else ():
        side.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})
    sides.here.send(*(call(f"e{number}", amount) for number, amount in enumerate(amounts)))
    sides.forward()
    in_doubles = Decimal(repr(reduce(add, amounts, 0.0)))

    check = sides.watch(there=AddedAsDoubles(sides.there.api, sides.there.meter_id("tokens"), NOON, in_doubles))

    assert in_doubles != sum(Decimal(str(amount)) for amount in amounts)
    where = [f"tokens, {NOON:%Y-%m-%d}", *["tokens, customer ann"] * has_balance]
    assert [(one.cause, one.where) for one in check.differences] == [(Cause.ROUNDING, each) for each in where]


def test_what_polar_writes_itself_is_no_difference(sides: TwoSides) -> None:
    """A meter without a filter counts Polar's own events there, also where events are lost on the same day."""
    sides.here.send(*numbered(6))
    sides.forward(lambda event: None if event["external_id"] == "e3" else event)
    sides.there.send({**call("credit", at=NOON), "name": "meter.credited", "metadata": {"units": 5}})

    check = sides.watch(there=WithItsOwn(sides.there.api, "meter.credited"))

    assert (only(check).cause, only(check).where.split(":")[0]) == (Cause.LOST, "e3")
    assert "calls: Polar counts events of its own as well (meter.credited), which is no difference" in check.notes


def test_the_command_finds_mends_and_then_agrees(
    servers: tuple[Installation, Installation], sides: TwoSides, tmp_path: Path
) -> None:
    """As an operator sees it: exit code 3 and a page, a repair, exit code 0; over the socket, without a token."""
    sides.here.send(*numbered(8))
    sides.forward(lambda event: None if event["external_id"] == "e3" else event)
    page = tmp_path / "report.html"
    words = ("reconcile", "--data", str(servers[0].data), "--check", "upstream", "--settle", "0")
    where = {
        "METERSTREAM_POLAR_TOKEN": sides.there.token, "METERSTREAM_POLAR_SERVER": sides.there.url,
        "METERSTREAM_POLAR_ORGANIZATION": sides.here.id,
        "METERSTREAM_POLAR_REQUESTS_PER_MINUTE": "100000",  # two whole comparisons within a minute
    }  # fmt: skip

    found = meterstream(*words, "--report", str(page), **where)
    mended = meterstream(*words, "--repair", "apply", **where)

    assert found.returncode == 3, found.stderr
    assert "lost: e3: call of bob" in found.stdout
    assert "e3: call of bob" in page.read_text()
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "1 events were new there" in mended.stdout
