"""Histories that are still being counted, or could not be: windows wait for them, and what failed is done again."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

from aggregator.totals import running as module
from aggregator.totals.plan import PREPARED_METERS_MAX
from aggregator.totals.running import HISTORIES_AT_ONCE
from aggregator.view import Consumption
from ingest.log import open_log
from meters.catalogue.catalogue import Customer, CustomerCreated, Names
from meters.ledger.ledger import MeterReset
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from meters.timestamps import microseconds_of
from tests.support.held_backfills import uncounted
from tests.support.records import NOW, ORGANIZATION, Running, created, decisions, entry, line, meter, organization
from tests.support.waiting import eventually

ANN = "11111111-1111-4111-8111-111111111111"
METER = meter("m", func="sum", property="n")
MINUTES = 5
LINES = 1_000  # of each minute
HOUR = timedelta(hours=1)


@contextmanager
def used() -> Iterator[Log]:
    """A log in which a customer used 0.9 a thousand times in each of five minutes; it is an hour later."""
    now = [NOW]
    log = open_log("memory:", clock_us=lambda: microseconds_of(now[0]))
    ann = Customer(id=ANN, organization_id=ORGANIZATION, external_id="ann", created_at=NOW)
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(METER), CustomerCreated(ann)])))
    for minute in range(MINUTES):
        now[0] = NOW + timedelta(minutes=minute)
        lines = [line(f"{minute}-{number}", metadata='{"n": 0.9}') for number in range(LINES)]
        asyncio.run(log.append(USAGE_EVENTS, [entry(*lines)]))
    now[0] = NOW + HOUR
    yield log
    log.close()


def reset(log: Log, minute: int) -> None:
    """The customer's window begins with that minute."""
    at = NOW + timedelta(minutes=minute)
    cut = MeterReset(id=f"r{minute}", organization_id=ORGANIZATION, customer_id=ANN, meter_ids=["m"], at=at)
    asyncio.run(log.append(USAGE_CONTROL, decisions([cut])))


def consumed(running: Running, minute: int) -> Consumption | None:
    """What was used since that minute, as memory has it."""
    engine = running.engine
    subjects = engine.directory.find(ORGANIZATION, Names((ANN,), ("ann",)))
    return engine.totals.consumed(engine.catalogue.meters["m"], subjects, NOW + timedelta(minutes=minute))


def used_since(minute: int) -> tuple[int, Decimal]:
    """Events and amount."""
    count = LINES * (MINUTES - minute)
    return count, count * Decimal("0.9")


def test_a_window_that_begins_in_the_past_is_counted_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its rows at once may be more than memory holds, and their fractions more than 64 bits."""
    monkeypatch.setattr(module, "HISTORY_ROWS", 2_048)
    pieces: list[int] = []
    scatter = module._scatter

    def watched(counted: Any, compiled: Any, table: Any, calendar: Any) -> None:
        pieces.append(table.num_rows)
        scatter(counted, compiled, table, calendar)

    with used() as log, Running(log, tmp_path / "store.duckdb") as running:
        running.catch_up()
        monkeypatch.setattr(module, "_scatter", watched)
        reset(log, 1)
        running.catch_up()
        found = consumed(running, 1)
    assert found is not None
    assert (found.count, found.value) == used_since(1)
    assert len(pieces) > 1
    assert max(pieces) <= 2_048


def test_windows_wait_while_history_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin when it is known, however many they are, and wait until then, also while the store is asked."""
    inside, waited = module.RunningTotals._inside, list[bool]()

    def watched(totals: module.RunningTotals, meter: Any, late: Any) -> Any:
        waited.append(meter.id in totals._waiting)
        return inside(totals, meter, late)

    monkeypatch.setattr(module.RunningTotals, "_inside", watched)
    with used() as log:
        with Running(log, tmp_path / "store.duckdb") as running:
            running.catch_up()
        running = Running(log, tmp_path / "store.duckdb")
        with uncounted() as passes, running:
            asyncio.run(log.append(USAGE_EVENTS, [entry(line("now", metadata='{"n": 0.5}'))]))
            for minute in range(MINUTES):
                reset(log, minute)
            eventually(lambda: running.engine.control_position == log.ends(USAGE_CONTROL)[0])
            eventually(lambda: dict(running.engine.as_of) == log.ends(USAGE_EVENTS))
            eventually(lambda: passes.begun)
            assert passes.begun == [["m"]]
            assert consumed(running, MINUTES - 1) is None
            passes.free.set()
            found = eventually(lambda: consumed(running, MINUTES - 1))
    count, amount = used_since(MINUTES - 1)
    assert (found.count, found.value) == (count + 1, amount + Decimal("0.5"))
    assert waited == [True]


