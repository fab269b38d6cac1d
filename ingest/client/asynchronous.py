"""``AsyncIngestion``: the same client in an application with an event loop.

Capturing takes microseconds and is done at once, on the loop; whatever may wait (room in a full spool, ``flush``,
``close``) waits in a thread, so that the loop goes on. Events travel on the client's own threads, so that a busy loop
holds no usage up and an ended one loses none.
"""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ingest.client.event import Event
from ingest.client.ingestion import Ingestion, Stats
from ingest.client.strategy import S


class AsyncIngestion:
    """Takes the arguments of ``Ingestion``. An asynchronous context manager; or await ``close`` at the end."""

    def __init__(self, token: str, **arguments: Any) -> None:
        self._ingestion = Ingestion(token, **arguments)

    async def ingest(self, event: Event | Mapping[str, Any]) -> str | None:
        """As ``Ingestion.ingest``; waiting for room leaves the loop free."""
        if self._ingestion.may_wait():
            return await asyncio.to_thread(self._ingestion.ingest, event)
        return self._ingestion.ingest(event)

    def capture(self, event: Event | Mapping[str, Any]) -> str | None:
        """As ``Ingestion.ingest``, for strategies and for code that cannot await: where the spool is full and shall
        block, this holds the loop up for at most ``limits.block_s_max``."""
        return self._ingestion.ingest(event)

    def strategy(self, strategy_class: type[S], event_name: str, **metadata: Any) -> S:
        """As ``Ingestion.strategy``."""
        return strategy_class(event_name, self, metadata)

    async def flush(self, timeout_s: float | None = None) -> bool:
        """As ``Ingestion.flush``."""
        return await asyncio.to_thread(self._ingestion.flush, timeout_s)

    async def close(self, timeout_s: float | None = None) -> None:
        """As ``Ingestion.close``."""
        await asyncio.to_thread(self._ingestion.close, timeout_s)

    def stats(self) -> Stats:
        """As ``Ingestion.stats``."""
        return self._ingestion.stats()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
