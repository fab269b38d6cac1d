"""What all routes share: limits, authorization, bodies, pages of lists, paths, answers and errors.

``allow`` is the dependency that checks the token and honors ``Prefer: wait``; ``body_of`` reads JSON with exact
numbers; ``listed`` and ``on_page`` build pages; ``answer`` adds ``As-Of``. ``Segments`` and ``RelativeRedirects`` are
ASGI middleware for paths. A route raises an exception, and ``install_error_answers`` maps it to Polar's error shape
(section 10.2 of its contract). Any other exception becomes a plain 500 that reveals nothing internal.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from uuid import UUID

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, AwareDatetime
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregator.api.strictness import check_parameters, takes_no_body
from aggregator.service.answers import ListResource, Pagination
from aggregator.service.errors import (
    QUERY_S_MAX,
    RETRY_AFTER_S,
    Busy,
    Conflict,
    Malformed,
    NotFound,
    Refused,
    TooLarge,
    TooLong,
)
from aggregator.service.service import Desk, Order, Page
from aggregator.view import Unavailable
from meters import exact
from meters.catalogue.access import Denied, authorize
from meters.catalogue.catalogue import Token
from meters.errors import COMPLAINTS_MAX, detail
from meters.log import Refused as RefusedByLog
from meters.log import TryAgain, format_position, parse_position

# Limits of requests and their parameters, each with its reason.

BODY_BYTES_MAX = 2 * 1024 * 1024
"""Of a request: a filter of a hundred clauses fits, with every text at its longest."""

ECHO_LENGTH_MAX = 4 * 1024
"""Characters of the ``input`` in a complaint, some kilobytes: a longer one is null, because whoever sent it has it. A
filter that lacks something at each of twenty levels would be sent back twenty times."""

PATH_SHOWN_MAX = 200
"""Characters of a path that an answer about an unknown route repeats: enough to see the mistake."""

POLAR_BODY_BYTES_MAX = 512 * 1024
"""Of a webhook of Polar's, which anybody may send and every secret is held against. Its longest ones are subscriptions
and orders: a product, a customer and benefits, each with metadata of 27 kB at most."""

PAGE_ROWS_MAX = 100
"""Items of one page; Polar's limit, and like there a larger wish is cut down silently."""

PAGE_ROWS_DEFAULT = 10
"""Items of one page when nobody says (Polar's default)."""

WAIT_S_MAX = 30.0
"""The longest that ``Prefer: wait`` is honored; clients of Polar give up after 5 to 30 seconds."""

AGGREGATE_FIELDS_MAX = 10
"""Fields to add up along traces in one request: each walks the traces of the page once."""

AGGREGATE_FIELD_LENGTH_MAX = 255
"""Characters of such a field (Polar's limit)."""

SEARCH_LENGTH_MIN = 3
"""Characters of a search for events (Polar's limit): fewer would find nearly everything."""

SEARCH_LENGTH_MAX = 1000
"""Characters of a search: as long as a filter's text."""

DEPTH_MAX = 5
"""Levels of a trace that may be asked for (Polar's limit)."""

IDENTIFIERS_MAX = 1000
"""Values of one repeated parameter, such as customers; a URL hardly holds more."""

METADATA_KEYS_MAX = 50
"""Different keys of ``metadata[key]=value``, as many as a resource's metadata has. Each is another place to plan for
and to read in every event: fifty cost a second of a processor, a thousand took twenty."""

PREVIEW_CUSTOMERS = 10
"""Customers that a preview names: enough to recognize one's own."""

FEED_ROWS_MAX = 10_000
"""Events of one page of the feed: a few megabytes, and half a second."""

FEED_ROWS_DEFAULT = 1_000
"""Events of such a page when nobody says."""

FEED_CUSTOMERS_DEFAULT = 100
"""Customers with most events that are named when nobody says how many."""

FEED_METERS_MAX = 100
"""Meters that are rolled up in one question: each reads the events once."""

FEED_WINDOW_S_MAX = 86_400
"""Seconds of a rollup's window: a day. What is sent later than that belongs to no bill any more."""


