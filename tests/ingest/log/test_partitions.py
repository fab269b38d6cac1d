"""Partitions that are read as one."""

from collections import deque
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.log.partitions import take_in_order
from meters.log import LATEST_US, Record

PLENTY = 1_000_000

times = st.lists(st.integers(0, 50), max_size=8).map(sorted)


def waiting(partitions: Sequence[Sequence[int]]) -> dict[int, deque[Record]]:
    """A byte for each time, partition by partition."""
    return {
        number: deque(Record(number, offset, time_us, b"x") for offset, time_us in enumerate(partition))
        for number, partition in enumerate(partitions)
    }


def taken(
    partitions: Sequence[Sequence[int]], more: Mapping[int, bool] | None = None, bytes_max: int = PLENTY
) -> list[tuple[int, int]]:
    """Partition and offset of what is taken."""
    records = take_in_order(waiting(partitions), lambda partition: bool(more and more.get(partition)), bytes_max)
    return [(record.partition, record.offset) for record in records]


@given(partitions=st.lists(times, max_size=4), bytes_max=st.integers(0, 40))
def test_the_order_is_that_of_times_however_much_is_read_at_once(partitions: list[list[int]], bytes_max: int) -> None:
    """Everything is taken once, a round at a time, in the same order as in one."""
    left, found = waiting(partitions), list[Record]()
    while some := take_in_order(left, lambda _: False, bytes_max):
        assert len(some) <= max(bytes_max, 1)
        found += some
    assert found == sorted(found, key=lambda record: (record.timestamp_us, record.partition, record.offset))
    assert [(record.partition, record.offset) for record in found] == taken(partitions)
    assert len(found) == sum(map(len, partitions))


@pytest.mark.parametrize(
    ("partitions", "more", "expected"),
    [
        ([[5, 1], [3]], {}, [(1, 0), (0, 0), (0, 1)]),  # a partition's own order comes first
        ([[1], [2]], {0: True}, [(0, 0)]),  # what comes next in 0 may be older than 2
        ([[], [2]], {}, [(1, 0)]),
        ([[LATEST_US, 9], [3, 4]], {1: True}, [(0, 0), (1, 0), (1, 1)]),  # it waits for nobody, nor does what follows
    ],
)
def test_order(partitions: list[list[int]], more: dict[int, bool], expected: list[tuple[int, int]]) -> None:
    """Of small cases."""
    assert taken(partitions, more) == expected
