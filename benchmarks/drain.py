"""How fast the aggregator works off a backlog: from the log on disk to stored events and ten meters' totals.

The log is filled first, in records of 100 events with unique ids; then an engine reads it from the beginning, without
a gateway or a reader beside it. At the end every meter is compared with what was written. Beside it, in the
same run, the usual consumer (``usual_stack``: a pydantic model, a row and an upsert per meter for every event, a commit
for every 500) over a part of the same backlog, and the machine's limits for the same events.

    python -m benchmarks.drain [--events 1000000] [--customers 100000]
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.engine.pipeline import Committed, Engine
from aggregator.process import SWITCH_INTERVAL_S
from aggregator.store.store import Store, prepare_partitions
from aggregator.view import Total
from benchmarks.end_to_end import SHOWN, expected, meters
from benchmarks.limits import floor, lines
from benchmarks.load import Bodies, Ledger
from benchmarks.report import Report
from benchmarks.usual_stack import COMMIT_EVENTS, UsageEvent
from benchmarks.usual_stack import Store as UsualStore
from ingest.log import open_log
from meters.catalogue.catalogue import Change, MeterCreated, Organization, OrganizationCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from meters.meter import Meter, new_meter

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
APPENDS_AT_ONCE = 32
RECORD_EVENTS = 100
USUAL_EVENTS_MAX = 40_000  # some seconds of its work
READ_BYTES = 8_000_000


def made_meters(definitions: Sequence[dict[str, Any]] = ()) -> list[Meter]:
    """Meters as the API would make them; the ten of the benchmarks, or others."""
    made = []
    for number, body in enumerate(definitions or meters()):
        meter = new_meter(body, id=f"m{number}", organization_id=ORGANIZATION, created_at=datetime.now(UTC))
        assert isinstance(meter, Meter)
        made.append(meter)
    return made


def entries(
    bodies: Bodies, events: int, ledger: Ledger, *, repeated: float = 0, partitions: int = 1, days: int = 1,
    organization_id: str = ORGANIZATION,
) -> Iterator[Entry]:  # fmt: skip
    """Records of 100 events. A share is ``repeated`` as it was; the rest is booked, and spread over so many days."""
    random, sent = np.random.default_rng(5), list[bytes]()
    for number in range(events // RECORD_EVENTS):
        partition = number % partitions
        if sent and random.random() < repeated:
            value = sent[int(random.integers(0, len(sent)))]
            yield Entry(value, partition, organization_id, admitted=True, distinct_keys=True)
            continue
        body, numbers = bodies.make()
        numbers.add_to(ledger)
        value = b"\n".join(lines(body))
        if days > 1:
            value = value.replace(b'"2026-03-01T', b'"2026-03-%02dT' % (1 + number % days))
        if repeated:
            sent.append(value)
        yield Entry(value, partition, organization_id, admitted=True, distinct_keys=True)


async def fill(log: Log, changes: Sequence[Change], records: Iterator[Entry]) -> None:
    """Write decisions, then records, some at once."""
    if changes:
        await log.append(USAGE_CONTROL, [Entry(encode_change(change)) for change in changes])
    while group := list(itertools.islice(records, APPENDS_AT_ONCE)):
        await log.append(USAGE_EVENTS, group)


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


def wrong(engine: Engine, made: Sequence[Meter], definitions: Sequence[dict[str, Any]], ledger: Ledger) -> list[str]:
    """Meters that do not show what was written, in words."""
    everyone, differences = list(range(engine.directory.subjects_count)), []
    for meter, definition in zip(made, definitions, strict=True):
        total, wanted = engine.totals.total(meter, everyone), expected(definition, ledger)
        found = None if total is None else shown(total, meter.aggregation.func)
        if found != wanted:
            differences.append(f"{meter.name} is {found}, not {wanted}")
        if total and not definition["filter"]["clauses"] and total.count != ledger.events:
            differences.append(f"{meter.name} counts {total.count}, not {ledger.events}")
    return differences


def shown(total: Total, func: str) -> Decimal | None:
    """A running total as its meter shows it."""
    if func == "avg":
        return (total.sum / max(total.count, 1)).quantize(SHOWN)
    return {"count": Decimal(total.count), "sum": total.sum, "min": total.min, "max": total.max}[func]


def work_off(
    log: Log, directory: Path, events: int, *, definitions: Sequence[dict[str, Any]] = (),
    bodies: Bodies | None = None, repeated: float = 0,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Fill the log, drain it into a store in the directory; one row, and the totals that are wrong."""
    made, ledger = made_meters(definitions), Ledger()
    records = entries(
        bodies or Bodies(1), events, ledger, repeated=repeated, partitions=len(log.ends(USAGE_EVENTS))
    )
    organization = OrganizationCreated(Organization(ORGANIZATION, "bench", datetime.now(UTC)))
    asyncio.run(fill(log, [organization, *map(MeterCreated, made)], records))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here (proc(5))
    engine, wall_s, cpu_s, commits = drain(log, directory)
    differences = wrong(engine, made, definitions or meters(), ledger)
    engine.stop()
    row = {
        "events": events, "events/s": events / wall_s, "CPU us/event": 1e6 * cpu_s / events, "rounds": len(commits),
        "commit max ms": 1000 * max(commits), "peak MB": _peak_mb(),
    }  # fmt: skip
    return row, differences


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def usual(log: Log, file: Path) -> tuple[dict[str, Any], bool]:
    """The usual consumer over the first records of a log: a row, and whether it counted them."""
    records = log.read(USAGE_EVENTS, log.starts(USAGE_EVENTS), bytes_max=READ_BYTES * 2)
    found = [line for record in records for line in record.value.split(b"\n")][:USUAL_EVENTS_MAX]
    store = UsualStore(str(file), metered=True)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for first in range(0, len(found), COMMIT_EVENTS):
        store.add(map(UsageEvent.model_validate_json, found[first : first + COMMIT_EVENTS]))
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    (count, _), stored = store.total("all tokens"), store.stored()
    row = {"events": len(found), "events/s": len(found) / wall_s, "CPU us/event": 1e6 * cpu_s / len(found)}
    return row, count == stored == len(found)


def main() -> None:
    """Run and report; exit 3 when a total is not what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--customers", type=int, default=100_000)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    report = Report("drain", f"working off a backlog; ten meters, {arguments.customers:,} customers")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as scratch:
        directory = Path(scratch)
        log = open_log(scratch)
        bodies = Bodies(1, customers=arguments.customers)
        row, differences = work_off(log, directory, arguments.events, bodies=bodies)
        other, right = usual(log, directory / "usual.sqlite")
        log.close()
        limits = floor(bodies.make()[0], RECORD_EVENTS, APPENDS_AT_ONCE)
        sizes = {"log B/event": "log.sqlite", "store B/event": "store.duckdb"}
        report.add(
            server="meterstream", **row, **{"times usual per CPU": other["CPU us/event"] / row["CPU us/event"]},
            **limits, **{"times limit": row["CPU us/event"] / sum(limits.values())},
            **{name: (directory / file).stat().st_size / row["events"] for name, file in sizes.items()},
        )  # fmt: skip
        report.add(server="usual stack", **other)
    report.check("; ".join(differences) or "counted = written, sums exact", not differences)
    report.check("the usual stack counted what it read", right)
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
