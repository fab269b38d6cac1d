"""Turns at the event loop: one in a round of the loop, in the order of asking."""

import asyncio
import functools

import pytest
import uvloop

from ingest.admission.batching import Turns


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


async def turns_of(count: int) -> list[tuple[int, int]]:
    """(who, in which round) of so many that ask together, in the order of their turns."""
    turns, rounds, had = Turns(), Rounds(), list[tuple[int, int]]()
    ended = [asyncio.Event(), asyncio.Event()]

    def one(number: int) -> None:
        had.append((number, rounds.count))
        if number >= count - 1:
            ended[number - count + 1].set()

    for number in range(count):
        turns.do(functools.partial(one, number))
    await ended[0].wait()
    turns.do(functools.partial(one, count))  # whoever comes later finds the line as it should be
    await ended[1].wait()
    rounds.stop()
    return had


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_one_turn_in_a_round(run: object) -> None:
    """Twenty that ask together run in twenty rounds of the loop, in their order."""
    had = run(turns_of(20))  # type: ignore[operator]

    assert [number for number, _ in had] == list(range(21))
    assert len({round_ for _, round_ in had}) == 21


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_what_fails_costs_its_own_turn_alone(run: object) -> None:
    """Those behind it have theirs."""

    async def three() -> list[int]:
        turns, had, told, ended = Turns(), list[int](), list[object](), asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        turns.do(lambda: had.append(0))
        turns.do(lambda: 1 // 0)
        turns.do(lambda: had.append(2) or ended.set())
        await ended.wait()
        assert [type(error) for error in told] == [ZeroDivisionError]
        return had

    assert run(three()) == [0, 2]  # type: ignore[operator]
