"""Accounts: credits in the order of their times, windows, what rolls over, and that telling has no order."""

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from meters.catalogue.catalogue import decode_change, encode_change
from meters.ledger.joined import CustomersJoined, Joined
from meters.ledger.ledger import (
    ZERO,
    Account,
    CreditGranted,
    Ledger,
    MeterReset,
    WindowUsage,
    customer_meter_id,
    customer_of,
    floored,
    in_window,
    rollover_units,
)
from meters.ledger.requests import RequestAnswered, request_name
from tests.conformance.cases import Case, agree, instant, named

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CUSTOMER, METER = "992fae2a-2a17-4b7a-8d9e-e287cf90131b", "d49a2c1e-54d3-4e0a-9f6a-0b6a5a1f0c11"


def credit(units: int | str, at: int, *, id: str = "", rollover: bool = False, key: str | None = None) -> CreditGranted:
    """A credit, ``at`` minutes after noon."""
    return CreditGranted(
        id=id or f"credit {units} {at} {rollover}", organization_id="o", customer_id=CUSTOMER, meter_id=METER,
        units=Decimal(units), at=NOON + timedelta(minutes=at), rollover=rollover, key=key,
    )  # fmt: skip


def reset(at: int, carried: int = 0, *, id: str = "") -> MeterReset:
    """A reset, ``at`` minutes after noon."""
    return MeterReset(
        id=id or f"reset {at}", organization_id="o", customer_id=CUSTOMER, meter_ids=[METER],
        at=NOON + timedelta(minutes=at), rollover={METER: Decimal(carried)} if carried else {},
    )  # fmt: skip


def told(*changes: CreditGranted | MeterReset) -> Account:
    """The account after these decisions, each as it comes back from the log."""
    ledger = Ledger()
    for change in changes:
        ledger.apply(decode_change(encode_change(change)))
    return ledger.account(CUSTOMER, METER) or Account()


changes = st.lists(
    st.one_of(
        st.builds(credit, st.integers(-200, 200), st.integers(0, 9), rollover=st.booleans()),
        st.builds(reset, st.integers(0, 9), st.just(0) | st.integers(0, 50)),  # nothing carried is what hides least
    ),
    max_size=12,
    unique_by=lambda change: change.id,
)


@given(changes, st.integers(0, 2**32))
def test_no_order_and_no_repetition_of_telling_changes_an_account(
    facts: list[CreditGranted | MeterReset], seed: int
) -> None:
    """An account is a function of the set of what is known."""
    choose = random.Random(seed)
    again = facts + choose.choices(facts, k=3) if facts else []
    choose.shuffle(again)
    assert told(*facts) == told(*again)


@example([reset(9), credit(136, 4)])  # told late, from before the window
@given(changes)
def test_credited_is_the_floored_sum_of_the_newest_window(facts: list[CreditGranted | MeterReset]) -> None:
    """What is kept while telling is what a fold over everything gives; it is never below zero."""
    account = told(*facts)
    cuts = [change.at for change in facts if isinstance(change, MeterReset)]
    newest = max(cuts, default=None)
    counted = [c for c in account.credits if newest is None or c.at >= newest]
    assert account.since == newest
    assert account.credited == floored(c.units for c in sorted(counted, key=lambda c: (c.at, c.id)))
    assert account.credited >= 0


@pytest.mark.parametrize(
    ("units", "sum"),
    [([100, -150, 50], 50), ([], 0), ([-5], 0), ([30, 40, 30], 100), ([100, -100], 0), ([5, -3, -3, 2], 2)],
)
def test_the_running_sum_never_falls_below_zero(units: list[int], sum: int) -> None:
    """What was taken too much is not owed later."""
    assert floored(map(Decimal, units)) == sum


@pytest.mark.parametrize(
    ("plain", "carried", "used", "left"),
    [
        (0, 0, "0", 0),
        (100, 0, "0", 0),  # nothing rolls over that was not given to
        (0, 100, "0", 100),
        (0, 100, "30", 70),
        (80, 60, "50", 60),  # the others are used first
        (80, 60, "100", 40),
        (80, 60, "150", 0),
        (80, 60, "139.5", 0),  # whole units only
        (80, 60, "120.5", 19),
        (0, 100, "-50", 100),  # usage below zero gives nothing to carry
    ],
)
def test_what_rolls_over(plain: int, carried: int, used: str, left: int) -> None:
    """max(0, min(trunc(N + V - u), V))."""
    account = told(credit(plain, 1), credit(carried, 2, rollover=True))
    assert rollover_units(account, Decimal(used)) == left


def test_credits_from_the_cut_on_do_not_roll_over_it() -> None:
    """A cut in the past looks at what there was then."""
    account = told(credit(10, 1, rollover=True), credit(90, 5, rollover=True))
    assert rollover_units(account, ZERO, until=NOON + timedelta(minutes=5)) == 10


def test_what_a_reset_carries_is_a_credit_that_rolls_over_again() -> None:
    """Units that rolled over once are not used up by rolling over."""
    account = told(credit(50, 1, rollover=True), reset(2, carried=50))
    assert account.credited == 50
    assert rollover_units(account, Decimal(20)) == 30


