"""The pipeline from log to answer against an independent model: whatever is sent, repeated, reordered or restarted.

The model reads the same log with the careful reader and the reference evaluation of ``meters``, one event at a time
and nothing else. Everything the store and the totals say must be equal to it, to the last digit.
"""

import asyncio
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlglot import exp

from aggregator.engine.pipeline import Engine
from aggregator.store.meter_sql import Measured, Parameters, Stage, condition, considered, measures, statement, value
from aggregator.store.queries import usage
from aggregator.totals import plan
from ingest.log import open_log
from meters.aggregation import considers, evaluate, exact_sum
from meters.catalogue.catalogue import MeterUpdated, Names
from meters.event import Event, check_line
from meters.event_values import Facts, facts
from meters.filters import Clause, Filter, Operator, matches
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from meters.meter import Meter, quantities
from meters.timestamps import Interval
from tests.support.random_events import aggregations, filters, metadata_texts
from tests.support.records import (
    NOW,
    ORGANIZATION,
    Running,
    created,
    decisions,
    entry,
    line,
    meter,
    organization,
    rows,
)

# An example starts a real store several times, so a failing one is printed as found, not shrunk for minutes.
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
CUSTOMERS = ["ann", "bob", "é"]
CLOCK = ["10:00:00.5", "10:14:59.999999", "10:15:00.000001", "18:15:00.25", "03:30:00.5", "18:14:59.999999"]
FEBRUARY, MARCH = datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)


@st.composite
def sent_lines(draw: st.DrawFn) -> bytes:
    """An event with one of few ids, so that repetitions and contradictions are common."""
    return line(
        f"r{draw(st.integers(0, 12))}",
        name=draw(st.sampled_from(["call", "chat"])),
        external_customer_id=draw(st.sampled_from(CUSTOMERS)),
        timestamp=f"2026-02-{draw(st.integers(1, 28)):02d}T{draw(st.sampled_from(CLOCK))}Z",
        metadata=draw(metadata_texts()),
    )


@st.composite
def meters(draw: st.DrawFn) -> list[Meter]:
    """A few random meters."""
    count = draw(st.integers(1, 4))
    found = []
    for number in range(count):
        made = meter(f"m{number}")
        found.append(
            Meter(
                id=made.id, organization_id=ORGANIZATION, name=made.name, created_at=NOW,
                filter=draw(filters), aggregation=draw(aggregations),
            )
        )
    return found


class Model:
    """First write wins, one event at a time."""

    def __init__(self) -> None:
        self.events: dict[str, Facts] = {}

    def take(self, raw: bytes) -> None:
        """One line of the log."""
        checked = check_line(raw, organization_id=ORGANIZATION, now=NOW)
        if isinstance(checked, Event):
            self.events.setdefault(str(checked.external_id), facts(checked, NOW))

    def counted(self, meter: Meter, customer: str) -> list[Facts]:
        """The events of one customer that a meter takes."""
        return [
            event
            for event in self.events.values()
            if event.external_customer_id == customer
            and matches(meter.filter, event)
            and considers(meter.aggregation, event)
        ]


def total_of(engine: Engine, meter: Meter, customer: str) -> Decimal:
    """What the running totals say of one customer."""
    subjects = engine.directory.find(ORGANIZATION, Names((), (customer,)))
    total = engine.totals.total(meter, subjects)
    assert total is not None
    measured = Measured(total.count, total.sum, None, total.min, total.max)
    return measured.value(meter.aggregation)


def stored_totals(engine: Engine, meter: Meter) -> dict[int, Decimal]:
    """What a recount over the store says, by customer number: grouped by DuckDB, unlike the running totals."""
    stage, parameters = Stage(), Parameters()
    subject = exp.column("subject")
    query = exp.select(subject, *measures(meter.aggregation, value(meter.aggregation, stage)))
    query = query.where(condition(meter.filter, stage, parameters), considered(meter.aggregation, stage))
    staged = stage.select(exp.to_table("events"), ["subject"], parameters)
    sql, values = statement(query.from_(staged.subquery("stage")).group_by(subject), parameters)
    with engine.store.read() as snapshot:
        found = snapshot.connection.execute(sql, values).fetchall()
    return {subject: Measured(*measured).value(meter.aggregation) for subject, *measured in found}


