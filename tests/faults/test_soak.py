"""The pieces of the soak that must be right for its verdict to mean anything. `make soak` itself runs in CI."""

import itertools
import json
from decimal import Decimal

import numpy as np

from tests.faults.soak.schedule import DISK, ENDING, OTHERS, faults
from tests.faults.soak.tally import body, content, expected
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
