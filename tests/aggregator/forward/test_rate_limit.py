"""The request limit as the receiver sees it, and the circuit breaker."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.forward.polar_client import (
    FAILURES_UNTIL_OPEN,
    IN_FLIGHT_POLL_US,
    UNDER_WAY_MAX_US,
    Circuit,
    Clock,
    RequestWindow,
    free_in_us,
)
from tests.support.faults.small_disk import nothing_written

SECOND_US = 1_000_000
NOW_US = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()) * SECOND_US


class World:
    """A clock that moves when it is waited for, and that is ahead of the true time by as much as somebody set it."""

    def __init__(self) -> None:
        self.us, self.ahead_us = NOW_US, 0
        self.clock = Clock(lambda: self.us + self.ahead_us, self.pause, lambda: self.us)

    def pause(self, seconds: float) -> None:
        """Time goes by."""
        self.us += max(1, round(seconds * 1e6))


def busiest(arrivals_us: list[int], period_us: int) -> int:
    """The most arrivals in any half-open window of the period."""
    return max(sum(at <= other < at + period_us for other in arrivals_us) for at in arrivals_us)


@settings(max_examples=60, deadline=None)
@given(
    requests_max=st.integers(1, 6),
    delays=st.lists(st.tuples(st.floats(0, 8), st.floats(0, 8), st.floats(0, 3), st.booleans()), max_size=30),
)
def test_no_window_holds_more_requests_than_allowed(
    tmp_path_factory: pytest.TempPathFactory, requests_max: int, delays: list[tuple[float, float, float, bool]]
) -> None:
    """Whenever within its time a request arrives, and whether or not the process is killed during it."""
    world, arrivals = World(), [NOW_US]
    path = tmp_path_factory.mktemp("window") / "forward.sqlite"
    window = RequestWindow(path, requests_max, 10.0, world.clock)
    window.ended(window.take())
    for until_arrival, until_answer, idle, is_killed in delays:
        place = window.take()
        world.pause(until_arrival)
        arrivals.append(world.us)
        world.pause(until_answer)
        if is_killed:
            window.close()
            window = RequestWindow(path, requests_max, 10.0, world.clock)
        else:
            window.ended(place)
        world.pause(idle)
    window.close()
    assert busiest(arrivals, 10 * SECOND_US) <= requests_max


def test_the_limit_is_used_up(tmp_path: Path) -> None:
    """Requests that take no time come as fast as allowed: all places at once, then again after the period."""
    world = World()
    window = RequestWindow(tmp_path / "forward.sqlite", 3, 10.0, world.clock)
    starts = []
    for _ in range(7):
        place = window.take()
        starts.append((world.us - NOW_US) // SECOND_US)
        window.ended(place)
    assert starts == [0, 0, 0, 10, 10, 10, 20]
    assert window.used() == 1
    window.close()


def test_two_processes_share_the_limit(tmp_path: Path) -> None:
    """Whoever opens the file counts the places of the others, also those that are taken just now."""
    world = World()
    first = RequestWindow(tmp_path / "forward.sqlite", 2, 10.0, world.clock)
    second = RequestWindow(tmp_path / "forward.sqlite", 2, 10.0, world.clock)
    first.ended(first.take())
    second.ended(second.take())
    first.ended(first.take())
    assert world.us - NOW_US >= 10 * SECOND_US
    first.close()
    second.close()


@settings(max_examples=60, deadline=None)
@given(
    requests_max=st.integers(1, 6),
    delays=st.lists(st.tuples(st.floats(0, 8), st.floats(0, 8), st.integers(-2_000, 2_000)), max_size=30),
)
def test_a_clock_that_is_set_lets_no_process_ask_more_often(
    tmp_path_factory: pytest.TempPathFactory, requests_max: int, delays: list[tuple[float, float, int]]
) -> None:
    """However far it is set forward or back, and whether during a request or between two, the limit holds."""
    world, arrivals = World(), [NOW_US]
    with closing(RequestWindow(tmp_path_factory.mktemp("window") / "f.sqlite", requests_max, 10.0, world.clock)) as one:
        one.ended(one.take())
        for until_arrival, until_answer, step_s in delays:
            place = one.take()
            world.pause(until_arrival)
            arrivals.append(world.us)
            world.ahead_us += step_s // 2 * SECOND_US
            world.pause(until_answer)
            one.ended(place)
            world.ahead_us += step_s * SECOND_US
    assert busiest(arrivals, 10 * SECOND_US) <= requests_max


def test_a_clock_that_was_set_back_makes_nobody_hurry(tmp_path: Path) -> None:
    """What ended in the future ended now; the wait is at most a period, not until the old time comes again."""
    world = World()
    other = RequestWindow(tmp_path / "forward.sqlite", 1, 10.0, world.clock)
    window = RequestWindow(tmp_path / "forward.sqlite", 1, 10.0, world.clock)
    other.ended(other.take())
    world.ahead_us -= 3600 * SECOND_US
    began = world.us
    window.take()
    assert 10 * SECOND_US <= world.us - began < 11 * SECOND_US
    window.close()
    other.close()


def test_a_request_of_a_process_that_is_gone_ends(tmp_path: Path) -> None:
    """Though nobody opens the file anew: who has it open waits no longer than the longest request and a period."""
    world = World()
    window = RequestWindow(tmp_path / "forward.sqlite", 1, 10.0, world.clock)
    killed = RequestWindow(tmp_path / "forward.sqlite", 1, 10.0, world.clock)
    killed.take()
    killed.close()
    assert window.wait_s() > 0
    world.us += UNDER_WAY_MAX_US
    world.pause(window.wait_s())
    assert window.wait_s() == 0
    assert window.used() == 0
    window.close()


def test_a_request_that_ends_on_a_full_disk_has_ended(tmp_path: Path) -> None:
    """Nothing is asked while it cannot be written; with room its place is free after the period, for others, too."""
    world = World()
    with closing(RequestWindow(tmp_path / "forward.sqlite", 1, 10.0, world.clock)) as window:
        place = window.take()
        with nothing_written(), pytest.raises(sqlite3.OperationalError):
            window.ended(place)
        with nothing_written(), pytest.raises(sqlite3.OperationalError):
            window.wait_s()
        assert window.wait_s() == 10
        world.pause(10)
        window.ended(window.take())
        assert (window.wait_s(), window.used()) == (10, 1)


@pytest.mark.parametrize(
    ("ended_s", "expected_us"),
    [
        ([], 0),
        ([-10, -3], 0),  # the first has left the window
        ([-5, -3, -1], 7 * SECOND_US),  # two must leave, so that there is room for one
        ([-4, None], 6 * SECOND_US),
        ([None, None], IN_FLIGHT_POLL_US),
    ],
)
def test_the_wait_is_until_a_place_is_free(ended_s: list[int | None], expected_us: int) -> None:
    """With two places in ten seconds."""
    ended_us = [at if at is None else NOW_US + at * SECOND_US for at in ended_s]
    assert free_in_us(ended_us, NOW_US, 2, 10 * SECOND_US) == expected_us


def test_the_circuit_opens_after_failures_in_a_row() -> None:
    """Then nothing is sent until the pause is over, the next request is a probe, and its success closes it."""
    circuit = Circuit()
    for _ in range(FAILURES_UNTIL_OPEN - 1):
        circuit.failed(NOW_US, None, 0.0)
    assert circuit.state(NOW_US) == "closed"
    pause_s = circuit.failed(NOW_US, 30.0, 0.0)
    assert (pause_s, circuit.state(NOW_US + 29 * SECOND_US)) == (30.0, "open")
    assert circuit.state(NOW_US + 30 * SECOND_US) == "half-open"
    circuit.succeeded()
    assert circuit.state(NOW_US) == "closed"


def test_a_clock_that_was_set_back_costs_a_period_at_most(tmp_path: Path) -> None:
    """Requests that seem to have ended in the future ended now, for who looks before it asks, too."""
    world = World()
    other = RequestWindow(tmp_path / "forward.sqlite", 2, clock=world.clock)
    window = RequestWindow(tmp_path / "forward.sqlite", 2, clock=world.clock)
    for _ in range(2):
        other.ended(other.take())
    world.ahead_us -= 3600 * SECOND_US

    assert window.wait_s() <= window.period_s
    world.pause(window.period_s)
    assert window.wait_s() == 0
    window.close()
    other.close()
