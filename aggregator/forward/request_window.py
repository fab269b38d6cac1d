"""The request limit of one upstream, kept in a file, so that a restart and a second process share it.

Whoever is about to ask takes a place and gives back the time when the answer was there. A place that a killed process
left taken is treated as having ended when the file is opened again: its request cannot arrive later than that.

    requests(number, ended_us)    the places of the last period; ended_us is NULL while a request is under way
"""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from aggregator.forward.pace import PERIOD_S, REQUESTS_MAX, free_in_us

BUSY_WAIT_S = 30.0  # another process holds the file for milliseconds
UNDER_WAY_MAX_US = 600_000_000  # no request lasts this long: its process is gone


class Clock(NamedTuple):
    """The world's time. ``now_us``: UTC, microseconds since 1970. ``pause`` waits; it may raise to end its caller."""

    now_us: Callable[[], int]
    pause: Callable[[float], None]


SYSTEM_CLOCK = Clock(lambda: time.time_ns() // 1000, time.sleep)


class RequestWindow:
    """At most ``requests_max`` requests in any ``period_s``, whoever shares the file. One thread at a time."""

    def __init__(
        self, path: Path, requests_max: int = REQUESTS_MAX, period_s: float = PERIOD_S, clock: Clock = SYSTEM_CLOCK,
        *, is_reader: bool = False,
    ) -> None:
        self.requests_max, self.period_s, self.clock = requests_max, period_s, clock
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
        self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [self.clock.now_us(), place])

    def wait_s(self) -> float:
        """How long until a request may begin, for who would rather do something else meanwhile; 0 for now."""
        now_us = self.clock.now_us()
        found = [row[0] for row in self._file.execute("SELECT ended_us FROM requests").fetchall()]
        ended = [end_us and min(end_us, now_us) for end_us in found]  # the clock was set back, as in ``_forget``
        return free_in_us(ended, now_us, self.requests_max, int(self.period_s * 1e6)) / 1e6

    def used(self) -> int:
        """How many places are taken now."""
        since_us = self.clock.now_us() - int(self.period_s * 1e6)
        sql = "SELECT COUNT(*) FROM requests WHERE ended_us IS NULL OR ended_us > ?"
        with closing(self._file.execute(sql, [since_us])) as found:
            return int(found.fetchone()[0])

    def _try(self) -> tuple[int | None, int]:
        now_us, period_us = self.clock.now_us(), int(self.period_s * 1e6)
        self._file.execute("BEGIN IMMEDIATE")
        try:
            self._forget(now_us, period_us)
            ended = [row[0] for row in self._file.execute("SELECT ended_us FROM requests").fetchall()]
            wait_us = free_in_us(ended, now_us, self.requests_max, period_us)
            place = None if wait_us else self._file.execute("INSERT INTO requests VALUES (NULL, NULL)").lastrowid
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")
        return place, wait_us

    def _forget(self, now_us: int, period_us: int) -> None:
        """Drop what left the window. A clock that was set back makes old ends new ones: waiting longer is harmless."""
        self._file.execute("UPDATE requests SET ended_us = ? WHERE ended_us > ?", [now_us, now_us])
        self._file.execute("DELETE FROM requests WHERE ended_us <= ?", [now_us - max(period_us, UNDER_WAY_MAX_US)])
