"""What usage will cost: a price for a meter, and an estimate of a customer's running period.

The period is the meter's window, from the newest reset on. Credits are used first. An estimate bills nobody.
"""

from typing import Annotated
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from aggregator.api import route_answers
from aggregator.api.bodies import known_fields
from aggregator.api.customers import customer_by_id
from aggregator.api.meters import meter_of
from aggregator.api.requests import AtDesk, allow, answer, body_of
from aggregator.api.schemas import PriceSet, gives, takes
from aggregator.service import answers
from aggregator.service.balances import CustomerMeter, customer_meters
from aggregator.service.errors import Malformed, NotFound
from aggregator.service.serializers import number, price_shape
from meters.access import reading, writing
from meters.amount import EXACT
from meters.catalogue import Token
from meters.ledger import ZERO
from meters.price import MeterPriced, Price, charge, parse_price

router = APIRouter(tags=["charges"])
MeterReader = Annotated[Token, Depends(allow(reading("meters")))]
MeterWriter = Annotated[Token, Depends(allow(writing("meters")))]
Reader = Annotated[Token, Depends(allow(frozenset({"customer_meters:read"})))]


@router.put("/v1/meters/{id}/price", openapi_extra=takes(PriceSet), responses=gives(answers.Price))
async def set_price(request: Request, desk: AtDesk, token: MeterWriter, id: UUID) -> Response:
    """Say what a unit costs, in cents with up to 12 decimals, and the most that a period costs, in cents."""
    meter_of(desk, token, id)
    price = parse_price(known_fields(PriceSet, await body_of(request)))
    if isinstance(price, list):
        raise Malformed(price)
    async with desk.deciding:
        meter = meter_of(desk, token, id)
        await desk.decide(MeterPriced(meter_id=meter.id, price=price, at=desk.now()))
    return answer(price_shape(meter.id, price), desk.view.as_of)


@router.get("/v1/meters/{id}/price", responses=gives(answers.Price))
async def get_price(desk: AtDesk, token: MeterReader, id: UUID) -> Response:
    """What a unit costs."""
    meter = meter_of(desk, token, id)
    price = desk.catalogue.prices.of(meter.id)
    if price is None:
        raise NotFound
    return answer(price_shape(meter.id, price), desk.view.as_of)


@router.delete("/v1/meters/{id}/price", status_code=204, responses=gives(status=204))
async def remove_price(desk: AtDesk, token: MeterWriter, id: UUID) -> Response:
    """The meter costs nothing any more, and can be archived."""
    async with desk.deciding:
        meter = meter_of(desk, token, id)
        if desk.catalogue.prices.of(meter.id) is None:
            raise NotFound
        await desk.decide(MeterPriced(meter_id=meter.id, price=None, at=desk.now()))
    return Response(status_code=204)


@router.get("/v1/customers/{id}/charges", responses=gives(route_answers.Charges))
async def list_charges(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """What each meter with a price comes to in the running period, in cents, and all of them together."""
    customer = customer_by_id(desk, token, id)
    as_of = desk.view.as_of
    prices = {m.id: price for m in desk.catalogue.meters_of(token.organization_id)
              if (price := desk.catalogue.prices.of(m.id)) is not None}  # fmt: skip
    pairs = [(customer, desk.catalogue.meters[meter_id]) for meter_id in prices]
    items = [_item(one, prices[one.meter.id]) for one in await customer_meters(desk, pairs)]
    return answer(route_answers.Charges(customer.id, items, sum(item.amount for item in items)), as_of)


def _item(one: CustomerMeter, price: Price) -> route_answers.Charge:
    return route_answers.Charge(
        **msgspec.structs.asdict(price_shape(one.meter.id, price)),
        meter_name=one.meter.name,
        period_start=one.since,
        consumed_units=number(one.consumed),
        credited_units=number(one.credited),
        billed_units=number(max(ZERO, EXACT.subtract(one.consumed, one.credited))),
        amount=charge(price, one.consumed, one.credited),
    )
