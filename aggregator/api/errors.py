"""What a client reads when something is wrong, in Polar's shapes (section 10.2 of its contract).

A handler raises one of these; ``install`` makes the answers. Nothing of the inside gets out: what is not foreseen here
is a plain 500.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from aggregator.api.limits import ECHO_LENGTH_MAX, QUERY_S_MAX, RETRY_AFTER_S
from aggregator.store.queries.asking import TooLarge, TooLong
from aggregator.view import Unavailable
from meters import exact_json
from meters.access import Denied
from meters.detail import COMPLAINTS_MAX, Detail, detail
from meters.log import Refused as RefusedByLog
from meters.log import TryAgain


class Forbidden(Exception):
    """Who asks may not: ``denied`` is the whole answer."""

    def __init__(self, denied: Denied) -> None:
        super().__init__(denied.status)
        self.denied = denied


class NotFound(Exception):
    """There is no such thing, or it is another organization's, which is the same to who asks."""


class Malformed(Exception):
    """The request is not of the shape that it should have."""

    def __init__(self, details: Sequence[Detail]) -> None:
        super().__init__(f"{len(details)} complaints")  # and not what they quote, which may be megabytes
        self.details = details


class Refused(Exception):
    """The request is well formed and cannot be done."""

    def __init__(self, type: str, loc: tuple[str | int, ...], msg: str, input: Any = None) -> None:
        super().__init__(msg)
        self.details = [detail(type, loc, msg, input)]


class Conflict(Exception):
    """It cannot be done as things are. ``is_passing``: they are others in a moment, as when it is being done."""

    def __init__(self, message: str, *, is_passing: bool = True) -> None:
        super().__init__(message)
        self.is_passing = is_passing


class BodyTooLarge(Exception):
    """The body has more bytes than are read."""


class Busy(Exception):
    """Too many who want the same are waiting already."""


PASSING = (Unavailable, TryAgain, Busy, TooLong, TooLarge)
"""The same question has an answer later."""


def json_response(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON whose decimals are numbers of all their digits."""
    return Response(exact_json.encode(body), status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Turn the exceptions above, and those of the rooms below, into answers."""
    for kind, answer in _ANSWERS.items():
        app.exception_handler(kind)(answer)


async def _forbidden(_: Request, error: Forbidden) -> Response:
    denied = error.denied
    return Response(denied.body, denied.status, dict(denied.headers), "application/json")


async def _not_found(_: Request, __: Exception) -> Response:
    return json_response(404, {"error": "ResourceNotFound", "detail": "Not found"})


async def _malformed(_: Request, error: Malformed) -> Response:
    return _unprocessable("RequestValidationError", error.details)


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    return _unprocessable("RequestValidationError", [_plain(entry) for entry in error.errors()[:COMPLAINTS_MAX]])


def _unprocessable(error: str, details: Sequence[Any]) -> Response:
    """An answer that stays small: with the first complaints, and without the inputs that are long."""
    return json_response(422, {"error": error, "detail": [_short(entry) for entry in details[:COMPLAINTS_MAX]]})


def _short(entry: Any) -> Any:
    return entry | {"input": None} if "input" in entry and _is_long(entry["input"]) else entry


def _is_long(value: Any) -> bool:
    """Whether a value has too many characters to be sent back. No more of it is looked at than that takes."""
    length, waiting = 0, [value]
    while waiting and length <= ECHO_LENGTH_MAX:
        part = waiting.pop()
        length += len(part) if isinstance(part, list | dict) else len(str(part))
        if isinstance(part, list | dict) and length <= ECHO_LENGTH_MAX:
            waiting += [*part.keys(), *part.values()] if isinstance(part, dict) else part
    return length > ECHO_LENGTH_MAX


def _plain(entry: Any) -> dict[str, Any]:
    """An entry of pydantic's as JSON: without its link, and with exceptions as their words."""
    plain: dict[str, Any] = {key: entry[key] for key in ("type", "loc", "msg", "input") if key in entry}
    if entry.get("ctx"):
        plain["ctx"] = {key: value if isinstance(value, int) else str(value) for key, value in entry["ctx"].items()}
    return plain


async def _refused(_: Request, error: Refused) -> Response:
    return _unprocessable("PolarRequestValidationError", error.details)


async def _conflict(_: Request, error: Conflict) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.is_passing else None
    return json_response(409, {"error": "Conflict", "detail": str(error)}, headers)


async def _too_large(_: Request, __: Exception) -> Response:
    return json_response(413, {"error": "RequestBodyTooLarge", "detail": "The request body is too large."})


async def _too_large_a_decision(_: Request, __: Exception) -> Response:
    message = "This would change more than the log takes as one record, so nothing was changed. Ask for less at a time."
    return json_response(413, {"error": "DecisionTooLarge", "detail": message})


def _later(error: str, message: str, after_s: float) -> Response:
    headers = {"Retry-After": str(max(1, round(after_s)))}
    return json_response(503, {"error": error, "detail": message}, headers)


async def _busy(_: Request, __: Exception) -> Response:
    return _later("TooManyQueries", "Too many requests like this are waiting already.", RETRY_AFTER_S)


async def _unavailable(_: Request, error: Unavailable | TryAgain) -> Response:
    return _later("ViewUnavailable", "The view cannot answer just now.", error.retry_after_s)


async def _too_long(_: Request, __: Exception) -> Response:
    message = f"The question takes longer than {QUERY_S_MAX:.0f} seconds. Ask for a shorter range, or filter by name."
    return json_response(504, {"error": "QueryTimeout", "detail": message})


async def _too_much(_: Request, __: Exception) -> Response:
    message = "The question needs more memory than the store may use. Ask for a shorter range."
    return json_response(503, {"error": "QueryTooLarge", "detail": message})


_ANSWERS: dict[type[Exception], Any] = {
    Forbidden: _forbidden,
    NotFound: _not_found,
    Malformed: _malformed,
    RequestValidationError: _invalid,
    Refused: _refused,
    Conflict: _conflict,
    BodyTooLarge: _too_large,
    RefusedByLog: _too_large_a_decision,
    Busy: _busy,
    Unavailable: _unavailable,
    TryAgain: _unavailable,
    TooLong: _too_long,
    TooLarge: _too_much,
}
