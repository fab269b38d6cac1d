"""S3: what a client puts, gets, copies and deletes, through the events that boto3 and aiobotocore have for it.

    storage = ingestion.strategy(S3Strategy, "storage")
    s3 = storage.client(boto3.client("s3"), "user-1")
    s3.put_object(Bucket="files", Key="a.pdf", Body=data)

An operation is an event, however often it was retried; a part of a multipart upload is an operation, and so is a
delete of many keys. ``bytes`` are those of the object: of the body that was sent, of what the caller really read. The
answer to a copy does not tell a size, so it is asked for with one HEAD. What failed is no event.

boto3's managed transfers (``upload_file`` and its like) work in threads of their own. Whose they are is asked in the
caller's, where a request's context is.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any, TypeVar

from ingest.client.event import clipped
from ingest.client.instrument import harmless
from ingest.client.strategy import Customer, Strategy, Who, count, items, read, text
from meters.errors import STRING_LENGTH_MAX

C = TypeVar("C")

OPERATIONS = (
    "PutObject", "UploadPart", "GetObject", "CopyObject", "UploadPartCopy", "DeleteObject", "DeleteObjects",
)  # fmt: skip
"""What is metered. Beginning and completing an upload, listings and HEADs move no object's bytes."""

TRANSFERS = ("upload_file", "upload_fileobj", "download_file", "download_fileobj", "copy")
"""boto3's managed transfers, made of those operations in other threads; aiobotocore has none."""

_transferring: ContextVar[Mapping[str, Customer | None] | None] = ContextVar("whose, by meter", default=None)


class S3Strategy(Strategy):
    """Meters an S3 client of boto3 or aiobotocore. A cost function gets the metadata."""

    def client(self, client: C, customer: Who, *, measure_copies: bool = True, **metadata: Any) -> C:
        """The same client, metered from now on, for this customer or for whom a function names at each operation.

        A client has one meter for each event name; the latest holds. Without ``measure_copies`` no HEAD is sent, and
        copies of unknown size have 0 bytes and are marked as estimated.
        """
        is_async = hasattr(client, "__aenter__")
        meter = _Meter(self, client, customer, measure_copies, metadata)
        after = meter.after_async if is_async else meter.after
        events: Any = client.meta.events  # type: ignore[attr-defined]  # botocore's; it is not installed everywhere
        for operation in OPERATIONS:
            for moment, handler in (
                ("before-parameter-build", meter.begin),
                ("before-call", meter.measure),
                ("after-call", after),
            ):
                name, mark = f"{moment}.s3.{operation}", f"meterstream {self.event_name} {moment} {operation}"
                events.unregister(name, unique_id=mark)
                events.register(name, partial(handler, operation), unique_id=mark)
        if not is_async:
            harmless(lambda client: _meter_transfers(client, meter), client, None)
        return client


class _Operation:
    """What is known of an operation before its answer. It travels in the client's own context of the operation."""

    def __init__(self, whose: Customer, parameters: Any) -> None:
        self.whose = whose
        self.bucket, self.key = text(parameters, "Bucket"), text(parameters, "Key")
        self.content_type = text(parameters, "ContentType")
        self.range = text(parameters, "CopySourceRange")
        self.objects = len(items(parameters, "Delete", "Objects"))
        self.sent_bytes: int | None = None