def assert_agrees(engine: Engine, model: Model, metered: list[Meter]) -> None:
    """I1, I2, I4, I7: all stored once, and every total is the model's."""
    stored = rows(engine.store, "SELECT external_id, count(*) FROM events GROUP BY ALL")
    assert {(external_id, 1) for external_id in model.events} == set(stored)
    tallies = engine.store.tallies()
    assert len(model.events) == tallies["stored"]
    for made in metered:
        if made.aggregation.func == "unique":
            continue
        recounted = stored_totals(engine, made)
        for customer in CUSTOMERS:
            expected = evaluate(made.aggregation, model.counted(made, customer))
            numbers = engine.directory.find(ORGANIZATION, Names((), (customer,)))

            assert expected == total_of(engine, made, customer)
            assert expected == exact_sum([recounted.get(number, Decimal(0)) for number in numbers])


def assert_charts_agree(engine: Engine, model: Model, metered: list[Meter]) -> None:
    """Quantities from the quarter hours in memory are those of the reference."""
    for made in metered:
        for interval, timezone in ((Interval.DAY, "Asia/Kathmandu"), (Interval.MONTH, "America/St_Johns")):
            points, bounds = usage.spans(FEBRUARY, MARCH, interval, timezone)
            totals = engine.totals.by_quarters(made, bounds)
            if totals is None:
                assert made.aggregation.func == "unique"
                continue
            parts = [Measured(total.count, total.sum, None, total.min, total.max) for total in totals]
            charted = usage.from_parts(made.aggregation, points, bounds, parts)

            expected = quantities(
                made, model.events.values(), start=FEBRUARY, end=MARCH, interval=interval, timezone=timezone
            )
            assert expected == charted


async def append(log: Log, lines: list[bytes], seed: int) -> None:
    """Write the lines in records of random length, admitted or foreign."""
    choose = random.Random(seed)
    while lines:
        count = choose.randint(1, 5)
        await log.append(USAGE_EVENTS, [entry(*lines[:count], admitted=choose.random() < 0.7)])
        lines = lines[count:]


@pytest.fixture(params=[1, plan.INDEXED_METERS_MIN], ids=["always by text", "as usual"])
def _indexed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to find a meter's rows: by the text that it looks for, and by a condition of its own."""
    with patch.object(plan, "INDEXED_METERS_MIN", request.param):
        yield


@pytest.mark.usefixtures("_indexed")
@settings(
    max_examples=15,
    deadline=None,
    phases=QUICK,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(
    lives=st.lists(st.lists(sent_lines(), max_size=15), min_size=1, max_size=3),
    metered=meters(),
    born=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_store_totals_and_reference_agree(
    lives: list[list[bytes]], metered: list[Meter], born: int, seed: int
) -> None:
    """Any events, any batching, meters made before or after them, restarts in between: the same numbers."""
    log, model = open_log("memory:"), Model()
    with TemporaryDirectory() as directory:
        for life, lines in enumerate(lives):
            changes: list[Any] = [organization()] if life == 0 else []
            changes += created(*metered) if life == min(born, len(lives) - 1) else []
            with Running(log, Path(directory) / "store.duckdb") as running:
                asyncio.run(append(log, lines, seed + life))
                if changes:
                    asyncio.run(log.append(USAGE_CONTROL, decisions(changes)))
                engine = running.catch_up()
                for raw in lines:
                    model.take(raw)
                if life == len(lives) - 1:
                    assert_agrees(engine, model, metered)
                    assert_charts_agree(engine, model, metered)
    log.close()


def test_many_meters_that_look_for_texts_each_take_their_own(tmp_path: Path) -> None:
    """Texts that occur, that never do, that look like numbers, and rows without the property or with another type."""
    looked_for = ["a", "b", "é", "5", "true", "0.5", "never"]
    metered = [
        msgspec.structs.replace(
            meter(f"m{number}", func=func, **({} if func == "count" else {"property": "tokens"})),
            filter=Filter("and", [Clause("model", Operator.EQ, text), *extra]),
        )
        for number, text in enumerate(looked_for)
        for func in ("count", "sum", "max", "unique")
        for extra in ([], [Clause("tokens", Operator.GT, 3)], [Clause("name", Operator.EQ, "chat")])
    ]
    metered = [msgspec.structs.replace(made, id=f"m{number}") for number, made in enumerate(metered)]
    at = "2026-02-03T10:15:00Z"
    values: list[Any] = ["a", "b", "é", "5", "true", 5, True, 0.5]
    lines = [
        line(f"r{n}", name=("call", "chat")[n % 2], timestamp=at, metadata={"model": values[n % 8], "tokens": n % 7})
        for n in range(200)
    ] + [line("bare", timestamp=at)]
    log, model = open_log("memory:"), Model()
    asyncio.run(append(log, lines, 1))
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(*metered)])))
    for raw in lines:
        model.take(raw)
    with Running(log, tmp_path / "store.duckdb") as running:
        engine = running.catch_up()
        assert_agrees(engine, model, metered)
        assert_charts_agree(engine, model, metered)
        distinct, ann = engine.catalogue.meters["m9"], engine.directory.find(ORGANIZATION, Names((), ("ann",)))
        unique = engine.totals.consumed(distinct, ann, None)
    log.close()

    assert metered[9].aggregation.func == "unique"
    assert unique is not None
    assert unique.value == evaluate(metered[9].aggregation, model.counted(metered[9], "ann"))


