"""How much was used: series, one customer's running total, and what a meter would count if it existed.

A running total comes from memory and is answered on the event loop. So does a series of everybody's, which takes some
milliseconds of the calendar's: it is made in a thread, so that nobody waits. The rest are questions to the store.
"""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response

from aggregator.api import route_answers
from aggregator.api.bodies import fields_of
from aggregator.api.limits import PREVIEW_CUSTOMERS
from aggregator.api.meters import meter_of
from aggregator.api.requests import BY_METADATA, AtDesk, Bound, Ids, MetadataTexts, Texts, allow, answer, body_of, texts
from aggregator.api.schemas import MeterDefinition, gives, takes
from aggregator.directory import EXTERNAL
from aggregator.service.errors import Malformed, Refused
from aggregator.service.serializers import number
from aggregator.service.service import Desk, Here, Reading
from aggregator.store.queries import preview, usage
from aggregator.store.queries.scope import NOBODY, Scope
from aggregator.store.queries.usage import Question
from aggregator.store.sql import Measured
from aggregator.view import Total
from meters.access import reading
from meters.aggregation import Function
from meters.amount import amount_text
from meters.catalogue import Token
from meters.detail import detail
from meters.meter import Meter
from meters.quantities import Quantities
from meters.window import Interval, range_refusal, zone

router = APIRouter(tags=["usage"])
Reader = Annotated[Token, Depends(allow(reading("meters")))]


def known_zone(timezone: str) -> str:
    """The name of a time zone. Raises Malformed for an unknown one."""
    if zone(timezone) is None:
        message = "Input should be the name of a time zone, such as Europe/Berlin"
        raise Malformed([detail("value_error", ("query", "timezone"), message, timezone)])
    return timezone


def check_range(start: datetime, end: datetime, interval: Interval, kind: str = "timestamp") -> None:
    """Raise Refused for a range that has too many intervals; ``kind`` is what it was asked for by."""
    reason = range_refusal(start, end, interval, kind)
    if reason is not None:
        raise Refused("value_error", ("query",), reason)


@router.get("/v1/meters/{id}/quantities", openapi_extra=BY_METADATA, responses=gives(route_answers.Quantities))
async def get_meter_quantities(
    desk: AtDesk, token: Reader, id: UUID, metadata: MetadataTexts, start_timestamp: Bound, end_timestamp: Bound,
    interval: Interval, timezone: str = "UTC", customer_id: Ids = None, external_customer_id: Texts = None,
    customer_aggregation_function: Function | None = None,
) -> Response:  # fmt: skip
    """What the meter counted, interval by interval. Each quantity is that of the whole calendar unit."""
    meter = meter_of(desk, token, id)
    known_zone(timezone)
    check_range(start_timestamp, end_timestamp, interval)
    subjects = desk.subjects(token, texts(customer_id), external_customer_id)
    scope = Scope(organization=NOBODY, subjects=subjects, metadata=metadata)
    if subjects is None and not metadata and customer_aggregation_function is None:
        charted = await asyncio.to_thread(_charted, desk, meter, (start_timestamp, end_timestamp), interval, timezone)
        if charted is not None:
            return _quantities(*charted)

    asked = Question(
        filter=meter.filter, aggregation=meter.aggregation, per_customer=customer_aggregation_function, scope=scope
    )

    def question(here: Here) -> Quantities:
        return usage.quantities(
            here.connection, here.about(asked), start=start_timestamp, end=end_timestamp, interval=interval,
            timezone=timezone,
        )  # fmt: skip

    return _quantities(*await desk.ask(token, question))


def _charted(
    desk: Desk, meter: Meter, between: tuple[datetime, datetime], interval: Interval, timezone: str
) -> Reading[Quantities] | None:
    """A thread: everybody's series, from memory; None where memory does not have it."""
    points, bounds = usage.spans(*between, interval, timezone)
    as_of = desk.view.as_of  # before it is read: what is read may be newer than it says, never older
    totals = desk.view.totals.by_quarters(meter.id, bounds)
    if totals is None:
        return None
    parts = [measured(total) for total in totals]
    return Reading(usage.from_parts(meter.aggregation, points, bounds, parts), as_of)


