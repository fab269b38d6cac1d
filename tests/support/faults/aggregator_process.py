"""One life of an aggregator in a process of its own, which ends itself with SIGKILL at a point.

Started by a fork server that has loaded everything already, a life costs a few tens of milliseconds.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from aggregator.engine.supervisor import Aggregator
from ingest.log import open_log
from tests.support.faults.crash_points import Point, watch
from tests.support.faults.store_checks import caught_up, ends
from tests.support.records import SMALL
from tests.support.waiting import eventually

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


Dies = Callable[[Point], bool]
"""Whether a life ends at a point. Goes to another process, so it is made of a class that both know."""


class FirstNew(NamedTuple):
    """At the first point after a call, or around a decisive statement, whose name was not ``struck`` yet."""

    struck: frozenset[str]

    def __call__(self, point: Point) -> bool:
        """By its name alone."""
        name = point[0]
        decisive = name.startswith("after ") or name.endswith(("COMMIT", "CHECKPOINT", "close"))
        return decisive and name not in self.struck


class AfterSo:
    """At the last of so ``many`` points."""

    def __init__(self, many: int) -> None:
        self._left = many

    def __call__(self, point: Point) -> bool:
        """Whatever its name."""
        self._left -= 1
        return self._left <= 0


def start_life(log: Path, store: Path, dies: Dies, last_words: Path) -> BaseProcess:
    """Start a life that ends with SIGKILL where ``dies`` says; the name of that point are its last words.

    A life that does not die catches up with the log and ends with exit code 0.
    """
    life = _FORKS.Process(target=_live, args=(log, store, dies, last_words))
    life.start()
    return life


def _live(log_directory: Path, store: Path, dies: Dies, last_words: Path) -> None:
    def strike(point: Point) -> None:
        if dies(point):
            last_words.write_text(point[0])
            os.kill(os.getpid(), signal.SIGKILL)

    log = open_log(str(log_directory))
    expected = ends(log)
    with watch(strike) as points:
        aggregator = Aggregator(log, store, SMALL)
        aggregator.start()
        eventually(lambda: caught_up(aggregator, expected) or aggregator.ended.is_set())
        aggregator.stop()
        points.silent = True
    log.close()
    if not aggregator.ended.is_set() or aggregator.failure is not None:
        raise SystemExit(f"the aggregator ended: {aggregator.failure}")