# Requests and answers.
#
# An organization's external id of a customer may contain a slash, such as ``acme/eu``. In a path that is
# ``acme%2Feu``, one segment, but ASGI servers decode the whole path, which makes it two. So ``Segments`` decodes the
# segments one by one and keeps ``%2F`` (and ``%25``); the path converter ``name`` decodes a parameter once its
# segment is known.
#
# A path without its closing slash is answered with 307 to the path with it, as Polar does. The framework redirects to
# an absolute URL with plain http and a Host that a proxy may have changed. ``RelativeRedirects`` shortens the
# location to the path, which is right behind every proxy and cannot lead a client from https to http.

T = TypeVar("T")


class Forbidden(Exception):
    """Who asks may not: ``denied`` is the whole answer."""

    def __init__(self, denied: Denied) -> None:
        super().__init__(denied.status)
        self.denied = denied


class BodyTooLarge(Exception):
    """The body has more bytes than are read."""


async def desk(request: Request) -> Desk:
    """The desk of the app that serves the request. A coroutine, because other dependencies are run in threads."""
    found: Desk = request.app.state.desk
    return found


def allow(scopes: frozenset[str]) -> Callable[[Request], Awaitable[Token]]:
    """A dependency: the caller's token, which has one of the scopes. Only for who has one ``Prefer: wait`` waits."""

    async def who(request: Request) -> Token:
        here = await desk(request)
        outcome = authorize(request.headers.get("authorization"), scopes, here.catalogue, here.now())
        if isinstance(outcome, Denied):
            raise Forbidden(outcome)
        await known_only(request)
        await caught_up(request, outcome.organization_id)
        return outcome

    return who


async def known_only(request: Request) -> None:
    """Refuse parameters that nobody knows, and a body where none is taken. Raises Malformed, BodyTooLarge.

    A route with a token does this once the token is known to be good; any other depends on it.
    """
    check_parameters(request)
    if takes_no_body(request) and (body := await body_of(request, otherwise={})) != {}:
        raise Malformed([detail("extra_forbidden", ("body",), "This takes no body: leave it out", body)])


async def caught_up(request: Request, organization_id: str) -> None:
    """Honor ``Prefer: wait=N`` with a ``Log-Position``: read what was written, if it becomes visible in time.

    Raises Busy where too many wait for that already.
    """
    seconds = _wait_seconds(",".join(request.headers.getlist("prefer")))
    text = request.headers.get("log-position")
    if seconds is None or not text:
        return
    position = parse_position(text)
    if position is None:
        message = "Input should be positions such as 0:18,1:7"
        raise Malformed([detail("value_error", ("header", "Log-Position"), message, text)])
    here = await desk(request)
    if not await here.view.wait_for(position, 0):
        with here.waits.of(organization_id):
            await here.view.wait_for(position, min(seconds, WAIT_S_MAX))


def _wait_seconds(prefer: str) -> int | None:
    """The ``wait`` of Prefer headers (RFC 7240), whose preferences may have parameters; None where there is none."""
    for preference in prefer.lower().split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        value = value.strip(' "')
        if name.strip() == "wait" and value.isascii() and value.isdigit():
            return int(value[:6])
    return None


AtDesk = Annotated[Desk, Depends(desk)]


async def body_of(request: Request, *, otherwise: object = None) -> Any:
    """The request's JSON with exact numbers; ``otherwise`` where there is none. Raises BodyTooLarge, Malformed."""
    received = await bytes_of(request)
    if not received and otherwise is not None:
        return otherwise
    if not received:
        raise Malformed([detail("missing", ("body",), "Field required")])
    return decoded(received)


