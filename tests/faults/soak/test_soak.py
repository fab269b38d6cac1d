"""The pieces of the soak that must be right for its verdict to mean anything. `make soak` itself runs in CI."""

import itertools
import json
from decimal import Decimal

import numpy as np
import pytest

from tests.faults.soak.forwarding import books_differ, differences
from tests.faults.soak.schedule import DISK, ENDING, OTHERS, faults
from tests.faults.soak.tally import Says, body, content, expected, forwarded, says
from tests.faults.soak.vitals import Sample, Vitals, sparkline

KINDS = {*ENDING, *DISK, *OTHERS}


def test_a_seed_gives_the_same_faults_again() -> None:
    """The order, the pauses and the strengths follow from the seed; another seed has others."""
    one, again, other = (list(itertools.islice(faults(seed, KINDS), 100)) for seed in (1, 1, 2))

    assert one == again
    assert one != other


def test_every_kind_comes_before_any_comes_again() -> None:
    """A run as long as one deck has seen everything."""
    dealt = [fault.kind for fault in itertools.islice(faults(7, KINDS), 2 * len(KINDS))]

    assert set(dealt[: len(KINDS)]) == set(dealt[len(KINDS) :]) == KINDS


def test_what_ends_a_process_comes_first() -> None:
    """A short run has struck with all of it before its last stretch, in which nothing is killed."""
    dealt = [fault.kind for fault in itertools.islice(faults(7, KINDS), len(ENDING))]

    assert set(dealt) == set(ENDING)


def test_what_is_forwarded_says_what_the_bodies_say() -> None:
    """The events that are to be forwarded are known, with their content, from the sender's books alone."""
    numbers = np.arange(5_000)
    events = json.loads(body(numbers), parse_float=Decimal)["events"]
    few = {
        event["external_id"]: Says(
            event["external_customer_id"], event["metadata"]["tokens"], event["metadata"]["_cost"]["amount"]
        )
        for event in events if event["metadata"]["tokens"] < 10_050
    }  # fmt: skip

    assert says(forwarded(len(numbers))) == few
    assert 10 < len(few) < 60


ONE, OTHER = Says("ann", 1, Decimal(2)), Says("ann", 1, Decimal(3))


@pytest.mark.parametrize(
    ("taken", "changed", "wrong"),
    [
        ({"a": ONE, "b": ONE}, set(), []),
        ({"a": ONE}, set(), ["lost"]),
        ({"a": ONE, "b": ONE, "c": ONE}, set(), ["made up"]),
        ({"a": ONE, "b": OTHER}, set(), ["something else"]),
        ({"a": ONE, "b": ONE}, {"a"}, ["something else"]),
    ],
)
def test_what_polar_has_otherwise_is_told(taken: dict[str, Says], changed: set[str], wrong: list[str]) -> None:
    """Lost, made up, or another than what was sent."""
    told = differences({"a": ONE, "b": ONE}, taken, changed)

    assert len(told) == len(wrong)
    assert all(word in complaint for word, complaint in zip(wrong, told, strict=True))


@pytest.mark.parametrize(
    ("lane", "name", "value"),
    [("raw", "accepted", 1), ("raw", "taken", 3), ("raw", "dead", 1), ("", "inserted", 2), ("waiting", "", 1)],
)
def test_books_of_the_forwarder_that_say_otherwise_are_told(lane: str, name: str, value: int) -> None:
    """Each of its numbers is held against what is known without it."""
    books = {"raw": {"taken": 2, "accepted": 2}, "": {"inserted": 1, "duplicates": 1}, "waiting": {"": 0}}

    assert books_differ(books, 2, 2) == []
    assert books_differ(books | {lane: books[lane] | {name: value}}, 2, 2)
    assert books_differ(books, 2, 1)


def test_the_expected_sums_are_those_of_the_bodies() -> None:
    """What is booked for some numbers is what a plain reader finds in the bodies made of them."""
    numbers = np.array([0, 3, 99, 12_345_678, 3, 999_999_999_999])
    events = json.loads(body(numbers), parse_float=Decimal)["events"]
    calls, tokens, cost = expected(numbers)

    assert [event["external_id"] for event in events] == [f"soak-{number:012d}" for number in numbers]
    assert [event["external_customer_id"] for event in events] == [
        f"customer-{number:04d}" for number in content(numbers).customer
    ]
    assert calls == len(events)
    assert tokens == sum(event["metadata"]["tokens"] for event in events)
    assert cost == sum(event["metadata"]["_cost"]["amount"] for event in events)


def test_memory_is_judged_in_the_last_life_alone() -> None:
    """A process that was replaced begins anew, and one that grows a byte a second grows 3600 an hour."""
    vitals = Vitals(dict, int, int)
    old = [Sample(float(second), 1, 10**9, 0) for second in range(50)]
    vitals.memory = {"gateway": old + [Sample(50.0 + second, 2, 1000 + second, 0) for second in range(60)]}
    slope = vitals.slopes()["gateway"]

    assert slope.resident_bytes == 1059
    assert round(slope.bytes_per_hour) == 3600


def test_a_chart_reaches_from_nothing_to_the_most() -> None:
    """Nothing is a blank, the most is a full bar, and a long series is as wide as it may be."""
    assert sparkline([0, 4, 8]) == " ▄█"
    assert len(sparkline(list(range(1000)), width=20)) == 20