def _quantities(quantities: Quantities, as_of: Mapping[int, int]) -> Response:
    points = [route_answers.Quantity(point.timestamp, number(point.quantity)) for point in quantities.quantities]
    return answer(route_answers.Quantities(points, number(quantities.total)), as_of)


@router.get("/v1/meters/{id}/usage", responses=gives(route_answers.Usage))
async def get_customer_usage(
    desk: AtDesk, token: Reader, id: UUID, customer_id: UUID | None = None, external_customer_id: str | None = None
) -> Response:
    """One customer's total since the beginning. ``value`` is a string, so that no client bends its digits."""
    meter = meter_of(desk, token, id)
    if (customer_id is None) == (external_customer_id is None):
        message = "Give either customer_id or external_customer_id"
        raise Refused("value_error", ("query",), message)
    ids = None if customer_id is None else [str(customer_id)]
    externals = None if external_customer_id is None else [external_customer_id]
    subjects = desk.subjects(token, ids, externals) or []
    as_of = desk.view.as_of  # before the total is read: the total may be newer than it says, never older
    total = desk.view.totals.total(meter.id, subjects)
    if total is None:
        question = Question(
            filter=meter.filter, aggregation=meter.aggregation, scope=Scope(organization=NOBODY, subjects=subjects)
        )
        found, as_of = await desk.ask(token, lambda here: usage.value_of(here.connection, here.about(question)))
    else:
        found = measured(total)
    return answer(running_total(meter, ids[0] if ids else None, external_customer_id, found), as_of)


def running_total(
    meter: Meter, customer_id: str | None, external_customer_id: str | None, found: Measured
) -> route_answers.Usage:
    """One customer's total, under the name that was asked for."""
    return route_answers.Usage(
        meter_id=meter.id,
        customer_id=customer_id,
        external_customer_id=external_customer_id,
        value=amount_text(found.value(meter.aggregation)),
        count=found.count,
    )


def measured(total: Total) -> Measured:
    """A total from memory as a question to the store would find it."""
    return Measured(total.count, enormous=[total.sum], min=total.min, max=total.max)


@router.post(
    "/v1/meters/preview",
    openapi_extra=takes(MeterDefinition),
    responses=gives(route_answers.Preview),
)
async def preview_meter(request: Request, desk: AtDesk, token: Reader) -> Response:
    """What a meter with this ``filter`` and ``aggregation`` would count of the events stored so far."""
    fields = fields_of(MeterDefinition, await body_of(request))
    filter, aggregation = fields["filter"], fields["aggregation"]
    question = Question(filter=filter, aggregation=aggregation, scope=Scope(organization=NOBODY))

    def previewed(here: Here) -> preview.Preview:
        same = _under_two_names(desk, token.organization_id)
        return preview.preview(here.connection, here.about(question), PREVIEW_CUSTOMERS, same)

    found, as_of = await desk.ask(token, previewed)
    whole = found.whole
    body = route_answers.Preview(
        total=number(whole.value(aggregation)),
        events=found.events,
        customers=found.customers_count,
        first_seen=found.first_seen,
        last_seen=found.last_seen,
        top_customers=[
            route_answers.TopCustomer(*_named(desk, token, row), number(row.measured.value(aggregation)))
            for row in found.customers
        ],
    )
    return answer(body, as_of)


def _under_two_names(desk: Desk, organization_id: str) -> dict[int, int]:
    """Of customers whose events name them in both ways: the number of one name to that of the other."""
    numbers = desk.view.directory.organizations.get(organization_id)
    if numbers is None:
        return {}
    same = {}
    for id, named in list(numbers.customer.items()):  # the reader of the log goes on meanwhile
        customer = desk.catalogue.customer(organization_id, id)
        other = numbers.external.get(customer.external_id) if customer and customer.external_id is not None else None
        if other is not None:
            same[named] = other
    return same


def _named(desk: Desk, token: Token, row: preview.CustomerUsage) -> tuple[str | None, str | None]:
    """The id and the external id of a customer, as far as they are known."""
    if row.kind == EXTERNAL:
        customer = desk.catalogue.customer_by_external_id(token.organization_id, row.who)
        return customer.id if customer else None, row.who
    customer = desk.catalogue.customer(token.organization_id, row.who)
    return row.who, customer.external_id if customer else None
