"""Routes of events (section 2 of Polar's contract) and dead letters.

Events are read as lists, one by one, and as the names that they use. Dead letters are lines that could not be
counted; they are listed and marked as replayed here.
"""

from decimal import Decimal
from typing import Annotated, NamedTuple
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Query, Response

from aggregator.api.customers import customers_mentioned
from aggregator.api.requests import (
    AGGREGATE_FIELD_LENGTH_MAX,
    AGGREGATE_FIELDS_MAX,
    BY_METADATA,
    DEPTH_MAX,
    SEARCH_LENGTH_MAX,
    SEARCH_LENGTH_MIN,
    AtDesk,
    Ids,
    Instant,
    MetadataTexts,
    Since,
    Texts,
    Until,
    WhichPage,
    allow,
    answer,
    earlier,
    includes,
    listed,
    order,
    texts,
)
from aggregator.api.schemas import gives, page_of
from aggregator.decode.dedup import LetterPlace
from aggregator.service import answers
from aggregator.service.errors import Malformed, NotFound, Refused
from aggregator.service.serializers import event_shape, letter_shape, name_shape
from aggregator.service.service import Desk, Here, Page, Patience
from aggregator.store.queries import events
from aggregator.store.queries.events import DeadLetter, Identity, Letters, Listing, StoredEvent, Whose
from aggregator.store.queries.scope import NOBODY, Scope
from meters import exact
from meters.aggregation import Aggregation
from meters.catalogue.access import reading, writing
from meters.catalogue.catalogue import DeadLetterReplayed, Token
from meters.errors import detail
from meters.event import SYSTEM, USER, halves
from meters.filters import Filter, parse_filter
from meters.log import is_count
from meters.meter import Meter

# Events.
#
# Polar's list compares metadata with strings alone. This list compares with the text of strings, numbers and
# booleans, as Polar's quantities do. ``query`` needs no ``organization_id``, since a token has only one organization.

router = APIRouter(tags=["events"])
Reader = Annotated[Token, Depends(allow(reading("events")))]
Sorting = Annotated[list[str] | None, Query(description="timestamp or -timestamp")]
Search = Annotated[str | None, Query(min_length=SEARCH_LENGTH_MIN, max_length=SEARCH_LENGTH_MAX)]
NameSearch = Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)]
Depth = Annotated[int | None, Query(ge=0, le=DEPTH_MAX)]
Field = Annotated[str, Query(pattern="^[a-zA-Z0-9_.]+$", max_length=AGGREGATE_FIELD_LENGTH_MAX)]
Fields = Annotated[list[Field] | None, Query(max_length=AGGREGATE_FIELDS_MAX)]
Pending = Annotated[bool, Query(description="Also events without a complete chain of parents, which Polar hides")]
Sums = dict[Identity, dict[str, Decimal]]
EVERY_EVENT = Aggregation("count")


async def _scope(
    desk: AtDesk, token: Reader, organization_id: Ids = None, customer_id: Ids = None,
    external_customer_id: Texts = None, source: Texts = None, since: Since = None, until: Until = None,
) -> Scope:  # fmt: skip
    """What is common to lists of events and of names. Both customer parameters together mean either's customers."""
    for given in source or ():
        if given not in (SYSTEM, USER):
            raise Malformed([detail("enum", ("query", "source"), f"Input should be '{SYSTEM}' or '{USER}'", given)])
    whose = desk.whose(token, texts(customer_id), external_customer_id)
    is_own = includes(organization_id, token)
    return Scope(
        organization=NOBODY, subjects=whose if is_own else [], sources=source, since=since, until=until
    )  # fmt: skip


InScope = Annotated[Scope, Depends(_scope)]


async def _no_event_types(
    _: Reader, event_type_id: Annotated[list[str] | None, Query(include_in_schema=False)] = None
) -> None:
    """Raises Malformed for an event type: a list that did not mind it would show more than was asked for."""
    if event_type_id is not None:
        message = "There are no event types here: give the 'name' of the events"
        raise Malformed([detail("extra_forbidden", ("query", "event_type_id"), message, event_type_id)])


NoEventTypes = Annotated[None, Depends(_no_event_types)]


