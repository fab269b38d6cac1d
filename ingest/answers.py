"""What the gateway says when it does not say yes: every status, its body and its headers, in Polar's shapes."""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from meters.access import API_VERSION_DEFAULT

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
