"""Conditions are awaited, never slept for: with a bound that only a failure reaches."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

PATIENCE_S = 60.0  # for what takes milliseconds, or a second, on a machine that does nothing else
LOOK_AGAIN_S = 0.005


def eventually(condition: Callable[[], Any], patience_s: float = PATIENCE_S, look_again_s: float = LOOK_AGAIN_S) -> Any:
    """What the condition gives once it is true. Fails when it does not become so."""
    deadline_s = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(look_again_s)
    return found


async def until(reached: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for what other tasks of the loop do. Fails when they do not."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = reached()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(LOOK_AGAIN_S)
