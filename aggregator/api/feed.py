"""Routes of the feed: counted events in the order of the log, for programs that forward or check them.

A reader keeps the ``position`` of an answer and sends it with the next request. A position is half-open and names
places in the log, so no event is missed or read twice, even after a restart or a rebuild of the store. A ``witness``
comes with each position and tells its log from others. A reader that sends both gets 409 if the log has other events
before the position. Events have the form in which another system could ingest them: a customer or parent that is known
by an internal id is shown with its external id. ``rollup`` adds events up; ``backlog``, ``customers`` and ``traffic``
describe what is waiting. Polar has no such routes.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Query, Response

from aggregator.api import route_answers
from aggregator.api.events import parsed_filter, wanted_meter
from aggregator.api.requests import (
    FEED_CUSTOMERS_DEFAULT,
    FEED_METERS_MAX,
    FEED_ROWS_DEFAULT,
    FEED_ROWS_MAX,
    FEED_WINDOW_S_MAX,
    AtDesk,
    Ids,
    Instant,
    Since,
    Texts,
    Until,
    allow,
    answer,
    earlier,
    json_response,
)
from aggregator.api.schemas import gives
from aggregator.service.answers import Error
from aggregator.service.errors import Conflict, Malformed
from aggregator.service.serializers import number
from aggregator.service.service import Desk, Here
from aggregator.store.queries import feed
from aggregator.store.queries.feed import FeedEvent, FeedPage, Group, Traffic, Wanted
from aggregator.store.queries.scope import NOBODY, Scope
from aggregator.view import Unavailable
from meters.aggregation import exact_sum
from meters.catalogue.access import reading
from meters.catalogue.catalogue import Token
from meters.errors import detail
from meters.filters import Filter
from meters.log import (
    FeedPlace,
    format_places,
    format_position,
    format_witnesses,
    parse_places,
    parse_witnesses,
)
from meters.meter import Meter

router = APIRouter(tags=["feed"])
Reader = Annotated[Token, Depends(allow(reading("events")))]
Meters = Annotated[list[UUID], Query(max_length=FEED_METERS_MAX)]
WindowSeconds = Annotated[int, Query(ge=1, le=FEED_WINDOW_S_MAX, description="Seconds of a window")]
CONFLICTS: dict[int | str, dict[str, Any]] = {409: gives(Error)[404]}
EXTERNAL = "external"
END_S_MAX = 1.0  # to ask the log where it ends, and to read up to it
OTHER = "it is a position of another log, or of this one before it was restored"
_Key = tuple[int, tuple[tuple[str, str], ...], datetime]  # meter, customer, start of the window


async def _position(
    position: Annotated[str, Query(description="The position of an earlier answer; empty for the beginning")] = "",
) -> dict[int, FeedPlace]:
    found = parse_places(position)
    if found is None:
        message = "Input should be places such as 0:18:0,1:7:2"
        raise Malformed([detail("value_error", ("query", "position"), message, position)])
    return found


async def _wanted(
    desk: AtDesk, token: Reader, name: Texts = None, meter_id: UUID | None = None,
    filter: Annotated[str | None, Query(description="A filter as JSON")] = None,
    start_timestamp: Instant | None = None, end_timestamp: Instant | None = None,
) -> Wanted:  # fmt: skip
    """What the reader selects: all that is given must hold. The start is inclusive, the end is not."""
    filters = [] if filter is None else [parsed_filter(filter)]
    filters += [] if meter_id is None else [wanted_meter(desk, token, str(meter_id)).filter]
    scope = Scope(organization=NOBODY, names=name, since=start_timestamp, until=end_timestamp)
    return Wanted(scope=scope, filter=Filter("and", list(filters)))


async def _witness(
    witness: Annotated[
        str | None,
        Query(description="The witness of that answer. 409 if the log has other events before the position"),
    ] = None,
) -> dict[int, str] | None:
    found = None if witness is None else parse_witnesses(witness)
    if found is None and witness is not None:
        message = "Input should be witnesses such as 0:5f1d20c7a6b94e83"
        raise Malformed([detail("value_error", ("query", "witness"), message, witness)])
    return found


class Known(NamedTuple):
    """A position as its reader sent it, and its witnesses, if the reader sent them."""

    places: dict[int, FeedPlace]
    witnesses: dict[int, str] | None

    def check(self, here: Here) -> None:
        """Raises Conflict if the position is one of another log; Unavailable while the store reads up to it."""
        if self._ahead(feed.ends_of(here.connection)):
            raise Unavailable("the store has yet to read up to the position")
        if self.witnesses is None:
            return
        found = feed.witnesses(here.connection, self.places)
        for partition, place in sorted(self.places.items()):
            if found.get(partition) != self.witnesses.get(partition):
                where = format_places({partition: place})
                raise Conflict(f"Another event stands before {where} than when it was read: {OTHER}", is_passing=False)

    async def check_end(self, desk: Desk) -> None:
        """Raises Conflict if the log ends before the position."""
        if self._ahead(desk.view.as_of) and await desk.view.present(END_S_MAX):
            ends = desk.view.as_of
            if ahead := self._ahead(ends):
                where = f"The log ends at {format_position(ends) or '0'}, before {format_places(ahead)}"
                raise Conflict(f"{where}: {OTHER}", is_passing=False)

    def _ahead(self, ends: Mapping[int, int]) -> dict[int, FeedPlace]:
        return {partition: place for partition, place in self.places.items() if place > (ends.get(partition, 0), 0)}


async def _known(
    desk: AtDesk,
    _: Reader,
    places: Annotated[dict[int, FeedPlace], Depends(_position)],
    witnesses: Annotated[dict[int, str] | None, Depends(_witness)],
) -> Known:
    known = Known(places, witnesses)
    await known.check_end(desk)
    return known


async def _wanted_between(
    wanted: Annotated[Wanted, Depends(_wanted)], since: Since = None, until: Until = None
) -> Wanted:
    """Narrow the wanted events to the range from ``since`` to ``until``, as in lists of events."""
    scope = wanted.scope
    starts = max((start for start in (scope.since, since) if start is not None), default=None)
    scope = msgspec.structs.replace(scope, since=starts, until=earlier(scope.until, until))
    return msgspec.structs.replace(wanted, scope=scope)


Position = Annotated[dict[int, FeedPlace], Depends(_position)]
SelectedByMeaning = Annotated[Wanted, Depends(_wanted)]
KnownPosition = Annotated[Known, Depends(_known)]
Selected = Annotated[Wanted, Depends(_wanted_between)]


@router.get("/v1/feed/", responses=gives(route_answers.FeedPage) | CONFLICTS)
async def read_feed(
    desk: AtDesk, token: Reader, known: KnownPosition, wanted: Selected,
    limit: Annotated[int, Query(ge=1)] = FEED_ROWS_DEFAULT,
) -> Response:  # fmt: skip
    """The next events from ``position`` on. An empty page may still move the position: keep it, and its witness."""

    def question(here: Here) -> tuple[FeedPage, dict[str, str], dict[int, str]]:
        known.check(here)
        page = feed.page(here.connection, here.about(wanted), known.places, min(limit, FEED_ROWS_MAX))
        return page, _parents(here, page.events), feed.witnesses(here.connection, page.position)

    (page, parents, witnesses), as_of = await desk.ask(token, question)
    items = [_item(desk, token, event, parents) for event in page.events]
    found = route_answers.FeedPage(items, format_places(page.position), format_witnesses(witnesses))
    return answer(found, as_of)


@router.get("/v1/feed/position", responses=gives(route_answers.FeedPosition) | CONFLICTS)
async def read_feed_position(
    desk: AtDesk, token: Reader, known: KnownPosition,
    since: Annotated[Instant | None, Query(description="Instead: where events begin that came in since then")] = None,
) -> Response:  # fmt: skip
    """A position and its witness, and when the newest of the organization's events before it came in."""

    def question(here: Here) -> route_answers.FeedPosition:
        known.check(here)
        places = known.places if since is None else feed.places_since(here.connection, since)
        newest = feed.newest_before(here.connection, Wanted(scope=Scope(organization=here.organization)), places)
        witnesses = feed.witnesses(here.connection, places)
        return route_answers.FeedPosition(format_places(places), format_witnesses(witnesses), newest)

    found, as_of = await desk.ask(token, question)
    return answer(found, as_of)


