"""Streams that are watched: the caller gets what he got before, the watcher hears of one end, and hurts nobody."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ingest.client.instrument import WatchedAsyncStream, WatchedStream, Watcher


class Notes(Watcher):
    """A watcher that writes down what it hears."""

    def __init__(self, hides: Any = None, last: Any = None) -> None:
        self.seen: list[Any] = []
        self.ends: list[bool] = []
        self._hides, self._last = hides, last

    def item(self, item: Any) -> bool:
        self.seen.append(item)
        return bool(item != self._hides)

    def is_last(self, item: Any) -> bool:
        return bool(item == self._last)

    def end(self, is_complete: bool) -> None:
        self.ends.append(is_complete)


def numbers(fail_at: int = 9) -> Iterator[int]:
    """0, 1, 2, unless it fails before."""
    for number in range(3):
        if number == fail_at:
            raise OSError("cut")
        yield number


async def numbers_later(fail_at: int = 9) -> AsyncIterator[int]:
    """The same, asynchronously."""
    for number in numbers(fail_at):
        await asyncio.sleep(0)
        yield number


def test_the_end_of_a_stream_is_heard_once_whatever_it_is() -> None:
    """Run out, closed, failed, forgotten; and then closed again."""
    whole, closed, failed, forgotten = notes = [Notes() for _ in range(4)]
    stream = WatchedStream(numbers(), whole)
    assert list(stream) == [0, 1, 2]
    stream.close()
    stream = WatchedStream(numbers(), closed)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(OSError, match="cut"):
        list(WatchedStream(numbers(fail_at=1), failed))
    next(WatchedStream(numbers(), forgotten))
    gc.collect()
    assert [note.ends for note in notes] == [[True], [False], [False], [False]]


def test_asynchronous_streams_as_well() -> None:
    """Run out, closed, failed, cancelled."""
    whole, closed, failed = notes = [Notes() for _ in range(3)]

    async def story() -> None:
        assert [number async for number in WatchedAsyncStream(numbers_later(), whole)] == [0, 1, 2]
        stream = WatchedAsyncStream(numbers_later(), closed)
        await anext(stream)
        await stream.aclose()
        with pytest.raises(OSError, match="cut"):
            [number async for number in WatchedAsyncStream(numbers_later(fail_at=1), failed)]

    asyncio.run(story())
    assert [note.ends for note in notes] == [[True], [False], [False]]


def test_who_wants_to_know_hears_that_a_stream_failed() -> None:
    """An error of the stream's is told apart from its end, from who gives up waiting, and from who leaves."""

    class Careful(Notes):
        def fail(self) -> None:
            self.seen.append("failed")

    async def given_up(watcher: Watcher) -> None:
        with pytest.raises(asyncio.CancelledError):
            await anext(WatchedAsyncStream(cancelled(), watcher))

    async def cancelled() -> AsyncIterator[int]:
        raise asyncio.CancelledError
        yield 0

    failed, whole, waiting, left = notes = [Careful() for _ in range(4)]
    with pytest.raises(OSError, match="cut"):
        next(WatchedStream(numbers(fail_at=0), failed))
    list(WatchedStream(numbers(), whole))
    asyncio.run(given_up(waiting))
    WatchedStream(numbers(), left).close()
    assert [note.seen for note in notes] == [["failed"], [0, 1, 2], [], []]
    assert [note.ends for note in notes] == [[], [True], [False], [False]]


def test_what_is_for_the_watcher_alone_is_fetched_in_time() -> None:
    """It is hidden from the caller, and seen although he leaves at the item before; errors keep their place."""
    notes = Notes(hides=2, last=1)
    stream = WatchedStream(numbers(), notes)
    assert [next(stream), next(stream)] == [0, 1]
    assert notes.seen == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(stream)
    failing = WatchedStream(numbers(fail_at=2), Notes(last=1))
    assert [next(failing), next(failing)] == [0, 1]
    with pytest.raises(OSError, match="cut"):
        next(failing)
    assert list(WatchedStream(numbers(), Notes(last=0))) == [0, 1, 2]


def test_an_item_that_was_fetched_early_may_be_the_last_as_well() -> None:
    """Several answers end one after the other; who leaves at the last of them is seen to the end of the stream."""

    class Answers(Notes):
        def is_last(self, item: Any) -> bool:
            return item in (0, 1)

    notes, later = Answers(hides=2), Answers(hides=2)
    stream = WatchedStream(numbers(), notes)
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()

    async def story() -> None:
        stream = WatchedAsyncStream(numbers_later(), later)
        assert [await anext(stream), await anext(stream)] == [0, 1]
        await stream.aclose()

    asyncio.run(story())
    assert notes.seen == later.seen == [0, 1, 2]
    assert notes.ends == later.ends == [True]
    failing = WatchedStream(numbers(fail_at=2), Answers())
    assert [next(failing), next(failing)] == [0, 1]
    with pytest.raises(OSError, match="cut"):
        next(failing)


def test_a_response_closed_below_the_stream_is_an_end_unless_it_closes_itself() -> None:
    """Helpers close the response; a stream that has run out closes it, too, while it is read."""
    response = SimpleNamespace(close=lambda: None)

    class Stream:
        def __init__(self) -> None:
            self.response = response
            self._numbers = numbers()

        def __next__(self) -> int:
            self.response.close()
            return next(self._numbers)

    notes = Notes()
    stream = WatchedStream(Stream(), notes)
    assert [next(stream), next(stream)] == [0, 1]
    assert notes.ends == []
    response.close()
    assert notes.ends == [False]
    assert isinstance(stream, Stream)


def test_a_watcher_that_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets every item; the log gets the error."""

    class Broken(Notes):
        def item(self, item: Any) -> bool:
            raise KeyError(item)

        def end(self, is_complete: bool) -> None:
            raise KeyError("end")

    assert list(WatchedStream(numbers(), Broken())) == [0, 1, 2]
    assert "usage could not be read" in caplog.text
