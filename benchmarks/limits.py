"""What this machine can do at most at each step of an event's way, however the program is written.

Each limit is measured for the same bodies as the step beside it, in the same run, on one core: finding where every
event of a body begins and ends; copying the body; and adding it to a file, synced once for as many bodies as clients
wait together. Over Kafka it is the broker's own producer, ``kafka-producer-perf-test``.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.support.kafka.cluster import Cluster
from tests.support.kafka.jars import CACHE, Missing, jars

SECONDS = 0.2  # of each limit; the best of some rounds is taken, since the others were disturbed
ROUNDS = 3
TOOLS = "4.3.0"  # the newest on Maven Central; it runs on the client library of the broker's own release
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy"
_JAVA = ("java", "-Xmx512m")


class _Envelope(msgspec.Struct):
    events: list[msgspec.Raw]


_decoder = msgspec.json.Decoder(_Envelope)


def lines(body: bytes) -> list[msgspec.Raw]:
    """The events of a request's body as they stand in it."""
    return _decoder.decode(body).events


def parse_us(body: bytes, events: int) -> float:
    """CPU microseconds an event to find the events of a body."""
    return _best_us(lambda: lines(body), events)


def copy_us(body: bytes, events: int) -> float:
    """CPU microseconds an event to copy a body once."""
    return _best_us(lambda: bytearray(body), events)


def append_us(body: bytes, events: int, together: int) -> float:
    """Microseconds an event, waiting included, to add so many bodies to a file and sync it."""
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        def append() -> None:
            file.write(body * together)
            file.flush()
            os.fdatasync(file.fileno())

        return _best_us(append, events * together, time.perf_counter)


def floor(body: bytes, events: int, together: int) -> dict[str, float]:
    """The limits of taking a body, by name, in microseconds an event."""
    return {
        "parse us": parse_us(body, events), "copy us": copy_us(body, events),
        "append us": append_us(body, events, together),
    }  # fmt: skip


def _best_us(work: Callable[[], object], events: int, clock: Callable[[], float] = time.process_time) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        times, began = 0, clock()
        while (spent := clock() - began) < SECONDS:
            work()
            times += 1
        best = min(best, 1e6 * spent / times / events)
    return best


def kafka_producer(cluster: Cluster, topic: str, records: int, record_bytes: int) -> float:
    """Records a second of Kafka's own performance producer, with ``acks=all``. Raises ``jars.Missing``."""
    tools = CACHE / f"tools-{TOOLS}"
    if not list(tools.glob("*.jar")):
        fetched = subprocess.run(
            ["mvn", "-B", "-q", _COPY, f"-Dartifact=org.apache.kafka:kafka-tools:{TOOLS}",  # noqa: S607
             f"-DoutputDirectory={tools}"],
            capture_output=True, text=True, check=False,
        )
        if fetched.returncode:
            raise Missing(f"Maven could not fetch Kafka's tools: {fetched.stdout.strip()[:500]}")
    done = subprocess.run(
        [*_JAVA, "-cp", f"{jars(cluster.version)}/*:{tools}/*", "org.apache.kafka.tools.ProducerPerformance",
         "--topic", topic, "--num-records", str(records), "--record-size", str(record_bytes), "--throughput", "-1",
         "--producer-props", f"bootstrap.servers={cluster.bootstrap}", "acks=all", "linger.ms=5"],
        capture_output=True, text=True, check=False,
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if " records/sec" not in last[0]:
        raise RuntimeError(f"{done.stdout[-500:]} {done.stderr[-500:]}")
    return float(last[0].split(" records/sec")[0].rsplit(" ", 1)[1])
