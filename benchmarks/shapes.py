"""What the shape of the load costs the aggregator: many meters, repetitions, a few hot customers.

Every row drains a backlog from the log on disk, as ``benchmarks.drain`` does, and compares the totals with what was
written. Rows of one run are comparable with each other; ``times ordinary`` is their CPU time in that of the row before
all others: ten meters, 100,000 customers alike, every event new.

    python -m benchmarks.shapes [--events 400000]
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.process import SWITCH_INTERVAL_S
from benchmarks.drain import work_off
from benchmarks.end_to_end import EVERYTHING, only
from benchmarks.load import MODELS, Bodies
from benchmarks.report import Report
from ingest.log import open_log

HOT_SHARES = (0.35, 0.43, 0.12, 0.06, 0.04)  # of all events, for 1, 9, 90, 900 and 99,000 of the customers
HOT_SIZES = (1, 9, 90, 900, 99_000)
WARM_UP_EVENTS = 20_000  # so that the first row does not pay for what every process does once


class HotRandom:
    """Draws customers so that a few have nearly all the events; everything else as it was."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(11)
        weights = np.repeat(np.array(HOT_SHARES) / HOT_SIZES, HOT_SIZES)
        self._edges = np.cumsum(weights / weights.sum())

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """Like numpy's, except among all customers."""
        if high != sum(HOT_SIZES):
            return self._random.integers(low, high, size)
        return np.searchsorted(self._edges, self._random.random(size))


def hot() -> Bodies:
    """Bodies whose customers follow a power law."""
    bodies = Bodies(1, customers=sum(HOT_SIZES))
    bodies._random = HotRandom()  # type: ignore[assignment]  # the one thing that differs
    return bodies


def definitions(count: int, property: str = "model") -> list[dict[str, Any]]:
    """A total of everything, and meters that each look for one value of a property; four of them find theirs."""
    present = [model.decode() for model in MODELS] if property == "model" else ["chat.completion"]
    values = [present[number] if number < len(present) else f"other-{number}" for number in range(count - 1)]
    filters = [("all tokens", EVERYTHING), *((f"{property} {value}", only(property, value)) for value in values)]
    tokens = {"func": "sum", "property": "tokens"}
    return [{"name": name, "filter": found, "aggregation": tokens} for name, found in filters]


ORDINARY = "ten meters, every event new"
SHAPES: dict[str, dict[str, Any]] = {
    ORDINARY: {"definitions": definitions(10)},
    "1 meter": {"definitions": definitions(1)},
    "100 meters": {"definitions": definitions(100)},
    "1,000 meters, each of one model": {"definitions": definitions(1000)},
    "1,000 meters, each of one event name": {"definitions": definitions(1000, "name")},
    "half sent again": {"definitions": definitions(10), "repeated": 0.5},
    "nine of ten sent again": {"definitions": definitions(10), "repeated": 0.9},
    "35/43/12/6/4 % of the events for 1/9/90/900/99,000 customers": {"definitions": definitions(10), "bodies": hot},
}


def drained(shape: dict[str, Any], events: int) -> tuple[dict[str, Any], list[str]]:
    """One backlog of a shape, worked off into a store of its own."""
    bodies = shape.get("bodies", lambda: Bodies(1))()
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as scratch:
        log = open_log(scratch)
        try:
            return work_off(log, Path(scratch), events, **{**shape, "bodies": bodies})
        finally:
            log.close()


def main() -> None:
    """Run and report; exit 3 when a total is not what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=400_000)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    report = Report("shapes", "what the shape of the load costs; a backlog of 100-event records, 100,000 customers")
    drained(SHAPES[ORDINARY], WARM_UP_EVENTS)
    ordinary = 0.0
    for name, shape in SHAPES.items():
        row, differences = drained(shape, arguments.events)
        ordinary = ordinary or row["CPU us/event"]
        report.add(shape=name, **row, **{"times ordinary": row["CPU us/event"] / ordinary})
        report.check(f"{name}: {'; '.join(differences) or 'sums exact'}", not differences)
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
