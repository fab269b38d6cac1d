"""Routes of meters: definitions, prices, quantities, usage and previews.

Each group has its own router. ``meter_of`` finds the organization's meter, and ``running_total`` builds the answer of
``/usage`` (fast reads use it as well).
"""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated
from uuid import UUID

import structlog
from fastapi import APIRouter, Depends, Query, Request, Response
from msgspec import UNSET

from aggregator.api import route_answers
from aggregator.api.bodies import fields_of, known_fields, refuse_organization
from aggregator.api.customers import customer_by_id, has_texts
from aggregator.api.requests import (
    BY_METADATA,
    IDENTIFIERS_MAX,
    PREVIEW_CUSTOMERS,
    SEARCH_LENGTH_MAX,
    AtDesk,
    Bound,
    Ids,
    MetadataTexts,
    Texts,
    WhichPage,
    allow,
    answer,
    body_of,
    includes,
    listed,
    on_page,
    order,
    texts,
)
from aggregator.api.schemas import MeterCreate, MeterDefinition, MeterUpdate, PriceSet, gives, page_of, takes
from aggregator.decode.directory import EXTERNAL
from aggregator.service import answers
from aggregator.service.balances import CustomerMeter, customer_meters, numbers_of
from aggregator.service.charges import Charge, charges_of
from aggregator.service.errors import PASSING, Malformed, NotFound, Refused
from aggregator.service.meter_check import Look, look, uncounted, warnings
from aggregator.service.polar_accounts import settle_meter
from aggregator.service.serializers import meter_shape, number, price_shape
from aggregator.service.service import Desk, Here, Reading
from aggregator.store.meter_sql import Measured
from aggregator.store.queries import usage
from aggregator.store.queries.scope import NOBODY, Scope
from aggregator.store.queries.unmatched import Unmatched, unmatched
from aggregator.store.queries.usage import Question
from aggregator.view import Total
from meters.aggregation import Function
from meters.catalogue.access import reading, writing
from meters.catalogue.catalogue import MeterCreated, MeterUpdated, Token, meter_json
from meters.errors import Detail, detail
from meters.exact import EXACT, amount_text
from meters.ledger.ledger import ZERO
from meters.ledger.price import MeterPriced, parse_price
from meters.meter import Meter, Quantities, new_meter, updated_meter
from meters.polar_webhooks import meters_here
from meters.tariff import tariff_of
from meters.timestamps import Interval, range_refusal, zone

# Meter definitions (section 3.1 of Polar's contract). In ``query``, wildcards are plain characters.

logger = structlog.get_logger("aggregator.api.meters")
router = APIRouter(tags=["meters"])
Reader = Annotated[Token, Depends(allow(reading("meters")))]
Writer = Annotated[Token, Depends(allow(writing("meters")))]
LOOK_S_MAX = 1.0  # for what a meter passes over: the meter itself is known at once
METERS = "meters"  # their changes wait for each other: nobody else may wait while what Polar told is counted


def meter_of(desk: Desk, token: Token, id: UUID) -> Meter:
    """The organization's meter. Raises NotFound."""
    meter = desk.catalogue.meter(token.organization_id, str(id))
    if meter is None:
        raise NotFound
    return meter


