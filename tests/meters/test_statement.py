"""The statement of an account: each movement with its cause, and the balance after it."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise

import pytest

from meters.aggregation import Aggregation, Function
from meters.ledger.ledger import Account, CreditGranted, Ledger, MeterReset, revocation_id
from meters.ledger.statement import QUARTER, Usage, parse_usage_id, statement, usage_id

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def used(minute: int, *amounts: str, fresh: int = 0) -> Usage:
    """What arrived in the quarter hour that ends with a minute; ``fresh`` values were not seen before."""
    units, at = [Decimal(amount) for amount in amounts], NOON + minute * MINUTE
    return Usage(
        arrived_from=at - QUARTER, arrived_until=at, last_at=at, count=len(units), sum=sum(units, Decimal(0)),
        min=min(units, default=None), max=max(units, default=None), distinct=fresh,
    )  # fmt: skip


def account() -> Account:
    """100 units at the beginning, and 50 more once the meter began anew at minute 60, of which 20 are taken back."""
    def credit(id: str, units: int, at: int, **fields: str) -> CreditGranted:
        return CreditGranted(
            id=id, organization_id="o", customer_id="c", meter_id="m", units=Decimal(units), at=NOON + at * MINUTE,
            **fields,  # type: ignore[arg-type]
        )  # fmt: skip

    ledger = Ledger()
    for change in (
        credit("first", 100, 0, cause="grant", reference="g"),
        MeterReset(
            id="anew", organization_id="o", customer_id="c", meter_ids=["m"], at=NOON + 60 * MINUTE, reference="s"
        ),
        credit("second", 50, 60), credit("third", 20, 61),
        credit(revocation_id("third"), -20, 100, cause="revoke", takes="third", reference="third"),
    ):  # fmt: skip
        ledger.apply(change)
    return ledger.account("c", "m") or Account()


USAGE = [used(15, "4", "6", fresh=2), used(30, "1", "5", "9", fresh=1), used(45), used(75, "-2", "8", fresh=2)]

BALANCES: dict[Function, list[str]] = {
    # after: first, the usage at 15, 30 and 45, anew, second, third, the usage at 75, the taking back
    "sum":    ["100", "90", "75", "75", "0", "50", "70", "64", "44"],
    "count":  ["100", "98", "95", "95", "0", "50", "70", "68", "48"],
    "unique": ["100", "98", "97", "97", "0", "50", "70", "68", "48"],
    "avg":    ["100", "95", "95", "95", "0", "50", "70", "67", "47"],
    "min":    ["100", "96", "99", "99", "0", "50", "70", "72", "52"],
    "max":    ["100", "94", "91", "91", "0", "50", "70", "62", "42"],
}  # fmt: skip


@pytest.mark.parametrize("function", BALANCES)
def test_a_statement_goes_through_the_balance(function: Function) -> None:
    """Usage moves it by as much as the meter's value changes; what is moved adds up to what is left."""
    aggregation = Aggregation(function, None if function == "count" else "units")
    entries = statement(aggregation, account(), USAGE)
    assert [entry.balance for entry in entries] == [Decimal(balance) for balance in BALANCES[function]]
    moved, before = [entry.units for entry in entries], [Decimal(0), *(entry.balance for entry in entries)]
    assert moved == [after - earlier for earlier, after in pairwise(before)]


def test_each_entry_says_what_it_is() -> None:
    """Its id, its time, why it is there, what it came from, and the units as they were decided."""
    told = [
        (one.id, (one.at - NOON) // MINUTE, one.cause, one.stated, one.rollover, one.reference, one.usage)
        for one in statement(Aggregation("count"), account(), USAGE)
    ]
    assert told == [
        ("first",           0,   "grant",  100,  False, "g",     None),
        (usage_id(USAGE[0]), 15, "usage",  None, None,  None,    USAGE[0]),
        (usage_id(USAGE[1]), 30, "usage",  None, None,  None,    USAGE[1]),
        (usage_id(USAGE[2]), 45, "usage",  None, None,  None,    USAGE[2]),
        ("anew",            60,  "reset",  None, None,  "s",     None),
        ("second",          60,  "credit", 50,   False, None,    None),
        ("third",           61,  "credit", 20,   False, None,    None),
        (usage_id(USAGE[3]), 75, "usage",  None, None,  None,    USAGE[3]),
        ("third-revoked",   100, "revoke", -20,  False, "third", None),
    ]  # fmt: skip


def test_at_one_instant_usage_comes_last_and_in_its_order() -> None:
    """Behind the reset and the credits; of several usages the one that is named first."""
    at_the_reset = [used(60, "3"), used(60, "4"), used(61, "1")]
    entries = statement(Aggregation("sum", "units"), account(), at_the_reset)
    assert [(one.cause, one.units) for one in entries] == [
        ("grant", 100), ("reset", -100), ("credit", 50), ("usage", -3), ("usage", -4), ("credit", 20), ("usage", -1),
        ("revoke", -20),
    ]  # fmt: skip


def test_an_entry_of_usage_is_found_by_its_id() -> None:
    """The id is the stretch in which the usage arrived."""
    one = used(15, "1")
    assert usage_id(one) == "1772366400000000-1772367300000000"
    assert parse_usage_id(usage_id(one)) == (one.arrived_from, one.arrived_until)


@pytest.mark.parametrize("id", ["", "1", "1-", "1-2-3", "a-b", "-1-2", "1-999999999999999999"])
def test_another_text_is_no_id_of_usage(id: str) -> None:
    """Two counts of microseconds of at most seventeen digits, and nothing else."""
    assert parse_usage_id(id) is None
