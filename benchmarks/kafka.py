"""Kafka underneath: taken durably, worked off, and end to end, beside the usual stack and Kafka's own producer.

A real broker of one node runs beside it (Java 17 and Maven are needed), with 12 partitions, and every answer waits for
``acks=all``. The usual stack (``usual_stack_kafka``) is FastAPI, a pydantic model per event and ``aiokafka.send`` per
event, with the same care; its consumer upserts for every event. A gateway on the embedded log takes its turns, too:
that is what one machine has instead of a broker. The broker's own ``kafka-producer-perf-test`` sends records as large
as an event. The same backlog is worked off from Kafka and from the embedded log, by the same engine.
At the end the topics are read back: they hold what was acknowledged, and the totals are what was written.

    python -m benchmarks.kafka [--seconds 4.5] [--events 600000] [--end-to-end-seconds 20]
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from aggregator.process import SWITCH_INTERVAL_S
from benchmarks.accept import GATEWAYS_MAX, logged, prepare
from benchmarks.contenders import SHAPES, TURNS, contender, in_turns
from benchmarks.drain import work_off
from benchmarks.end_to_end import Phase, check, meters, row, warmed
from benchmarks.limits import kafka_producer
from benchmarks.load import Bodies
from benchmarks.report import Report
from benchmarks.server import Server, usage
from benchmarks.usual_stack import Store
from benchmarks.usual_stack_kafka import LINGER_MS, consume
from ingest.log import open_log
from ingest.log.kafka_admin import EVENTS_PARTITIONS, Wanted, make_topics, parse_address
from meters.log import USAGE_EVENTS, Log, format_position
from tests.support.kafka.cluster import Cluster, running
from tests.support.kafka.jars import Missing

USUAL_TOPIC = "usual"
EMBEDDED = "meterstream, embedded log"
USUAL_CONSUMED_MAX = 40_000  # some seconds of its consumer's work
BROKER = {"num.network.threads": "2", "num.io.threads": "4"}  # more than the tests give it, the same for both


def topics(cluster: Cluster, prefix: str) -> str:
    """Our two topics; the log's URL."""
    url = f"kafka://{cluster.bootstrap}/{prefix}"
    make_topics(parse_address(url, {}), Wanted())
    return url


def ends(url: str) -> dict[int, int]:
    """The end of each partition of a topic of events."""
    with contextlib.closing(open_log(url)) as log:
        return dict(log.ends(USAGE_EVENTS))


def accept(report: Report, cluster: Cluster, folder: Path, seconds: float) -> None:
    """What gateways take, what the usual stack takes, what Kafka's own producer gets through."""
    broker, theirs, url = cluster.nodes[0].pid, topics(cluster, USUAL_TOPIC), topics(cluster, "ours")
    prepare(url)
    linger = f"{url}?linger_ms={LINGER_MS}"  # batches fill as long as in the usual stack
    stack = ["-m", "benchmarks.usual_stack_kafka", cluster.bootstrap, f"{USUAL_TOPIC}.{USAGE_EVENTS}", "PORT"]
    gateway = ["-m", "deploy.cli", "gateway", "--log", linger, "--data", str(folder / "gateway"), "--port", "PORT"]
    (data := folder / "embedded-gateway").mkdir()
    prepare(str(data))
    with contextlib.ExitStack() as undo:
        usual = undo.enter_context(contender(stack))
        ours = [undo.enter_context(contender(gateway, servers)) for servers in range(1, GATEWAYS_MAX + 1)]
        embedded = undo.enter_context(contender(["-m", "deploy.cli", "gateway", "--data", str(data), "--port", "PORT"]))
        broker_s, taken = [0.0] * (2 + len(ours)), [0] * (2 + len(ours))
        for shape, number, one in in_turns([usual, *ours, embedded]):
            before_s = usage(broker)["cpu_s"]
            taken[number] += one.take(shape, seconds / TURNS)
            broker_s[number] += usage(broker)["cpu_s"] - before_s
    found = sum(ends(theirs).values())
    is_all = found == usual.acknowledged
    report.check(f"the usual stack acknowledged {usual.acknowledged:,}, in its topic are {found:,}", is_all)
    in_topic, acknowledged = logged(url), sum(one.acknowledged for one in ours)
    report.check(f"gateways acknowledged {acknowledged:,}, in their topic are {in_topic:,}", in_topic == acknowledged)
    in_file = logged(str(data))
    is_all = in_file == embedded.acknowledged
    report.check(f"a gateway acknowledged {embedded.acknowledged:,}, in its file are {in_file:,}", is_all)
    servers = [("meterstream", one) for one in ours] + [(EMBEDDED, embedded), ("usual stack", usual)]
    for name, one in servers:
        for shape in SHAPES:
            row, other = one.row(shape), usual.row(shape)
            report.add(server=name, **row, **{"times usual per CPU": other["CPU us/event"] / row["CPU us/event"]})
    for number, one in enumerate(ours, 1):
        report.add(gateways=one.servers, **{"broker us/event": 1e6 * broker_s[number] / taken[number]})  # of all bodies
    event_bytes = len(Bodies(0).make()[0]) // 100
    topics(cluster, "limit")
    records = int(100_000 * seconds)
    producer = kafka_producer(cluster, f"limit.{USAGE_EVENTS}", records, event_bytes)
    report.add(**{"perf producer records/s": producer, "bytes a record": event_bytes})


