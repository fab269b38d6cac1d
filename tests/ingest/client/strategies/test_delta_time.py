"""Time as usage: each way of measuring gives one event, whatever ends it, and changes nothing else."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from ingest.client import Customer
from ingest.client.strategies.delta_time import DeltaTime
from ingest.client.testing import RecordingIngestion


class Clock:
    """A clock that a test sets, in nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 7_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def passes(self, nanoseconds: int = 1_500_000_001) -> None:
        """Time goes by."""
        self.now_ns += nanoseconds


class Bench:
    """A strategy with its clock and what it captured."""

    def __init__(self) -> None:
        self.ingestion, self.clock = RecordingIngestion(), Clock()
        self.time = DeltaTime("task", self.ingestion, {"plan": "pro"}, clock_ns=self.clock)

    def measured(self, seconds: float = 1.500000001) -> dict[str, Any]:
        """The only event, which says so many seconds."""
        event = self.ingestion.one("task")
        assert event["metadata"]["deltaTime"] == seconds
        assert event["metadata"]["strategy"] == "DeltaTime"
        assert event["metadata"]["plan"] == "pro"
        return event


@pytest.fixture
def bench() -> Bench:
    """A strategy at work."""
    return Bench()


def test_a_block_is_measured(bench: Bench) -> None:
    """From its begin to its end, exactly, to the nanosecond."""
    with bench.time.measure("u", queue="fast"):
        bench.clock.passes()

    event = bench.measured()
    assert (event["external_customer_id"], event["metadata"]["queue"]) == ("u", "fast")


def test_a_block_that_fails_is_measured_too(bench: Bench) -> None:
    """The error goes on."""
    def fail() -> None:
        with bench.time.measure(Customer(customer_id="11111111-1111-4111-8111-111111111111")):
            bench.clock.passes()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert bench.measured()["customer_id"] == "11111111-1111-4111-8111-111111111111"


def test_a_timer_stops_once(bench: Bench) -> None:
    """The first stop counts; the end of a block around it adds nothing."""
    with bench.time.start("u", external_id="task-1") as timer:
        bench.clock.passes()
        assert timer.stop(result="ok") == "task-1"
        bench.clock.passes()
        assert timer.stop() is None

    assert bench.measured()["metadata"]["result"] == "ok"


def test_a_function_is_measured(bench: Bench) -> None:
    """The customer may come from the call; name, arguments and result stay as they were."""
    @bench.time.measured(lambda user, **named: user, kind="sync")
    def work(user: str, *, factor: int) -> int:
        """Works."""
        bench.clock.passes()
        return factor * 2

    assert (work("ann", factor=3), work.__name__, work.__doc__) == (6, "work", "Works.")
    assert bench.measured()["external_customer_id"] == "ann"


def test_a_coroutine_is_measured(bench: Bench) -> None:
    """With the time it waited."""
    @bench.time.measured("u")
    async def work() -> str:
        await asyncio.sleep(0)
        bench.clock.passes()
        return "done"

    assert asyncio.run(work()) == "done"
    bench.measured()


def test_a_generator_is_measured(bench: Bench) -> None:
    """From the first step to the last; sent values, thrown errors and the result pass through."""
    @bench.time.measured("u")
    def steps() -> Iterator[Any]:
        received = yield 1
        try:
            yield received
        except ValueError:
            bench.clock.passes()
            yield "caught"
        return "result"

    running: Any = steps()
    assert (next(running), running.send("sent"), running.throw(ValueError())) == (1, "sent", "caught")
    with pytest.raises(StopIteration, match="result"):
        next(running)
    bench.measured()


def test_an_asynchronous_generator_is_measured(bench: Bench) -> None:
    """The same, for the other kind."""
    @bench.time.measured("u")
    async def steps() -> AsyncIterator[Any]:
        received = yield 1
        try:
            yield received
        except ValueError:
            bench.clock.passes()
            yield "caught"

    async def consume() -> list[Any]:
        running: Any = steps()
        found = [await running.__anext__(), await running.asend("sent"), await running.athrow(ValueError())]
        with pytest.raises(StopAsyncIteration):
            await running.__anext__()
        return found

    assert asyncio.run(consume()) == [1, "sent", "caught"]
    bench.measured()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_abandoned_generator_is_measured_and_closed(bench: Bench, kind: str) -> None:
    """Its ``finally`` runs, and its time until then counts, once."""
    closed = []

    @bench.time.measured("u")
    def steps() -> Iterator[int]:
        try:
            yield 1
        finally:
            closed.append(1)

    @bench.time.measured("u")
    async def async_steps() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(1)

    async def consume() -> None:
        running: Any = async_steps()
        await running.__anext__()
        bench.clock.passes()
        await running.aclose()

    if kind == "sync":
        running: Any = steps()
        next(running)
        bench.clock.passes()
        running.close()
    else:
        asyncio.run(consume())

    assert closed == [1]
    bench.measured()


def broken(*arguments: object) -> str:
    """Does not know."""
    raise RuntimeError("no customer")


def test_metering_that_fails_is_not_the_callers_problem(bench: Bench) -> None:
    """Who does not know whose call it is, or gives metadata that nobody takes, gets the result all the same."""
    calls: list[Callable[[], int]] = [
        bench.time.measured(broken)(lambda: 1), bench.time.measured("u", bad=[1])(lambda: 2),  # type: ignore[arg-type]
        bench.time.cost(broken).measured("u")(lambda: 3),
    ]  # fmt: skip

    assert [call() for call in calls] == [1, 2, 3]
    assert [rejection.type for rejection in bench.ingestion.rejections] == ["metadata_value_type"]
    assert "_cost" not in bench.ingestion.one()["metadata"]


def test_time_can_cost(bench: Bench) -> None:
    """A cost function sees what was measured; its decimals stay exact."""
    with bench.time.cost(lambda measured: measured["deltaTime"] * 2).measure("u"):
        bench.clock.passes()

    assert bench.measured()["metadata"]["_cost"] == {"amount": 3.000000002, "currency": "usd"}


def test_the_clock_is_monotonic_by_default() -> None:
    """Without a clock of its own, real time passes."""
    ingestion = RecordingIngestion()
    ingestion.strategy(DeltaTime, "task").start("u").stop()

    assert ingestion.one()["metadata"]["deltaTime"] > 0
