"""A large organization's meters change: counting goes on while their common statement is made again in a thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from aggregator.totals import plan as module
from aggregator.totals.plan import APART_METERS_MIN, Prepared
from ingest.log import open_log
from meters.catalogue.catalogue import Change, MeterUpdated, Names
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from meters.meter import Meter
from tests.support.records import ORGANIZATION, Running, created, decisions, entry, line, meter, organization
from tests.support.waiting import PATIENCE_S, eventually

METERS = APART_METERS_MIN + 4


def least(number: int, func: str = "count", **aggregation: Any) -> Meter:
    """A meter of two clauses: events named call whose ``n`` is at least the number."""
    clauses = [
        {"property": "name", "operator": "eq", "value": "call"}, {"property": "n", "operator": "gte", "value": number},
    ]  # fmt: skip
    return meter(f"m{number}", {"conjunction": "and", "clauses": clauses}, func=func, **aggregation)


class Held:
    """Whether a thread that makes a statement has begun, and whether it may go on; how often one began."""

    def __init__(self) -> None:
        self.begun, self.free, self.times = threading.Event(), threading.Event(), 0


@contextmanager
def held(error: Exception | None = None) -> Iterator[Held]:
    """No statement is made in a thread before it is set free, and none at all with an error."""
    found, made = Held(), module.plan

    def waiting(*arguments: Any, **more: Any) -> Any:
        if threading.current_thread().name.startswith("plan"):
            found.times += 1
            found.begun.set()
            assert found.free.wait(PATIENCE_S)
            if error is not None:
                raise error
        return made(*arguments, **more)

    with patch.object(module, "plan", waiting):
        try:
            yield found
        finally:
            found.free.set()


class Story:
    """An engine, what was sent to it, and what each meter has to have counted."""

    def __init__(self, log: Log, running: Running) -> None:
        self.log, self.running = log, running
        self.values: list[int] = []
        self.meters = {made.id: made for made in map(least, range(METERS))}
        self.decide(organization(), *created(*self.meters.values()))

    def decide(self, *changes: Change) -> None:
        """Write decisions, and wait until they are applied: events in front of them would be counted as history."""
        asyncio.run(self.log.append(USAGE_CONTROL, decisions(changes)))
        self.running.catch_up()

    def use(self, *values: int) -> None:
        """Send events, and check every total once they are counted."""
        lines = [line(f"{len(self.values)}-{n}-{at}", metadata={"n": n}) for at, n in enumerate(values)]
        self.values += values
        asyncio.run(self.log.append(USAGE_EVENTS, [entry(*lines)]))
        engine = self.running.catch_up()
        numbers = engine.directory.find(ORGANIZATION, Names((), ("ann",)))
        for number, made in ((int(id[1:]), made) for id, made in self.meters.items()):
            total = engine.totals.total(made, numbers)
            assert total is not None
            counted = [value for value in self.values if value >= number]
            assert (total.count, total.sum) == (len(counted), sum(counted) if made.aggregation.func == "sum" else 0)

    @property
    def plans(self) -> list[Prepared]:
        """The statements that count now."""
        [plans] = self.running.engine.totals._plans._plans.values()
        return plans.found


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    """Some more meters than are planned at once."""
    log = open_log("memory:")
    with Running(log, tmp_path / "store.duckdb") as running:
        yield Story(log, running)
    log.close()


def is_renewed(story: Story, value: int) -> Callable[[], bool]:
    """Whether one statement has all meters; asked for with another event, since plans are looked at with rows."""

    def looked() -> bool:
        story.use(value)
        return len(story.plans) == 1 and story.plans[0].is_whole

    return looked


def test_counting_goes_on_while_a_statement_is_made(story: Story) -> None:
    """New meters and changed ones count beside the others, before the statement of all is there and after it."""
    story.use(1, 5, 30)
    assert len(story.plans) == 1
    with held() as thread:
        for number in (METERS, METERS + 1):
            story.meters[f"m{number}"] = least(number)
            story.decide(*created(story.meters[f"m{number}"]))
            story.use(number, number - 1, 3)
        assert thread.begun.wait(PATIENCE_S)
        changed = story.meters["m2"] = least(2, "sum", property="n")
        story.decide(MeterUpdated(changed))
        story.use(1, 2, 3)
        story.meters["m2"] = least(2)
        story.decide(MeterUpdated(story.meters["m2"]))
        story.use(2, 40)
        assert thread.times == 1
        assert [len(one.plan.choices) for one in story.plans] == [METERS - 1, 1, 1, 1]
        thread.free.set()
        eventually(is_renewed(story, 7))
    assert len(story.plans[0].plan.choices) == METERS + 2


def test_counting_goes_on_where_no_statement_can_be_made(story: Story) -> None:
    """As where memory is short; the next change tries again."""
    story.use(1, 30)
    with held(MemoryError("no room")) as thread:
        thread.free.set()
        story.meters[f"m{METERS}"] = least(METERS)
        story.decide(*created(story.meters[f"m{METERS}"]))
        story.use(2, 40)
        assert thread.begun.wait(PATIENCE_S)
        story.use(3, 50)
    story.meters["m3"] = least(3, "sum", property="n")
    story.decide(MeterUpdated(story.meters["m3"]))
    eventually(is_renewed(story, 60))


def test_an_engine_ends_while_a_statement_is_made(tmp_path: Path) -> None:
    """It waits for the thread, whose connection would keep the store open."""
    log = open_log("memory:")
    with held() as thread:
        with Running(log, tmp_path / "store.duckdb") as running:
            story = Story(log, running)
            story.use(1)
            story.decide(*created(least(METERS)))
            story.use(2)
            assert thread.begun.wait(PATIENCE_S)
            freeing = threading.Thread(target=lambda: running.engine.ended.wait() and thread.free.set())
            freeing.start()
        freeing.join()
    with Running(log, tmp_path / "store.duckdb") as running:
        assert running.catch_up().failure is None
    log.close()