class _Meter:
    """The handlers of one client."""

    def __init__(self, strategy: S3Strategy, client: Any, customer: Who, measures: bool, metadata: Any) -> None:
        self._strategy, self._client, self._customer, self._measures = strategy, client, customer, measures
        self._metadata = metadata
        self.mark = f"meterstream {strategy.event_name}"

    def whose(self) -> Customer | None:
        """Whose usage begins now."""
        return self._strategy.resolve(self._customer)

    def begin(self, operation: str, params: Any, context: Any, **more: Any) -> None:
        """Before anything: whose it is, and where."""
        known = _transferring.get() or {}
        whose = known[self.mark] if self.mark in known else self.whose()
        context[self.mark] = harmless(lambda whose: _Operation(whose, params), whose, None) if whose else None

    def measure(self, operation: str, params: Any, context: Any, **more: Any) -> None:
        """Before the first attempt: how long the body is."""
        if (begun := context.get(self.mark)) is not None and operation in ("PutObject", "UploadPart"):
            begun.sent_bytes = harmless(_length, params, None)

    def after(self, operation: str, http_response: Any, parsed: Any, context: Any, **more: Any) -> None:
        """After the last attempt."""
        if (begun := _succeeded(context, self.mark, http_response, parsed)) is None:
            return
        head = None
        if operation == "CopyObject" and self._measures:
            head = harmless(lambda s3: s3.head_object(Bucket=begun.bucket, Key=begun.key), self._client, None)
        self._end(operation, begun, parsed, head)

    async def after_async(self, operation: str, http_response: Any, parsed: Any, context: Any, **more: Any) -> None:
        """As ``after``."""
        if (begun := _succeeded(context, self.mark, http_response, parsed)) is None:
            return
        head = None
        if operation == "CopyObject" and self._measures:
            with contextlib.suppress(Exception):  # the copy was made, whatever is the matter with its size
                head = await self._client.head_object(Bucket=begun.bucket, Key=begun.key)
        self._end(operation, begun, parsed, head)

    def _end(self, operation: str, begun: _Operation, parsed: Any, head: Any) -> None:
        if operation == "GetObject":
            harmless(lambda parsed: self._watch(begun, parsed), parsed, None)
        elif operation == "CopyObject":
            self._emit(operation, begun, read(head, "ContentLength"))
        else:
            self._emit(operation, begun, _bytes(operation, begun))

    def _emit(self, operation: str, begun: _Operation, size_bytes: int | None) -> None:
        measured: dict[str, Any] = {
            "bytes": size_bytes or 0,
            "bucket": begun.bucket,
            "key": clipped(begun.key, STRING_LENGTH_MAX),
            "contentType": clipped(begun.content_type, STRING_LENGTH_MAX),
            "operation": operation,
            "strategy": "S3",
        }
        measured |= {"objects": begun.objects} if operation == "DeleteObjects" else {}
        measured |= {"estimated": True} if size_bytes is None else {}
        self._strategy.emit(begun.whose, measured, self._metadata)

    def _watch(self, begun: _Operation, parsed: Any) -> None:
        begun.content_type = text(parsed, "ContentType")
        body = parsed.get("Body")
        length = count(parsed, "ContentLength")
        tally = _Tally(length, lambda size_bytes: self._emit("GetObject", begun, size_bytes))
        if hasattr(body, "__aiter__") and hasattr(body, "__aenter__"):
            parsed["Body"] = _counting_body(body, tally)
        elif hasattr(body, "_raw_stream"):
            body._raw_stream = _CountedStream(body._raw_stream, tally)
        else:
            tally.add(length, is_end=True)


def _meter_transfers(client: Any, meter: _Meter) -> None:
    """Have the client's managed transfers ask each of its meters whose they are before they begin."""
    for name in TRANSFERS:
        method = getattr(client, name, None)
        if inspect.ismethod(method):
            method = _transfer(client, method)
            setattr(client, name, method)
        if isinstance(meters := getattr(method, "meters", None), dict):
            meters[meter.mark] = meter


def _transfer(client: Any, method: Any) -> Any:
    meters: dict[str, _Meter] = {}

    @wraps(method)
    def transfer(*arguments: Any, **named: Any) -> Any:
        customers = {mark: meter.whose() for mark, meter in meters.items()}
        carrier = harmless(lambda client: _Carrier(client, customers), client, client)
        return method.__func__(carrier, *arguments, **named)

    transfer.meters = meters  # type: ignore[attr-defined]  # for the meters that come later
    return transfer


class _Carrier:
    """The client as one transfer sees it: its operations know whose they are in whatever thread they are called."""

    def __init__(self, client: Any, customers: Mapping[str, Customer | None]) -> None:
        self._client = client
        for name, operation in client.meta.method_to_api_mapping.items():
            if operation in OPERATIONS:
                setattr(self, name, _carried(getattr(client, name), customers))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def _carried(method: Any, customers: Mapping[str, Customer | None]) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        token = _transferring.set(customers)
        try:
            return method(*arguments, **named)
        finally:
            _transferring.reset(token)

    return call


def _succeeded(context: Any, mark: str, http_response: Any, parsed: Any) -> _Operation | None:
    """What was begun and succeeded; each once."""
    begun: _Operation | None = context.pop(mark, None)
    return begun if http_response.status_code < 300 and not read(parsed, "Error") else None


def _length(request: Any) -> int | None:
    """The bytes of a request's body, from where it is read on; None when only reading it would tell."""
    body, headers = request.get("body"), request.get("headers") or {}
    if declared := headers.get("Content-Length"):
        return int(declared)
    if body is None:
        return 0
    if hasattr(body, "__len__"):
        return len(body.encode() if isinstance(body, str) else body)
    here = body.tell()
    end = body.seek(0, 2)
    body.seek(here)
    return int(body.tell() if end is None else end) - int(here)


def _bytes(operation: str, begun: _Operation) -> int | None:
    match operation:
        case "PutObject" | "UploadPart":
            return begun.sent_bytes
        case "UploadPartCopy":
            first, _, last = begun.range.removeprefix("bytes=").partition("-")
            return int(last) - int(first) + 1 if first.isdigit() and last.isdigit() else None
    return 0