def _parents(here: Here, events: list[FeedEvent]) -> dict[str, str]:
    """The external ids of parents that are named by their public id."""
    ids = {text: id for event in events if (text := event.parent) and (id := _public_id(text)) is not None}
    found = feed.parents(here.connection, here.organization, list(ids.values()))
    return {text: found[id] for text, id in ids.items() if id in found}


def _public_id(text: str) -> int | None:
    try:
        return UUID(text).int
    except ValueError:
        return None


def _item(desk: Desk, token: Token, event: FeedEvent, parents: dict[str, str]) -> route_answers.FeedItem:
    place = format_places({event.partition: (event.offset, event.line)})
    parent = None if event.parent is None else parents.get(event.parent, event.parent)
    members = {"member_id": event.member_id, "external_member_id": event.external_member_id, "parent_id": parent}
    customer = _customer(desk, token, event.kind, event.who)
    if "customer_id" not in customer:
        del members["member_id"]  # speaks of a member of a customer_id
    body = route_answers.FeedEvent(
        name=event.name,
        timestamp=event.timestamp,
        external_id=event.external_id,
        metadata=msgspec.Raw(event.metadata.encode()),
        **customer,
        **{name: value for name, value in members.items() if value is not None},
    )
    return route_answers.FeedItem(place, event.ingested_at, body)


