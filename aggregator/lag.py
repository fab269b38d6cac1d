"""How far behind the log the store is, looked at now and then for the metrics.

The ends are the log's and the positions the view's, so a lag is true for a moment that has just passed. While either
cannot be had the last look stays, and says by its age that it is old.
"""

import contextlib
import threading
import time

from prometheus_client import Gauge

from aggregator.owner import Aggregator
from aggregator.readable import Readable
from aggregator.view import Unavailable
from meters.log import USAGE_EVENTS, Log, PositionLost, TryAgain

FIRST_LOOK_S = 0.2  # until the view is there
LOOK_S = 2.0  # well below what a scrape waits, and nothing to a broker


class LagWatch:
    """Gauges of ``usage.events`` by partition, kept by a thread until ``stop``."""

    def __init__(self, log: Log, aggregator: Aggregator) -> None:
        self._log, self._aggregator = log, aggregator
        self._readable = Readable()
        registry = aggregator.telemetry.registry
        self._end = Gauge("meterstream_log_end", "Next offset that the log will give", ["partition"], registry=registry)
        self._lag = Gauge(
            "meterstream_lag_records", "Records of the log that are not in the store", ["partition"], registry=registry
        )
        self._looked = Gauge("meterstream_lag_looked_seconds", "When the lag was known, since 1970", registry=registry)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lag", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        pause_s = FIRST_LOOK_S
        while not self._stopping.wait(pause_s):
            with contextlib.suppress(TryAgain, Unavailable, PositionLost):  # said by whoever stops, or waits, for it
                self._look()
                pause_s = LOOK_S

    def _look(self) -> None:
        as_of = self._aggregator.as_of
        with self._readable.asking(f"the end of {USAGE_EVENTS}"):
            ends = self._log.ends(USAGE_EVENTS)
        for partition, end in ends.items():
            position = as_of.get(partition, 0)
            self._aggregator.telemetry.position.labels(str(partition)).set(position)
            self._end.labels(str(partition)).set(end)
            self._lag.labels(str(partition)).set(max(0, end - position))
        self._looked.set(time.time())
