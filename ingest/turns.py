"""Bodies are checked in turns, and between two turns the event loop looks at its sockets.

Checking a body of a hundred unusual events takes about a millisecond, in which nothing else happens. When sixteen of
them have arrived together and the loop runs one after the other, a read that came beside them waits for all sixteen, on
its way to the query API and again on its way back. In turns it waits for one.
"""

import asyncio
from collections import deque
from collections.abc import Callable

TURN_BYTES_MIN = 8 * 1024
"""Bytes of a body that is worth a turn: a smaller one is checked in the time of a few looks at the sockets."""


class Turns:
    """A line, first come first served. For one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._taken = False  # the next round of the loop

    def do(self, work: Callable[[], object]) -> None:
        """Do it when its turn comes: in the next round of the loop, if nobody else waits."""
        self._waiting.append(work)
        if not self._taken:
            self._taken = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        """Another round: it is the turn of whoever is first in line."""
        work = self._waiting.popleft()
        self._taken = bool(self._waiting)
        if self._taken:
            asyncio.get_running_loop().call_soon(self._next)
        work()
