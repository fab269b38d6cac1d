"""Bytes as usage: what went through a file, an iterator or a response, counted where it passes.

    downloads = ingestion.strategy(Stream, "download")

    with downloads.file("user-1", open(path, "rb")) as file: ...
    for chunk in downloads.iterate("user-1", chunks): ...
    async for chunk in downloads.iterate_async("user-1", chunks): ...
    app = downloads.asgi(app, customer=lambda scope: scope["state"]["user_id"])
    app = downloads.wsgi(app, customer=lambda environ: environ.get("REMOTE_USER"))

Each stream gives one event when it ends, is closed early or fails, with the ``bytes`` that passed until then,
``finished`` and ``strategy: "Stream"``. An error goes on to whoever it concerns. Text counts as UTF-8.
"""

import contextlib
import inspect
import logging
import os
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
)
from threading import Lock
from types import TracebackType
from typing import Any, Self

from ingest.client.strategy import CustomerLike, Strategy, Value

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Whose = CustomerLike | None  # None is nobody's: nothing is counted


class Tally:
    """Counts what passes; ``end`` captures the event, once."""

    def __init__(self, finish: Callable[[int, bool], object]) -> None:
        self._finish, self._once, self._bytes = finish, Lock(), 0

    def add(self, chunk: Any) -> Any:
        """Count a chunk and hand it on."""
        if isinstance(chunk, str):  # which may hold surrogates: file names do, and files read with surrogateescape
            self._bytes += len(chunk.encode(errors="surrogatepass"))
        else:
            self._bytes += memoryview(chunk).nbytes
        return chunk

    def count(self, number: int | None) -> int | None:
        """Count bytes that passed unseen and hand the number on."""
        self._bytes += number or 0
        return number

    def end(self, is_finished: bool) -> None:
        """The stream is over."""
        if self._once.acquire(blocking=False):
            self._finish(self._bytes, is_finished)


