"""Time as usage: how long something took, by a clock that nobody sets.

    render = ingestion.strategy(DeltaTime, "render", quality="high")

    with render.measure("user-1"):                     # a block
        ...
    @render.measured("user-1")                         # a function, a coroutine function, a generator of either kind
    def frames(): ...
    timer = render.start("user-1"); ...; timer.stop()  # two places

Each gives one event with ``deltaTime`` in seconds and ``strategy: "DeltaTime"``, also when an error ends it. Of a
generator the time from its first step to its last is measured, with what its consumer did in between.
"""

import functools
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractContextManager, aclosing
from decimal import Decimal
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar, cast

from ingest.client.strategy import Capturing, CustomerLike, Strategy, Value

logger = logging.getLogger(__name__)

_NANOSECONDS = 9  # decimals of a second
F = TypeVar("F", bound=Callable[..., Any])
WhoseCall = CustomerLike | Callable[..., CustomerLike]


class Timer(AbstractContextManager["Timer"]):
    """A measurement that runs. ``stop`` ends it and captures the event, once; so does the end of its block."""

    def __init__(self, finish: Callable[[int, Mapping[str, Value]], str | None], clock_ns: Callable[[], int]) -> None:
        self._finish, self._clock_ns = finish, clock_ns
        self._once = Lock()
        self._began_ns = clock_ns()

    def stop(self, **metadata: Value) -> str | None:
        """Capture the event, with this metadata on top; its id. Nothing and None when it was stopped before."""
        elapsed_ns = self._clock_ns() - self._began_ns
        return self._finish(elapsed_ns, metadata) if self._once.acquire(blocking=False) else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class DeltaTime(Strategy):
    """Measures time. ``clock_ns`` gives nanoseconds of a clock that only goes forward."""

    def __init__(
        self, event_name: str, ingestion: Capturing, metadata: Mapping[str, Any] | None = None, *,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:  # fmt: skip
        super().__init__(event_name, ingestion, metadata)
        self._clock_ns = clock_ns

    def start(self, customer: CustomerLike, *, external_id: str | None = None, **metadata: Value) -> Timer:
        """Begin to measure. A task that may run twice names its ``external_id``, and counts once."""
        return self._timer(customer, external_id, metadata)

    def _timer(self, customer: CustomerLike, external_id: str | None, metadata: Mapping[str, Value]) -> Timer:
        def finish(elapsed_ns: int, more: Mapping[str, Value]) -> str | None:
            seconds = Decimal(elapsed_ns).scaleb(-_NANOSECONDS)
            measured = {"deltaTime": seconds, "strategy": "DeltaTime"}
            return self.emit(customer, measured, {**metadata, **more}, external_id=external_id)

        return Timer(finish, self._clock_ns)

    measure = start
    """The same, for ``with``."""

    def ingest(self, external_customer_id: str, **metadata: Value) -> Timer:
        """In the shape of Polar's strategies: begin to measure for a customer, named by your id."""
        return self._timer(external_customer_id, None, metadata)

    def measured(self, customer: WhoseCall, **metadata: Value) -> Callable[[F], F]:
        """A decorator that measures every call. ``customer`` may be a function of the call's arguments."""
        def decorate(function: F) -> F:
            def begin(*arguments: Any, **named: Any) -> Timer:
                try:
                    who = customer(*arguments, **named) if callable(customer) else customer
                except Exception:
                    logger.exception("nobody knows whose call this is; it is not measured")
                    return Timer(lambda elapsed_ns, more: None, self._clock_ns)
                return self._timer(who, None, metadata)

            return cast(F, functools.wraps(function)(_wrapped(function, begin)))

        return decorate


def _wrapped(function: Callable[..., Any], begin: Callable[..., Timer]) -> Callable[..., Any]:
    """A function of the same kind that is measured."""
    if inspect.isasyncgenfunction(function):
        def async_generator(*arguments: Any, **named: Any) -> Any:
            return _async_steps(function(*arguments, **named), lambda: begin(*arguments, **named))
        return async_generator
    if inspect.isgeneratorfunction(function):
        def generator(*arguments: Any, **named: Any) -> Any:
            return _steps(function(*arguments, **named), lambda: begin(*arguments, **named))
        return generator
    if inspect.iscoroutinefunction(function):
        async def coroutine(*arguments: Any, **named: Any) -> Any:
            with begin(*arguments, **named):
                return await function(*arguments, **named)
        return coroutine

    def call(*arguments: Any, **named: Any) -> Any:
        with begin(*arguments, **named):
            return function(*arguments, **named)
    return call


def _steps(inner: Any, begin: Callable[[], Timer]) -> Generator[Any, Any, Any]:
    """``yield from`` passes on what is sent, thrown and returned."""
    with begin():
        return (yield from inner)


async def _async_steps(inner: Any, begin: Callable[[], Timer]) -> AsyncGenerator[Any, Any]:
    """The same for an asynchronous generator, which has no ``yield from``."""
    with begin():
        async with aclosing(inner):
            step = inner.asend(None)
            while True:
                try:
                    item = await step
                except StopAsyncIteration:
                    return
                try:
                    step = inner.asend((yield item))
                except GeneratorExit:
                    raise
                except BaseException as error:  # thrown in by the consumer; the generator may handle it
                    step = inner.athrow(error)
