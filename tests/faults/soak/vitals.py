"""Memory and rate, looked at once a second, as lines of a chart and as a slope.

Memory is judged in the last life of each process, which the schedule makes a long one, and only behind its first
stretch, in which caches and the allocator find their size. What a process holds for a while goes up and down by far
more than a leak; so the slope is that of the least it held in each of a few stretches.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PERIOD_S = 1.0
WARM_SHARE = 0.2  # of a life: DuckDB caches what it reads, up to its limit
STRETCHES = 6
SAMPLES_MIN = 10  # of a life that has a slope
BARS = " ▁▂▃▄▅▆▇█"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Sample(NamedTuple):
    """One look. ``stored`` are the numbers that were sent so far, which the aggregator has to remember."""

    at_s: float
    pid: int
    resident_bytes: int
    stored: int


class Slope(NamedTuple):
    """How a process's memory moved in its last life. ``per_event_bytes`` is 0 where hardly any event was new."""

    seconds: float
    resident_bytes: int
    bytes_per_hour: float
    events_per_hour: float


class Vitals:
    """Samples in a thread of its own, between ``start`` and ``stop``."""

    def __init__(self, processes: Callable[[], dict[str, int]], lines: Callable[[], int], stored: Callable[[], int]):
        """``processes`` gives process ids by name, ``lines`` how many were acknowledged so far."""
        self._processes, self._lines, self._stored = processes, lines, stored
        self.memory: dict[str, list[Sample]] = {}
        self.rates: list[float] = []  # acknowledged lines a second, one a period
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vitals", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._began_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        before, before_s = self._lines(), time.monotonic()
        while not self._over.wait(PERIOD_S):
            now, now_s = self._lines(), time.monotonic()
            self.rates.append((now - before) / (now_s - before_s))
            before, before_s = now, now_s
            with contextlib.suppress(OSError, AssertionError):  # between two lives there is nothing to see
                for name, pid in self._processes().items():
                    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
                    sample = Sample(now_s - self._began_s, pid, resident, self._stored())
                    self.memory.setdefault(name, []).append(sample)

    def slopes(self) -> dict[str, Slope]:
        """By process; those whose last life was too short are left out."""
        found = {name: _slope(samples) for name, samples in self.memory.items()}
        return {name: slope for name, slope in found.items() if slope is not None}


def _slope(samples: Sequence[Sample]) -> Slope | None:
    life = [sample for sample in samples if sample.pid == samples[-1].pid]
    settled = life[int(len(life) * WARM_SHARE) :]
    if len(settled) < SAMPLES_MIN:
        return None
    parts = np.array_split(np.arange(len(settled)), STRETCHES)
    least = [min((settled[place] for place in part), key=lambda sample: sample.resident_bytes) for part in parts]
    at_s, _, resident, stored = (np.array(column, float) for column in zip(*least, strict=True))
    hourly = [3600 * float(np.polyfit(at_s, values, 1)[0]) for values in (resident, stored)]
    return Slope(settled[-1].at_s - settled[0].at_s, settled[-1].resident_bytes, *hourly)


def sparkline(values: Sequence[float], width: int = 72) -> str:
    """A line of bars from zero to the largest; each is the largest of its stretch."""
    if not values:
        return ""
    stretches = np.array_split(np.array(values, float), min(width, len(values)))
    heights = np.array([stretch.max() for stretch in stretches]) / (max(values) or 1)
    return "".join(BARS[int(np.ceil(height * (len(BARS) - 1)))] for height in heights)