async def bytes_of(request: Request, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """The request's body as it was sent, however often it is asked for. Raises BodyTooLarge."""
    if (known := getattr(request.state, "received", None)) is not None:
        return bytes(known)
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > bytes_max:
            raise BodyTooLarge
    request.state.received = bytes(received)
    return bytes(received)


def decoded(body: bytes) -> Any:
    """A body's JSON with exact numbers. Raises Malformed."""
    try:
        return exact.decode(body)
    except ValueError as error:
        place = getattr(error, "pos", 0)
        raise Malformed([detail("json_invalid", ("body", place), "JSON decode error", {})]) from error


def _in_utc(instant: datetime) -> datetime:
    try:
        return instant.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("the calendar does not reach that far") from error


def _as_sent(instant: datetime) -> datetime:
    _in_utc(instant)
    return instant


Instant = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A point in time with an offset, brought to UTC."""

Bound = Annotated[AwareDatetime, AfterValidator(_as_sent)]
"""Where a range of calendar days begins or ends: a point in time in the offset of whoever asks."""

Since = Annotated[Instant | None, Query(description="What happened at this time or later")]
Until = Annotated[Instant | None, Query(description="What happened before this time")]
"""The two ends of a half-open range, which ranges of Polar's are not on every route."""


def earlier(one: datetime | None, other: datetime | None) -> datetime | None:
    """The earlier one of two ends that may be absent."""
    return min((end for end in (one, other) if end is not None), default=None)


Ids = Annotated[list[UUID] | None, Query(max_length=IDENTIFIERS_MAX)]
Texts = Annotated[list[str] | None, Query(max_length=IDENTIFIERS_MAX)]


async def _page(page: Annotated[int, Query(ge=1)] = 1, limit: Annotated[int, Query(ge=1)] = PAGE_ROWS_DEFAULT) -> Page:
    rows = min(limit, PAGE_ROWS_MAX)
    return Page(rows, (page - 1) * rows)


WhichPage = Annotated[Page, Depends(_page)]


def listed(items: list[T], total: int, page: Page) -> ListResource[T]:
    """Polar's envelope of a list."""
    return ListResource(items, Pagination(total, -(-total // page.limit)))


def on_page(items: Sequence[T], page: Page) -> list[T]:
    """The page of a list that is in memory."""
    return list(items[page.offset : page.offset + page.limit])


def order(sorting: list[str] | None, known: Collection[str], default: str) -> Order:
    """The first criterion that is asked for; the rest have no say. Raises Malformed for an unknown one."""
    allowed = [f"{sign}{name}" for name in known for sign in ("", "-")]
    for criterion in sorting or ():
        if criterion not in allowed:
            names = ", ".join(f"'{name}'" for name in allowed)
            raise Malformed([detail("enum", ("query", "sorting"), f"Input should be {names}", criterion)])
    chosen = (sorting or [default])[0]
    return Order(chosen.lstrip("-"), not chosen.startswith("-"))


def is_metadata(name: str) -> bool:
    """Whether a query parameter is ``metadata[key]``."""
    return name.startswith("metadata[") and name.endswith("]")


async def metadata_texts(request: Request) -> dict[str, list[str]]:
    """``metadata[key]=value`` parameters: the texts asked for by key. Raises Malformed for too many."""
    found: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        if is_metadata(name):
            found.setdefault(name[len("metadata[") : -1], []).append(value)
    if sum(map(len, found.values())) > IDENTIFIERS_MAX:
        message = f"At most {IDENTIFIERS_MAX} values are taken"
        raise Malformed([detail("too_long", ("query", "metadata"), message)])
    if len(found) > METADATA_KEYS_MAX:
        message = f"At most {METADATA_KEYS_MAX} different keys are taken"
        raise Malformed([detail("too_long", ("query", "metadata"), message)])
    return found


MetadataTexts = Annotated[dict[str, list[str]], Depends(metadata_texts)]

BY_METADATA = {"parameters": [{
    "name": "metadata", "in": "query", "style": "deepObject", "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    "description": "`metadata[key]=value`: what has this text at the key. Repeated for one key: any of the texts",
}]}  # fmt: skip
"""For the OpenAPI document, which cannot see by itself what ``metadata_texts`` reads."""


def includes(organization_id: list[UUID] | None, token: Token) -> bool:
    """Whether an ``organization_id`` parameter leaves the token's organization in: none does, or one that names it."""
    return organization_id is None or token.organization_id in map(str, organization_id)


def texts(ids: list[UUID] | None) -> list[str] | None:
    """UUIDs as the catalogue writes them."""
    return None if ids is None else [str(id) for id in ids]


class Segments:
    """ASGI middleware before the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, under the path by which routes are found."""
        if scope["type"] == "http":
            scope["path"] = "/".join(map(_routed, scope["raw_path"].decode("ascii").split("/")))
        await self._app(scope, receive, send)


def _routed(segment: str) -> str:
    return unquote(segment).replace("%", "%25").replace("/", "%2F")


class RelativeRedirects:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; shorten the ``Location`` of the answer."""

        async def shorten(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if "location" in headers:
                    headers["location"] = urlunsplit(("", "", *urlsplit(headers["location"])[2:]))
            await send(message)

        await self._app(scope, receive, shorten)


class _Name(Convertor[str]):
    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("name", _Name())

BY_EXTERNAL_ID = "/v1/customers/external/{external_id:name}"
"""The path of a customer by the id that its organization gave it."""


def answer(body: object, as_of: Mapping[int, int], status: int = 200) -> Response:
    """A response that says as of which positions it is true."""
    return json_response(status, body, {"As-Of": format_position(as_of)})


def json_response(status: int, body: object, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON whose decimals are numbers of all their digits."""
    return Response(exact.encode(body), status, headers, "application/json")


def install_error_answers(app: FastAPI) -> None:
    """Answer each exception in ``_ANSWERS`` with its status and body."""
    for kind, answer in _ANSWERS.items():
        app.exception_handler(kind)(answer)


async def _forbidden(_: Request, error: Forbidden) -> Response:
    denied = error.denied
    return Response(denied.body, denied.status, dict(denied.headers), "application/json")


async def _not_found(_: Request, __: Exception) -> Response:
    return json_response(404, {"error": "ResourceNotFound", "detail": "Not found"})


async def _no_route(request: Request, error: HTTPException) -> Response:
    """Answer what the framework refuses by itself.

    Polar's clients know routes that are not here, and can read a 404 only with the fields of its other 404s.
    """
    if error.status_code != HTTPStatus.NOT_FOUND:
        return json_response(error.status_code, {"detail": error.detail}, dict(error.headers or {}))
    message = f"There is no {request.url.path[:PATH_SHOWN_MAX]} here. GET /docs lists every route."
    return json_response(404, {"error": "ResourceNotFound", "detail": message})


async def _malformed(_: Request, error: Malformed) -> Response:
    return _unprocessable("RequestValidationError", error.details)


async def _invalid(_: Request, error: RequestValidationError) -> Response:
    return _unprocessable("RequestValidationError", [_plain(entry) for entry in error.errors()[:COMPLAINTS_MAX]])


def _unprocessable(error: str, details: Sequence[Mapping[str, object]]) -> Response:
    """An answer that stays small: with the first complaints, and without the inputs that are long."""
    return json_response(422, {"error": error, "detail": [_short(entry) for entry in details[:COMPLAINTS_MAX]]})


def _short(entry: Mapping[str, object]) -> Mapping[str, object]:
    return {**entry, "input": None} if "input" in entry and _is_long(entry["input"]) else entry


def _is_long(value: object) -> bool:
    """Whether a value has too many characters to be sent back. No more of it is looked at than that takes."""
    length, waiting = 0, [value]
    while waiting and length <= ECHO_LENGTH_MAX:
        part = waiting.pop()
        length += len(part) if isinstance(part, list | dict) else len(str(part))
        if isinstance(part, list | dict) and length <= ECHO_LENGTH_MAX:
            waiting += [*part.keys(), *part.values()] if isinstance(part, dict) else part
    return length > ECHO_LENGTH_MAX


def _plain(entry: Mapping[str, Any]) -> dict[str, object]:
    """An entry of pydantic's as JSON: without its link, and with exceptions as their words."""
    plain: dict[str, object] = {key: entry[key] for key in ("type", "loc", "msg", "input") if key in entry}
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


_ANSWERS: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
    Forbidden: _forbidden,
    NotFound: _not_found,
    HTTPException: _no_route,
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
