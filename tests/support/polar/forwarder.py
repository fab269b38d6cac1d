"""A forwarder in the test's own thread, on a clock that may run faster than the world's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aggregator.forward.feed_client import Selection, Source
from aggregator.forward.forwarder import Forwarder, Wishes
from aggregator.forward.polar_client import Clock, RequestWindow, Upstream
from aggregator.forward.state import State

PATIENCE_S = 60.0


class Clocks:
    """Time that runs ``speed`` times as fast from now on, on a clock that a test may set ``behind_s`` behind."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed, self.behind_s = speed, 0.0
        self._began_us, self._began = time.time_ns() // 1000, time.monotonic()

    def now_us(self) -> int:
        """UTC, microseconds."""
        return self._began_us + int(((time.monotonic() - self._began) * self.speed - self.behind_s) * 1e6)

    def leap(self, seconds: float) -> None:
        """So much time is gone."""
        self._began_us += int(seconds * 1e6)

    def pause(self, seconds: float) -> None:
        """Wait, shorter by the same factor."""
        time.sleep(seconds / self.speed)


class Running:
    """A forwarder with its parts, over the feed of a server (its address and token)."""

    def __init__(
        self, feed: tuple[str, str], server: str, state: Path, *, clocks: Clocks | None = None,
        requests_max: int = 300, timeout_s: float = 30.0, **wishes: Any,
    ) -> None:
        self.clocks = clocks or Clocks()
        clock = Clock(self.clocks.now_us, self.clocks.pause, self.clocks.now_us)
        self.state = State(state)
        self.window = RequestWindow(state, requests_max, clock=clock)
        self.upstream = Upstream(server, "polar_oat_upstream", self.window, timeout_s=timeout_s)
        self.source = Source(*feed)
        self.forwarder = Forwarder(self.source, self.upstream, self.state, Wishes(**wishes), lambda: 0.5)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()
        self.upstream.close()
        self.window.close()
        self.state.close()

    def until(self, condition: Callable[[], object]) -> None:
        """Forward until the condition holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.state.flags()
            self.clocks.pause(self.forwarder.turn())

    def taken(self, lane: str = "raw") -> int:
        """How many events of the lane were taken from the feed."""
        return self.state.tallies().get(lane, {}).get("taken", 0)

    def done(self, events: int, lane: str = "raw") -> bool:
        """Whether so many events of the lane were taken, and none waits."""
        return self.taken(lane) >= events and self.state.waiting()[0] == 0

    def books(self, lane: str = "raw") -> dict[str, int]:
        """The lane's tallies; they always add up."""
        tallies = {"taken": 0, "accepted": 0, "dead": 0} | self.state.tallies().get(lane, {})
        waiting = self.state.waiting()[0] if lane != "waiting" else 0
        assert tallies["taken"] == tallies["accepted"] + tallies["dead"] + waiting, (tallies, waiting)
        return tallies


def forward_for_ever(url: str, token: str, server: str, state: str, name: str) -> None:
    """Forward the events of a name, in a process of its own, until it is killed."""
    with Running((url, token), server, Path(state), selection=Selection(names=(name,))) as running:
        running.forwarder.run()
