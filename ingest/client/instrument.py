"""Instrumentation of vendors' clients and of their streams.

``metered`` returns a copy of a client made by the Stainless generator (OpenAI's, Anthropic's) that hands every call
to a ``Reader``. ``WatchedStream`` and ``WatchedAsyncStream`` wrap a stream: they yield what it yields, and tell a
``Watcher`` when it ends. An error in metering never reaches the caller (``harmless``).
"""

import contextlib
import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from ingest.client.strategy import read

# Watched streams. A stream ends by running out, by an error, by ``close``, by leaving its ``with`` block, or by being
# garbage-collected. The first end counts.

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


# Metered clients. Every call of such a client passes through ``post`` or ``get``. The copy shares the client's
# connections and overrides only these two, so everything built on them (parsing, streaming helpers, raw responses,
# tool runners, other libraries) is metered, ``isinstance`` holds, and retries, which happen below, count once. No
# vendor library is imported: the client brings its own classes.

C = TypeVar("C")

RAW_RESPONSE_HEADER = "x-stainless-raw-response"
"""How a client is told to answer with the response as it came; its presence is enough."""


class Reader(Watcher, Protocol):
    """Reads one call. Either ``whole`` is called, or ``item`` and then ``end``."""

    body: Any
    """What is sent: the caller's request, to which a reader may have added."""

    def whole(self, answer: Any) -> None:
        """The complete answer, as an object or as a dictionary."""

    def withdraw(self, error: Exception) -> bool:
        """Whether the call failed by what the reader added to the body; it is then the caller's own again."""
        return False


Open = Callable[[str, Any, bool], Reader | None]
"""A call begins: path, body (None: something is fetched), is it streamed. None when it is none to be metered."""


def metered(client: C, opened: Open) -> C:
    """A copy of the client whose calls are read."""
    base: Any = type(client)
    twin: Any = copy.copy(client)
    twin.__class__ = _metered_class(base)
    made = base.copy(twin)  # an object of the twin's class, whose resources, made at once by some, use its requests
    made._opened_by_meter = opened
    return made  # type: ignore[no-any-return]


@cache
def _metered_class(base: Any) -> type:
    """A subclass of the client's class, with other requests; copies of its instances are metered as they are."""
    if hasattr(base, "_opened_by_meter"):
        return base  # type: ignore[no-any-return]
    is_async = inspect.iscoroutinefunction(base.post)

    def metered_copy(self: Any, *arguments: Any, **options: Any) -> Any:
        made = base.copy(self, *arguments, **options)
        made._opened_by_meter = self._opened_by_meter
        return made

    requests = {name: (_async_request if is_async else _request)(getattr(base, name)) for name in ("post", "get")}
    members = {"_opened_by_meter": None, "copy": metered_copy, "with_options": metered_copy, **requests}
    return type(base.__name__, (base,), members | {"__module__": base.__module__})


class _Call:
    """A call under way, and whether its reader has seen the answer: the first who has it shows it."""

    def __init__(self, reader: Reader, options: dict[str, Any]) -> None:
        self.reader = reader
        self.is_streamed = bool(options.get("stream"))
        self._is_seen = False

    def see(self, answer: Any) -> None:
        """Read a whole answer."""
        if not self._is_seen:
            self._is_seen = True
            harmless(self.reader.whole, answer, None)

    def before(self, parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The library's own parser, which may refuse an answer that was billed; it is read before."""

        def read_and_parse(answer: Any) -> Any:
            if not self.is_streamed:
                self.see(answer)
            return parse(answer)

        return read_and_parse

    def fail(self, error: Exception) -> None:
        """Read the answer that an error came after, if it holds one."""
        answer = read(error, "completion")
        if answer is None and read(error, "status_code") == 200 and not self.is_streamed:
            answer = harmless(lambda error: error.response.json(), error, None)
        if answer is not None:
            self.see(answer)


def _request(request: Any) -> Any:
    def read_request(self: Any, path: str, **options: Any) -> Any:
        call = _begun(self._opened_by_meter, path, options)
        try:
            answer = request(self, path, **options)
        except Exception as error:
            if not _is_refused(error, call, options):
                raise
            answer = request(self, path, **options)
        return answer if call is None else harmless(lambda answer: _read(answer, call, options), answer, answer)

    return read_request


def _async_request(request: Any) -> Any:
    async def read_request(self: Any, path: str, **options: Any) -> Any:
        call = _begun(self._opened_by_meter, path, options)
        try:
            answer = await request(self, path, **options)
        except Exception as error:
            if not _is_refused(error, call, options):
                raise
            answer = await request(self, path, **options)
        return answer if call is None else harmless(lambda answer: _read(answer, call, options), answer, answer)

    return read_request


def _begun(opened: Open, path: str, options: dict[str, Any]) -> _Call | None:
    """The call, if it is metered. What its reader adds to the request goes into ``options``."""
    request = options.get("options") or {}
    body = options.get("body")
    if isinstance(body, Mapping) and isinstance(request.get("extra_json"), Mapping):
        body = {**body, **request["extra_json"]}
        request = {name: value for name, value in request.items() if name != "extra_json"}
    is_streamed = bool(options.get("stream"))
    plain_path = path.partition("?")[0]  # a beta of a resource asks at the same path
    reader: Reader | None = harmless(lambda opened: opened(plain_path, body, is_streamed), opened, None)
    if reader is None:
        return None
    call = _Call(reader, options)
    if callable(parse := request.get("post_parser")):
        request = {**request, "post_parser": call.before(parse)}
    if body is not None:
        options["body"] = reader.body
    options["options"] = request
    return call


def _is_refused(error: Exception, call: _Call | None, options: dict[str, Any]) -> bool:
    """Whether it was metering that the call failed by. ``options`` then have what the caller asked for, and no more."""
    if call is None:
        return False
    if not harmless(call.reader.withdraw, error, False):
        call.fail(error)
        return False
    options["body"] = call.reader.body
    return True


def _read(answer: Any, call: _Call, options: dict[str, Any]) -> Any:
    headers = (options.get("options") or {}).get("headers") or {}
    if any(name.lower() == RAW_RESPONSE_HEADER for name in headers) and hasattr(answer, "parse"):
        return _raw(answer, call)
    return _watched(answer, call)


def _watched(answer: Any, call: _Call) -> Any:
    if not call.is_streamed:
        call.see(answer)
        return answer
    return (WatchedAsyncStream if hasattr(answer, "__aiter__") else WatchedStream)(answer, call.reader)


def _raw(answer: Any, call: _Call) -> Any:
    """A raw response is read as soon as its body is here; else when the caller parses it, the first time."""
    if not call.is_streamed and answer.http_response.is_closed:
        harmless(lambda answer: call.see(answer.http_response.json()), answer, None)
        return answer
    parse = answer.parse
    seen: list[tuple[Any, Any]] = []  # what was parsed first, and what the caller gets for it

    def watched(parsed: Any) -> Any:
        if not seen:
            told = parsed if call.is_streamed else harmless(lambda raw: raw.http_response.json(), answer, parsed)
            seen.append((parsed, _watched(told, call) if call.is_streamed else parsed))
            if not call.is_streamed:
                call.see(told)
        return seen[0][1] if parsed is seen[0][0] else parsed

    async def later(parsed: Any) -> Any:
        return watched(await parsed)

    def parse_watched(**options: Any) -> Any:
        parsed = parse(**options)
        return later(parsed) if inspect.isawaitable(parsed) else watched(parsed)

    answer.parse = parse_watched
    return answer