def answered(key: str, *movements: CreditGranted | MeterReset, body: str = "{}") -> RequestAnswered:
    """The answer to a request that moved this, as it stands before its movements in one record."""
    return RequestAnswered(
        organization_id="o", method="POST", path="/cycle", key=key, content="c", status=200, body=body,
        movements=[one.id for one in movements],
    )  # fmt: skip


def test_a_request_that_was_decided_twice_moves_once() -> None:
    """The movements of the first record stand, and its answer; what both records name is one movement."""
    first = [reset(1, id="r1"), credit(10, 1, id="a"), credit(3, 1, id="same")]
    second = [reset(2, id="r2"), credit(10, 2, id="b"), credit(3, 1, id="same")]
    records = [answered("k", *first, body="1"), *first, answered("k", *second, body="2"), *second]
    other = credit(5, 3, id="other")
    for told_so in (records, [*records, *records]):  # a start may hear of records again
        ledger = Ledger()
        for change in [*told_so, answered("l", other), other]:
            ledger.apply(decode_change(encode_change(change)))
        account = ledger.account(CUSTOMER, METER) or Account()
        assert ([held.id for held in account.resets], account.credited) == (["r1"], 18)
        kept = ledger.answered.find(request_name("o", "POST", "/cycle", "k"))
        assert kept is not None
        assert kept.body == "1"
    for name in (("p", "POST", "/cycle", "k"), ("o", "PUT", "/cycle", "k"), ("o", "POST", "/", "k")):
        assert ledger.answered.find(request_name(*name)) is None


def test_a_key_is_decided_once() -> None:
    """In records of older versions, when nobody could tell whether a request was decided: the first one counts."""
    account = told(credit(10, 1, id="a", key="k"), credit(10, 2, id="b", key="k"))
    assert [held.id for held in account.credits] == ["a"]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6), st.integers(0, 9))
def test_what_came_from_something_is_told_once_at_its_earliest(
    times: list[tuple[int, bool]], cut: int
) -> None:
    """Its id is made of what it came from: decided again at other times, in whatever order, the earliest stands."""
    others = [credit(100, 0), credit(50, 5), reset(cut)]
    tellings = [replace(credit(-30, at, id="back"), reference="credit 50 5 False") for at, _ in times]
    mixed = [tellings[0], *others, *tellings[1:]] if times[0][1] else [*others, *tellings]
    earliest = min(tellings, key=lambda one: one.at)
    assert told(*mixed) == told(*others, earliest)


@given(changes)
def test_a_start_is_told_the_same_at_once(facts: list[CreditGranted | MeterReset]) -> None:
    """What is known already makes the accounts that it would make one by one."""
    ledger = Ledger()
    with ledger.loading():
        for fact in facts:
            ledger.apply(fact)
    assert (ledger.account(CUSTOMER, METER) or Account()) == told(*facts)


