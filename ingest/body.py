"""A request's body, read and unpacked within limits; and a whole answer, sent.

Three ways to hurt a server with a body: send more than was agreed, send it slowly, or send little that unpacks to a
lot. Each ends here in an answer, after at most the limit's worth of memory.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import zstandard

from ingest import answers
from ingest.answers import Answer
from ingest.limits import InFlight

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
                    refusal = answers.too_large(bytes_max)
                elif not in_flight.take(len(chunk)):
                    refusal = answers.busy()
                else:
                    held += len(chunk)
                    chunks.append(chunk)
    except TimeoutError:
        refusal = answers.timed_out()
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
        return answers.undecodable("gzip")
    if len(unpacked) > bytes_max:
        return answers.too_large(bytes_max)
    if not stream.eof or stream.unused_data:
        return answers.undecodable("gzip")
    return unpacked


def _unzstd(body: bytes, bytes_max: int) -> bytes | Answer:
    stream = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).decompressobj()
    pieces: list[bytes] = []
    room = bytes_max
    try:
        for start in range(0, len(body), ZSTD_STEP_BYTES):
            if stream.eof:
                return answers.undecodable("zstd")
            piece = stream.decompress(body[start : start + ZSTD_STEP_BYTES])
            room -= len(piece)
            if room < 0:
                return answers.too_large(bytes_max)
            pieces.append(piece)
    except zstandard.ZstdError:
        return answers.undecodable("zstd")
    return b"".join(pieces) if stream.eof and not stream.unused_data else answers.undecodable("zstd")


async def send_answer(send: Send, what: Answer) -> int:
    """Send a whole answer; its status."""
    length = (b"content-length", b"%d" % len(what.body))
    await send({"type": "http.response.start", "status": what.status, "headers": [*what.headers, length]})
    await send({"type": "http.response.body", "body": what.body})
    return what.status