async def _listing(
    desk: AtDesk, token: Reader, _: NoEventTypes, scope: InScope, page: WhichPage, metadata: MetadataTexts,
    filter: Annotated[str | None, Query(description="A filter as JSON")] = None,
    start_timestamp: Annotated[Instant | None, Query(description="Not included")] = None,
    end_timestamp: Annotated[Instant | None, Query(description="Not included")] = None, name: Texts = None,
    meter_id: UUID | None = None, query: Search = None, parent_id: UUID | None = None, depth: Depth = None,
    sorting: Sorting = None, cursor_pagination: bool = False, pending: Pending = False,
) -> Listing:  # fmt: skip
    """What the parameters ask for. Both of Polar's timestamps are exclusive; with both kinds of range, both hold."""
    until = earlier(scope.until, end_timestamp)
    filters = [] if filter is None else [parsed_filter(filter)]
    meter = None if meter_id is None else wanted_meter(desk, token, str(meter_id))
    if meter:
        filters.append(meter.filter)
    return Listing(
        scope=msgspec.structs.replace(scope, names=name, after=start_timestamp, until=until, metadata=metadata),
        filter=Filter("and", list(filters)),
        aggregation=meter.aggregation if meter else EVERY_EVENT,
        search=query,
        parent=None if parent_id is None else halves(parent_id.int),
        depth=depth,
        ascending=order(sorting, ["timestamp"], "-timestamp").ascending,
        limit=page.limit,
        offset=page.offset,
        is_counted=not cursor_pagination,
        shows_pending=pending,
    )


def parsed_filter(text: str) -> Filter:
    """A filter that was given as JSON in the query. Raises Malformed."""
    where = ("query", "filter")
    try:
        parsed = parse_filter(exact.decode(text), where)
    except ValueError as error:
        raise Malformed([detail("json_invalid", where, "Invalid JSON", text)]) from error
    if isinstance(parsed, Filter):
        return parsed
    raise Malformed(parsed)


def wanted_meter(desk: Desk, token: Token, id: str) -> Meter:
    """The organization's meter that a query names. Raises Refused."""
    meter = desk.catalogue.meter(token.organization_id, id)
    if meter is None:
        raise Refused("meter_id", ("query", "meter_id"), "Meter not found.", id)
    return meter


def _mentioned(desk: Desk, token: Token, search: str | None, patience: Patience) -> list[int]:
    """Numbers of the customers that a search text occurs in."""
    if search is None:
        return []
    found = customers_mentioned(patience.each(desk.catalogue.customers_of(token.organization_id)), search)
    return desk.subjects(token, [customer.id for customer in found], None) or []


@router.get(
    "/v1/events/",
    openapi_extra=BY_METADATA,
    responses=gives(page_of(answers.Event), answers.ListResourceWithCursorPagination[answers.Event]),
)
async def list_events(
    desk: AtDesk, token: Reader, listing: Annotated[Listing, Depends(_listing)],
    aggregate_fields: Fields = None,
) -> Response:  # fmt: skip
    """Events, newest first. One that waits for its parent is shown only with `pending`; it counts all the same."""

    def question(here: Here) -> _Found:
        mentioned = _mentioned(desk, token, listing.search, here.patience)
        return _page(here, msgspec.structs.replace(listing, searched=mentioned), aggregate_fields or [])

    found, as_of = await desk.ask(token, question)
    items = [_shape(desk, token, event, found) for event in found.page.events]
    if listing.is_counted:
        return answer(listed(items, found.page.total, Page(listing.limit, listing.offset)), as_of)
    more = answers.CursorPagination(found.page.has_more)
    return answer(answers.ListResourceWithCursorPagination(items, more), as_of)


class _Found(NamedTuple):
    page: events.Page
    children: dict[Identity, int]
    sums: Sums


def _page(here: Here, listing: Listing, fields: list[str]) -> _Found:
    return _with_family(here, events.page(here.connection, here.about(listing)), fields)


def _with_family(here: Here, page: events.Page, fields: list[str]) -> _Found:
    tops = [event.identity for event in page.events]
    children = events.descendant_counts(here.connection, tops) if tops else {}
    sums: Sums = {}
    for field in dict.fromkeys(fields if tops else ()):
        for top, amount in events.sums_below(here.connection, here.organization, tops, field).items():
            sums.setdefault(top, {})[field] = amount
    return _Found(page, children, sums)


def _shape(desk: Desk, token: Token, event: StoredEvent, found: _Found) -> answers.Event:
    children, sums = found.children.get(event.identity, 0), found.sums.get(event.identity, {})
    return event_shape(event, token.organization_id, desk.catalogue, children, sums)