def test_a_history_that_failed_is_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may be short for a moment; until then nothing is said rather than something wrong."""
    monkeypatch.setattr(module, "HISTORY_AGAIN_S", 0.01)
    plan, failures = module.plan, [duckdb.OutOfMemoryException("short"), OSError("in the middle")]

    def failing(meters: Any, relation: str, *written: Any, **more: Any) -> Any:
        if relation == module._HISTORY and failures:
            raise failures.pop()
        return plan(meters, relation, *written, **more)

    monkeypatch.setattr(module, "plan", failing)
    with used() as log:
        with Running(log, tmp_path / "store.duckdb") as running:
            running.catch_up()
        with Running(log, tmp_path / "store.duckdb") as running:
            running.catch_up()
            engine = running.engine
            numbers = engine.directory.find(ORGANIZATION, Names((ANN,), ("ann",)))
            found = engine.totals.total(engine.catalogue.meters["m"], numbers)
    assert failures == []
    assert found is not None
    assert (found.count, found.sum) == used_since(0)


def test_meters_that_wait_are_counted_in_one_pass(tmp_path: Path) -> None:
    """Each up to where it was made: what came between two is in the history of one, in the rounds of the other."""
    made = [meter(f"late-{number}", func="sum", property="n") for number in range(HISTORIES_AT_ONCE + 3)]
    with used() as log, Running(log, tmp_path / "store.duckdb") as running, uncounted() as passes:
        engine = running.engine
        eventually(lambda: dict(engine.as_of) == log.ends(USAGE_EVENTS))
        for number, one in enumerate(made):
            asyncio.run(log.append(USAGE_CONTROL, decisions(created(one))))
            eventually(lambda: engine.control_position == log.ends(USAGE_CONTROL)[0])
            asyncio.run(log.append(USAGE_EVENTS, [entry(line(f"now-{number}", metadata='{"n": 0.9}'))]))
            eventually(lambda: dict(engine.as_of) == log.ends(USAGE_EVENTS))
            if number < HISTORIES_AT_ONCE:
                eventually(lambda expected=number + 1: len(passes.begun) == expected)
        passes.free.set()
        running.catch_up()
        subjects = engine.directory.find(ORGANIZATION, Names((ANN,), ("ann",)))
        found = [engine.totals.total(one, subjects) for one in made]
    assert passes.begun == [["late-0"], ["late-1"], ["late-2", "late-3", "late-4"]]
    count = MINUTES * LINES + len(made)
    assert [(total.count, total.sum) for total in found if total] == [(count, count * Decimal("0.9"))] * len(made)


def test_histories_wait_where_no_thread_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine goes on without them, and they are counted when there is one again."""
    start, refused = threading.Thread.start, list[str]()

    def refusing(thread: threading.Thread) -> None:
        if thread.name == "history" and len(refused) < 2:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    with used() as log:
        with Running(log, tmp_path / "store.duckdb") as running:
            running.catch_up()
        monkeypatch.setattr(threading.Thread, "start", refusing)
        with Running(log, tmp_path / "store.duckdb") as running:
            running.catch_up()
            engine = running.engine
            numbers = engine.directory.find(ORGANIZATION, Names((ANN,), ("ann",)))
            found = engine.totals.total(engine.catalogue.meters["m"], numbers)
    assert len(refused) == 2
    assert found is not None
    assert (found.count, found.sum) == used_since(0)


@pytest.mark.parametrize("room", [0, PREPARED_METERS_MAX])
def test_meters_count_alike_whether_their_statement_is_planned_once_or_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """There is room for a number of plans, which says nothing about what is counted."""
    monkeypatch.setattr("aggregator.totals.plan.PREPARED_METERS_MAX", room)
    with used() as log, Running(log, tmp_path / "store.duckdb") as running:
        running.catch_up()
        totals = running.engine.totals
        meter = running.engine.catalogue.meters["m"]
        found = totals.total(meter, running.engine.directory.find(ORGANIZATION, Names((ANN,), ("ann",))))
        [plans] = totals._plans._plans.values()
        assert [one.text.startswith("EXECUTE ") for one in plans.found] == [room > 0]
    assert found is not None
    assert (found.count, found.sum) == used_since(0)
