"""Streams that are watched: they give what they gave before, and tell somebody when they end, however they end.

A stream ends by running out, by an error, by ``close``, by leaving its ``with`` block, or by being forgotten. Whoever
watches hears of each end, the first of them counts, and nothing that goes wrong in watching reaches the caller.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Sees a stream go by."""

    def item(self, item: Any) -> bool:
        """See an item. False keeps it from the caller."""

    def is_last(self, item: Any) -> bool:
        """Whether what follows this item is for the watcher alone; with most streams nothing is.

        It is then fetched before the caller gets the item, because callers who saw the last of what is theirs leave.
        """
        return False

    def end(self, is_complete: bool) -> None:
        """The stream ended; it ran out by itself when ``is_complete``."""

    def fail(self) -> None:
        """The stream ended with an error of its own, which is an end like others unless a watcher knows better."""
        self.end(False)


class Ward:
    """A watcher that cannot hurt: what it raises is logged, and it hears of one end only."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher: Watcher | None = watcher

    def item(self, item: Any) -> bool:
        """Whether the caller gets the item."""
        if self._watcher is None:
            return True
        return bool(harmless(lambda watcher: watcher.item(item), self._watcher, True))

    def is_last(self, item: Any) -> bool:
        """Whether nothing is to follow for the caller."""
        if self._watcher is None:
            return False
        return bool(harmless(lambda watcher: watcher.is_last(item), self._watcher, False))

    def end(self, is_complete: bool = False) -> None:
        """Pass the end on, once."""
        self._tell_last(lambda watcher: watcher.end(is_complete))

    def end_with(self, error: BaseException) -> None:
        """Pass on the end that came in place of an item: there are no more, an error, or whoever waited gave up."""
        if isinstance(error, StopIteration | StopAsyncIteration):
            self.end(True)
        elif isinstance(error, Exception):
            self._tell_last(lambda watcher: watcher.fail())
        else:
            self.end()

    def _tell_last(self, word: Callable[[Watcher], None]) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            harmless(word, watcher, None)


def harmless(action: Callable[[Any], Any], subject: Any, otherwise: Any) -> Any:
    """What the action gives; ``otherwise`` if it fails. Metering is not why a call may fail."""
    try:
        return action(subject)
    except Exception:
        logger.exception("usage could not be read")
        return otherwise


class _End:
    """An error that was met early, and is raised when its turn comes."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _given(found: Any) -> Any:
    if isinstance(found, _End):
        raise found.error
    return found


class _Watched:
    """Stands in for a stream; whatever it does not know itself is the stream's."""

    def __init__(self, stream: Any, watcher: Watcher) -> None:
        self._stream = stream
        self._ward = Ward(watcher)
        self._is_reading = False
        self._next: list[Any] = []  # an item, or an error, that came after the last item and was not for us
        response = getattr(stream, "response", None)
        for name in ("close", "aclose"):  # some close what is below the stream, and not the stream
            if callable(close := getattr(response, name, None)):
                with contextlib.suppress(AttributeError):  # who cannot be told apart, ends when it is forgotten
                    setattr(response, name, self._ending(close, self._ward, weakref.ref(self)))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that it passes for what it stands in for
        return type(self._stream)

    @staticmethod
    def _ending(close: Callable[[], Any], ward: Ward, watched: "weakref.ref[_Watched]") -> Callable[[], Any]:
        def close_and_end() -> Any:
            reader = watched()
            if reader is None or not reader._is_reading:  # else it closes itself, having run out
                ward.end()
            return close()

        return close_and_end

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_stream", "_ward", "_is_reading", "_next"):
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __del__(self) -> None:
        if ward := self.__dict__.get("_ward"):
            ward.end()


class WatchedStream(_Watched):
    """A watched iterator that may be closed and may be a context."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        item = _given(self._next.pop()) if self._next else self._read()
        if self._ward.is_last(item):
            try:
                self._next.append(self._read())
            except Exception as end:
                self._next.append(_End(end))
        return item

    def _read(self) -> Any:
        while True:
            self._is_reading = True
            try:
                item = next(self._stream)
            except BaseException as end:
                self._ward.end_with(end)
                raise
            finally:
                self._is_reading = False
            if self._ward.item(item):
                return item

    def close(self) -> None:
        """Close the stream; what was seen until now is all there is."""
        try:
            self._stream.close()
        finally:
            self._ward.end()

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        try:
            return self._stream.__exit__(kind, error, trace)
        finally:
            self._ward.end()


class WatchedAsyncStream(_Watched):
    """The same for asynchronous iterators."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        item = _given(self._next.pop()) if self._next else await self._read()
        if self._ward.is_last(item):
            try:
                self._next.append(await self._read())
            except Exception as end:
                self._next.append(_End(end))
        return item

    async def _read(self) -> Any:
        while True:
            self._is_reading = True
            try:
                item = await anext(self._stream)
            except BaseException as end:
                self._ward.end_with(end)
                raise
            finally:
                self._is_reading = False
            if self._ward.item(item):
                return item

    async def close(self) -> None:
        """Close the stream; what was seen until now is all there is."""
        try:
            await self._stream.close()
        finally:
            self._ward.end()

    async def aclose(self) -> None:
        """As ``close``, by the name that generators have for it."""
        try:
            await (getattr(self._stream, "aclose", None) or self._stream.close)()
        finally:
            self._ward.end()

    async def __aenter__(self) -> Self:
        await self._stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        try:
            return await self._stream.__aexit__(kind, error, trace)
        finally:
            self._ward.end()
