"""What the shape of the load costs the aggregator: many meters, repetitions, a few hot customers, a long history.

Every row drains a backlog from the log on disk, as ``benchmarks.drain`` does, and compares the totals with what was
written. Rows of one run are comparable with each other; the first one is the ordinary shape. At the end the store that
has the most history is asked for a month of quantities by the day, opened again, and made again from its log.

    python -m benchmarks.shapes [--events 400000] [--history 2000000]
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aggregator.engine import Engine
from aggregator.process import SWITCH_INTERVAL_S
from aggregator.store.queries import usage
from aggregator.store.sql import Measured
from aggregator.store.store import Store
from benchmarks.drain import ORGANIZATION, drain
from benchmarks.end_to_end import only
from benchmarks.load import Bodies, Ledger
from benchmarks.report import Report
from deploy.data import DataDirectory
from deploy.rebuild import rebuild
from ingest.log import open_log
from meters.catalogue import Change, MeterCreated, Organization, OrganizationCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from meters.meter import Meter, new_meter
from meters.window import Interval

APPENDS_AT_ONCE = 32
HOT_SHARES = (0.35, 0.43, 0.12, 0.06, 0.04)  # of all events, for 1, 9, 90, 900 and 99,000 of the customers
HOT_SIZES = (1, 9, 90, 900, 99_000)


class _Envelope(msgspec.Struct):
    events: list[msgspec.Raw]


class HotRandom:
    """Draws customers so that a few have nearly all the events; everything else as it was."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(11)
        weights = np.repeat(np.array(HOT_SHARES) / HOT_SIZES, HOT_SIZES)
        self._edges = np.cumsum(weights / weights.sum())

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """Like numpy's, except among all customers."""
        if high != sum(HOT_SIZES):
            return self._random.integers(low, high, size)
        return np.searchsorted(self._edges, self._random.random(size))


def metered(count: int) -> list[Meter]:
    """A total of everything, and meters that each look for one model."""
    bodies: list[dict[str, Any]] = [{"name": "all tokens", "filter": {"conjunction": "and", "clauses": []}}]
    models = ["gpt-4.1-nano", "gpt-4.1-mini", "claude-haiku", "gemini-flash"]
    bodies += [
        {"name": f"model {number}", "filter": only("model", models[number] if number < 4 else f"model-{number}")}
        for number in range(count - 1)
    ]
    made = []
    for number, body in enumerate(bodies):
        body["aggregation"] = {"func": "sum", "property": "tokens"}
        meter = new_meter(body, id=f"m{number}", organization_id=ORGANIZATION, created_at=datetime.now(UTC))
        assert isinstance(meter, Meter)
        made.append(meter)
    return made


def entries(bodies: Bodies, events: int, ledger: Ledger, repeated: float) -> Iterator[Entry]:
    """Records of 100 events, of which a share is sent again as it was."""
    random = np.random.default_rng(5)
    sent: list[bytes] = []
    for _ in range(events // 100):
        if sent and random.random() < repeated:
            yield Entry(sent[int(random.integers(0, len(sent)))], 0, ORGANIZATION, True)
            continue
        body, numbers = bodies.make()
        numbers.add_to(ledger)
        value = b"\n".join(msgspec.json.decode(body, type=_Envelope).events)
        if repeated:
            sent.append(value)
        yield Entry(value, 0, ORGANIZATION, True)


async def fill(log: Log, meters: list[Meter], written: Iterator[Entry]) -> None:
    """Write decisions and records."""
    changes: list[Change] = [OrganizationCreated(Organization(ORGANIZATION, "bench", datetime.now(UTC)))]
    changes += map(MeterCreated, meters)
    await log.append(USAGE_CONTROL, [Entry(encode_change(change)) for change in changes])
    group: list[Entry] = []
    for entry in written:
        group.append(entry)
        if len(group) == APPENDS_AT_ONCE:
            await log.append(USAGE_EVENTS, group)
            group = []
    if group:
        await log.append(USAGE_EVENTS, group)


class Shape:
    """One backlog, worked off. ``exact`` is whether the totals are what was written."""

    def __init__(
        self, directory: Path, events: int, *, meters: int = 10, repeated: float = 0, hot: bool = False
    ) -> None:
        self.directory, self.ledger, self.meters = directory, Ledger(), metered(meters)
        bodies = Bodies(1)
        if hot:
            bodies._random = HotRandom()  # type: ignore[assignment]  # the one thing that differs
        self.log = open_log(str(directory))
        asyncio.run(fill(self.log, self.meters, entries(bodies, events, self.ledger, repeated)))
        self.engine, self.wall_s, self.cpu_s, _ = drain(self.log, directory)
        total = self.engine.totals.total("m0", list(range(self.engine.directory.subjects_count)))
        self.exact = total is not None and (total.count, total.sum) == (self.ledger.events, Decimal(self.ledger.tokens))
        self.lines = events

    def row(self, shape: str) -> dict[str, Any]:
        """A line of the report."""
        return {
            "shape": shape, "events sent": self.lines, "events/s": self.lines / self.wall_s,
            "CPU us/event": 1e6 * self.cpu_s / self.lines, "exact": self.exact,
        }  # fmt: skip

    def close(self) -> None:
        """Stop the engine and let go of the log."""
        self.engine.stop()
        self.log.close()


def timed_ms(call: Callable[[], object]) -> float:
    """How long one call took."""
    began_s = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began_s)


