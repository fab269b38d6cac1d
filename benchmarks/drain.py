"""How fast the aggregator works off a backlog: from the log on disk to stored events and ten meters' totals.

The log is filled first, in records of 100 events with unique ids; then an engine reads it from the beginning, without
a gateway or a reader beside it. At the end the totals are compared with the sums of what was written.

    python -m benchmarks.drain [--events 1000000]
"""

import argparse
import asyncio
import resource
import shutil
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import msgspec

from aggregator.engine import Committed, Engine
from aggregator.process import SWITCH_INTERVAL_S
from aggregator.store.store import Store, prepare_partitions
from benchmarks.end_to_end import meters
from benchmarks.load import Bodies, Ledger
from benchmarks.report import Report
from ingest.log import open_log
from meters.catalogue import MeterCreated, Organization, OrganizationCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from meters.meter import Meter, new_meter

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
APPENDS_AT_ONCE = 32


class _Envelope(msgspec.Struct):
    events: list[msgspec.Raw]


def made_meters() -> list[Meter]:
    """The ten meters, as the API would make them."""
    made = []
    for number, body in enumerate(meters()):
        meter = new_meter(body, id=f"m{number}", organization_id=ORGANIZATION, created_at=datetime.now(UTC))
        assert isinstance(meter, Meter)
        made.append(meter)
    return made


async def fill(log: Log, events: int, made: list[Meter]) -> Ledger:
    """Write the backlog, over all partitions in turn; return what is in it."""
    partitions = len(log.ends(USAGE_EVENTS))
    changes = [OrganizationCreated(Organization(ORGANIZATION, "bench", datetime.now(UTC))), *map(MeterCreated, made)]
    await log.append(USAGE_CONTROL, [Entry(encode_change(change)) for change in changes])
    bodies, ledger = Bodies(1), Ledger()
    for _ in range(events // 100 // APPENDS_AT_ONCE):
        entries = []
        for number in range(APPENDS_AT_ONCE):
            body, numbers = bodies.make()
            numbers.add_to(ledger)
            lines = msgspec.json.decode(body, type=_Envelope).events
            entries.append(Entry(b"\n".join(lines), number % partitions, ORGANIZATION, True))
        await log.append(USAGE_EVENTS, entries)
    return ledger


def drain(log: Log, directory: Path) -> tuple[Engine, float, float, list[float]]:
    """Follow the log to its end; the engine, wall and CPU seconds, and each round's commit seconds."""
    end = log.ends(USAGE_EVENTS)
    store = Store.open(directory / "store.duckdb", {s: log.identity(s) for s in (USAGE_EVENTS, USAGE_CONTROL)})
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        prepare_partitions(store, stream, list(log.ends(stream)))
    done = threading.Event()
    commits: list[float] = []

    def observe(committed: Committed) -> None:
        commits.append(committed.commit_s)
        if dict(committed.as_of) == end:
            done.set()

    engine = Engine(log, store, observe)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    engine.start()
    while not done.wait(0.5):
        if engine.failure is not None:
            raise engine.failure
    return engine, time.perf_counter() - began_s, time.process_time() - cpu_s, commits


def work_off(log: Log, directory: Path, events: int) -> tuple[dict[str, float], bool]:
    """Fill the log, drain it into a store in the directory; one row, and whether the totals are what was written."""
    made = made_meters()
    ledger = asyncio.run(fill(log, events, made))
    engine, wall_s, cpu_s, commits = drain(log, directory)
    everyone = list(range(engine.directory.subjects_count))
    tokens, cost = engine.totals.total("m0", everyone), engine.totals.total("m2", everyone)
    exact = tokens is not None and cost is not None and tokens.count == ledger.events
    exact = exact and tokens.sum == ledger.tokens and cost.sum == Decimal(ledger.cost_units).scaleb(-4)
    engine.stop()
    if not exact:
        print(f"the totals are {tokens} and {cost}, not {ledger}")
    row = {
        "events": ledger.events, "events/s": ledger.events / wall_s, "CPU us/event": 1e6 * cpu_s / ledger.events,
        "rounds": len(commits), "commit max ms": 1000 * max(commits),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    return row, exact


def main() -> None:
    """Run and report; exit 3 when a total is not what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    directory = Path(tempfile.mkdtemp(prefix="meterstream-bench-"))
    report = Report("drain", "working off a backlog of 100-event records, ten meters, 100,000 customers")
    log = open_log(str(directory))
    try:
        row, exact = work_off(log, directory, arguments.events)
        files = {"log B/event": "log.sqlite", "store B/event": "store.duckdb"}
        report.add(**row, **{name: (directory / file).stat().st_size / row["events"] for name, file in files.items()})
    finally:
        log.close()
        shutil.rmtree(directory, ignore_errors=True)
    report.finish()
    print("counted = written, sums exact" if exact else "what was counted is not what was written")
    sys.exit(0 if exact else 3)


if __name__ == "__main__":
    main()