def _customer(desk: Desk, token: Token, kind: str | None, who: str | None) -> dict[str, str]:
    """By external id where there is one, also of a customer deleted since: an id of ours means nothing elsewhere."""
    if kind == EXTERNAL:
        return {"external_customer_id": who or ""}
    known = desk.catalogue.customers.get(desk.catalogue.customer_named(token.organization_id, who or ""))
    if known is not None and known.organization_id == token.organization_id and known.external_id is not None:
        return {"external_customer_id": known.external_id}
    return {"customer_id": who or ""}


@router.get("/v1/feed/backlog", responses=gives(route_answers.FeedBacklog))
async def read_backlog(desk: AtDesk, token: Reader, position: Position, wanted: Selected) -> Response:
    """How many events stand from ``position`` on, and when the oldest of them came in."""
    found, as_of = await desk.ask(token, lambda here: feed.backlog(here.connection, here.about(wanted), position))
    return answer(route_answers.FeedBacklog(found.events, found.oldest), as_of)


@router.get("/v1/feed/customers", responses=gives(route_answers.FeedCustomers))
async def read_feed_customers(
    desk: AtDesk, token: Reader, position: Position, wanted: Selected,
    limit: Annotated[int, Query(ge=1)] = FEED_CUSTOMERS_DEFAULT,
) -> Response:  # fmt: skip
    """Who has most of the events from ``position`` on, most first. One whom events name in two ways is there twice."""
    found, as_of = await desk.ask(
        token, lambda here: feed.customers(here.connection, here.about(wanted), position, min(limit, FEED_ROWS_MAX))
    )
    items = [
        route_answers.FeedCustomer(**_customer(desk, token, kind, who), events=events)
        for kind, who, events in found.rows
    ]
    return answer(route_answers.FeedCustomers(items, found.total), as_of)


@router.get("/v1/feed/rollup", responses=gives(route_answers.FeedRollup) | CONFLICTS)
async def read_rollup(
    desk: AtDesk, token: Reader, known: KnownPosition, meter_id: Meters, before: Instant,
    window_seconds: WindowSeconds = 60,
) -> Response:  # fmt: skip
    """What the events from ``position`` on, ingested ``before``, add up to: by meter, customer and window of time.

    An answer that would be too large ends early. Ask again from its position, until that stays where it is.
    """
    meters = [wanted_meter(desk, token, str(id)) for id in meter_id]

    def question(here: Here) -> Response:
        known.check(here)
        scope = Scope(organization=here.organization)
        wanted = [Wanted(scope=scope, filter=meter.filter, aggregation=meter.aggregation) for meter in meters]
        groups, reached = feed.rollup(here.connection, wanted, known.places, before, window_seconds)
        items = _rolled_up(desk, token, meters, groups)
        witnesses = format_witnesses(feed.witnesses(here.connection, reached))
        return json_response(200, route_answers.FeedRollup(items, format_places(reached), witnesses))

    response, as_of = await desk.ask(token, question)
    response.headers["As-Of"] = format_position(as_of)
    return response


def _rolled_up(desk: Desk, token: Token, meters: list[Meter], groups: list[Group]) -> list[route_answers.FeedGroup]:
    """A customer that events name in two ways is one to the reader: its groups belong together."""
    found: dict[_Key, list[Group]] = {}
    for group in groups:
        customer = tuple(_customer(desk, token, group.kind, group.who).items())
        found.setdefault((group.meter, customer, group.starts), []).append(group)
    return [
        route_answers.FeedGroup(
            **dict(customer), meter_id=meters[meter].id, window=starts, count=sum(part.count for part in parts),
            sum=number(exact_sum(part.sum for part in parts)),
        )
        for (meter, customer, starts), parts in found.items()
    ]  # fmt: skip


@router.get("/v1/feed/traffic", responses=gives(route_answers.FeedTraffic))
async def read_traffic(
    desk: AtDesk, token: Reader, wanted: SelectedByMeaning, since: Instant, rollup_meter_id: Ids = None,
    window_seconds: WindowSeconds = 60,
) -> Response:  # fmt: skip
    """What came in since an instant, and how many events a rollup would make of it."""
    meters = [wanted_meter(desk, token, str(id)) for id in rollup_meter_id or ()]

    def question(here: Here) -> tuple[Traffic, list[int]]:
        return feed.traffic(here.connection, here.about(wanted), since), [
            feed.windows(here.connection, _whole(here, meter.filter), since, window_seconds) for meter in meters
        ]

    (traffic, windows), as_of = await desk.ask(token, question)
    rollups = [route_answers.FeedTrafficRollup(meter.id, events) for meter, events in zip(meters, windows, strict=True)]
    return answer(route_answers.FeedTraffic(*traffic, rollups), as_of)


def _whole(here: Here, filter: Filter) -> Wanted:
    return Wanted(scope=Scope(organization=here.organization), filter=filter)
