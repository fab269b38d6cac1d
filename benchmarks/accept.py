"""How many events a second the gateway takes durably, and what the usual stack takes on the same machine.

The gateway runs alone, so nothing is counted meanwhile; the log is real and every answer waits for its sync. At the
end the log is read back: it holds as many events as were acknowledged. Beside it, in the same run, an endpoint as most
teams write it: FastAPI, a pydantic model per event, one row per event into SQLite with a commit per request.

    python -m benchmarks.accept [--seconds 5]
"""

import argparse
import asyncio
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Bodies, send
from benchmarks.report import Report
from benchmarks.server import TOKEN, usage
from ingest.log import open_log
from meters.access import digest
from meters.catalogue import Organization, OrganizationCreated, Token, TokenCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
SHAPES = ((1, 64), (10, 32), (100, 32), (1000, 8))  # events a body, connections
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
    changes = [OrganizationCreated(Organization(ORGANIZATION, "bench", now)), TokenCreated(token)]
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
    process = subprocess.Popen([str(port) if part == "PORT" else part for part in command])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(0.5)  # the catalogue is read
                return process, port
        time.sleep(0.02)
    raise RuntimeError(f"{command} does not listen")


def measure(
    command: list[str], seconds: float, shapes: Sequence[tuple[int, int]] = SHAPES
) -> tuple[list[dict[str, Any]], int]:
    """Rows for each of the shapes, and how many events were acknowledged in all."""
    process, port = started(command)
    rows, acknowledged = [], 0
    try:
        for run, (events, connections) in enumerate(shapes):
            before, began = usage(process.pid)["cpu_s"], time.perf_counter()
            bodies = Bodies(run, events)
            ledger = asyncio.run(
                send("127.0.0.1", port, TOKEN, bodies, seconds=seconds, rate=None, connections=connections)
            )
            wall_s, cpu_s = time.perf_counter() - began, usage(process.pid)["cpu_s"] - before
            acknowledged += ledger.events
            latencies_ms = np.array(ledger.latencies_s) * 1000
            rows.append({
                "events a body": events, "events/s": ledger.events / wall_s, "requests/s": ledger.requests / wall_s,
                "events/CPU s": ledger.events / cpu_s, "CPU us/event": 1e6 * cpu_s / ledger.events,
                "p50 ms": float(np.percentile(latencies_ms, 50)), "p99 ms": float(np.percentile(latencies_ms, 99)),
                "peak MB": usage(process.pid)["peak_mb"],
            })
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    return rows, acknowledged


def main() -> None:
    """Run and report; exit 3 when the log does not hold what was acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    report = Report("accept", "durable events a second, the gateway alone, beside the usual stack")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as directory:
        data = Path(directory) / "data"
        data.mkdir()
        prepare(str(data))
        gateway = [sys.executable, "-m", "deploy.cli", "gateway", "--data", str(data), "--port", "PORT"]
        rows, acknowledged = measure(gateway, arguments.seconds)
        found = logged(str(data))
        usual = [sys.executable, "-m", "benchmarks.usual_stack", str(Path(directory) / "usual.sqlite"), "PORT"]
        beside, taken = measure(usual, arguments.seconds)
        with sqlite3.connect(Path(directory) / "usual.sqlite") as connection:
            (usual_found,) = connection.execute("SELECT count(*) FROM events").fetchone()
    for row, other in zip(rows, beside, strict=True):
        report.add(server="meterstream", **row, **{"times usual per CPU": row["events/CPU s"] / other["events/CPU s"]})
        report.add(server="usual stack", **other)
    report.finish()
    print(f"acknowledged {acknowledged:,}, in the log {found:,}; usual stack {taken:,} and {usual_found:,}")
    sys.exit(0 if found >= acknowledged and usual_found >= taken else 3)


if __name__ == "__main__":
    main()
