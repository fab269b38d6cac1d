"""Lines before what only a few may have at a time: threads, and answers that wait for a position.

Nobody is kept out by another: of one organization fewer come in, and fewer wait, than of all. Who does not come in soon
is sent away, since whoever asked will not wait for ever, and work for nobody makes everybody wait longer.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from aggregator.api.errors import Busy
from aggregator.api.limits import TURN_S_MAX


class Waits:
    """So many wait for something at a time, and so many of one organization. Raises Busy for whoever comes then."""

    def __init__(self, most: int, of_one_max: int) -> None:
        self._most, self._of_one_max = most, of_one_max
        self._waiting: Counter[str] = Counter()

    @property
    def now(self) -> int:
        """How many wait."""
        return self._waiting.total()

    @contextmanager
    def of(self, organization_id: str) -> Iterator[None]:
        """One more, until left."""
        if self.now >= self._most or self._waiting[organization_id] >= self._of_one_max:
            raise Busy
        self._waiting[organization_id] += 1
        try:
            yield
        finally:
            self._waiting -= Counter([organization_id])  # and who has none any more is forgotten


class Line:
    """So many come in at a time, and so many of one organization; more wait for their turn. Raises Busy for whoever
    comes where too many wait, and for whoever waited for TURN_S_MAX."""

    def __init__(self, at_once: int, of_one: int, waits: Waits) -> None:
        self._turns, self._of_one, self.waits = asyncio.Semaphore(at_once), of_one, waits
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def enter(self, organization_id: str) -> Callable[[], None]:
        """Wait for a turn, the organization's own first; what ends it."""
        own = self._own.setdefault(organization_id, asyncio.Semaphore(self._of_one))
        with self.waits.of(organization_id), ExitStack() as held:
            try:
                async with asyncio.timeout(TURN_S_MAX):
                    for turns in (own, self._turns):
                        await turns.acquire()
                        held.callback(turns.release)
            except TimeoutError as error:
                raise Busy from error
            return held.pop_all().close

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn of nobody in particular."""
        leave = await self.enter("")
        try:
            yield
        finally:
            leave()