class Stream(Strategy):
    """Counts bytes of streams."""

    def file(self, customer: CustomerLike, file: Any, **metadata: Value) -> "MeteredFile":
        """A file whose reads and writes are counted; the event is captured when it is closed."""
        return MeteredFile(file, self._tally(customer, metadata))

    def iterate(self, customer: CustomerLike, chunks: Iterable[Any], **metadata: Value) -> Iterator[Any]:
        """The chunks, counted as they are taken. A generator is closed at the end; anything else stays open."""
        tally, is_finished = self._tally(customer, metadata), False
        try:
            for chunk in chunks:
                yield tally.add(chunk)
            is_finished = True
        finally:
            try:
                if inspect.isgenerator(chunks):
                    chunks.close()
            finally:
                tally.end(is_finished)

    async def iterate_async(
        self, customer: CustomerLike, chunks: AsyncIterable[Any], **metadata: Value
    ) -> AsyncIterator[Any]:
        """The chunks of an asynchronous iterator, counted as they are taken and closed as by ``iterate``."""
        tally, is_finished = self._tally(customer, metadata), False
        try:
            async for chunk in chunks:
                yield tally.add(chunk)
            is_finished = True
        finally:
            try:
                if inspect.isasyncgen(chunks):
                    await chunks.aclose()
            finally:
                tally.end(is_finished)

    ingest = iterate
    """In the shape of Polar's strategies: whose stream, then the stream."""

    def asgi(self, app: AsgiApp, customer: Callable[[Scope], Whose], **metadata: Value) -> AsgiApp:
        """An ASGI application whose response bodies are counted. ``customer`` is asked at the end of a response, when
        the application has put into the scope what it knows; None counts nothing."""
        async def metered(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            tally, is_finished = self._late_tally(lambda: customer(scope), metadata), False

            async def counting(message: Message) -> None:
                nonlocal is_finished
                await send(message)
                if message["type"] == "http.response.body":
                    tally.add(message.get("body", b"") if scope.get("method") != "HEAD" else b"")  # a server sends none
                    is_finished = not message.get("more_body", False)
                elif message["type"] == "http.response.pathsend":  # the server sends the file by itself
                    with contextlib.suppress(OSError):
                        tally.count(os.stat(message["path"]).st_size)
                    is_finished = True

            try:
                await app(scope, receive, counting)
            finally:
                tally.end(is_finished)

        return metered

    def wsgi(self, app: WsgiApp, customer: Callable[[dict[str, Any]], Whose], **metadata: Value) -> WsgiApp:
        """A WSGI application whose response bodies are counted; ``customer`` as for ``asgi``."""
        def metered(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            tally = self._late_tally(lambda: customer(environ), metadata)

            def starting(*arguments: Any, **named: Any) -> Callable[[bytes], object]:
                write = start_response(*arguments, **named)
                return lambda chunk: write(tally.add(chunk))

            try:
                return _MeteredBody(app(environ, starting), tally)
            except BaseException:
                tally.end(False)
                raise

        return metered

    def _tally(self, customer: CustomerLike, metadata: Mapping[str, Value]) -> Tally:
        return self._late_tally(lambda: customer, metadata)

    def _late_tally(self, customer: Callable[[], Whose], metadata: Mapping[str, Value]) -> Tally:
        def finish(bytes_passed: int, is_finished: bool) -> None:
            try:
                who = customer()
            except Exception:
                logger.exception("nobody knows whose stream this is; it is not counted")
                return
            if who is not None:
                measured = {"bytes": bytes_passed, "finished": is_finished, "strategy": "Stream"}
                self.emit(who, measured, metadata)

        return Tally(finish)


class MeteredFile:
    """A file that counts what is read and written. Everything else is the file's own."""

    def __init__(self, file: Any, tally: Tally) -> None:
        self._file, self._tally = file, tally

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, *size: int) -> Any:
        """Read, counted."""
        return self._counted(self._file.read(*size))

    def read1(self, *size: int) -> Any:
        """Read at once, counted."""
        return self._counted(self._file.read1(*size))

    def readall(self) -> Any:
        """Read to the end, counted."""
        return self._counted(self._file.readall())

    def readline(self, *size: int) -> Any:
        """Read a line, counted."""
        return self._counted(self._file.readline(*size))

    def readlines(self, *hint: int) -> list[Any]:
        """Read lines, counted."""
        return [self._tally.add(line) for line in self._file.readlines(*hint)]

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer, counted."""
        return self._tally.count(self._file.readinto(buffer))

    def readinto1(self, buffer: Any) -> int | None:
        """Read into a buffer at once, counted."""
        return self._tally.count(self._file.readinto1(buffer))

    def write(self, chunk: Any) -> Any:
        """Write, counted: what the file took, which of a raw one may be less."""
        taken = self._file.write(chunk)
        if isinstance(chunk, str) or not isinstance(taken, int):
            self._tally.add(chunk)
        else:
            self._tally.count(taken)
        return taken

    def writelines(self, lines: Iterable[Any]) -> None:
        """Write lines, counted."""
        self._file.writelines(self._tally.add(line) for line in lines)

    def close(self) -> None:
        """Close the file and capture the event."""
        self._end(True)

    def _counted(self, chunk: Any) -> Any:
        return chunk if chunk is None else self._tally.add(chunk)

    def _end(self, is_finished: bool) -> None:
        try:
            self._file.close()
        except BaseException:
            self._tally.end(False)
            raise
        self._tally.end(is_finished)

    def __iter__(self) -> Iterator[Any]:
        return map(self._tally.add, self._file)

    def __next__(self) -> Any:
        return self._tally.add(next(self._file))

    def __enter__(self) -> Self:
        if enter := getattr(self._file, "__enter__", None):
            enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        """As the file would: one that gives up a half-written object on an error must hear of it."""
        leave = getattr(self._file, "__exit__", None)
        if leave is None:
            return self._end(kind is None)
        is_finished = False
        try:
            is_suppressed = leave(kind, error, trace)
            is_finished = kind is None
        finally:
            self._tally.end(is_finished)
        return is_suppressed

    def __del__(self) -> None:
        """A file that nobody closed was used all the same."""
        if "_tally" in self.__dict__:
            self._tally.end(False)


class _MeteredBody:
    """A WSGI response's body. The server calls ``close`` in every case (PEP 3333)."""

    def __init__(self, body: Iterable[bytes], tally: Tally) -> None:
        self._body, self._chunks, self._tally = body, iter(body), tally
        self._is_finished = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            chunk: bytes = self._tally.add(next(self._chunks))
        except StopIteration:
            self._is_finished = True
            raise
        return chunk

    def close(self) -> None:
        """The server is through with it."""
        try:
            if close := getattr(self._body, "close", None):
                close()
        finally:
            self._tally.end(self._is_finished)
