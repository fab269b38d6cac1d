"""Forwarding in Prometheus' terms, read from the forwarder's file by whoever serves ``/metrics``.

The forwarder itself listens nowhere: what it wants known stands in its file, so the numbers are there while it is down.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aggregator.forward.opening import Unusable, explaining
from aggregator.forward.state import State

SILENT_US = 30_000_000  # a forwarder at work writes something every few seconds
COUNTERS = {
    "requests": "Requests to Polar",
    "inserted": "Events that Polar counted",
    "duplicates": "Events that Polar had already",
    "postponed": "Requests that have to be made again",
    "refused": "Requests whose content was refused",
}
STOPPED = "Whether somebody has to do something"

logger = structlog.get_logger("aggregator.forward")


class ForwardingMetrics:
    """A collector. It says nothing while nothing was ever forwarded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        if self._path.exists():
            yield from self._found()

    def _found(self) -> list[Metric]:
        try:
            with explaining(self._path), closing(State(self._path)) as state:
                return list(_metrics(state))
        except Unusable as reason:
            return [_gauge("stopped", STOPPED, 1)] if reason.is_damaged else []  # a locked file: another time
        except Exception:  # whatever lies in the file, it must not cost the metrics of counting
            logger.exception("forwarding_unreadable")
            return [_gauge("stopped", STOPPED, 1)]


def _oldest_unsent_s(flags: dict[str, Any], oldest_waiting_us: int | None, now_s: float) -> float:
    """The age of the oldest unsent event. While no forwarder is at work, all since its last sign of life is unsent."""
    seen_us = flags.get("seen_us", 0)
    silent_us = seen_us if now_s * 1e6 - seen_us > SILENT_US else None
    known = [us for us in (flags.get("oldest_us"), oldest_waiting_us, silent_us) if us is not None]
    return max(0.0, now_s - min(known) / 1e6) if known else 0.0


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
    age_s = _oldest_unsent_s(flags, oldest_waiting_us, time.time())
    gauges = {
        "pending_events": ("Events that are counted and not yet taken", flags.get("pending") or 0),
        "waiting_events": ("Events that are taken and wait: of the future, or rollups", waiting),
        "oldest_unsent_seconds": ("Age of the oldest event that Polar does not have", age_s),
        "window_seconds": ("Window of rollups, which are sent once it has ended", flags.get("window_s") or 0),
        "events_per_second": ("Events that Polar took during the last minute, per second", flags.get("rate") or 0),
        "circuit_open": ("Whether Polar failed so often that it is only probed", flags.get("circuit") != "closed"),
        "stopped": (STOPPED, bool(flags.get("stopped"))),
        "paused": ("Whether an operator paused it", bool(flags.get("paused"))),
        "seen_timestamp_seconds": ("When the forwarder was last at work", (flags.get("seen_us") or 0) / 1e6),
    }
    for name, (about, value) in gauges.items():
        yield _gauge(name, about, value)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"meterstream_forward_{name}", about, value=float(value))
