"""Fast reads: balances, totals and states answered at the connection, before the web framework.

Applications make these reads before each of their own requests. ``meters.fast_paths`` lists them: one customer meter,
one customer's meters, one customer's total of one meter, one customer's state. All of their data is in memory, and
the framework would cost ten times as much as the read. ``front`` returns uvicorn's protocol with ``AtOnce`` in front
of the application, which answers in the turn of the event loop in which the request arrives.

A request is answered here only if nothing about it is unusual: a valid token with the scope, known ids in their usual
form, each parameter once, totals that memory has, and a log position that is already reached. Every other request
goes on to its endpoint unchanged. Lookups and shapes are the endpoints' own functions, so both give the same answers
(``tests/aggregator/api/test_fast_reads.py`` compares them).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aggregator.api.customer_meters import DEFAULT_SORTING, READING, SORTINGS, in_order
from aggregator.api.meters import measured, running_total
from aggregator.api.requests import PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX, order
from aggregator.service.answers import Answer
from aggregator.service.balances import find, in_memory
from aggregator.service.customer_state import state_in_memory
from aggregator.service.serializers import customer_meter_shape
from aggregator.service.service import Desk, Page
from aggregator.view import Unavailable
from meters import exact
from meters.catalogue.access import Denied, authorize, reading
from meters.catalogue.catalogue import Customer, Token
from meters.fast_paths import ID, FastRead, path_pattern
from meters.log import format_position, parse_position

Parameters = dict[str, str]
Headers = dict[bytes, bytes]

_IS_ID = re.compile(ID).fullmatch
_IS_COUNT = re.compile("[1-9][0-9]{0,5}").fullmatch
"""Of a page or of its rows: what every way to read a number takes for the same number."""

METERS_MAX = 100
"""Meters of an organization whose balances are looked up at once: some 3 ms in which nobody else is served."""

_NEWEST_FIRST = order(None, SORTINGS, DEFAULT_SORTING)


class Handler(NamedTuple):
    """The scopes of which a token needs one, and the answer to the id in the path, if it can be given at once."""

    scopes: frozenset[str]
    answer: Callable[[Desk, Token, str, Parameters], Answer | None]


def _balance(desk: Desk, token: Token, id: str, parameters: Parameters) -> Answer | None:
    pair = None if parameters else find(desk, token.organization_id, id)
    found = in_memory(desk, [pair]) if pair else None
    return customer_meter_shape(found[0]) if found else None


def _balances(desk: Desk, token: Token, _: str, parameters: Parameters) -> Answer | None:
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


def _total(desk: Desk, token: Token, id: str, parameters: Parameters) -> Answer | None:
    meter = desk.catalogue.meter(token.organization_id, id)
    customer_id, external_id = parameters.pop("customer_id", None), parameters.pop("external_customer_id", None)
    is_plain = (customer_id is None) != (external_id is None) and (customer_id is None or _IS_ID(customer_id))
    if meter is None or parameters or not is_plain:
        return None
    ids, externals = [[name] if name else None for name in (customer_id, external_id)]
    total = desk.view.totals.total(meter, desk.subjects(token, ids, externals) or [])
    return None if total is None else running_total(meter, customer_id, external_id, measured(total))


def _state(desk: Desk, token: Token, id: str, parameters: Parameters) -> Answer | None:
    return None if parameters else _state_of(desk, desk.catalogue.customer(token.organization_id, id))


def _state_by_external_id(desk: Desk, token: Token, segment: str, parameters: Parameters) -> Answer | None:
    if parameters:
        return None
    return _state_of(desk, desk.catalogue.customer_by_external_id(token.organization_id, unquote(segment)))


def _state_of(desk: Desk, customer: Customer | None) -> Answer | None:
    if customer is None or len(desk.catalogue.meters_of(customer.organization_id)) > METERS_MAX:
        return None
    return state_in_memory(desk, customer)


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


_HANDLERS = {
    FastRead.CUSTOMER_METER: Handler(READING, _balance),
    FastRead.CUSTOMER_METERS: Handler(READING, _balances),
    FastRead.USAGE: Handler(reading("meters"), _total),
    FastRead.STATE: Handler(reading("customers"), _state),
    FastRead.STATE_BY_EXTERNAL_ID: Handler(reading("customers"), _state_by_external_id),
}
_ROUTES = [(path_pattern(read), _HANDLERS[read]) for read in FastRead]


class AtOnce:
    """The fast reads of one API."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def answer(self, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes] | None:
        """``As-Of`` and the body of a 200, or None where the endpoint has to be asked.

        ``target`` is the request's, with its query; the names of ``headers`` are in lower case.
        """
        path, _, query = target.decode("latin-1").partition("?")
        for pattern, handler in _ROUTES:
            matched = pattern.fullmatch(path)
            if matched and "#" not in query:
                return self._read(handler, "".join(matched.groups()), query, headers)
        return None

    def _read(
        self, handler: Handler, id: str, query: str, headers: Sequence[tuple[bytes, bytes]]
    ) -> tuple[bytes, bytes] | None:
        once, parameters = _each_once(headers), _parameters(query)
        if once is None or parameters is None:
            return None
        try:
            as_of = self._desk.view.as_of  # before anything is read, which may then be newer than it says, never older
            token = self._admitted(once, handler.scopes) if _is_reached(once, as_of) else None
            body = handler.answer(self._desk, token, id, parameters) if token else None
        except Unavailable:
            return None
        return None if body is None else (format_position(as_of).encode(), exact.encode(body))

    def _admitted(self, headers: Headers, scopes: frozenset[str]) -> Token | None:
        header = headers.get(b"authorization", b"").decode("latin-1")
        outcome = authorize(header, scopes, self._desk.catalogue, self._desk.now())
        return None if isinstance(outcome, Denied) else outcome


