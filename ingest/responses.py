"""Request bodies read within limits, and the gateway's responses and refusals.

``Answer`` is a whole response. There is a function for each refusal (``too_large``, ``unavailable``, ...), with its
status, headers and body in Polar's shapes. ``read`` reads a body from ASGI and ``unpack`` decompresses it, both
within limits; ``send_answer`` sends an answer through ASGI and ``written`` makes its bytes.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
import zstandard

from ingest.limits import InFlight
from meters.catalogue.access import API_VERSION_DEFAULT
from meters.errors import COMPLAINTS_MAX, detail

Headers = tuple[tuple[bytes, bytes], ...]

JSON = (b"content-type", b"application/json")
CLOSE = (b"connection", b"close")

ANY_ORIGIN: Headers = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", b"Polar-Version, Log-Position, As-Of, Preference-Applied, Retry-After"),
)
"""What a browser has to be told before a page of another site may read an answer. A token opens the API, and no cookie
does, so a page can do no more than whoever gave it the token."""
_PREFLIGHT_S = 600  # how long a browser may remember what it was told; ten minutes, Starlette's default


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Answer(msgspec.Struct, frozen=True):
    """A whole response. ``headers`` are lower case and without the length, which is added when it is sent."""

    status: int
    body: bytes
    headers: Headers = (JSON,)


def written(found: Answer, default_headers: Iterable[tuple[bytes, bytes]], *, keep: bool) -> bytes:
    """The whole answer as bytes, where the request named no version; ``keep`` says whether the connection stays."""
    headers = [*default_headers, *found.headers, (b"polar-version", API_VERSION_DEFAULT)]
    if not keep and CLOSE not in found.headers:
        headers.append(CLOSE)
    head = b"".join([b"%s: %s\r\n" % header for header in headers])
    first = _STATUS_LINES.get(found.status, b"HTTP/1.1 %d \r\n" % found.status)
    return b"%s%scontent-length: %d\r\n\r\n%s" % (first, head, len(found.body), found.body)


def problem(status: int, error: str, detail: Any, *headers: tuple[bytes, bytes]) -> Answer:
    """Polar's shape of an error: its name and what happened."""
    return Answer(status, msgspec.json.encode({"error": error, "detail": detail}), (JSON, *headers))


def _retry_after(seconds: float) -> tuple[bytes, bytes]:
    return b"retry-after", b"%d" % max(1, round(seconds))


def bad_request(detail: str) -> Answer:
    """A request whose bytes mean nothing, or two things: the connection cannot be trusted any further."""
    return problem(400, "BadRequest", detail, CLOSE)


def undecodable(encoding: str) -> Answer:
    """A body that is not what its Content-Encoding says."""
    return problem(400, "BadRequest", f"The body is not one complete {encoding} stream.")


def timed_out() -> Answer:
    """A head or a body that took too long."""
    return problem(408, "RequestTimeout", "The request did not arrive in time.", CLOSE)


def failed() -> Answer:
    """What should not happen. Nothing was acknowledged, so the sender may repeat it."""
    return problem(500, "InternalServerError", "The request failed; it may be repeated.", CLOSE)


def unknown_parameters(names: Sequence[str]) -> Answer:
    """Query parameters of a route that has none, each in Polar's shape of a complaint."""
    message = "Extra inputs are not permitted: this takes no query parameters"
    complaints = [detail("extra_forbidden", ("query", name), message) for name in names[:COMPLAINTS_MAX]]
    return problem(422, "RequestValidationError", complaints)


def length_required() -> Answer:
    """A body without Content-Length; chunked uploads are not taken."""
    return problem(411, "LengthRequired", "Content-Length is required.", CLOSE)


def too_large(bytes_max: int) -> Answer:
    """A body over the limit, as sent or unpacked."""
    return problem(413, "RequestBodyTooLarge", f"The body may have at most {bytes_max} bytes.")


def unsupported_encoding() -> Answer:
    """A Content-Encoding that is not known; the header says which ones are."""
    detail = "Content-Encoding should be one of gzip, zstd, identity."
    return problem(415, "UnsupportedMediaType", detail, (b"accept-encoding", b"gzip, zstd, identity"))


def too_many_requests(retry_after_s: float) -> Answer:
    """Polar's 429: nothing but the number of seconds."""
    return Answer(429, b"", (_retry_after(retry_after_s),))


def unavailable(error: str, detail: str, retry_after_s: float) -> Answer:
    """Not now: the same request may be answered later."""
    return problem(503, error, detail, _retry_after(retry_after_s))