def test_at_a_start_no_account_is_made_anew_for_its_every_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads it yet; afterwards whoever has an account keeps it as it is."""
    made: list[Account] = []

    def counted(*fields: Any) -> Account:
        made.append(Account(*fields))
        return made[-1]

    monkeypatch.setattr("meters.ledger.ledger.Account", counted)
    ledger = Ledger()
    with ledger.loading():
        for at in range(100):
            ledger.apply(replace(credit(1, at), reference="grant"))
    assert len(made) == 1
    kept = ledger.account(CUSTOMER, METER)
    ledger.apply(credit(1, 100))
    assert kept is made[0]
    assert (len(made[0].credits), ledger.account(CUSTOMER, METER)) == (100, made[-1])


def test_what_an_older_version_decided_for_a_key_is_found() -> None:
    """Of its organization alone."""
    ledger, decided = Ledger(), credit(10, 1, key="k")
    ledger.apply(decided)
    assert ledger.by_key("o", "k") == decided
    assert (ledger.by_key("o", "l"), ledger.by_key("p", "k")) == (None, None)


@pytest.mark.parametrize(("given", "began", "counts"), [(3, None, 3), (3, 5, 5), (5, 5, 5), (7, 5, 7)])
def test_what_is_given_counts_in_the_newest_window(given: int, began: int | None, counts: int) -> None:
    """Where the clock has gone back behind the window, from its beginning on."""
    account = told(credit(1, 0)) if began is None else told(reset(began))
    for known in (account, None) if began is None else (account,):
        assert in_window(known, NOON + timedelta(minutes=given)) == NOON + timedelta(minutes=counts)


def test_a_trial_changes_nothing() -> None:
    """It is the account alone, to see what changes would make of it: what is known there is known."""
    ledger, back = Ledger(), replace(credit(-30, 2, id="back"), reference="a", takes="a", cause="revoke")
    for change in (credit(30, 1, id="a"), back, credit(5, 3), replace(credit(7, 1), customer_id="other")):
        ledger.apply(change)
    trial = ledger.trial(CUSTOMER, METER)
    assert trial.account(CUSTOMER, METER) == ledger.account(CUSTOMER, METER)
    assert trial.account("other", METER) is None
    for change in (back, replace(back, at=NOON + timedelta(minutes=9)), credit(100, 4)):
        trial.apply(change)
    found = [one.account(CUSTOMER, METER) for one in (trial, ledger)]
    assert [(one.credited, len(one.credits)) for one in found if one] == [(105, 4), (5, 3)]
    assert ledger.trial("nobody", METER).account("nobody", METER) is None


def test_customers_that_turn_out_to_be_one_have_one_account() -> None:
    """Of both, in the order of time, with each movement once; other customers and organizations keep theirs."""
    twin = "992fae2a-2a17-4b7a-8d9e-000000000000"
    def of(change: CreditGranted | MeterReset, customer: str, organization: str = "o") -> CreditGranted | MeterReset:
        return replace(change, customer_id=customer, organization_id=organization)

    used = {METER: WindowUsage(None, Decimal(40))}
    ledger = Ledger()
    for change in (
        credit(100, 1, id="a", rollover=True), replace(reset(5, id="cut"), used=used), credit(10, 6, id="d"),
        of(credit(7, 2, id="b"), twin), of(credit(3, 7, id="c"), twin), of(credit(1, 1, id="x"), "other"),
        replace(of(credit(9, 1, id="y"), twin, "p"), meter_id="of p"),
    ):  # fmt: skip
        ledger.apply(change)
    joined = CustomersJoined(organization_id="o", id=twin, into=CUSTOMER, at=NOON)
    for change in (joined, joined, of(credit(5, 8, id="e"), twin)):  # told twice; then of the old id
        ledger.apply(change)
    account = ledger.account(CUSTOMER, METER)
    assert account is not None
    assert [one.id for one in account.credits] == ["a", "b", "d", "c", "e"]
    assert [(one.id, one.used) for one in account.resets] == [("cut", ())]  # it was the usage of one of the two
    assert account.credited == 18
    assert ledger.account(twin, METER) is None
    assert [one.credited for one in (ledger.account("other", METER), ledger.account(twin, "of p")) if one] == [1, 9]


def test_which_ids_name_whom() -> None:
    """Joined customers go on together; an id that parts names nobody else any more."""
    joined = Joined()
    told = [
        ("a", "b", "b"), ("a", "b", None), ("b", "a", None),  # said once, it holds
        ("c", "a", "b"),  # a is b by now
        ("b", "d", "d"),  # all of b's ids go along
        ("e", "f", "f"), ("a", "f", "f"),  # one of d's is somebody else's now
        ("c", "c", None),  # and one is a new customer of its own
    ]  # fmt: skip
    for id, into, whose in told:
        change = CustomersJoined(organization_id="o", id=id, into=into, at=NOON)
        assert joined.join(change) == whose, (id, into)
    assert {id: joined.customer_of("o", id) for id in "abcdefg"} == dict(zip("abcdefg", "fdcdffg", strict=True))
    assert {id: joined.others("o", id) for id in "abcdefg"} == {
        "a": (), "b": (), "c": (), "d": ("b",), "e": (), "f": ("e", "a"), "g": ()
    }  # fmt: skip
    assert (joined.customer_of("p", "a"), joined.others("p", "f")) == ("a", ())


@pytest.mark.parametrize("carried", ["0.5", "1", "2"])
def test_what_a_reset_carried_as_it_was_decided_holds(carried: str) -> None:
    """Where no credit of the window before has those units, as in records of older versions, they are its own."""
    account = told(replace(reset(5), rollover={METER: Decimal(carried)}))
    assert account.credited == Decimal(carried)
    assert [(one.cause, one.units, one.rollover) for one in account.credits] == [("rollover", Decimal(carried), True)]


def test_amounts_keep_their_digits() -> None:
    """Fractions of units are exact in the log and in the sum."""
    account = told(credit("0.1", 1), credit("0.2", 2), credit("12345678901234567890.000000000001", 3))
    assert account.credited == Decimal("12345678901234567890.300000000001")


@given(st.uuids(), st.uuids())
def test_a_customer_meters_id_gives_the_customer_back(customer: object, meter: object) -> None:
    """With the meter's id, and only with that one."""
    id = customer_meter_id(str(customer), str(meter))
    assert customer_of(id, str(meter)) == str(customer)
    assert customer_of(id, METER) != str(customer) or str(meter) == METER


@named("rollover")
def test_rollover_is_polars(case: Case) -> None:
    """The units that are carried to the next cycle."""
    account, consumed = Account(), ZERO
    ledger = Ledger()
    for event in case["given"]["events"]:
        metadata = event["metadata"]
        if event["name"] == "meter.credited":
            ledger.apply(CreditGranted(
                id=event["id"], organization_id="o", customer_id="c1", meter_id=metadata["meter_id"],
                units=Decimal(metadata["units"]), rollover=metadata["rollover"], at=instant(event["timestamp"]),
            ))  # fmt: skip
        else:
            consumed += metadata["tokens"]
    account = ledger.account("c1", "m1") or Account()
    ours = rollover_units(account, consumed)
    agree(case, ours == case["then"]["rollover_units"], ours)