def month_by_day(engine: Engine, meter: Meter) -> Decimal:
    """A month of quantities by the day, from memory; its total."""
    start, end = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 31, tzinfo=UTC)
    points, bounds = usage.spans(start, end, Interval.DAY, "Europe/Berlin")
    totals = engine.totals.by_quarters(meter.id, bounds)
    assert totals is not None
    parts = [Measured(total.count, total.sum, None, total.min, total.max) for total in totals]
    return usage.from_parts(meter.aggregation, points, bounds, parts).total


def history(report: Report, events: int, directory: Path) -> bool:
    """A long history: working it off, a chart over it, opening it, making it again."""
    shape = Shape(directory, events)
    report.add(**shape.row(f"history of {events:,}"))
    exact = shape.exact and month_by_day(shape.engine, shape.meters[0]) == shape.ledger.tokens
    chart_ms = timed_ms(lambda: month_by_day(shape.engine, shape.meters[0]))
    shape.engine.stop()
    identities = {stream: shape.log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}

    def opened() -> None:
        store = Store.open(directory / "store.duckdb", identities)
        engine = Engine(shape.log, store, lambda _: None)
        engine.start()
        while engine.totals.total("m0", [0]) is None:
            time.sleep(0.005)
        engine.stop()

    open_ms = timed_ms(opened)
    shape.log.close()
    rebuild_ms = timed_ms(lambda: rebuild(DataDirectory(directory), lambda done, total: None))
    report.add(shape="month by the day, from memory", **{"ms": chart_ms})
    report.add(shape="opened, identities and totals in memory", **{"ms": open_ms})
    report.add(shape="made again from the log", **{"ms": rebuild_ms, "events/s": 1000 * events / rebuild_ms})
    return exact


def main() -> None:
    """Run and report; exit 3 when a total is not what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--history", type=int, default=2_000_000)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    report = Report("shapes", "what the shape of the load costs; a backlog of 100-event records, 100,000 customers")
    shapes: dict[str, dict[str, Any]] = {
        "ten meters, all new": {}, "100 meters": {"meters": 100}, "1,000 meters": {"meters": 1000},
        "half sent again": {"repeated": 0.5}, "nine of ten sent again": {"repeated": 0.9},
        "35/43/12/6/4 % of the events for 1/9/90/900/99,000 customers": {"hot": True},
    }  # fmt: skip
    exact = True
    for name, differs in shapes.items():
        with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as scratch:
            shape = Shape(Path(scratch), arguments.events, **differs)
            report.add(**shape.row(name))
            exact = exact and shape.exact
            shape.close()
    directory = Path(tempfile.mkdtemp(prefix="meterstream-bench-"))
    try:
        exact = history(report, arguments.history, directory) and exact
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report.finish()
    print("counted = written, sums exact" if exact else "what was counted is not what was written")
    sys.exit(0 if exact else 3)


if __name__ == "__main__":
    main()
