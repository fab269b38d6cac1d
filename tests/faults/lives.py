"""One life of an aggregator in a process of its own, which ends itself with SIGKILL at a point.

Started by a fork server that has loaded everything already, a life costs a few tens of milliseconds.
"""

import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

from aggregator.consumer import Aggregator
from ingest.log import open_log
from tests.aggregator.records import SMALL
from tests.faults.evidence import caught_up, ends
from tests.faults.points import Point, watch
from tests.waiting import eventually

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


def start_life(log: Path, store: Path, struck: frozenset[str], last_words: Path) -> BaseProcess:
    """Start a life that ends at the first point after a call that was not ``struck`` yet; its name are its last words.

    A life that finds none catches up with the log and ends with exit code 0.
    """
    life = _FORKS.Process(target=_live, args=(log, store, struck, last_words))
    life.start()
    return life


def _live(log_directory: Path, store: Path, struck: frozenset[str], last_words: Path) -> None:
    def strike(point: Point) -> None:
        name = point[0]
        if name not in struck and (name.startswith("after ") or name.endswith(("COMMIT", "CHECKPOINT", "close"))):
            last_words.write_text(name)
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