@pytest.mark.parametrize("batching", [1, 3, 100])
def test_any_batching_gives_the_same_store(tmp_path: Path, batching: int) -> None:
    """Reading the log in pieces of any size writes the same rows, tallies and dead letters."""
    log = open_log("memory:")
    lines = [line(f"r{number % 40}", metadata={"tokens": number % 50}) for number in range(120)] + [b"broken"]
    for first in range(0, len(lines), batching):
        asyncio.run(log.append(USAGE_EVENTS, [entry(*lines[first : first + batching], admitted=False)]))
    with Running(log, tmp_path / "store.duckdb") as running:
        engine = running.catch_up()
        found = rows(engine.store, "SELECT external_id, metadata, name FROM events ORDER BY seq")
        dead = rows(engine.store, "SELECT reason, raw FROM dead_letters ORDER BY number")
    log.close()

    assert [(f"r{n}", f'{{"tokens":{n % 50}}}', "call") for n in range(40)] == found
    conflicting = [lines[n] for n in range(40, 120) if n % 50 != (n % 40) % 50]
    expected = [("conflict", raw) for raw in conflicting] + [("json_invalid", b"broken")]
    assert expected == sorted(dead, key=lambda letter: letter[0])


def test_a_meter_made_in_the_same_round_as_events_counts_them_once(tmp_path: Path) -> None:
    """History ends where the round that made the meter begins."""
    log = open_log("memory:")
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(meter("m"))])))
    asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"), line("b"))]))
    with Running(log, tmp_path / "store.duckdb") as running:
        assert total_of(running.catch_up(), meter("m"), "ann") == 2
    log.close()


def test_a_change_that_leaves_what_is_counted_reads_no_history(tmp_path: Path) -> None:
    """A meter's name, labels and archiving touch no total; another filter is counted from the beginning."""
    log, counted = open_log("memory:"), meter("m")
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(counted, meter("other"))])))
    asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"), line("b", name="another"))]))
    with Running(log, tmp_path / "store.duckdb") as running:
        before = dict(running.catch_up().totals._meters)
        renamed = msgspec.structs.replace(counted, name="Renamed", metadata={"plan": "pro"}, archived_at=NOW)
        asyncio.run(log.append(USAGE_CONTROL, decisions([MeterUpdated(renamed)])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("c"))]))
        engine = running.catch_up()
        assert engine.totals._meters["m"] is before["m"]
        assert total_of(engine, renamed, "ann") == 3
        narrowed = msgspec.structs.replace(renamed, filter=Filter("and", [Clause("name", Operator.EQ, "another")]))
        asyncio.run(log.append(USAGE_CONTROL, decisions([MeterUpdated(narrowed)])))
        engine = running.catch_up()
        assert engine.totals._meters["other"] is before["other"]
        assert total_of(engine, narrowed, "ann") == 1
    log.close()
