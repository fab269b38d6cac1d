"""How many events a second the gateway takes durably, and what the usual stack takes on the same machine.

Gateways run alone, one or two on the same log, so nothing is counted meanwhile; the log is real and every answer waits
for its sync. At the end the log is read back: it holds as many events as were acknowledged. Beside it, in the same run,
an endpoint as most teams write it (``usual_stack``: a row per event into SQLite, a commit per request), and the
machine's limits for the same bodies (``limits``).

    python -m benchmarks.accept [--seconds 5]
"""

import argparse
import asyncio
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.limits import floor
from benchmarks.load import Bodies, Ledger, Numbers, send
from benchmarks.report import Report
from benchmarks.server import TOKEN, usage
from benchmarks.usual_stack import Store
from ingest.log import open_log
from meters.access import digest
from meters.catalogue import Change, Organization, OrganizationCreated, Token, TokenCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
SHAPES = ((1, 64), (10, 32), (100, 32), (1000, 8))  # events a body, connections
WARM_UP = ((100, 32),)  # a stretch that is not shown: what a server loads once it loads there
GATEWAYS_MAX = 2
PREPARED = {1: 30_000, 10: 150_000, 100: 350_000, 1000: 400_000}  # events a second that bodies are made for
READ_BYTES = 8_000_000


def prepare(url: str) -> None:
    """Make the log at the URL know one token."""
    now = datetime.now(UTC)
    token = Token(
        id="t",
        organization_id=ORGANIZATION,
        name="bench",
        sha256=digest(TOKEN),
        scopes=["events:write"],
        created_at=now,
    )
    changes: list[Change] = [OrganizationCreated(Organization(ORGANIZATION, "bench", now)), TokenCreated(token)]
    log = open_log(url)
    asyncio.run(log.append(USAGE_CONTROL, [Entry(encode_change(change)) for change in changes]))
    log.close()


def logged(url: str) -> int:
    """Events in the log at the URL."""
    log = open_log(url)
    positions, events = dict.fromkeys(log.ends(USAGE_EVENTS), 0), 0
    while records := log.read(USAGE_EVENTS, positions, bytes_max=READ_BYTES):
        events += sum(record.value.count(b"\n") + 1 for record in records)
        positions |= {record.partition: record.offset + 1 for record in records}
    log.close()
    return events


def started(command: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A server on a free port, once it listens. ``PORT`` in the command stands for the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, *(str(port) if part == "PORT" else part for part in command)])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(0.5)  # the catalogue is read
                return process, port
        time.sleep(0.02)
    raise RuntimeError(f"{command} does not listen")


class Prepared(Bodies):
    """Bodies of which so many are made before anybody sends."""

    def __init__(self, run: int, events: int, count: int) -> None:
        super().__init__(run, events)
        made = super().make
        self._ready = [made() for _ in range(count)]

    def make(self) -> tuple[bytes, Numbers]:
        """One of them, or another when they are used up."""
        return self._ready.pop() if self._ready else super().make()


async def sent(ports: Sequence[int], run: int, events: int, connections: int, seconds: float) -> list[Ledger]:
    """What each server acknowledged; the connections and the bodies are shared out among them."""
    share = len(ports)
    count = int(seconds * PREPARED[events] / events / share)
    prepared = [Prepared(GATEWAYS_MAX * run + number, events, count) for number in range(share)]
    return await asyncio.gather(*(
        send("127.0.0.1", port, TOKEN, bodies, seconds=seconds, rate=None, connections=connections // share)
        for port, bodies in zip(ports, prepared, strict=True)
    ))  # fmt: skip


def measure(
    command: list[str], seconds: float, shapes: Sequence[tuple[int, int]] = SHAPES, servers: int = 1, first_run: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """Rows for each of the shapes, and how many events were acknowledged in all.

    ``command`` is run by this Python, once for each of the servers. Ids of events begin with ``first_run``.
    """
    running = [started(command) for _ in range(servers)]
    pids, ports = [process.pid for process, _ in running], [port for _, port in running]
    rows, acknowledged = [], 0
    try:
        for run, (events, connections) in enumerate(shapes, first_run):
            before_s = sum(usage(pid)["cpu_s"] for pid in pids)
            ledgers = uvloop.run(sent(ports, run, events, connections, seconds))
            cpu_s = sum(usage(pid)["cpu_s"] for pid in pids) - before_s
            taken = sum(ledger.events for ledger in ledgers)
            acknowledged += taken
            latencies_ms = np.array([second for ledger in ledgers for second in ledger.latencies_s]) * 1000
            rows.append({
                "gateways": servers, "events a body": events, "events/s": taken / seconds,
                "requests/s": taken / seconds / events, "events/CPU s": taken / cpu_s,
                "CPU us/event": 1e6 * cpu_s / taken, "ack p50 ms": float(np.percentile(latencies_ms, 50)),
                "ack p99 ms": float(np.percentile(latencies_ms, 99)),
                "peak MB": sum(usage(pid)["peak_mb"] for pid in pids),
            })
    finally:
        for process, _ in running:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    return rows, acknowledged


def beside(row: dict[str, Any], usual: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A row of ours with the usual stack and the machine's limits beside it, as ratios of CPU time an event."""
    return {
        **row, "times usual per CPU": usual["CPU us/event"] / row["CPU us/event"], **limits,
        "times limit": row["CPU us/event"] / sum(limits.values()),
    }  # fmt: skip


def main() -> None:
    """Run and report; exit 3 when the log does not hold what was acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row")
    arguments = parser.parse_args()
    report = Report("accept", "durable events a second, gateways alone")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as directory:
        file = str(Path(directory) / "usual.sqlite")
        stack = ["-m", "benchmarks.usual_stack", file, "PORT"]
        (_, *usual), taken = measure(stack, arguments.seconds, WARM_UP + SHAPES)
        stored = Store(file, metered=False).stored()
        report.check(f"the usual stack acknowledged {taken:,} and stored {stored:,}", stored == taken)
        data = Path(directory) / "data"
        data.mkdir()
        prepare(str(data))
        gateway = ["-m", "deploy.cli", "gateway", "--data", str(data), "--port", "PORT"]
        acknowledged = 0
        limits = [floor(Bodies(0, events).make()[0], events, together) for events, together in SHAPES]
        for servers in range(1, GATEWAYS_MAX + 1):
            (_, *rows), added = measure(gateway, arguments.seconds, WARM_UP + SHAPES, servers, 10 * servers)
            acknowledged += added
            for row, other, limit in zip(rows, usual, limits, strict=True):
                report.add(server="meterstream", **beside(row, other, limit))
        found = logged(str(data))
        report.check(f"gateways acknowledged {acknowledged:,}, in the log are {found:,}", found == acknowledged)
    for other in usual:
        report.add(server="usual stack", **other)
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
