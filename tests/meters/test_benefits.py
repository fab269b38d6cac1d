"""What grants give, renew and take back, and who has what by them."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from msgspec.structs import replace

from meters.catalogue.catalogue import decode_change, encode_change
from meters.ledger.benefits import (
    INSTANT,
    Benefit,
    Benefits,
    BenefitSet,
    Grant,
    GrantSet,
    Step,
    Subscription,
    SubscriptionSet,
    cycled,
    grant_id,
    granted,
    is_credited,
    needs_reset,
    revoked,
)
from meters.ledger.joined import CustomersJoined
from meters.ledger.ledger import Account, Credit, CreditGranted, Ledger, MeterReset

T0 = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
BENEFIT = Benefit(
    id="b", organization_id="org", description="Tokens", meter_id="m", units=100, rollover=True, created_at=T0
)
GRANT = Grant(id="g", organization_id="org", benefit_id="b", customer_id="c", created_at=T0, granted_at=T0)


@pytest.mark.parametrize("is_polars", [False, True])
def test_a_grant_knows_what_kind_of_units_it_gave(is_polars: bool) -> None:
    """An edited benefit changes nothing of it; a grant of Polar's, which does not say, goes by the benefit."""
    line = encode_change(GrantSet(granted(GRANT, BENEFIT, T0, None).grant))
    if is_polars:
        line = line.replace(b',"last_credited_rollover":true', b"")
    told = decode_change(line)
    assert isinstance(told, GrantSet)
    (back,) = revoked(told.grant, replace(BENEFIT, rollover=False), T0 + DAY, None).movements
    assert isinstance(back, CreditGranted)
    assert back.rollover is not is_polars


class Book:
    """One grant and the account that its movements make. ``move`` returns what a step adds to the account."""

    def __init__(self) -> None:
        self.grant, self.ledger, self.benefit = GRANT, Ledger(), BENEFIT

    @property
    def account(self) -> Account | None:
        return self.ledger.account("c", "m")

    def reset(self, at: datetime) -> MeterReset:
        return MeterReset(id=f"r{at}", organization_id="org", customer_id="c", meter_ids=["m"], at=at)

    def move(self, what: str, day: float) -> Step:
        """Do it on a day, and write it down."""
        at = T0 + day * DAY
        match what:
            case "grant":
                step = granted(self.grant, self.benefit, at, self.account)
            case "renew":
                cut = self.reset(at) if needs_reset(self.grant, self.account) else None
                step = cycled(self.grant, self.benefit, at, cut, self.account)
            case "revoke":
                step = revoked(self.grant, self.benefit, at, self.account)
            case _:  # something else begins the meter anew
                step = Step(self.grant, [self.reset(at)])
        self.grant = step.grant
        for movement in step.movements:
            self.ledger.apply(movement)
        return step


ZEROTH, FIFTH = "2026-01-01T00:00:00.000000+00:00", "2026-01-06T00:00:00.000000+00:00"

