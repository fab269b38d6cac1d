"""Bodies are checked one at a time, and between two of them the event loop looks at its sockets.

Checking a body of a hundred events takes about a millisecond, in which nothing else happens. When sixteen of them have
arrived together and the loop runs one after the other, a read that came beside them waits for all sixteen, on its way
to the query API and again on its way back. In turns it waits for one.
"""

import asyncio
from collections import deque

TURN_BYTES_MIN = 8 * 1024
"""Bytes of a body that is worth a turn: a smaller one is checked in the time of a few looks at the sockets."""


class Turns:
    """A line, first come first served. For one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False  # in this round of the loop

    async def take(self) -> None:
        """Wait until nobody else had a turn in this round of the loop; the turn ends with the next ``await``."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        """Another round: whoever is first in line runs in it, unless nobody waits for it any more."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._taken = False