@router.post(
    "/v1/meters/",
    status_code=201,
    openapi_extra=takes(MeterCreate),
    responses=gives(answers.CheckedMeter, status=201),
)
async def create_meter(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Make a meter. It counts every stored event that its filter lets through, from the first one on.

    ``warnings`` names what may be a mistake, such as a metadata key that no recent event has.
    """
    body = known_fields(MeterCreate, await body_of(request))
    if isinstance(body, dict):
        refuse_organization(body)
    async with desk.settling(token.organization_id, METERS):
        async with desk.deciding:
            now = desk.decided_at()
            meter = new_meter(body, id=desk.new_id(), organization_id=token.organization_id, created_at=now)
            if isinstance(meter, list):
                raise Malformed(meter)
            await desk.decide(MeterCreated(meter))
        try:
            await settle_meter(desk, meter)
        except PASSING:  # the meter is made; whoever were told otherwise would make another one
            logger.warning("meter_not_settled", meter_id=meter.id, help="PATCH its metadata to credit what Polar told")
    as_of = desk.view.as_of
    return answer(_checked(meter, await _look(desk, token, meter)), as_of, 201)


async def _look(desk: Desk, token: Token, meter: Meter) -> Look | None:
    """Return what the meter passes over; None where looking takes too long, since the meter is what was asked for."""
    question = desk.ask(token, lambda here: look(here, meter.filter, meter.aggregation))
    try:
        return (await asyncio.wait_for(question, LOOK_S_MAX)).answer
    except (TimeoutError, *PASSING):
        return None


def _checked(meter: Meter, found: Look | None) -> answers.CheckedMeter:
    shape = answers.CheckedMeter(**meter_json(meter))
    if found is None:
        return shape
    if found.unmatched.no_number or found.unmatched.absent:
        shape.unmatched = uncounted(found.unmatched)
    shape.warnings = warnings(meter.filter, meter.aggregation, found) or UNSET
    return shape


@router.get("/v1/meters/", openapi_extra=BY_METADATA, responses=gives(page_of(answers.Meter)))
async def list_meters(
    desk: AtDesk, token: Reader, page: WhichPage, metadata: MetadataTexts, organization_id: Ids = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None, is_archived: bool | None = None,
    sorting: Texts = None,
) -> Response:  # fmt: skip
    """The organization's meters, by name."""
    chosen = order(sorting, ("name", "created_at"), "name")
    found = [
        meter
        for meter in (desk.catalogue.meters_of(token.organization_id) if includes(organization_id, token) else ())
        if (query or "").lower() in meter.name.lower()
        and is_archived in (None, meter.archived_at is not None)
        and has_texts(meter.metadata, metadata)
    ]
    found.sort(key=lambda meter: (getattr(meter, chosen.by), meter.id), reverse=not chosen.ascending)
    shapes = [meter_shape(meter) for meter in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


@router.get("/v1/meters/{id}", responses=gives(answers.CheckedMeter))
async def get_meter(request: Request, desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One meter, with what it passes over in recent events, looked at once a minute at most."""
    as_of, looks, now = desk.view.as_of, request.app.state.looks, desk.now()
    meter = meter_of(desk, token, id)
    try:
        found = looks.find(meter, now)
    except KeyError:
        found = await _look(desk, token, meter)
        looks.keep(meter, now, found)
    return answer(_checked(meter, found), as_of)


@router.patch("/v1/meters/{id}", openapi_extra=takes(MeterUpdate), responses=gives(answers.Meter))
async def update_meter(request: Request, desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Change what is named in the body."""
    meter_of(desk, token, id)
    body = known_fields(MeterUpdate, await body_of(request))
    async with desk.settling(token.organization_id, METERS):
        async with desk.deciding:
            meter = meter_of(desk, token, id)
            changed = updated_meter(meter, body, modified_at=desk.decided_at())
            if isinstance(changed, list):
                raise _complaint(changed)
            if changed.archived_at and not meter.archived_at and _is_attached(desk, meter):
                message = "This meter is still attached to a price or a benefit."
                raise Refused("value_error", ("body", "is_archived"), message, True)
            await desk.decide(MeterUpdated(changed))
        if isinstance(body, dict) and body.get("metadata") is not None:
            # also as it was: what follows from it may not have been done
            await settle_meter(desk, changed)
    return answer(meter_shape(changed), desk.view.as_of)


def _is_attached(desk: Desk, meter: Meter) -> bool:
    """Whether anything is sold or given by this meter.

    A subscription is for it while somebody would tell here that it ended.
    """
    catalogue, organization_id = desk.catalogue, meter.organization_id
    named = {benefit.meter_id for benefit in catalogue.benefits.benefits_of(organization_id)}
    if catalogue.webhooks.sources_of(organization_id):
        named |= catalogue.benefits.priced_meters(organization_id)
    return catalogue.prices.of(meter.id) is not None or meter.id in meters_here(catalogue, organization_id, named)


def _complaint(details: list[Detail]) -> Exception:
    """The lock is a rule of business, everything else one of form; form comes first."""
    malformed = [entry for entry in details if entry["type"] != "forbidden"]
    if malformed:
        return Malformed(malformed)
    first = details[0]
    refused = Refused(first["type"], tuple(first["loc"]), first["msg"], first["input"])
    refused.details = details
    return refused


# Prices, and estimated charges for a customer's running period.
#
# The period is the meter's window, from the newest reset on. Credits are used first. An estimate bills nobody.

charges_router = APIRouter(tags=["charges"])
MeterReader = Annotated[Token, Depends(allow(reading("meters")))]
MeterWriter = Annotated[Token, Depends(allow(writing("meters")))]
ChargesReader = Annotated[Token, Depends(allow(frozenset({"customer_meters:read"})))]


@charges_router.put("/v1/meters/{id}/price", openapi_extra=takes(PriceSet), responses=gives(answers.Price))
async def set_price(request: Request, desk: AtDesk, token: MeterWriter, id: UUID) -> Response:
    """Say what a unit costs, in cents with up to 12 decimals, and the most that a period costs, in cents."""
    meter_of(desk, token, id)
    price = parse_price(known_fields(PriceSet, await body_of(request)))
    if isinstance(price, list):
        raise Malformed(price)
    async with desk.deciding:
        meter = meter_of(desk, token, id)
        currency = desk.catalogue.currency(token.organization_id, but=meter.id)
        if currency not in (None, price.currency):
            message = (
                f"This organization's prices are in {currency}, and an organization has one currency. Remove its other "
                "prices first, or state this one in the same currency."
            )
            raise Refused("currency", ("body", "currency"), message, price.currency)
        await desk.decide(MeterPriced(meter_id=meter.id, price=price, at=desk.decided_at()))
    return answer(price_shape(meter.id, price), desk.view.as_of)


@charges_router.get("/v1/meters/{id}/price", responses=gives(answers.Price))
async def get_price(desk: AtDesk, token: MeterReader, id: UUID) -> Response:
    """What a unit costs."""
    meter = meter_of(desk, token, id)
    price = desk.catalogue.prices.of(meter.id)
    if price is None:
        raise NotFound
    return answer(price_shape(meter.id, price), desk.view.as_of)


@charges_router.delete("/v1/meters/{id}/price", status_code=204, responses=gives(status=204))
async def remove_price(desk: AtDesk, token: MeterWriter, id: UUID) -> Response:
    """The meter costs nothing any more, and can be archived."""
    async with desk.deciding:
        meter = meter_of(desk, token, id)
        if desk.catalogue.prices.of(meter.id) is None:
            raise NotFound
        await desk.decide(MeterPriced(meter_id=meter.id, price=None, at=desk.decided_at()))
    return Response(status_code=204)


@charges_router.get("/v1/customers/{id}/charges", responses=gives(route_answers.Charges))
async def list_charges(desk: AtDesk, token: ChargesReader, id: UUID) -> Response:
    """What each meter with a price comes to in the running period, in cents, and all of them together."""
    customer = customer_by_id(desk, token, id)
    as_of = desk.view.as_of
    meters = desk.catalogue.meters_of(token.organization_id)
    pairs = [(customer, meter) for meter in meters if tariff_of(desk.catalogue, customer, meter) is not None]
    found = await customer_meters(desk, pairs)
    charges = await charges_of(desk, found)
    items = [_item(one, charges[one.id]) for one in found if one.id in charges]
    currency = next((item.currency for item in items if item.currency is not None), None)
    return answer(route_answers.Charges(customer.id, items, _total(items), currency), as_of)


def _total(items: list[route_answers.Charge]) -> int | None:
    """All amounts together; None where one is not known, or where nothing that was used has a price."""
    amounts = [item.amount for item in items if item.amount is not None]
    return sum(amounts) if items and len(amounts) == len(items) else None


def _item(one: CustomerMeter, charge: Charge) -> route_answers.Charge:
    tariff = charge.tariff
    price = tariff.price
    return route_answers.Charge(
        meter_id=one.meter.id,
        unit_amount=None if price is None else amount_text(price.unit_amount),
        cap_amount=None if price is None else price.cap_amount,
        currency=None if price is None else price.currency,
        product_id=tariff.subscription.product_id if tariff.subscription else None,
        meter_name=one.meter.name,
        period_start=one.since,
        consumed_units=number(one.consumed),
        credited_units=number(one.credited),
        billed_units=number(max(ZERO, EXACT.subtract(one.consumed, one.credited))),
        amount=charge.amount,
    )


# Usage: series, running totals, and previews of meters.
#
# A customer's running total comes from memory and is answered on the event loop. A series of all customers comes from
# memory as well, but its calendar costs some milliseconds, so it is computed in a thread. Everything else is a store
# query.

usage_router = APIRouter(tags=["usage"])


def known_zone(timezone: str) -> str:
    """The name of a time zone. Raises Malformed for an unknown one."""
    if zone(timezone) is None:
        message = "Input should be the name of a time zone, such as Europe/Berlin"
        raise Malformed([detail("value_error", ("query", "timezone"), message, timezone)])
    return timezone


def check_range(
    start: datetime, end: datetime, interval: Interval, names: tuple[str, str] = ("start_timestamp", "end_timestamp")
) -> None:
    """Raise Refused for a range that has too many intervals; ``names`` are those of its parameters."""
    reason = range_refusal(start, end, interval, names)
    if reason is not None:
        raise Refused("value_error", ("query",), reason)


@usage_router.get("/v1/meters/{id}/quantities", openapi_extra=BY_METADATA, responses=gives(route_answers.Quantities))
async def get_meter_quantities(
    desk: AtDesk, token: Reader, id: UUID, metadata: MetadataTexts, start_timestamp: Bound, end_timestamp: Bound,
    interval: Interval, timezone: str = "UTC", customer_id: Ids = None, external_customer_id: Texts = None,
    customer_aggregation_function: Function | None = None,
    misspelt: Annotated[list[str] | None, Query(
        alias="exernal_customer_id", max_length=IDENTIFIERS_MAX, include_in_schema=False
    )] = None,
) -> Response:  # fmt: skip
    """What the meter counted, interval by interval. Each quantity is that of the whole calendar unit."""
    meter = meter_of(desk, token, id)
    known_zone(timezone)
    check_range(start_timestamp, end_timestamp, interval)
    external_ids = [*(external_customer_id or ()), *(misspelt or ())] or None  # as an old client of Polar's spells it
    whose = desk.whose(token, texts(customer_id), external_ids)
    same = {} if customer_aggregation_function is None else under_several_names(desk, token.organization_id)
    scope = Scope(organization=NOBODY, subjects=whose, metadata=metadata, same=same)
    if whose is None and not metadata and customer_aggregation_function is None:
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
    totals = desk.view.totals.by_quarters(meter, bounds)
    if totals is None:
        return None
    parts = [measured(total) for total in totals]
    return Reading(usage.from_parts(meter.aggregation, points, bounds, parts), as_of)


def _quantities(quantities: Quantities, as_of: Mapping[int, int]) -> Response:
    points = [route_answers.Quantity(point.timestamp, number(point.quantity)) for point in quantities.quantities]
    return answer(route_answers.Quantities(points, number(quantities.total)), as_of)


@usage_router.get("/v1/meters/{id}/usage", responses=gives(route_answers.Usage))
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
    as_of = desk.view.as_of  # before the total is read: the total may be newer than it says, never older
    total = desk.view.totals.total(meter, desk.subjects(token, ids, externals) or [])
    if total is None:
        scope = Scope(organization=NOBODY, subjects=desk.whose(token, ids, externals))
        question = Question(filter=meter.filter, aggregation=meter.aggregation, scope=scope)
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


@usage_router.post(
    "/v1/meters/preview",
    openapi_extra=takes(MeterDefinition),
    responses=gives(route_answers.Preview),
)
async def preview_meter(request: Request, desk: AtDesk, token: Reader) -> Response:
    """What a meter with this ``filter`` and ``aggregation`` would count of the events stored so far.

    ``unmatched`` counts the stored events that match and add nothing; ``warnings`` are about the newest seven days.
    """
    fields = fields_of(MeterDefinition, await body_of(request))
    filter, aggregation = fields["filter"], fields["aggregation"]
    question = Question(filter=filter, aggregation=aggregation, scope=Scope(organization=NOBODY))

    def previewed(here: Here) -> tuple[usage.Preview, Unmatched, Look]:
        same = under_several_names(desk, token.organization_id)
        counted = usage.preview(here.connection, here.about(question), PREVIEW_CUSTOMERS, same)
        passed_over = unmatched(here.connection, here.about(question))
        return counted, passed_over, look(here, filter, aggregation)

    (found, passed_over, looked), as_of = await desk.ask(token, previewed)
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
        unmatched=uncounted(passed_over),
        warnings=warnings(filter, aggregation, looked),
    )
    return answer(body, as_of)


def under_several_names(desk: Desk, organization_id: str) -> dict[int, int]:
    """Of customers whom events name in several ways: the numbers of further names to that of the first."""
    numbers = desk.view.directory.organizations.get(organization_id)
    if numbers is None:
        return {}
    same = {}
    for id in list(numbers.customer):  # the reader of the log goes on meanwhile
        customer = desk.catalogue.customer(organization_id, id)
        first, *others = numbers_of(desk, customer) if customer else [0]
        same.update(dict.fromkeys(others, first))
    return same


def _named(desk: Desk, token: Token, row: usage.CustomerUsage) -> tuple[str | None, str | None]:
    """The id and the external id of a customer, as far as they are known."""
    if row.kind == EXTERNAL:
        customer = desk.catalogue.customer_by_external_id(token.organization_id, row.who)
        return customer.id if customer else None, row.who
    customer = desk.catalogue.customer(token.organization_id, row.who)
    return (customer.id, customer.external_id) if customer else (row.who, None)
