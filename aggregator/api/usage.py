"""``GET /v1/usage``: the one route for questions about usage over time.

A range is half-open. It cuts the first and the last calendar unit that it touches, and a total is the meter's aggregate
over it. Values are text. ``Question`` reads a range, and ``used`` answers for meters and customers; the
portal shares both.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response
from msgspec.structs import replace

from aggregator.api import route_answers
from aggregator.api.events import wanted_meter
from aggregator.api.meters import known_zone
from aggregator.api.requests import (
    BY_METADATA,
    AtDesk,
    Ids,
    Instant,
    MetadataTexts,
    Texts,
    allow,
    answer,
    texts,
)
from aggregator.api.schemas import gives
from aggregator.service.errors import Malformed, Refused
from aggregator.service.service import Desk, Here
from aggregator.store.queries.breakdown import METADATA, ROWS_MAX, Found, Known, TooManyRows, Wanted, breakdown
from aggregator.store.queries.scope import NOBODY, Bounds, Scope
from meters.aggregation import is_summable
from meters.catalogue.access import reading
from meters.catalogue.catalogue import Token
from meters.errors import detail
from meters.event_values import PROPERTY_LENGTH_MAX
from meters.exact import amount_text
from meters.ledger.ledger import ZERO
from meters.log import format_position
from meters.meter import Meter
from meters.timestamps import END_MAX, START_MIN, Interval, units, zone

METERS_MAX = 100
"""Meters of one question, as many as of one rollup of the feed: each reads the events once."""

KEYS_MAX = 3
"""Keys to group by: a chart by customer and model has two, and each further one multiplies the rows."""

DAYS_MAX = {
    Interval.HOUR: 400,
    Interval.DAY: 3660,
    Interval.WEEK: 3660,
    Interval.MONTH: 3660,
    Interval.YEAR: 3660,
}
"""Days of a range that is divided: ten years, and a year of hours with a month to spare. More rows are not taken
anyway, and the calendar of ten years is made in a few milliseconds."""

NAMED_KEYS = ("external_customer_id", "customer_id", "name")
CUSTOMER_KEYS = {"external_customer_id", "customer_id"}

router = APIRouter(tags=["usage"])
Reader = Annotated[Token, Depends(allow(reading("meters")))]
Meters = Annotated[list[UUID], Query(max_length=METERS_MAX, description="The id of a meter; repeatable")]
Unit = Literal["hour", "day", "week", "month", "year", "none"]
Keys = Annotated[list[str] | None, Query(
    max_length=KEYS_MAX, description="`external_customer_id`, `customer_id`, `name` or `metadata.PATH`; at most three",
)]  # fmt: skip
Top = Annotated[
    int | None, Query(ge=1, le=ROWS_MAX, description="Show only so many groups, and the usage of all others together")
]
Order = Annotated[
    Literal["-value", "value", "group", "-group"] | None,
    Query(description="The order of the groups; `-value` by default"),
]


class Asked(NamedTuple):
    """A range, how it is divided, and by what its usage is grouped."""

    start: datetime
    end: datetime
    interval: Interval | None
    timezone: str
    keys: list[str] = []  # noqa: RUF012 (never changed)
    top: int | None = None
    order: str = "-value"

    def units(self) -> list[Bounds]:
        """The calendar units that the range touches, whole; empty where it is not divided."""
        return units(self.start, self.end, self.interval, self.timezone) if self.interval else []

    def cut(self, unit: Bounds) -> Bounds:
        """Return the part of a unit that lies in the range."""
        return max(unit[0], self.start), min(unit[1], self.end)


async def _ungrouped(
    start: Annotated[Instant, Query(description="The first instant of the range")],
    end: Annotated[Instant, Query(description="The end of the range, not included")],
    interval: Unit = "none",
    timezone: Annotated[str, Query(description="The IANA time zone of days, weeks, months and years")] = "UTC",
) -> Asked:
    """The range of a question. Raises Malformed and Refused."""
    known_zone(timezone)
    divided = None if interval == "none" else Interval(interval)
    reason = _range_refusal(start, end, divided, timezone)
    if reason is not None:
        raise Refused("value_error", ("query",), reason)
    return Asked(start, end, divided, timezone)


async def _grouped(
    ungrouped: Annotated[Asked, Depends(_ungrouped)], group_by: Keys = None, top: Top = None, order: Order = None
) -> Asked:
    """The range and the groups of a question. Raises Malformed and Refused."""
    keys = group_by or []
    for place, key in enumerate(keys):
        if not _is_key(key) or key in keys[:place]:
            message = f"Input should be {', '.join(NAMED_KEYS)} or {METADATA}PATH, each once"
            raise Malformed([detail("value_error", ("query", "group_by", place), message, key)])
    for name, given in (("top", top), ("order", order)):
        if given is not None and not keys:
            message = "There are no groups to choose from: give group_by too"
            raise Malformed([detail("value_error", ("query", name), message, given)])
    return ungrouped._replace(keys=keys, top=top, order=order or "-value")


def _is_key(key: str) -> bool:
    path = key.removeprefix(METADATA)
    return key in NAMED_KEYS or (path != key and 0 < len(path) <= PROPERTY_LENGTH_MAX)


def _range_refusal(start: datetime, end: datetime, interval: Interval | None, timezone: str) -> str | None:
    """Why a range cannot be shown, or None. Its years may begin with the first one of the time zone."""
    if start >= end:
        return "end should be later than start: the range does not include it"
    if end > END_MAX:
        return f"end should be {END_MAX.date()} or earlier"
    if interval is None:
        return None
    if start < min(START_MIN, START_MIN.replace(tzinfo=zone(timezone))):
        return f"start should be {START_MIN.date()} or later; for what is older leave out the interval"
    if end - start > timedelta(days=DAYS_MAX[interval]):
        return f"By the {interval} a range may have {DAYS_MAX[interval]} days: take a longer interval, or less time"
    return None


Question = Annotated[Asked, Depends(_ungrouped)]
GroupedQuestion = Annotated[Asked, Depends(_grouped)]


@router.get("/v1/usage", openapi_extra=BY_METADATA, responses=gives(route_answers.UsageAnswer))
async def get_usage(
    desk: AtDesk, token: Reader, question: GroupedQuestion, meter_id: Meters, metadata: MetadataTexts,
    customer_id: Ids = None, external_customer_id: Texts = None,
) -> Response:  # fmt: skip
    """Return what meters counted from `start` up to, but not including, `end`: a row for every calendar unit.

    The first and the last unit are cut to the range. A total is the aggregate over the range alone. With `group_by`
    each group has rows of its own. With `top` only so many groups do, and `remainder` has the usage of all others. A
    customer that events name by both ids is one group. `customer_id` and `external_customer_id` together select the
    customers that either of them names.
    """
    meters = [wanted_meter(desk, token, str(id)) for id in dict.fromkeys(meter_id)]
    whose = desk.whose(token, texts(customer_id), external_customer_id)
    scope = Scope(organization=NOBODY, subjects=whose, metadata=metadata)
    return await used(desk, token.organization_id, meters, question, scope)


async def used(
    desk: Desk, organization_id: str, meters: Sequence[Meter], question: Asked, scope: Scope
) -> Response:
    """The answer about some meters. ``scope`` says whose events are meant.

    Raises Refused where the answer would have too many rows.
    """

    def look(here: Here) -> list[_OfMeter]:
        whole = question.units()
        within = replace(here.within(scope), since=question.start, until=question.end)
        known = list(_known(desk, organization_id)) if CUSTOMER_KEYS & set(question.keys) else []
        rows_left = ROWS_MAX
        found = []
        for meter in meters:
            wanted = Wanted(
                filter=meter.filter,
                aggregation=meter.aggregation,
                scope=within,
                units=whole,
                keys=question.keys,
                by_name=question.order.endswith("group"),
                ascending=not question.order.startswith("-"),
                top=question.top,
                rows_max=rows_left,
            )
            found.append(_OfMeter(meter, whole, breakdown(here.connection, wanted, known)))
            rows_left -= len(found[-1].found.groups) * max(len(whole), 1)
        return found

    try:
        found, as_of = await desk.ask_about(organization_id, look)
    except TooManyRows:
        message = (
            f"The answer would have more than {ROWS_MAX} rows: take a longer interval, a shorter range, fewer meters, "
            "or only the first groups (top)"
        )
        raise Refused("value_error", ("query",), message) from None
    body = route_answers.UsageAnswer(
        as_of=format_position(as_of),
        meters=[shown_meter(meter) for meter in meters],
        rows=[row for one in found for row in _rows(question, one)],
        remainder=[row for one in found for row in _remainder(question, one)],
        totals=[_total(one) for one in found],
    )
    return answer(body, as_of)


class _OfMeter(NamedTuple):
    meter: Meter
    units: list[Bounds]
    found: Found


def _known(desk: Desk, organization_id: str) -> Iterator[Known]:
    """The names of each customer that somebody created, for every number that events name it by."""
    for customer in desk.catalogue.customers_of(organization_id):
        for subject in desk.view.directory.find(organization_id, desk.catalogue.names_of(customer)):
            yield Known(subject, customer.id, customer.external_id)


def shown_meter(meter: Meter) -> route_answers.ShownMeter:
    """Return the name and the unit of a meter, for its numbers."""
    return route_answers.ShownMeter(meter.id, meter.name, meter.unit, meter.custom_label, meter.custom_multiplier)


def _spans(question: Asked, one: _OfMeter) -> list[tuple[datetime | None, Bounds]]:
    """The units by their starts, as results name them, and what of each is shown; or the whole range."""
    return [(unit[0], question.cut(unit)) for unit in one.units] or [(None, (question.start, question.end))]


def _rows(question: Asked, one: _OfMeter) -> Iterator[route_answers.UsageRow]:
    spans = _spans(question, one)
    for place, values in enumerate(one.found.groups):
        group = dict(zip(question.keys, values, strict=True))
        for unit, (start, end) in spans:
            value = one.found.values.get((place, unit), ZERO)
            yield route_answers.UsageRow(one.meter.id, group, start, end, amount_text(value))


def _remainder(question: Asked, one: _OfMeter) -> Iterator[route_answers.UsageRemainder]:
    for unit, (start, end) in _spans(question, one) if question.top is not None else ():
        value = one.found.rest.get(unit, ZERO)
        yield route_answers.UsageRemainder(one.meter.id, start, end, amount_text(value))


def _total(one: _OfMeter) -> route_answers.UsageTotal:
    adds_up = is_summable(one.meter.aggregation)
    return route_answers.UsageTotal(one.meter.id, amount_text(one.found.total), adds_up)
