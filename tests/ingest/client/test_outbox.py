"""The line of waiting events: what travels together, what has room, and when a request may start."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from ingest.client.event import Limits, SpoolFull
from ingest.client.outbox import Batch, Outbox, Pace


def line(number: int, size_bytes: int) -> bytes:
    """A line of this length, told apart by its number."""
    return b"%d" % number + b"x" * (size_bytes - len(str(number)))


@contextmanager
def outbox(when_full: Any = "drop_oldest", **limits: Any) -> Iterator[Outbox]:
    """Without a spool."""
    whole = Limits(**{"linger_s": 3600, "block_s_max": 0, **limits})
    with closing(Outbox(whole, when_full, None)) as made:
        yield made


def leaving(queue: Outbox) -> list[int]:
    """The numbers of the events in the next batch. Something must wait that may leave."""
    batch = queue.take()
    assert batch is not None
    return [number for number, _ in batch.rows]


def test_a_batch_has_as_many_bytes_as_allowed_and_not_one_more() -> None:
    """Each line counts with the comma behind it. What does not fit leaves with the next batch."""
    with outbox(batch_bytes_max=300) as queue:
        for number, size_bytes in enumerate([99, 99, 99, 99, 99, 100]):
            queue.put(line(number, size_bytes))
        queue.hurry()
        assert [leaving(queue), leaving(queue)] == [[1, 2, 3], [4, 5]]  # 300 bytes; 200, and 101 more would be 301
        assert leaving(queue) == [6]


def test_an_event_above_the_bound_leaves_alone() -> None:
    """It is sent all the same: the server says whether it is too large. Those around it keep the bound."""
    with outbox(batch_bytes_max=100) as queue:
        for number, size_bytes in enumerate([40, 500, 40, 40]):
            queue.put(line(number, size_bytes))
        queue.hurry()
        assert [leaving(queue), leaving(queue), leaving(queue)] == [[1], [2], [3, 4]]


def test_a_full_batch_does_not_linger() -> None:
    """With the last event that a batch may have it leaves; the one after waits for others, until somebody hurries."""
    with outbox(batch_events_max=3) as queue:
        for number in range(4):
            queue.put(line(number, 20))
        assert leaving(queue) == [1, 2, 3]
        assert (queue._seconds_until_ready(0.0) or 0) > 0
        queue.hurry()
        assert leaving(queue) == [4]


@pytest.mark.parametrize("when_full", ["block", "raise", "drop_oldest"])
def test_the_bound_of_what_is_held_is_exact(when_full: str) -> None:
    """The event that fills the bound is taken. One byte more is refused, or makes the oldest go."""
    with outbox(when_full, held_bytes_max=100) as queue:
        assert queue.put(line(0, 40))
        assert queue.put(line(1, 60))
        assert (queue.pending, queue.held_bytes, queue.dropped) == (2, 100, 0)
        if when_full == "raise":
            with pytest.raises(SpoolFull):
                queue.put(line(2, 1))
        else:
            assert queue.put(line(2, 1)) is (when_full == "drop_oldest")
        dropped = when_full == "drop_oldest"
        assert (queue.pending, queue.held_bytes, queue.dropped) == ((2, 61, 1) if dropped else (2, 100, 0))


def test_settled_events_make_room() -> None:
    """Acknowledged or rejected, their bytes are free again, and each is counted once."""
    with outbox("block", held_bytes_max=100) as queue:
        for number in range(2):
            queue.put(line(number, 50))
        queue.hurry()
        batch = queue.take()
        assert batch is not None
        queue.settle(batch.rows[:1], is_acknowledged=True)
        queue.settle(batch.rows[1:], is_acknowledged=False)
        queue.land(batch)
        assert (queue.acknowledged, queue.rejected, queue.pending, queue.held_bytes) == (1, 1, 0, 0)
        assert queue.put(line(2, 100))


def test_the_oldest_goes_first_though_it_was_tried_before() -> None:
    """An event that waits for another try is older than those in line, so it is the one that is dropped."""
    with outbox(held_bytes_max=100, batch_events_max=2) as queue:
        for number in range(4):
            queue.put(line(number, 25))
        batch = queue.take()
        assert batch is not None
        queue.land(batch, [(Batch(batch.rows), 3600.0)])
        for number in (4, 5):
            assert queue.put(line(number, 25))
        assert queue.dropped == 2
        queue.hurry()
        assert [leaving(queue), leaving(queue)] == [[3, 4], [5, 6]]


def test_of_events_that_wait_for_another_try_the_oldest_goes() -> None:
    """By their age, not by when they are tried again."""
    with outbox(held_bytes_max=100, batch_events_max=1) as queue:
        for number in range(4):
            queue.put(line(number, 25))
        first, second = queue.take(), queue.take()
        assert first is not None
        assert second is not None
        queue.land(second, [(Batch(second.rows), 0.0)])
        queue.land(first, [(Batch(first.rows), 3600.0)])
        assert queue.put(line(4, 25))
        assert leaving(queue) == [2]


def test_while_the_server_is_away_one_event_asks() -> None:
    """A single new event leaves, and nothing else until its answer is here. An acknowledgement opens the line again."""
    with outbox(backoff_s=0, backoff_s_max=0) as queue:
        for number in range(5):
            queue.put(line(number, 20))
        queue.hurry()
        queue.pace.failed(0.0)
        asking = queue.take()
        assert asking is not None
        assert len(asking.rows) == 1
        assert queue._seconds_until_ready(1.0) is None
        queue.settle(asking.rows, is_acknowledged=True)
        queue.land(asking)
        assert leaving(queue) == [2, 3, 4, 5]


def test_failures_that_come_together_count_once() -> None:
    """Requests that left before the pause began say nothing new; the first one after it does."""
    pace = Pace(Limits(backoff_s=1, backoff_s_max=30), lambda: 0.0)
    for _ in range(3):
        pace.failed(100.0)
    assert (pace.failures, pace.until_s) == (1, 100.5)
    pace.failed(100.5)
    assert (pace.failures, pace.until_s) == (2, 101.5)
    pace.worked()
    assert (pace.failures, pace.until_s) == (0, 0.0)


@pytest.mark.parametrize(("asked_s", "until_s"), [(None, 0.5), (0.0, 0.5), (20.0, 20.0), (10_000.0, 600.0)])
def test_a_server_may_ask_for_a_longer_pause_within_reason(asked_s: float | None, until_s: float) -> None:
    """The pause is never shorter than asked for, and never longer than the bound."""
    pace = Pace(Limits(backoff_s=1), lambda: 0.0)
    pace.failed(0.0, asked_s)
    assert pace.until_s == until_s
    assert not pace.allows(until_s - 0.25, 0)
    assert pace.allows(until_s, 0)
    assert not pace.allows(until_s, 1)  # one request asks


def test_who_was_told_to_wait_waits_a_little_longer_by_chance() -> None:
    """Never less than asked for, and up to a tenth more, so that not all come back at one time."""
    pace = Pace(Limits(backoff_s=1), lambda: 1.0)
    pace.failed(0.0, 20.0)
    assert pace.until_s == 22.0


def test_a_failure_within_a_pause_does_not_shorten_it() -> None:
    """A request that left before the pause may fail in its middle, and then asks for less."""
    pace = Pace(Limits(backoff_s=1), lambda: 0.0)
    pace.failed(0.0, 20.0)
    pace.failed(5.0)
    assert (pace.failures, pace.until_s) == (1, 20.0)


def test_pauses_double_up_to_the_longest() -> None:
    """Without luck they are as long as the bound says."""
    pace = Pace(Limits(backoff_s=1, backoff_s_max=10), lambda: 1.0)
    assert [pace.backoff_s(failures) for failures in range(1, 7)] == [1, 2, 4, 8, 10, 10]
