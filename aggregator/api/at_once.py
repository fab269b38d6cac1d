"""Balances and running totals answered at once: the reads that an application makes before each of its own requests.

One customer meter, one customer's meters, one customer's total of one meter. Everything they need is in memory, in
microseconds; the framework around an endpoint (dependencies, validation, two tasks' worth of callbacks) costs ten
times that, and every turn of the event loop waits again for the interpreter's lock, which the threads that count
events hold most of the time. So this stands in front of the framework and answers in one turn.

It answers a request only when nothing about it is unusual: a good token with the scope, known ids in their usual
form, each parameter once, numbers that memory has, a position that is reached already. Anything else goes on to the
endpoint, untouched; what a refusal looks like, how long to wait and what the store is asked are decided there alone.
What is looked up and how it is shaped are the endpoints' own functions, so the two cannot say different things
(``tests/aggregator/test_at_once.py`` holds them side by side).
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from aggregator.api.balances import find, in_memory
from aggregator.api.customer_meters import DEFAULT_SORTING, READING, SORTINGS, in_order
from aggregator.api.desk import Desk
from aggregator.api.limits import PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX
from aggregator.api.paging import Page, order
from aggregator.api.shapes import customer_meter_shape
from aggregator.api.usage import measured, running_total
from aggregator.view import Unavailable
from meters import exact_json
from meters.access import Denied, authorize, reading
from meters.catalogue import Customer, Token
from meters.log import format_position, parse_position

Json = dict[str, Any]
Parameters = dict[str, str]
Headers = dict[bytes, bytes]

_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_IS_ID = re.compile(_UUID).fullmatch
_IS_COUNT = re.compile("[1-9][0-9]{0,5}").fullmatch
"""Of a page or of its rows: what every way to read a number takes for the same number."""

METERS_MAX = 100
"""Meters of an organization whose balances are looked up at once: some 3 ms in which nobody else is served."""

_NEWEST_FIRST = order(None, SORTINGS, DEFAULT_SORTING)


class Read(NamedTuple):
    """One kind of read: the path's pattern, who may ask, the answer if it can be given at once."""

    path: re.Pattern[str]
    scopes: frozenset[str]
    answer: Callable[[Desk, Token, str, Parameters], Json | None]


def _balance(desk: Desk, token: Token, id: str, parameters: Parameters) -> Json | None:
    pair = None if parameters else find(desk, token.organization_id, id)
    found = in_memory(desk, [pair]) if pair else None
    return customer_meter_shape(found[0]) if found else None


def _balances(desk: Desk, token: Token, _: str, parameters: Parameters) -> Json | None:
    customer = _named(desk, token, parameters)
    page = _page(parameters)
    if customer is None or page is None:
        return None
    meter_id = parameters.pop("meter_id", None)
    meters = desk.catalogue.meters_of(token.organization_id)
    if parameters or len(meters) > METERS_MAX or not (meter_id is None or _IS_ID(meter_id)):
        return None
    asked = [meter for meter in meters if (meter.archived_at is None if meter_id is None else meter.id == meter_id)]
    found = in_memory(desk, [(customer, meter) for meter in asked])
    return None if found is None else in_order(found, _NEWEST_FIRST, page)


def _total(desk: Desk, token: Token, id: str, parameters: Parameters) -> Json | None:
    meter = desk.catalogue.meters.get(id)
    customer_id, external_id = parameters.pop("customer_id", None), parameters.pop("external_customer_id", None)
    is_plain = (customer_id is None) != (external_id is None) and (customer_id is None or _IS_ID(customer_id))
    if meter is None or meter.organization_id != token.organization_id or parameters or not is_plain:
        return None
    ids, externals = [[name] if name else None for name in (customer_id, external_id)]
    total = desk.view.total(meter.id, desk.subjects(token, ids, externals) or [])
    return None if total is None else running_total(meter, customer_id, external_id, measured(total))


def _named(desk: Desk, token: Token, parameters: Parameters) -> Customer | None:
    """The one customer that is meant, taken out of the parameters."""
    organization = token.organization_id
    id, external_id = parameters.pop("customer_id", None), parameters.pop("external_customer_id", None)
    if (id is None) == (external_id is None):
        return None
    if external_id is not None:
        return desk.catalogue.customer_by_external_id(organization, external_id)
    return desk.catalogue.customer(organization, id or "")


def _page(parameters: Parameters) -> Page | None:
    number, rows = parameters.pop("page", "1"), parameters.pop("limit", str(PAGE_ROWS_DEFAULT))
    if not (_IS_COUNT(number) and _IS_COUNT(rows)):
        return None
    limit = min(int(rows), PAGE_ROWS_MAX)
    return Page(limit, (int(number) - 1) * limit)


READS = (
    Read(re.compile(f"/v1/customer-meters/({_UUID})"), READING, _balance),
    Read(re.compile("/v1/customer-meters/()"), READING, _balances),
    Read(re.compile(f"/v1/meters/({_UUID})/usage"), reading("meters"), _total),
)


class AtOnce:
    """ASGI middleware in front of the framework."""

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app, self._desk = app, desk

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer now, or pass the request on."""
        if scope["type"] == "http" and scope["method"] == "GET":
            for read in READS:
                matched = read.path.fullmatch(scope["path"])
                if matched:
                    found = self._read(scope, read, matched[1])
                    if found is not None:
                        return _send(send, *found)
        return self._app(scope, receive, send)

    def _read(self, scope: Scope, read: Read, id: str) -> tuple[bytes, bytes] | None:
        headers, parameters = _each_once(scope["headers"]), _parameters(scope["query_string"])
        if headers is None or parameters is None:
            return None
        try:
            as_of = self._desk.view.as_of  # before anything is read, which may then be newer than it says, never older
            token = self._admitted(headers, read.scopes) if _is_reached(headers, as_of) else None
            body = read.answer(self._desk, token, id, parameters) if token else None
        except Unavailable:
            return None
        return None if body is None else (exact_json.encode(body), format_position(as_of).encode())

    def _admitted(self, headers: Headers, scopes: frozenset[str]) -> Token | None:
        header = headers.get(b"authorization", b"").decode("latin-1")
        outcome = authorize(header, scopes, self._desk.catalogue, self._desk.now())
        return None if isinstance(outcome, Denied) else outcome


def _each_once(headers: list[tuple[bytes, bytes]]) -> Headers | None:
    found = dict(headers)
    return found if len(found) == len(headers) else None


def _parameters(query: bytes) -> Parameters | None:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else []
    found = dict(pairs)
    return found if len(found) == len(pairs) and "" not in found.values() else None


def _is_reached(headers: Headers, as_of: Mapping[int, int]) -> bool:
    """Whether there is nothing to wait for."""
    if b"log-position" not in headers:
        return True
    position = parse_position(headers[b"log-position"].decode("latin-1"))
    return position is not None and all(as_of.get(partition, 0) >= offset for partition, offset in position.items())


async def _send(send: Send, body: bytes, as_of: bytes) -> None:
    length = b"%d" % len(body)
    headers = [(b"as-of", as_of), (b"content-length", length), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