HISTORIES = {
    # what happens on which day; then each credit by its id, why, on which day it counts, its units and what it takes
    "given, renewed and taken back": (
        "grant 0, renew 5, revoke 10",
        ["g:0:grant grant 0 100 -", f"g:{FIFTH}:cycle cycle 5 100 -",
         f"g:{FIFTH}:revoke revoke 10 -100 g:{FIFTH}:cycle"],
    ),
    "given again, its id is of the time when it was taken back": (
        "grant 0, revoke 5, grant 10",
        ["g:0:grant grant 0 100 -", f"g:{ZEROTH}:revoke revoke 5 -100 g:0:grant", f"g:{FIFTH}:grant grant 10 100 -"],
    ),
    "given as of before the meter began anew, it counts from there": (
        "else 5, grant 3",
        ["g:0:grant grant 5 100 -"],
    ),
    "the meter began anew since, so the renewal is that window's": (
        "grant 0, else 10, renew 5",
        ["g:0:grant grant 0 100 -", f"g:{FIFTH}:cycle cycle 10 100 -"],
    ),
    "what never gave takes nothing": ("revoke 5", []),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_each_movement_of_a_grant_says_what_it_is(name: str) -> None:
    """Its id, its cause, when it counts, its units, and the credit that it takes back; all are the grant's."""
    book, told = Book(), list[CreditGranted]()
    history, expected = HISTORIES[name]
    for step in history.split(", "):
        what, day = step.split()
        told += [one for one in book.move(what, int(day)).movements if isinstance(one, CreditGranted)]
    rows = [f"{one.id} {one.cause} {(one.at - T0) // DAY} {one.units} {one.takes or '-'}" for one in told]
    assert rows == expected
    for one in told:
        assert (one.organization_id, one.customer_id, one.meter_id, one.reference, one.rollover) == (
            "org", "c", "m", "g", True
        )  # fmt: skip


@pytest.mark.parametrize(
    ("history", "needs"),
    [
        ("", True),
        ("grant 0", True),
        ("grant 0, renew 5", True),  # its own renewal was at the same instant as the credit, not after it
        ("grant 0, renew 5, else 6", False),
        ("else 0, grant 0", True),
        ("else 3", True),  # nothing was credited yet
    ],
)
def test_a_renewal_begins_the_meter_anew_unless_something_else_did(history: str, needs: bool) -> None:
    """Since the last credit, that is."""
    book = Book()
    for step in filter(None, history.split(", ")):
        book.move(step.split()[0], int(step.split()[1]))
    assert needs_reset(book.grant, book.account) is needs


def test_every_renewal_gives_the_units_anew() -> None:
    """A month's units do not pile up."""
    book, credited = Book(), []
    book.benefit = replace(BENEFIT, rollover=False)
    for what, day in (("grant", 0), ("renew", 30), ("renew", 60), ("renew", 90)):
        step = book.move(what, day)
        assert [isinstance(one, MeterReset) for one in step.movements] == ([False] if day == 0 else [True, False])
        account = book.account
        assert account is not None
        credited.append(account.credited)
        assert is_credited(book.grant, T0 + day * DAY, account) is (what == "renew")
        assert not is_credited(book.grant, T0 + (day + 1) * DAY, account)
    assert credited == [100, 100, 100, 100]
    assert not is_credited(book.grant, T0 + 30 * DAY, None)


def test_the_grant_keeps_what_happened_to_it() -> None:
    """When it was given, changed and taken back, and its last credit."""
    book = Book()
    rows = []
    for what, day in (("grant", 0), ("renew", 5), ("revoke", 10), ("grant", 20)):
        held = book.move(what, day).grant
        times = (held.granted_at, held.modified_at, held.revoked_at, held.last_credited_at)
        days = [None if at is None else (at - T0) // DAY for at in times]
        rows.append((what, *days, held.is_held, held.last_credited_units, held.last_credited_meter_id))
    assert rows == [
        #          given  changed taken  credited held
        ("grant",  0,     None,   None,  0,       True,  100, "m"),
        ("renew",  0,     5,      None,  5,       True,  100, "m"),
        ("revoke", 0,     10,     10,    5,       False, 100, "m"),
        ("grant",  20,    20,     None,  20,      True,  100, "m"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("revoked_on", "began_on", "counts_at"),
    [
        (5, None, 5 * DAY),
        (-3, None, INSTANT),  # the clock went back behind the credit
        (0, None, INSTANT),
        (-3, 2, 2 * DAY + INSTANT),  # and behind the beginning of the window
    ],
)
def test_nothing_is_taken_back_before_it_was_there(
    revoked_on: int, began_on: int | None, counts_at: timedelta
) -> None:
    """A take-back comes after what it takes was given, and after the window began."""
    book = Book()
    book.move("grant", 0)
    if began_on is not None:
        book.move("else", began_on)
    (back,) = book.move("revoke", revoked_on).movements
    assert back.at == T0 + counts_at


@pytest.mark.parametrize(
    ("credits", "last"),
    [
        ([(0, "grant", "g"), (5, "cycle", "g")], "5 cycle g"),
        ([(4, "grant", "g"), (3, "grant", "g")], "3 grant g"),  # the grant names the later of two times: the newest
        ([(5, "grant", "g"), (9, "cycle", "g")], "5 grant g"),
        ([(5, "credit", "g"), (5, "cycle", "h"), (2, "grant", "g")], "2 grant g"),  # another grant's, or somebody's
        ([(5, "credit", "g")], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_last_credit_is_the_one_that_is_taken_back(credits: list[tuple[int, str, str]], last: str | None) -> None:
    """That of the time which the grant names, or else its newest."""
    held = replace(GRANT, last_credited_at=T0 + 5 * DAY, last_credited_units=100, last_credited_meter_id="m")
    account = Account([
        Credit(T0 + day * DAY, f"{day} {cause} {of}", Decimal(100), False, cause, of)  # type: ignore[arg-type]
        for day, cause, of in credits
    ])
    (back,) = revoked(held, BENEFIT, T0 + 9 * DAY, account).movements
    assert isinstance(back, CreditGranted)
    assert back.takes == last


def test_who_has_what() -> None:
    """By benefit, by customer and by organization; what ended is left out where only what holds is asked for."""
    def grant(id: str, benefit: str, customer: str, ended: bool = False, given: bool = True) -> GrantSet:
        return GrantSet(replace(
            GRANT, id=id, benefit_id=benefit, customer_id=customer, revoked_at=T0 if ended else None, is_granted=given
        ))  # fmt: skip

    def subscription(id: str, customer: str, status: str, *meters: str, organization: str = "org") -> SubscriptionSet:
        return SubscriptionSet(Subscription(
            id=id, organization_id=organization, customer_id=customer, status=status, created_at=T0, amount=0,
            currency="usd", recurring_interval="month", current_period_start=T0, product_id="p", meter_ids=list(meters),
        ))  # fmt: skip

    benefits = Benefits()
    for change in (
        BenefitSet(BENEFIT), BenefitSet(replace(BENEFIT, id="b2", meter_id="m2")),
        BenefitSet(replace(BENEFIT, id="gone", deleted_at=T0)),
        BenefitSet(replace(BENEFIT, id="x", organization_id="y")),
        grant("1", "b", "ann"), grant("2", "b2", "ann", ended=True), grant("3", "b", "bob", ended=True),
        grant("4", "b2", "bob", given=False), grant("5", "b2", "cy"),
        subscription("s1", "ann", "active", "m3", "m4"), subscription("s2", "ann", "canceled", "m5"),
        subscription("s3", "bob", "trialing", "m6"), subscription("s4", "dan", "active", "m7", organization="y"),
    ):  # fmt: skip
        benefits.apply(change)
    assert [one.id for one in benefits.benefits_of("org")] == ["b", "b2"]
    assert [one.id for one in benefits.grants_by("b")] == ["1"]
    assert [one.id for one in benefits.grants_by("b", held=False)] == ["1", "3"]
    assert [one.id for one in benefits.grants_of("ann")] == ["1", "2"]
    assert [one.id for one in benefits.subscriptions_of("ann")] == ["s1", "s2"]
    assert [one.id for one in benefits.active_subscriptions("org")] == ["s1", "s3"]
    assert benefits.priced_meters("org") == {"m3", "m4", "m6"}
    paid = {customer: benefits.paid_meters(customer) for customer in ("ann", "bob", "cy", "eve")}
    assert paid == {"ann": {"m", "m3", "m4"}, "bob": {"m6"}, "cy": {"m2"}, "eve": set()}
    for change in (CustomersJoined(organization_id="org", id="cy", into="bob", at=T0), grant("6", "b", "cy")):
        benefits.apply(change)
    assert [(one.id, one.customer_id) for one in benefits.grants_of("bob")] == [
        ("3", "bob"), ("4", "bob"), ("5", "bob"), ("6", "bob")
    ]  # fmt: skip
    assert benefits.grants_of("cy") == []
    benefits.apply(CustomersJoined(organization_id="org", id="bob", into="ann", at=T0))
    assert [one.id for one in benefits.subscriptions_of("ann")] == ["s1", "s2", "s3"]
    assert benefits.subscriptions_of("bob") == []


def test_a_benefits_grant_to_a_customer_has_one_id() -> None:
    """Made of both, so that it is the same whenever it is asked for."""
    one, other = "0e1d7f2a-6f63-4c6c-8a53-111111111111", "0e1d7f2a-6f63-4c6c-8a53-222222222222"
    assert grant_id(one, "c") == grant_id(one, "c")
    assert len({grant_id(one, "c"), grant_id(one, "d"), grant_id(other, "c")}) == 3
