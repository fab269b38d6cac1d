"""Clients made by the Stainless generator (OpenAI's, Anthropic's): every call passes through ``post`` or ``get``.

``metered`` makes a copy of a client that shares its connections and differs in these two alone. So whatever is built
on them (parsing, streaming helpers, raw responses, tool runners, other libraries) is metered too, ``isinstance`` holds,
and retries, which happen below, are seen once. Nothing is imported: the client brings its own classes.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol, TypeVar

from ingest.client.streams import WatchedAsyncStream, WatchedStream, Watcher, harmless

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


def _request(request: Any) -> Any:
    def read_request(self: Any, path: str, **options: Any) -> Any:
        reader = _reader(self._opened_by_meter, path, options)
        try:
            answer = request(self, path, **options)
        except Exception as error:
            if not _is_refused(error, reader, options):
                raise
            answer = request(self, path, **options)
        return answer if reader is None else harmless(lambda answer: _read(answer, reader, options), answer, answer)

    return read_request


def _async_request(request: Any) -> Any:
    async def read_request(self: Any, path: str, **options: Any) -> Any:
        reader = _reader(self._opened_by_meter, path, options)
        try:
            answer = await request(self, path, **options)
        except Exception as error:
            if not _is_refused(error, reader, options):
                raise
            answer = await request(self, path, **options)
        return answer if reader is None else harmless(lambda answer: _read(answer, reader, options), answer, answer)

    return read_request


def _reader(opened: Open, path: str, options: dict[str, Any]) -> Reader | None:
    """The call's reader. What it adds to the request goes into ``options``."""
    request = options.get("options") or {}
    body = options.get("body")
    if isinstance(body, Mapping) and isinstance(request.get("extra_json"), Mapping):
        body = {**body, **request["extra_json"]}
        request = {name: value for name, value in request.items() if name != "extra_json"}
    reader: Reader | None = harmless(lambda opened: opened(path, body, bool(options.get("stream"))), opened, None)
    if reader is not None and body is not None:
        options |= {"body": reader.body, "options": request}
    return reader


def _is_refused(error: Exception, reader: Reader | None, options: dict[str, Any]) -> bool:
    """Whether it was metering that the call failed by. ``options`` then have what the caller asked for, and no more."""
    if reader is None or not harmless(reader.withdraw, error, False):
        return False
    options["body"] = reader.body
    return True


def _read(answer: Any, reader: Reader, options: dict[str, Any]) -> Any:
    is_streamed = bool(options.get("stream"))
    headers = (options.get("options") or {}).get("headers") or {}
    if any(name.lower() == RAW_RESPONSE_HEADER for name in headers) and hasattr(answer, "parse"):
        return _raw(answer, reader, is_streamed)
    return _watched(answer, reader, is_streamed)


def _watched(answer: Any, reader: Reader, is_streamed: bool) -> Any:
    if not is_streamed:
        harmless(reader.whole, answer, None)
        return answer
    return (WatchedAsyncStream if hasattr(answer, "__aiter__") else WatchedStream)(answer, reader)


def _raw(answer: Any, reader: Reader, is_streamed: bool) -> Any:
    """A raw response is read as soon as its body is here; else when the caller parses it, the first time."""
    if not is_streamed and answer.http_response.is_closed:
        harmless(lambda answer: reader.whole(answer.http_response.json()), answer, None)
        return answer
    parse = answer.parse
    seen: list[tuple[Any, Any]] = []  # what was parsed first, and what the caller gets for it

    def watched(parsed: Any) -> Any:
        if not seen:
            read = parsed if is_streamed else harmless(lambda raw: raw.http_response.json(), answer, parsed)
            seen.append((parsed, _watched(read, reader, is_streamed) if is_streamed else parsed))
            if not is_streamed:
                harmless(reader.whole, read, None)
        return seen[0][1] if parsed is seen[0][0] else parsed

    async def later(parsed: Any) -> Any:
        return watched(await parsed)

    def parse_watched(**options: Any) -> Any:
        parsed = parse(**options)
        return later(parsed) if inspect.isawaitable(parsed) else watched(parsed)

    answer.parse = parse_watched
    return answer
