"""Kafka underneath: what a gateway takes durably beside the usual stack, and how fast a backlog is worked off.

A real broker of one node runs beside it (Java 17 and Maven are needed), with 12 partitions, and every answer waits for
``acks=all``. The usual stack is FastAPI, a pydantic model per event and ``aiokafka.send`` per event, with the same
care. Then the same backlog is worked off from Kafka and from the embedded log, by the same engine. At the end the
topics are read back: they hold what was acknowledged, and the totals are what was written.

    python -m benchmarks.kafka [--seconds 5] [--events 600000]
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aggregator.process import SWITCH_INTERVAL_S
from benchmarks.accept import logged, measure, prepare
from benchmarks.drain import work_off
from benchmarks.report import Report
from benchmarks.server import usage
from benchmarks.usual_stack_kafka import LINGER_MS
from ingest.log import open_log
from ingest.log.kafka_address import parse_address
from ingest.log.kafka_init import EVENTS_PARTITIONS, Wanted, make_topics
from meters.log import USAGE_EVENTS, Log
from tests.kafka.cluster import Cluster, running

SHAPES = ((100, 32), (100, 32))  # events a body, connections; the first round only warms both up
USUAL_TOPIC = "usual"
BROKER = {"num.network.threads": "2", "num.io.threads": "4"}  # more than the tests give it, the same for both


def topics(cluster: Cluster, prefix: str) -> str:
    """Our two topics; the log's URL."""
    url = f"kafka://{cluster.bootstrap}/{prefix}"
    make_topics(parse_address(url, {}), Wanted())
    return url


def records(cluster: Cluster) -> int:
    """How many records the usual stack's topic holds, one an event."""
    with contextlib.closing(open_log(f"kafka://{cluster.bootstrap}/{USUAL_TOPIC}")) as log:
        return sum(log.ends(USAGE_EVENTS).values())


def accept(cluster: Cluster, folder: Path, seconds: float) -> tuple[list[dict[str, Any]], bool]:
    """Rows of our gateway and of the usual stack; whether the topics hold what they acknowledged."""
    url = topics(cluster, "ours")
    prepare(url)
    topics(cluster, USUAL_TOPIC)
    ours_url = f"{url}?linger_ms={LINGER_MS}"  # batches fill as long as in the usual stack
    ours = ["-m", "deploy.cli", "gateway", "--log", ours_url, "--data", str(folder / "gateway"), "--port", "PORT"]
    usual = ["-m", "benchmarks.usual_stack_kafka", cluster.bootstrap, f"{USUAL_TOPIC}.{USAGE_EVENTS}", "PORT"]
    rows, complete = [], True
    for server, command in (("meterstream", ours), ("usual stack", usual)):
        before_s = usage(cluster.nodes[0].pid)["cpu_s"]
        (*_, row), acknowledged = measure([sys.executable, *command], seconds, SHAPES)
        broker_s = usage(cluster.nodes[0].pid)["cpu_s"] - before_s
        found = logged(url) if server == "meterstream" else records(cluster)
        complete &= found >= acknowledged
        print(f"{server}: acknowledged {acknowledged:,}, in its topic {found:,}")
        rows.append({"server": server, **row, "broker us/event": 1e6 * broker_s / acknowledged})
    rows[0]["times usual per CPU"] = rows[0]["events/CPU s"] / rows[1]["events/CPU s"]
    return rows, complete


@contextlib.contextmanager
def logs(cluster: Cluster, folder: Path) -> Iterator[dict[str, Log]]:
    """A fresh log of each kind."""
    with (
        contextlib.closing(open_log(str(folder / "embedded"))) as embedded,
        contextlib.closing(open_log(topics(cluster, "drain"))) as kafka,
    ):
        yield {"embedded": embedded, "kafka": kafka}


def main() -> None:
    """Run and report; exit 3 when something that was acknowledged is missing or a total is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--events", type=int, default=600_000)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    taken = Report("kafka_accept", f"durable events a second over a real Kafka, {EVENTS_PARTITIONS} partitions")
    drained = Report("kafka_drain", "working off a backlog, ten meters, 100,000 customers")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as directory:
        folder = Path(directory)
        with running(folder / "cluster", settings=BROKER) as cluster, logs(cluster, folder) as both:
            rows, right = accept(cluster, folder, arguments.seconds)
            for row in rows:
                taken.add(**row)
            for kind, log in both.items():
                (folder / f"store-{kind}").mkdir()
                found, exact = work_off(log, folder / f"store-{kind}", arguments.events)
                drained.add(log=kind, **found)
                right &= exact
    taken.finish()
    drained.finish()
    sys.exit(0 if right else 3)


if __name__ == "__main__":
    main()
