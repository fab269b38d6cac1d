"""The request limit of one upstream, kept in a file, so that a restart and a second process share it.

Whoever is about to ask takes a place and gives back the time when the answer was there. A place that a killed process
left taken is treated as having ended when the file is opened again: its request cannot arrive later than that. Where
nobody opens it again, it ends when somebody has seen it taken for longer than any request lasts.

Times in the file are the world's: processes have no other in common. What a process asked itself it also knows by a
clock that nobody sets, so that a step of the world's clock does not let it ask more often.

    requests(number, ended_us)    the places of the last period; ended_us is NULL while a request is under way
"""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from aggregator.forward.opening import transaction
from aggregator.forward.pace import PERIOD_S, REQUESTS_MAX, free_in_us

BUSY_WAIT_S = 30.0  # another process holds the file for milliseconds
UNDER_WAY_MAX_US = 600_000_000  # no request lasts this long: its process is gone


class Clock(NamedTuple):
    """The world's time. ``now_us``: UTC, microseconds since 1970. ``pause`` waits; it may raise to end its caller.

    ``steady_us``: microseconds since whenever, by a clock that nobody sets.
    """

    now_us: Callable[[], int]
    pause: Callable[[float], None]
    steady_us: Callable[[], int]


SYSTEM_CLOCK = Clock(lambda: time.time_ns() // 1000, time.sleep, lambda: time.monotonic_ns() // 1000)


class RequestWindow:
    """At most ``requests_max`` requests in any ``period_s``, whoever shares the file. One thread at a time."""

    def __init__(
        self, path: Path, requests_max: int = REQUESTS_MAX, period_s: float = PERIOD_S, clock: Clock = SYSTEM_CLOCK,
        *, is_reader: bool = False,
    ) -> None:
        self.requests_max, self.period_s, self.clock = requests_max, period_s, clock
        self._period_us = int(period_s * 1e6)
        self._own: dict[int, int | None] = {}  # places of this process: when they ended, by the steady clock
        self._seen: dict[int, int] = {}  # places of others under way: when that was seen first, by the same
        self._file = sqlite3.connect(path, timeout=BUSY_WAIT_S, isolation_level=None, check_same_thread=False)
        self._file.execute("PRAGMA journal_mode = WAL").fetchone()
        self._file.execute("CREATE TABLE IF NOT EXISTS requests (number INTEGER PRIMARY KEY AUTOINCREMENT, ended_us)")
        if not is_reader:  # whoever only looks says nothing about the requests of others
            self._file.execute("UPDATE requests SET ended_us = ? WHERE ended_us IS NULL", [clock.now_us()])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def take(self) -> int:
        """Wait until a request may begin; the number of its place."""
        while True:
            place, wait_us = self._try()
            if place is not None:
                return place
            self.clock.pause(wait_us / 1e6)

    def ended(self, place: int) -> None:
        """The request of this place is over, whatever became of it."""
        steady_us = self.clock.steady_us()
        self._own[place] = steady_us  # before it is written: on a full disk it would be under way for ever
        since_us = steady_us - self._period_us
        self._own = {number: at_us for number, at_us in self._own.items() if at_us is None or at_us > since_us}
        self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [self.clock.now_us(), place])

    def wait_s(self) -> float:
        """How long until a request may begin, for who would rather do something else meanwhile; 0 for now."""
        with transaction(self._file):
            return self._wait_us(self.clock.now_us()) / 1e6

    def used(self) -> int:
        """How many places are taken now."""
        since_us = self.clock.now_us() - self._period_us
        sql = "SELECT COUNT(*) FROM requests WHERE ended_us IS NULL OR ended_us > ?"
        with closing(self._file.execute(sql, [since_us])) as found:
            return int(found.fetchone()[0])

    def _try(self) -> tuple[int | None, int]:
        now_us = self.clock.now_us()
        place: int | None = None
        with transaction(self._file):
            wait_us = self._wait_us(now_us)
            if not wait_us:
                place = self._file.execute("INSERT INTO requests VALUES (NULL, NULL)").lastrowid
        if place is not None:
            self._own[place] = None
        return place, wait_us

    def _wait_us(self, now_us: int) -> int:
        self._forget(now_us)
        ends_us: dict[int, int | None] = dict(self._file.execute("SELECT number, ended_us FROM requests").fetchall())
        steady_us = self.clock.steady_us()
        for place, at_us in self._own.items():
            ended_us = at_us if at_us is None else now_us - (steady_us - at_us)
            if ended_us is not None and ends_us.get(place, 0) is None:  # there was no room to write it
                self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [ended_us, place])
            ends_us[place] = ended_us
        others = {place for place, at_us in ends_us.items() if at_us is None} - self._own.keys()
        for place in self._gone(others, steady_us):
            self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [now_us, place])
            ends_us[place] = now_us
        return free_in_us(list(ends_us.values()), now_us, self.requests_max, self._period_us)

    def _gone(self, under_way: set[int], steady_us: int) -> list[int]:
        """Of the places that others hold, those that have been seen under way for longer than a request lasts."""
        self._seen = {place: self._seen.get(place, steady_us) for place in under_way}
        return [place for place, since_us in self._seen.items() if steady_us - since_us >= UNDER_WAY_MAX_US]

    def _forget(self, now_us: int) -> None:
        """Drop what left the window. A clock that was set back makes old ends new ones: waiting longer is harmless."""
        self._file.execute("UPDATE requests SET ended_us = ? WHERE ended_us > ?", [now_us, now_us])
        since_us = now_us - max(self._period_us, UNDER_WAY_MAX_US)
        self._file.execute("DELETE FROM requests WHERE ended_us <= ?", [since_us])
