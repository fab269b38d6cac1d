"""Every Prometheus metric of the aggregator, declared in one place.

``Telemetry`` owns the registry and counts committed batches. ``Freshness`` is a histogram, over all stored events, of
the time from ingestion to commit. One batch holds thousands of events, so they are sorted into buckets as an array
and not one by one.
"""

import time
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily

from aggregator.engine.pipeline import Committed

FRESHNESS_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0,
    8.0, 10.0, 60.0, 600.0,
)  # fmt: skip


class Freshness:
    """A histogram over events: seconds from ingestion until the event was queryable."""

    def __init__(self) -> None:
        self._edges = np.array(FRESHNESS_BUCKETS_S)
        self._counts = np.zeros(len(self._edges) + 1, np.int64)
        self._sum = 0.0

    def observe(self, ages_s: np.ndarray) -> None:
        """Count one round's events. What a gateway's clock puts into the future is as fresh as can be."""
        ages_s = np.maximum(ages_s, 0.0)
        self._counts += np.bincount(np.searchsorted(self._edges, ages_s), minlength=len(self._counts))
        self._sum += float(ages_s.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        totals = np.cumsum(self._counts)
        names = [*(str(edge) for edge in FRESHNESS_BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "meterstream_freshness_seconds",
            "From an event's ingestion to its commit in the store",
            buckets=[(name, float(count)) for name, count in zip(names, totals, strict=True)],
            sum_value=self._sum,
        )


class Telemetry:
    """The aggregator's registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lines = Counter("meterstream_lines", "Lines read from the log", registry=self.registry)
        self.stored = Counter("meterstream_events_stored", "Events stored", registry=self.registry)
        self.dead = Counter(
            "meterstream_dead_letters", "Lines that became dead letters, conflicts included", registry=self.registry
        )
        self.strangers = Gauge(
            "meterstream_unknown_organization_events",
            "Events stored under organizations that no decision made, which nobody can see",
            registry=self.registry,
        )
        self.commit_s = Histogram("meterstream_commit_seconds", "Time of a round's transaction", registry=self.registry)
        self.rounds = Counter("meterstream_rounds", "Rounds committed", registry=self.registry)
        self.restarts = Counter("meterstream_engine_failures", "Engines ended by a failure", registry=self.registry)
        self.position = Gauge(
            "meterstream_position", "Next offset of usage.events, by partition", ["partition"], registry=self.registry
        )
        self.clock_ahead_s = Gauge(
            "meterstream_log_clock_ahead_seconds",
            "Seconds by which the newest time in the log is ahead of this machine's clock",
            registry=self.registry,
        )
        self._freshness = Freshness()
        self.registry.register(self._freshness)

    def observe(self, committed: Committed) -> None:
        """Count one committed round."""
        self.rounds.inc()
        self.lines.inc(committed.lines)
        self.stored.inc(committed.stored)
        self.dead.inc(committed.dead)
        self.strangers.set(committed.strangers)
        self.commit_s.observe(committed.commit_s)
        for partition, offset in committed.as_of.items():
            self.position.labels(str(partition)).set(offset)
        if committed.ingested is not None:
            ages_us = np.int64(time.time_ns() // 1000) - committed.ingested.astype("datetime64[us]").astype(np.int64)
            self._freshness.observe(ages_us / 1e6)

    def text(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)