class _Tally:
    """Bytes as they are read, told once: at the end, or when no more will be read."""

    def __init__(self, length: int, tell: Callable[[int], None]) -> None:
        self._tell: Callable[[int], None] | None = tell
        self._length, self._bytes = length, 0

    def add(self, size_bytes: int, is_end: bool) -> None:
        """Some were read; ``is_end`` when there are no more."""
        self._bytes += size_bytes
        if is_end or self._bytes == self._length:
            self.end()

    def end(self) -> None:
        """No more will be read."""
        tell, self._tell = self._tell, None
        if tell is not None:
            harmless(tell, self._bytes, None)


class _CountedStream:
    """The raw stream below a body of boto3's, counted."""

    def __init__(self, raw: Any, tally: _Tally) -> None:
        self._raw, self._tally = raw, tally

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def __iter__(self) -> Any:
        for line in self._raw:
            self._tally.add(len(line), is_end=False)
            yield line
        self._tally.end()

    def readline(self, *size: int) -> Any:
        """Read a line, and count."""
        line = self._raw.readline(*size)
        self._tally.add(len(line), is_end=not line)
        return line

    def read1(self, *size: int) -> Any:
        """Read at once, and count."""
        chunk = self._raw.read1(*size)
        self._tally.add(len(chunk), is_end=not chunk)
        return chunk

    def read(self, amt: int | None = None, **options: Any) -> Any:
        """Read, and count."""
        chunk = self._raw.read(amt, **options)
        self._tally.add(len(chunk), is_end=_is_end(amt, len(chunk)))
        return chunk

    def readinto(self, buffer: Any) -> Any:
        """Read, and count."""
        size_bytes = self._raw.readinto(buffer)
        self._tally.add(size_bytes, is_end=_is_end(len(buffer), size_bytes))
        return size_bytes

    def readlines(self) -> Any:
        """Read all, and count."""
        lines = self._raw.readlines()
        self._tally.add(sum(map(len, lines)), is_end=True)
        return lines

    def stream(self, amt: int = 1 << 16, **options: Any) -> Any:
        """urllib3's own way to read, counted."""
        for chunk in self._raw.stream(amt, **options):
            self._tally.add(len(chunk), is_end=False)
            yield chunk
        self._tally.end()

    def close(self) -> None:
        """What was read until now is all."""
        self._tally.end()
        self._raw.close()

    def __del__(self) -> None:
        if tally := self.__dict__.get("_tally"):
            tally.end()


def _is_end(asked: int | None, got: int) -> bool:
    return asked is None or asked < 0 or (got == 0 and asked > 0)


def _counting_body(body: Any, tally: _Tally) -> Any:
    """The body of an object as aiobotocore makes it, counted. Before version 3.1 it is a proxy of the response."""
    base: Any = type(body)  # of a proxy its own, not that of what it stands for
    counting = _counting_class(base)
    if hasattr(body, "_self_content_length"):
        body = counting(body.__wrapped__, body._self_content_length)
    else:
        body.__class__ = counting
    body._self_tally = tally
    return body


@cache
def _counting_class(base: Any) -> type:
    """A subclass of a body of aiobotocore's that counts in ``_self_tally``."""

    async def read(self: Any, amt: int | None = None) -> Any:
        chunk = await base.read(self, amt)
        self._self_tally.add(len(chunk), is_end=_is_end(amt, len(chunk)))
        return chunk

    async def readinto(self: Any, buffer: Any) -> Any:
        size_bytes = await base.readinto(self, buffer)
        self._self_tally.add(size_bytes, is_end=_is_end(len(buffer), size_bytes))
        return size_bytes

    def close(self: Any) -> Any:  # a coroutine or none, as the base has it
        self._self_tally.end()
        return base.close(self) if hasattr(base, "close") else self.__wrapped__.close()

    def aclose(self: Any) -> Any:
        self._self_tally.end()
        return base.aclose(self) if hasattr(base, "aclose") else self.close()

    async def enter(self: Any) -> Any:
        await base.__aenter__(self)
        return self  # before aiobotocore 3.1 the response below, which nobody counts

    async def leave(self: Any, *error: Any) -> Any:
        self._self_tally.end()
        return await base.__aexit__(self, *error)

    def forgotten(self: Any) -> None:
        if tally := getattr(self, "_self_tally", None):
            tally.end()

    members = {
        "read": read, "readinto": readinto, "close": close, "aclose": aclose, "__aenter__": enter, "__aexit__": leave,
        "__del__": forgotten,
    }  # fmt: skip
    return type(base.__name__, (base,), members | {"__module__": base.__module__})
