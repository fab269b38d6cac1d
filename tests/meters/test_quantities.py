"""The reference answer to "how much, by when"."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from meters.aggregation import Aggregation, Function
from meters.event_values import Facts, number
from meters.filters import EVERYTHING, Clause, Filter, Operator
from meters.meter import EVERYONE, Meter, Quantities, Selection, quantities
from meters.timestamps import Interval

JANUARY_1, JANUARY_3 = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC)


def used(day: datetime, amount: str, *, customer: str | None = None, external: str | None = "u", **more: Any) -> Facts:
    """An event with an amount in ``t``."""
    return Facts("use", day, {"t": number(amount)} | more, customer_id=customer, external_customer_id=external)


EVENTS = [
    used(datetime(2020, 1, 1, tzinfo=UTC), "1000"),
    used(datetime(2024, 1, 1, 9, tzinfo=UTC), "10"),
    used(datetime(2024, 1, 1, 23, 59, 59, 999_999, tzinfo=UTC), "20"),
    used(datetime(2024, 1, 3, 23, tzinfo=UTC), "0.5", external="v"),
    used(datetime(2024, 1, 4, tzinfo=UTC), "7"),
]


def answer(
    func: Function,
    events: list[Facts] = EVENTS,
    *,
    filter: Filter = EVERYTHING,
    selection: Selection = EVERYONE,
    per_customer: Function | None = None,
) -> Quantities:
    """The quantities of the first three days of 2024."""
    meter = Meter(
        id="m",
        organization_id="o",
        name="use",
        filter=filter,
        created_at=JANUARY_1,
        aggregation=Aggregation(func, None if func == "count" else "t"),
    )
    return quantities(
        meter,
        events,
        start=JANUARY_1,
        end=JANUARY_3,
        interval=Interval.DAY,
        selection=selection,
        per_customer=per_customer,
    )


def numbers(answered: Quantities) -> tuple[list[str], str]:
    """Quantities and total as text."""
    return [str(quantity.quantity) for quantity in answered.quantities], str(answered.total)


@pytest.mark.parametrize(
    ("func", "shown", "total"),
    [
        ("count", [2, 0, 1], 3),
        ("sum", [30, 0, "0.5"], "30.5"),
        ("min", [10, 0, "0.5"], "0.5"),
        ("max", [20, 0, "0.5"], 20),
        ("avg", [15, 0, "0.5"], "10.166666666667"),
        ("unique", [2, 0, 1], 3),
    ],
)
def test_totals_speak_of_the_buckets_shown(func: Function, shown: list[Any], total: Any) -> None:
    """For every function: what is before and after the range does not count, though the last bucket is whole."""
    answered = answer(func)
    assert [quantity.quantity for quantity in answered.quantities] == [Decimal(value) for value in shown]
    assert answered.total == Decimal(total)


def test_an_empty_bucket_shows_zero_and_does_not_win() -> None:
    """The greatest of negative numbers is negative."""
    assert numbers(answer("max", [used(JANUARY_1, "-5")])) == (["-5.000000000000", "0", "0"], "-5.000000000000")


def test_an_event_without_a_number_makes_no_bucket() -> None:
    """Nothing to aggregate is nothing, also when something happened."""
    nothing = Facts("use", JANUARY_3, {"t": "text"})
    answered = answer("max", [used(JANUARY_1, "-5"), nothing])
    assert answered.total == -5


@pytest.mark.parametrize(
    ("func", "per_customer", "shown", "total"),
    [
        ("sum", "max", [30, 0, "0.5"], "30.5"),
        ("sum", "count", [1, 0, 1], 2),
        ("max", "sum", [20, 0, "0.5"], 20),
        ("max", "unique", [1, 0, 1], 1),
        ("avg", "sum", [15, 0, "0.5"], "10.166666666667"),
    ],
)
def test_a_function_per_customer(func: Function, per_customer: Function, shown: list[Any], total: Any) -> None:
    """First by customer, then over the customers; avg and unique totals do not know customers."""
    answered = answer(func, per_customer=per_customer)
    assert [quantity.quantity for quantity in answered.quantities] == [Decimal(value) for value in shown]
    assert answered.total == Decimal(total)


def test_one_person_under_two_names_is_two_groups() -> None:
    """A customer id goes before an external id; nobody resolves one into the other here."""
    events = [
        used(JANUARY_1, "1", customer="c", external=None),
        used(JANUARY_1, "2", customer="c", external="ignored beside an id"),
        used(JANUARY_1, "4", external="u"),
    ]
    assert answer("sum", events, per_customer="max").total == 4
    assert answer("sum", events, per_customer="count").total == 2


@pytest.mark.parametrize(
    ("selection", "total"),
    [
        (Selection(), "7"),
        (Selection(customer_ids=frozenset({"c"})), "1"),
        (Selection(external_customer_ids=frozenset({"u"})), "2"),
        (Selection(customer_ids=frozenset({"c"}), external_customer_ids=frozenset({"u"})), "3"),
        (Selection(customer_ids=frozenset({"nobody"})), "0"),
        (Selection(customer_ids=frozenset()), "0"),
        (Selection(metadata={"plan": ["pro", "free"]}), "3"),
        (Selection(metadata={"plan": ["pro"], "size": ["5"]}), "1"),
        (Selection(metadata={"size": ["5.0"]}), "2"),
        (Selection(metadata={"on": ["true"]}), "4"),
        (Selection(metadata={"deep.key": ["x"]}), "0"),
    ],
)
def test_whose_usage(selection: Selection, total: str) -> None:
    """Names are joined by or, metadata keys by and; values are compared as text."""
    events = [
        used(JANUARY_1, "1", customer="c", external=None, plan="pro", size=number("5")),
        used(JANUARY_1, "2", external="u", plan="free", size=number("5.0")),
        used(JANUARY_1, "4", external=None, on=True, deep={"key": "x"}),
    ]
    assert answer("sum", events, selection=selection).total == Decimal(total)


def test_the_filter_decides_what_counts() -> None:
    """Before anything is aggregated."""
    heavy = Filter("and", [Clause("t", Operator.GT, 10)])
    assert numbers(answer("count", filter=heavy)) == (["1", "0", "0"], "1")
