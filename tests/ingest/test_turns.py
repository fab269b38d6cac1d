"""Turns at the event loop: one in a round of the loop, in the order of asking."""

import asyncio
import contextlib

import pytest
import uvloop

from ingest.turns import Turns


class Rounds:
    """Counts the rounds of the running loop."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        self.count += 1
        self._handle = self._loop.call_soon(self._pass)

    def stop(self) -> None:
        """Count no more."""
        self._handle.cancel()


async def turns_of(count: int, cancelled: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
    """(who, in which round) of so many that ask together, in the order of their turns."""
    turns, rounds, had = Turns(), Rounds(), list[tuple[int, int]]()

    async def one(number: int) -> None:
        await turns.take()
        had.append((number, rounds.count))

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    await asyncio.sleep(0)
    for number in cancelled:
        tasks[number].cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await one(count)  # whoever comes later finds the line as it should be
    rounds.stop()
    return had


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_one_turn_in_a_round(run: object) -> None:
    """Twenty that ask together run in twenty rounds of the loop, in their order."""
    had = run(turns_of(20))  # type: ignore[operator]

    assert [number for number, _ in had] == list(range(21))
    assert len({round_ for _, round_ in had}) == 21


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_who_is_gone_takes_no_turn(run: object) -> None:
    """A cancelled one is passed over, first, last or between."""
    had = run(turns_of(6, cancelled=frozenset({1, 2, 5})))  # type: ignore[operator]

    assert [number for number, _ in had] == [0, 3, 4, 6]
