"""How long the nightly proof takes: a log and the store that was counted from it, compared line by line.

The log is filled and counted first, as in ``benchmarks.drain`` but with a tenth of repetitions; that is not part of the
measurement. Then a process of its own compares log and store and finds everything equal, and another one finds a row
that was removed, one that was doubled and one that was changed. Each is measured by wall time, CPU and its largest
resident size, both checks together.

    python -m benchmarks.reconcile [--events 10000000] [--keep DIR]
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from benchmarks.drain import ORGANIZATION, made_meters
from benchmarks.load import Bodies
from benchmarks.report import Report
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from ingest.log import open_log
from meters.catalogue.catalogue import Change, MeterCreated, Organization, OrganizationCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from meters.meter import Meter

RECORDS_AT_ONCE = 32
CUSTOMERS = 100_000
PLANTED = (
    "DELETE FROM events WHERE seq = 1234",
    "INSERT INTO events SELECT * FROM events WHERE seq = 2345",
    "UPDATE events SET metadata = replace(metadata, '\"tokens\":1', '\"tokens\":2') WHERE seq = 3456",
)
CAUSES = ["changed", "doubled", "lost"]
_MEASURED = """
import json, resource, sys, time
from deploy.cli import main
began = time.perf_counter()
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
usage = resource.getrusage(resource.RUSAGE_SELF)  # its ru_maxrss is that of the process that started this one
peak_kb = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
found = {"code": code, "wall s": time.perf_counter() - began, "CPU s": usage.ru_utime + usage.ru_stime,
         "peak MB": peak_kb / 1024}
print(json.dumps(found), file=sys.stderr)
"""


class _Envelope(msgspec.Struct):
    events: list[msgspec.Raw]


def records(events: int) -> Iterator[Entry]:
    """Records of 100 events, of which ten repeat earlier ones."""
    bodies, before = Bodies(1, customers=CUSTOMERS), [b""]
    for _ in range(events // 100):
        body, _ = bodies.make()
        lines = msgspec.json.decode(body, type=_Envelope).events
        value = b"\n".join([*map(bytes, lines[:90]), *map(bytes, before[-10:])] if len(before) > 10 else lines)
        before = list(map(bytes, lines[:20]))
        yield Entry(value, 0, ORGANIZATION, True)


async def fill(log: Log, events: int, made: list[Meter]) -> None:
    """Write the log."""
    organization = OrganizationCreated(Organization(ORGANIZATION, "bench", datetime.now(UTC)))
    changes: list[Change] = [organization, *map(MeterCreated, made)]
    await log.append(USAGE_CONTROL, [Entry(encode_change(change)) for change in changes])
    batch: list[Entry] = []
    for entry in records(events):
        batch.append(entry)
        if len(batch) == RECORDS_AT_ONCE:
            await log.append(USAGE_EVENTS, batch)
            batch = []
    if batch:
        await log.append(USAGE_EVENTS, batch)


def measured(data: Path, *checks: str) -> tuple[dict[str, float], dict[str, Any]]:
    """One run of the command in a process of its own: what it cost, and what it said."""
    options = [option for check in checks for option in ("--check", check)]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, "reconcile", "--data", str(data), *options, "--output", "json"],
        capture_output=True, text=True, check=True,
    )
    return json.loads(done.stderr.splitlines()[-1]), json.loads(done.stdout)


def main() -> None:
    """Run and report; exit 3 when something is found in an untouched store, or not found in a spoiled one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="make the log and the store here, or use what is here")
    arguments = parser.parse_args()
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="meterstream-bench-"))
    report = Report("reconcile", "log and store compared line by line, ten meters recounted, two cores")
    try:
        data = DataDirectory(directory)
        data.make()
        if not data.store.exists():
            began = time.perf_counter()
            log = open_log(str(directory))
            asyncio.run(fill(log, arguments.events, made_meters()))
            log.close()
            rebuild(data)
            print(f"prepared in {time.perf_counter() - began:.0f} s")
        cost, found = measured(directory, "log", "store")
        report.add(run="log and store, untouched", **_row(cost, found))
        report.check("an untouched store is equal", bool(found["equal"]))
        with duckdb.connect(str(data.store)) as store:
            for statement in PLANTED:
                store.execute(statement)
        cost, found = measured(directory, "log")
        causes = sorted(difference["cause"] for check in found["checks"] for difference in check["differences"])
        report.add(run="log, three errors planted", **_row(cost, found))
        report.check("every planted error was found, and nothing else", causes == CAUSES)
    finally:
        if arguments.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    report.finish()
    sys.exit(report.code)


def _row(cost: dict[str, float], found: dict[str, Any]) -> dict[str, object]:
    row: dict[str, object] = {}
    for check in found["checks"]:
        compared = check["counted"][0]["compared"]
        row |= {check["name"]: compared, f"{check['name']} per second": compared / check["seconds"]}
    differences = sum(check["differences_count"] for check in found["checks"])
    return row | {name: amount for name, amount in cost.items() if name != "code"} | {"differences": differences}


if __name__ == "__main__":
    main()
