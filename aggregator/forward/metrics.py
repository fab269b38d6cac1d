"""Forwarding in Prometheus' terms, read from the forwarder's file by whoever serves ``/metrics``.

The forwarder itself listens nowhere: what it wants known stands in its file, so the numbers are there while it is down.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aggregator.forward.state import State

COUNTERS = {
    "requests": "Requests to Polar",
    "inserted": "Events that Polar counted",
    "duplicates": "Events that Polar had already",
    "postponed": "Requests that have to be made again",
    "refused": "Requests whose content was refused",
}


class ForwardingMetrics:
    """A collector. It says nothing while nothing was ever forwarded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        if not self._path.exists():
            return
        with contextlib.suppress(sqlite3.Error), closing(State(self._path)) as state:  # a locked file: another time
            yield from _metrics(state)


def _metrics(state: State) -> Iterator[Metric]:
    flags, tallies = state.flags(), state.tallies()
    waiting, oldest_waiting_us = state.waiting()
    for name, about in COUNTERS.items():
        yield CounterMetricFamily(f"meterstream_forward_{name}", about, value=tallies.get("", {}).get(name, 0))
    for name, about in (("accepted", "Events that Polar has"), ("dead", "Events that Polar refuses for good")):
        family = GaugeMetricFamily(f"meterstream_forward_{name}", about, labels=["lane"])
        for lane, counts in tallies.items():
            if lane and not lane.startswith("replay"):
                family.add_metric([lane], counts.get(name, 0))
        yield family
    oldest = [us for us in (flags.get("oldest_us"), oldest_waiting_us) if us is not None]
    age_s = max(0.0, time.time() - min(oldest) / 1e6) if oldest else 0.0
    gauges = {
        "pending_events": ("Events that are counted and not yet taken", flags.get("pending") or 0),
        "waiting_events": ("Events that are taken and wait: of the future, or rollups", waiting),
        "oldest_unsent_seconds": ("Age of the oldest event that Polar does not have", age_s),
        "events_per_second": ("Events that Polar took during the last minute, per second", flags.get("rate") or 0),
        "circuit_open": ("Whether Polar failed so often that it is only probed", flags.get("circuit") != "closed"),
        "stopped": ("Whether somebody has to do something", bool(flags.get("stopped"))),
        "paused": ("Whether an operator paused it", bool(flags.get("paused"))),
        "seen_timestamp_seconds": ("When the forwarder was last at work", (flags.get("seen_us") or 0) / 1e6),
    }
    for name, (about, value) in gauges.items():
        yield GaugeMetricFamily(f"meterstream_forward_{name}", about, value=float(value))
