"""``AsyncIngestion``: the same client in an application with an event loop.

Capturing takes microseconds and is done at once, on the loop; whatever may wait (room in a full spool, ``flush``,
``close``) waits in a thread, so that the loop goes on; not in one of those in which asyncio looks up hosts. No thread
waits long for what its coroutine may have given up: it would keep others waiting, and the process from its end. Events
travel on the client's own threads, so that a busy loop holds no usage up and an ended one loses none.
"""

import asyncio
import contextvars
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from ingest.client.event import Event
from ingest.client.ingestion import Ingestion, Stats
from ingest.client.lifecycle import abandon
from ingest.client.strategy import S

_WAITING_MAX = 8  # threads: more events that wait for room would only wait behind each other
_GLANCE_S = 0.25  # how long a flush waits in a thread at a time, and so the longest that a cancelled one keeps it

T = TypeVar("T")


class AsyncIngestion:
    """Takes the arguments of ``Ingestion``. An asynchronous context manager; or await ``close`` at the end."""

    def __init__(self, token: str, **arguments: Any) -> None:
        self._ingestion = Ingestion(token, **arguments)
        self._make_threads()

    async def ingest(self, event: Event | Mapping[str, Any]) -> str | None:
        """As ``Ingestion.ingest``; waiting for room leaves the loop free."""
        if self._ingestion.may_wait():
            return await self._wait("ingest", lambda: self._ingestion.ingest(event))
        return self._ingestion.ingest(event)

    def capture(self, event: Event | Mapping[str, Any]) -> str | None:
        """As ``Ingestion.ingest``, for strategies and for code that cannot await: where the spool is full and shall
        block, this holds the loop up for at most ``limits.block_s_max``, and not again until room has appeared."""
        return self._ingestion.ingest(event)

    def strategy(self, strategy_class: type[S], event_name: str, **metadata: Any) -> S:
        """As ``Ingestion.strategy``."""
        return strategy_class(event_name, self, metadata)

    async def flush(self, timeout_s: float | None = None) -> bool:
        """As ``Ingestion.flush``."""
        number = self._ingestion.begin_flush()
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            glance_s = min(_GLANCE_S, until_s - time.monotonic())
            is_settled = await self._wait("flush", partial(self._ingestion.wait_flushed, number, glance_s))
            if is_settled is not None or time.monotonic() >= until_s:
                return bool(is_settled)

    async def close(self, timeout_s: float | None = None) -> None:
        """As ``Ingestion.close``."""
        await asyncio.to_thread(self._ingestion.close, timeout_s)  # not behind flushes that only it ends

    def stats(self) -> Stats:
        """As ``Ingestion.stats``."""
        return self._ingestion.stats()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _wait(self, what: Literal["ingest", "flush"], action: Callable[[], T]) -> T:
        if self._process_id != os.getpid():  # a fork: the threads did not come along
            abandon(self._threads)
            self._make_threads()
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads[what], lambda: context.run(action))

    def _make_threads(self) -> None:
        self._process_id = os.getpid()
        self._threads = {
            what: ThreadPoolExecutor(_WAITING_MAX, f"meterstream-client-{what}") for what in ("ingest", "flush")
        }