def front(desk: Desk) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these reads in front of the application."""

    class Front(_Front):
        at_once = AtOnce(desk)

    return Front


class _Front(HttpToolsProtocol):
    at_once: AtOnce
    answered = False  # the request that is being received

    def on_headers_complete(self) -> None:
        """Answer now, or begin what uvicorn begins."""
        if self.parser.get_method() == b"GET" and self._is_free():
            found = self.at_once.answer(self.url, self.headers)
            if found is not None:
                self.answered = True
                own = b"".join([b"%s: %s\r\n" % header for header in self.server_state.default_headers])
                self.transport.write(_HEAD % (own, found[0], len(found[1])) + found[1])
                return
        self._unset_keepalive_if_required()  # what was answered in this same turn has set it
        super().on_headers_complete()

    def _is_free(self) -> bool:
        """Whether an answer may be written now, and nothing has to happen after it."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        is_last = self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive()
        is_last = is_last or self.parser.should_upgrade()
        return not (is_busy or is_last or self.flow.write_paused or self.transport.is_closing())

    def _unsupported_upgrade_warning(self) -> None:
        """An offer of another protocol is declined, and the connection closed: the parser does not read its body."""
        self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A body that nobody asked for is passed over."""
        if not self.answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The next request may come."""
        if self.answered:
            self.answered = False
            self.on_response_complete()
        else:
            super().on_message_complete()


_HEAD = b"HTTP/1.1 200 OK\r\n%sas-of: %s\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n"


def _each_once(headers: Sequence[tuple[bytes, bytes]]) -> Headers | None:
    found = dict(headers)
    return found if len(found) == len(headers) else None


def _parameters(query: str) -> Parameters | None:
    pairs = parse_qsl(query, keep_blank_values=True) if query else []
    found = dict(pairs)
    return found if len(found) == len(pairs) and "" not in found.values() else None


def _is_reached(headers: Headers, as_of: Mapping[int, int]) -> bool:
    """Whether there is nothing to wait for."""
    if b"log-position" not in headers:
        return True
    position = parse_position(headers[b"log-position"].decode("latin-1"))
    return position is not None and all(as_of.get(partition, 0) >= offset for partition, offset in position.items())