def busy() -> Answer:
    """As many bytes as the process may hold are held already."""
    return unavailable("Busy", "Too much is being taken in at once.", 1)


def no_answer() -> Answer:
    """The query API took the request and did not answer in time."""
    return problem(504, "ViewTimeout", "The query API did not answer in time.")


def preflight() -> Answer:
    """To a browser that asks whether a page may send a request: any, with any of these headers."""
    headers = b"Authorization, Content-Type, Polar-Version, Prefer, Log-Position, Idempotency-Key"
    return Answer(200, b"OK", (
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE"),
        (b"access-control-allow-headers", headers),
        (b"access-control-max-age", b"%d" % _PREFLIGHT_S),
    ))  # fmt: skip


def not_found() -> Answer:
    """No such route, or an API version that does not exist."""
    return Answer(404, b'{"detail":"Not Found"}')


def method_not_allowed(allow: str) -> Answer:
    """The route exists, and takes other methods."""
    return Answer(405, b'{"detail":"Method Not Allowed"}', (JSON, (b"allow", allow.encode())))


# Bodies. A client can send more than was agreed, send slowly, or send little that unpacks to a lot. Each of these
# ends in an answer, and holds at most as much memory as the limit allows.

Message = dict[str, Any]  # ASGI's
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
"""Methods whose requests have a body, and say how long it is, be it empty."""

GZIP_WINDOW_BITS = 31  # zlib's way of saying: a gzip header, and the largest window
ZSTD_WINDOW_BYTES_MAX = 8 * 1024 * 1024  # what RFC 8878 asks every decoder to support, and no more

ZSTD_STEP_BYTES = 256
"""Bytes unpacked at a time. Four bytes may state a block of 128 KiB, so one step makes at most 8 MiB."""

ENCODINGS = frozenset({"", "identity", "gzip", "x-gzip", "zstd"})


class Gone(Exception):
    """The client hung up before its body was whole: there is nobody to answer."""


async def read(receive: Receive, deadline_s: float, in_flight: InFlight, bytes_max: int) -> bytes | Answer:
    """The whole body, with its bytes counted into ``in_flight``, or an answer with nothing counted. Raises Gone."""
    chunks: list[bytes] = []
    held = 0
    refusal: Answer | None = None
    try:
        async with asyncio.timeout(deadline_s):
            more = True
            while more and refusal is None:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                chunk, more = message.get("body", b""), message.get("more_body", False)
                if held + len(chunk) > bytes_max:
                    refusal = too_large(bytes_max)
                elif not in_flight.take(len(chunk)):
                    refusal = busy()
                else:
                    held += len(chunk)
                    chunks.append(chunk)
    except TimeoutError:
        refusal = timed_out()
    except BaseException:
        in_flight.give_back(held)
        raise
    if refusal is not None:
        in_flight.give_back(held)
        return refusal
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def unpack(body: bytes, encoding: str, bytes_max: int) -> bytes | Answer:
    """The body without its Content-Encoding (one of ENCODINGS), or why not. One stream, complete, nothing after it."""
    if encoding in ("gzip", "x-gzip"):
        return _gunzip(body, bytes_max)
    if encoding == "zstd":
        return _unzstd(body, bytes_max)
    return body


def _gunzip(body: bytes, bytes_max: int) -> bytes | Answer:
    stream = zlib.decompressobj(GZIP_WINDOW_BITS)
    try:
        unpacked = stream.decompress(body, bytes_max + 1)
    except zlib.error:
        return undecodable("gzip")
    if len(unpacked) > bytes_max:
        return too_large(bytes_max)
    if not stream.eof or stream.unused_data:
        return undecodable("gzip")
    return unpacked


def _unzstd(body: bytes, bytes_max: int) -> bytes | Answer:
    stream = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).decompressobj()
    pieces: list[bytes] = []
    room = bytes_max
    try:
        for start in range(0, len(body), ZSTD_STEP_BYTES):
            if stream.eof:
                return undecodable("zstd")
            piece = stream.decompress(body[start : start + ZSTD_STEP_BYTES])
            room -= len(piece)
            if room < 0:
                return too_large(bytes_max)
            pieces.append(piece)
    except zstandard.ZstdError:
        return undecodable("zstd")
    return b"".join(pieces) if stream.eof and not stream.unused_data else undecodable("zstd")


async def send_answer(send: Send, what: Answer) -> int:
    """Send a whole answer; its status."""
    length = (b"content-length", b"%d" % len(what.body))
    await send({"type": "http.response.start", "status": what.status, "headers": [*what.headers, length]})
    await send({"type": "http.response.body", "body": what.body})
    return what.status