@contextlib.contextmanager
def logs(cluster: Cluster, folder: Path) -> Iterator[dict[str, Log]]:
    """A fresh log of each kind."""
    with (
        contextlib.closing(open_log(str(folder / "embedded"))) as embedded,
        contextlib.closing(open_log(topics(cluster, "drain"))) as kafka,
    ):
        yield {"embedded": embedded, "kafka": kafka}


def drain(report: Report, cluster: Cluster, folder: Path, events: int) -> None:
    """The same backlog from both kinds of log, and the usual consumer's work on what the usual stack took."""
    with logs(cluster, folder) as both:
        for kind, log in both.items():
            (folder / f"store-{kind}").mkdir()
            found, differences = work_off(log, folder / f"store-{kind}", events)
            report.add(log=kind, server="meterstream", **found)
            report.check(f"{kind}: {'; '.join(differences) or 'sums exact'}", not differences)
    store = Store(str(folder / "usual.sqlite"), metered=True)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    asyncio.run(consume(cluster.bootstrap, f"{USUAL_TOPIC}.{USAGE_EVENTS}", store, USUAL_CONSUMED_MAX))
    wall_s, cpu_s, stored = time.perf_counter() - began_s, time.process_time() - cpu_s, store.stored()
    report.add(log="kafka", server="usual stack", events=stored, **{
        "events/s": stored / wall_s, "CPU us/event": 1e6 * cpu_s / stored,
    })  # fmt: skip
    report.check("the usual consumer counted what it stored", store.total("all tokens")[0] == stored)


def end_to_end(report: Report, cluster: Cluster, seconds: float) -> None:
    """From a POST to a number over Kafka, at full speed and at half of it, the broker on the same cores."""
    url = topics(cluster, "end")
    with Server("--log", url) as server:
        ids = server.create_meters(meters())
        rate, ledgers = None, [warmed(server)]
        for run, name in enumerate(("full speed", "half load"), 1):
            before_s = usage(cluster.nodes[0].pid)["cpu_s"]
            phase = Phase(server, run, seconds, rate)
            server.wait_for(format_position(ends(url)))  # every partition, not only that of the last event
            broker_us = 1e6 * (usage(cluster.nodes[0].pid)["cpu_s"] - before_s) / phase.ledger.events
            report.add(**row(name, phase), **{"broker us/event": broker_us})
            ledgers.append(phase.ledger)
            rate = rate or phase.rate / 2
        differences = check(server, ids, ledgers)
    report.check("; ".join(differences) or "counted = acknowledged, sums exact", not differences)


def main() -> None:
    """Run and report; exit 3 when something that was acknowledged is missing or a total is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.5, help="of each row of what gateways take")
    parser.add_argument("--events", type=int, default=600_000, help="of the backlog")
    parser.add_argument("--end-to-end-seconds", type=float, default=20.0, help="of each load from a POST to a number")
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    taken = Report("kafka_accept", f"durable events a second over a real Kafka, {EVENTS_PARTITIONS} partitions")
    drained = Report("kafka_drain", "working off a backlog, ten meters, 100,000 customers")
    whole = Report("kafka_end_to_end", "from a POST to a number over a real Kafka, the broker on the same cores")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as directory:
        folder = Path(directory)
        with running(folder / "cluster", settings=BROKER) as cluster:
            accept(taken, cluster, folder, arguments.seconds)
            drain(drained, cluster, folder, arguments.events)
            end_to_end(whole, cluster, arguments.end_to_end_seconds)
    for report in (taken, drained, whole):
        report.finish()
    sys.exit(max(report.code for report in (taken, drained, whole)))


if __name__ == "__main__":
    try:
        main()
    except Missing as missing:
        print(f"left out: {missing}")