@router.get("/v1/events/names", responses=gives(page_of(answers.EventName)))
async def list_names(
    desk: AtDesk, token: Reader, scope: InScope, page: WhichPage, query: NameSearch = None, sorting: Sorting = None
) -> Response:
    """The names that events go by, with how often and when they were seen."""
    chosen = order(sorting, events.NAME_ORDERS, "-last_seen")

    def question(here: Here) -> tuple[list[events.EventName], int]:
        return events.names(
            here.connection, here.within(scope), search=query, order=chosen.by, ascending=chosen.ascending,
            limit=page.limit, offset=page.offset,
        )  # fmt: skip

    (names, total), as_of = await desk.ask(token, question)
    return answer(listed([name_shape(name) for name in names], total, page), as_of)


@router.get("/v1/events/{id}", responses=gives(answers.Event))
async def get_event(desk: AtDesk, token: Reader, id: UUID, aggregate_fields: Fields = None) -> Response:
    """One event, by the id that lists show."""

    def question(here: Here) -> _Found:
        event = events.one(here.connection, here.organization, halves(id.int))
        return _with_family(here, events.Page([event] if event else [], 0, False), aggregate_fields or [])

    found, as_of = await desk.ask(token, question)
    if not found.page.events:
        raise NotFound
    return answer(_shape(desk, token, found.page.events[0], found), as_of)


# Dead letters, which Polar does not have.
#
# The fixed event of a dead letter is sent through ``POST /v1/events/ingest`` like any other. The replay route only
# removes the dead letter from the list.
#
# A line whose organization is missing or unknown belongs to no organization; only a producer that bypasses the
# gateway can write one. Tokens of the first organization, which ``serve`` created for the operator, can read these
# lines.

dead_letters_router = APIRouter(tags=["dead letters"])
Writer = Annotated[Token, Depends(allow(writing("events")))]


@dead_letters_router.get("/v1/dead-letters/", responses=gives(page_of(answers.DeadLetter)))
async def list_dead_letters(desk: AtDesk, token: Reader, page: WhichPage, include_replayed: bool = False) -> Response:
    """The lines that could not be counted, newest first, with their reason and their bytes.

    Of a line of more than 16 KiB, which then ``is_cut``, these are the first; ``/v1/dead-letters/{id}`` has all of it.
    Lines of no known organization are shown to the first one that was made, the operator's.
    """

    def question(here: Here) -> Letters:
        return events.dead_letter_page(
            here.connection, _whose(desk, token), replayed=include_replayed, limit=page.limit, offset=page.offset
        )

    (letters, total), as_of = await desk.ask(token, question)
    return answer(listed([letter_shape(letter, token.organization_id) for letter in letters], total, page), as_of)


@dead_letters_router.get("/v1/dead-letters/{id}", responses=gives(answers.DeadLetter))
async def get_dead_letter(desk: AtDesk, token: Reader, id: str) -> Response:
    """One dead letter, with all its bytes."""
    letter, as_of = await desk.ask(token, lambda here: _find(here, desk, token, id))
    return answer(letter_shape(letter, token.organization_id), as_of)


@dead_letters_router.post("/v1/dead-letters/{id}/replay", responses=gives(answers.DeadLetter))
async def replay_dead_letter(desk: AtDesk, token: Writer, id: str) -> Response:
    """Remove a dead letter from the list, after its fixed event was ingested or given up. Repeating this is harmless.

    Send the fixed event to `/v1/events/ingest` first. This request has no body.
    """
    letter, as_of = await desk.ask(token, lambda here: _find(here, desk, token, id))
    if letter.replayed_at is None:
        place = letter.log_partition, letter.log_offset, letter.line
        async with desk.deciding:
            await desk.decide(DeadLetterReplayed(*place, desk.decided_at()))
        letter, as_of = await desk.ask(token, lambda here: _find(here, desk, token, id))
    return answer(letter_shape(letter, token.organization_id), as_of)


def _find(here: Here, desk: AtDesk, token: Token, id: str) -> DeadLetter:
    place = _place(id)
    letter = events.dead_letter(here.connection, _whose(desk, token), place) if place else None
    if letter is None:
        raise NotFound
    return letter


def _whose(desk: AtDesk, token: Token) -> Whose:
    known = list(desk.catalogue.organizations)  # in the order in which they were made
    return Whose(token.organization_id, token.organization_id == known[0], known)


def _place(id: str) -> LetterPlace | None:
    parts = id.split("-")
    if len(parts) != 3 or not all(map(is_count, parts)):
        return None
    partition, offset, line = map(int, parts)
    return partition, offset, line
