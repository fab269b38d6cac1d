"""The metrics of the gateway, declared in one place.

The ``count_*`` functions and ``observe`` update them, and ``exposition`` writes them for ``/metrics``. No label has a
value from a request, so clients cannot make the number of series grow.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()
ProcessCollector(namespace="meterstream_gateway", registry=REGISTRY)

PASSED_ON = Counter(
    "meterstream_gateway_passed_on", "Requests passed on to the query API, by status of the answer", ["status"],
    registry=REGISTRY,
)
EVENTS = Counter(
    "meterstream_gateway_events",
    "Events by verdict: accepted, duplicate and known are in the log; rejected are not", ["verdict"],
    registry=REGISTRY,
)
APPEND_SECONDS = Histogram(
    "meterstream_gateway_append_seconds", "Time until an append to the log was durable",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), registry=REGISTRY,
)
IN_FLIGHT_BYTES = Gauge("meterstream_gateway_in_flight_bytes", "Bytes of bodies held now", registry=REGISTRY)
CONNECTIONS = Gauge("meterstream_gateway_connections", "Open client connections", registry=REGISTRY)
CONNECTIONS_CUT = Counter(
    "meterstream_gateway_connections_cut",
    "Connections closed for their head, a slow body, an unread answer, too long a pipeline, or too many connections",
    ["reason"], registry=REGISTRY,
)
CATALOGUE_POSITION = Gauge(
    "meterstream_gateway_catalogue_position", "Next offset of the control stream, by partition", ["partition"],
    registry=REGISTRY,
)
CATALOGUE_CURRENT = Gauge(
    "meterstream_gateway_catalogue_current", "1 while tokens and customers are known and fresh", registry=REGISTRY
)

EVENTS_ACCEPTED = EVENTS.labels("accepted")
EVENTS_DUPLICATE = EVENTS.labels("duplicate")
EVENTS_KNOWN = EVENTS.labels("known")
EVENTS_REJECTED = EVENTS.labels("rejected")

STATUSES = frozenset({200, 400, 401, 403, 404, 405, 408, 411, 413, 415, 422, 429, 500, 503})
"""Statuses of the ingest endpoint, each a label of its own from the start, so that a rate is 0 and not absent."""


class Tally(Collector):
    """Counters for what is counted with every request: an addition, without a lock. For the event loop alone."""

    def __init__(self) -> None:
        self.requests = dict.fromkeys(STATUSES, 0)
        self.body_bytes = 0
        self._created_s = time.time()

    def collect(self) -> Iterator[Metric]:
        """See the library."""
        about = "Requests to the ingest endpoint, by status of the answer"
        requests = CounterMetricFamily("meterstream_gateway_requests", about, labels=["status"])
        for status, count in self.requests.items():
            requests.add_metric([str(status)], count, created=self._created_s)
        yield requests
        about, created_s = "Bytes of ingest bodies, unpacked", self._created_s
        yield CounterMetricFamily("meterstream_gateway_body_bytes", about, value=self.body_bytes, created=created_s)


TALLY = Tally()
REGISTRY.register(TALLY)


class Held(Protocol):
    """Something that knows how many bytes are held."""

    bytes: int


class Following(Protocol):
    """Something that follows the control stream."""

    position: Mapping[int, int]

    @property
    def current(self) -> bool:
        """Whether it is up to date."""
        ...


def count_request(status: int) -> None:
    """One request to the ingest endpoint was answered."""
    TALLY.requests[status] += 1


def count_passed_on(status: int) -> None:
    """One request was passed on, and answered."""
    PASSED_ON.labels(str(status)).inc()


def count_events(accepted: int, known: int, logged: int, rejected: int) -> None:
    """The events of one request; those logged are accepted, known with other bytes, or duplicates."""
    EVENTS_ACCEPTED.inc(accepted)
    duplicates = logged - accepted - known
    for counter, count in ((EVENTS_KNOWN, known), (EVENTS_DUPLICATE, duplicates), (EVENTS_REJECTED, rejected)):
        if count:
            counter.inc(count)


def observe(held: Held, following: Following) -> None:
    """Read these gauges from the process's own state whenever they are asked for."""
    IN_FLIGHT_BYTES.set_function(lambda: held.bytes)
    CATALOGUE_CURRENT.set_function(lambda: following.current)
    CATALOGUE_POSITION.labels("0").set_function(lambda: following.position.get(0, 0))


def exposition() -> bytes:
    """The metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
