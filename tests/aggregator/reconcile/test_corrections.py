"""What takes an event back, and when nothing can."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from aggregator.reconcile.polar_pairing import (
    MARK,
    METADATA_KEYS_MAX,
    Seen,
    instead,
    mark_of,
    seen,
    settled,
    takes_back,
)
from meters.aggregation import Aggregation
from meters.filters import EVERYTHING, Clause, Filter, Operator
from meters.meter import Meter

LARGE = Filter("and", [Clause("tokens", Operator.GTE, 10)])


def event(**metadata: Any) -> Seen:
    """As Polar lists it."""
    return seen({
        "name": "call", "timestamp": "2026-03-01T10:00:00Z", "external_customer_id": "ann",
        "metadata": metadata,
    })  # fmt: skip


def meter(func: str, property: str | None = "tokens", filter: Filter = EVERYTHING) -> Meter:
    """A meter."""
    return Meter(
        id=func, organization_id="o", name=func, filter=filter, aggregation=Aggregation(func, property),  # type: ignore[arg-type]
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def test_the_summed_numbers_are_negated_and_nothing_else() -> None:
    """Whatever filters look at stays as it is; reserved amounts are numbers too."""
    doubled = event(tokens=4, tier=3, region="eu", _cost={"amount": 2, "currency": "usd"})

    body = takes_back(doubled, [meter("sum"), meter("sum", "_cost.amount")], 0)

    assert body is not None
    sent = json.loads(body)
    assert sent["metadata"] == {
        "tokens": -4, "tier": 3, "region": "eu", "_cost": {"amount": -2, "currency": "usd"}, MARK: mark_of(doubled),
    }  # fmt: skip
    assert (sent["name"], sent["external_customer_id"]) == ("call", "ann")


@pytest.mark.parametrize(
    ("meters", "metadata"),
    [
        ([], {"tokens": 4}),  # nobody knows who counts it
        ([meter("sum"), meter("count", None)], {"tokens": 4}),
        ([meter("sum"), meter("max")], {"tokens": 4}),
        ([meter("sum", filter=LARGE)], {"tokens": 40}),  # -40 is not large, and would not count
        ([meter("sum")], {"tokens": 4, **{f"key{number}": 1 for number in range(METADATA_KEYS_MAX)}}),
    ],
)
def test_what_no_event_can_take_back_is_not_tried(meters: list[Meter], metadata: dict[str, Any]) -> None:
    """A meter that is no sum, or whose filter lets only one of the two through."""
    assert takes_back(event(**metadata), meters, 0) is None


def test_an_amount_is_negated_with_all_its_digits() -> None:
    """A filter that knows the last of 38 lets the one through and not the other, so nothing takes it back."""
    amount = "12345678901234567890123456.123456789012"
    large = seen(json.loads(
        f'{{"name":"call","timestamp":"2026-03-01T10:00:00Z","external_customer_id":"ann","metadata":{{"tokens":{amount}}}}}',
        parse_float=Decimal,
    ))  # fmt: skip
    apart = Filter("and", [Clause("tokens", Operator.NE, Decimal(f"-{amount}"))])

    assert takes_back(large, [meter("sum", filter=apart)], 0) is None
    assert takes_back(large, [meter("sum")], 0) is not None


def test_what_was_taken_back_is_known_again() -> None:
    """One copy goes with what takes it back; further ones stay, and their corrections have ids of their own."""
    doubled = event(tokens=4)
    bodies = [takes_back(doubled, [meter("sum")], number) for number in (0, 1)]
    first, second = (json.loads(body) for body in bodies if body is not None)
    listed = [doubled, doubled, doubled, seen(first), event(tokens=5)]

    left, taken_back = settled(listed)

    assert left == [doubled, doubled, event(tokens=5)]
    assert taken_back == {mark_of(doubled): 1}
    assert first["external_id"] != second["external_id"]
    assert settled([seen(first)])[0] == [seen(first)]  # of nothing that is there


def test_what_stands_in_the_place_of_another_has_its_own_id() -> None:
    """The same each time, so that sending it again changes nothing."""
    body = b'{"name":"call","external_id":"e1","metadata":{"tokens":0.10}}'

    assert instead(body) == b'{"name":"call","external_id":"instead/e1","metadata":{"tokens":0.10}}'
