"""What handing over an event costs an application, and how many a second one process gets through.

Against a whole server on this machine: the time of single captures with the spool off and on, the rate of capturing
until everything is acknowledged, and the processor time of the client for it. Beside it, in the same run, Polar's own
Python helper (polar-sdk 0.32.0) in an interpreter of its own: the time of its ``ingest``, and what it gets through in
as many seconds. At the end the server's log holds as many events as were acknowledged.

    python -m benchmarks.client [--events 200000] [--seconds 5]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.server import TOKEN, Server
from ingest.client import Ingestion, Limits
from ingest.log import open_log
from meters.log import USAGE_EVENTS

BURSTS, BURST = 1000, 20  # captures that are timed one by one: as many as a request of an application may make
PAUSE_S = 0.004  # between bursts; sending is at work meanwhile, and the first capture after it finds caches cold
READ_BYTES = 8_000_000
EVENT = {
    "name": "chat.completion", "external_customer_id": "customer-00000042",
    "metadata": {"model": "gpt-4.1-nano", "tokens": 812, "region": "eu-west-1", "cached": False, "latency_ms": 420},
}  # fmt: skip


def percentiles(spent_ns: list[int]) -> dict[str, float]:
    """Microseconds of a capture: of all, and of the first after each pause."""
    first = sorted(spent_ns[::BURST])
    spent_ns = sorted(spent_ns)
    shares = {"p50 us": 0.5, "p99 us": 0.99, "p99.9 us": 0.999}
    found = {name: spent_ns[int(len(spent_ns) * share)] / 1000 for name, share in shares.items()}
    return {**found, "max us": spent_ns[-1] / 1000, "p50 us after a pause": first[len(first) // 2] / 1000}


def timed(capture: Callable[[dict[str, Any]], object]) -> list[int]:
    """Nanoseconds of each capture, in bursts."""
    spent_ns = []
    for _ in range(BURSTS):
        for _ in range(BURST):
            began_ns = time.perf_counter_ns()
            capture(EVENT)
            spent_ns.append(time.perf_counter_ns() - began_ns)
        time.sleep(PAUSE_S)
    return spent_ns


def sustained(ingestion: Ingestion, events: int) -> dict[str, float]:
    """Capture as fast as it goes, until everything is acknowledged."""
    before = ingestion.stats().acknowledged
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(events):
        ingestion.ingest(EVENT)
    captured_s = time.perf_counter() - began_s
    if not ingestion.flush(120):
        raise SystemExit("the server did not take everything")
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    assert ingestion.stats().acknowledged - before == events
    return {
        "captured/s": events / captured_s, "acknowledged/s": events / wall_s, "CPU us/event": 1e6 * cpu_s / events
    }  # fmt: skip


def measure(server: Server, spool: Path | None, gzip: bool, events: int) -> tuple[dict[str, Any], int]:
    """A row for one kind of client, and what it got acknowledged."""
    limits = Limits(block_s_max=60, close_s_max=60)
    with Ingestion(TOKEN, base_url=server.url, spool=spool, gzip=gzip, limits=limits) as ingestion:
        ingestion.ingest(EVENT)
        ingestion.flush(10)
        single = percentiles(timed(ingestion.ingest))
        ingestion.flush(60)
        through = sustained(ingestion, events)
        acknowledged = ingestion.stats().acknowledged
    return {**single, **through}, acknowledged


HELPER = """
import json, sys, time
from polar_sdk.ingestion import Ingestion
url, token, event, bursts, burst, pause_s, seconds = sys.argv[1:]
event, spent_ns = json.loads(event), []
ingestion = Ingestion(token, server_url=url, max_queue_size=10_000_000)
for _ in range(int(bursts)):
    for _ in range(int(burst)):
        copy = {**event, "metadata": dict(event["metadata"])}  # it writes into what it is given
        began_ns = time.perf_counter_ns()
        ingestion.ingest(copy)
        spent_ns.append(time.perf_counter_ns() - began_ns)
    time.sleep(float(pause_s))
waiting = ingestion._queue.qsize()
time.sleep(float(seconds))
by_itself = (waiting - ingestion._queue.qsize()) / float(seconds)
waiting, began_s, cpu_s = ingestion._queue.qsize(), time.perf_counter(), time.process_time()
while not ingestion._queue.empty():
    ingestion.flush(1000)
told, cpu_s = waiting / (time.perf_counter() - began_s), time.process_time() - cpu_s
print(json.dumps([spent_ns, by_itself, told, 1e6 * cpu_s / waiting]))
"""


def measure_helper(server: Server, python: Path, seconds: float) -> list[dict[str, Any]]:
    """The same of Polar's helper: as it comes, and when the application flushes a thousand at a time."""
    settings = map(str, (BURSTS, BURST, PAUSE_S, seconds))
    command = [str(python), "-c", HELPER, server.url, TOKEN, json.dumps(EVENT), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spent_ns, by_itself, told, cpu_us = json.loads(done.stdout)
    return [
        {**percentiles(spent_ns), "acknowledged/s": by_itself},
        {"acknowledged/s": told, "CPU us/event": cpu_us},
    ]


def logged(data: Path) -> int:
    """Events in the log."""
    log, position, events = open_log(str(data)), 0, 0
    while records := log.read(USAGE_EVENTS, {0: position}, bytes_max=READ_BYTES):
        events += sum(record.value.count(b"\n") + 1 for record in records)
        position = records[-1].offset + 1
    log.close()
    return events


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="for which Polar's helper is watched")
    arguments = parser.parse_args()
    report = Report("client", "what capturing costs an application, beside Polar's helper")
    acknowledged = 0
    with Server() as server, tempfile.TemporaryDirectory(prefix="meterstream-bench-") as spool:
        for name, directory, gzip in (("spool off", None, False), ("spool on", Path(spool), False),
                                      ("spool off, gzip", None, True)):  # fmt: skip
            row, taken = measure(server, directory, gzip, arguments.events)
            acknowledged += taken
            report.add(client=f"meterstream, {name}", **row)
        found = logged(server.data)
        try:
            from tests.support.environments import interpreter

            helper = interpreter("0.32.0")
        except BaseException as reason:  # pytest's skip: it cannot be installed here
            print(f"without Polar's helper: {reason}", file=sys.stderr)
        else:
            for name, row in zip(("as it comes", "flush(1000)"), measure_helper(server, helper, arguments.seconds),
                                 strict=True):  # fmt: skip
                report.add(client=f"polar-sdk 0.32.0, {name}", **row)
    report.check(f"the log holds the {acknowledged:,} events that were acknowledged", found == acknowledged)
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
