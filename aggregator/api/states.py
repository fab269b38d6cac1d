"""A customer's state: who they are, what they pay for, what they were given, what is left (contract, section 7.1).

The same object is answered here and told to webhooks. It is worked out from memory when it is asked for, so it is as
new as the balances are.
"""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Response

from aggregator.api.balances import CustomerMeter, Pair, customer_meters, in_memory
from aggregator.api.benefits import grant_properties
from aggregator.api.desk import AtDesk, Desk, allow, answer
from aggregator.api.errors import NotFound
from aggregator.api.paths import BY_EXTERNAL_ID
from aggregator.api.schemas import gives, ref
from aggregator.api.shapes import customer_shape, number
from meters.access import reading
from meters.benefits import METER_CREDIT, Subscription
from meters.catalogue import Customer, Token
from meters.polar_meters import here, meters_here
from meters.price import charge

router = APIRouter(tags=["customers"])
Reader = Annotated[Token, Depends(allow(reading("customers")))]


async def state_of(desk: Desk, customer: Customer) -> dict[str, Any]:
    """The state as of now. Raises Unavailable while too many meters are still being counted.

    A customer who was deleted has no meters any more: usage under the same names is nobody's, or another customer's.
    """
    return _state(desk, customer, await customer_meters(desk, _pairs(desk, customer)))


def state_in_memory(desk: Desk, customer: Customer) -> dict[str, Any] | None:
    """Return the same state without asking the store; None where memory does not have all of it."""
    found = in_memory(desk, _pairs(desk, customer))
    return None if found is None else _state(desk, customer, found)


def _pairs(desk: Desk, customer: Customer) -> list[Pair]:
    every = [] if customer.deleted_at else desk.catalogue.meters_of(customer.organization_id)
    return [(customer, meter) for meter in every]


def _state(desk: Desk, customer: Customer, found: list[CustomerMeter]) -> dict[str, Any]:
    catalogue = desk.catalogue
    by_meter = {one.meter.id: one for one in found}
    subscriptions = [one for one in catalogue.benefits.subscriptions_of(customer.id) if one.is_active]
    grants = [one for one in catalogue.benefits.grants_of(customer.id) if one.is_held]
    return customer_shape(customer) | {
        "active_subscriptions": [_subscription(desk, one, by_meter) for one in subscriptions],
        "granted_benefits": [
            {
                "id": grant.id,
                "created_at": grant.created_at,
                "modified_at": grant.modified_at,
                "granted_at": grant.granted_at,
                "benefit_id": grant.benefit_id,
                "benefit_type": METER_CREDIT,
                "benefit_metadata": catalogue.benefits.benefits[grant.benefit_id].metadata,
                "properties": grant_properties(here(catalogue, grant)),
            }
            for grant in grants
        ],
        "active_meters": [
            meter_numbers(one) | {"balance": number(one.balance)}
            for one in sorted(found, key=lambda one: (one.created_at, one.id))
        ],
    }


def meter_numbers(one: CustomerMeter) -> dict[str, Any]:
    """What every shape of a customer's meter has."""
    return {
        "id": one.id,
        "created_at": one.created_at,
        "modified_at": one.modified_at,
        "meter_id": one.meter.id,
        "consumed_units": number(one.consumed),
        "credited_units": number(one.credited),
    }


def _subscription(desk: Desk, held: Subscription, by_meter: dict[str, CustomerMeter]) -> dict[str, Any]:
    unknown = ("organization_id", "customer_id", "ended_at", "meter_ids")
    fields = {name: getattr(held, name) for name in held.__struct_fields__ if name not in unknown}
    priced = meters_here(desk.catalogue, held.organization_id, held.meter_ids)
    meters = [meter_numbers(one) | {"amount": _amount(desk, one)} for id in priced if (one := by_meter.get(id))]
    return fields | {"meters": meters}


def _amount(desk: Desk, one: CustomerMeter) -> int:
    """Cents for the period so far, where the meter's price is known."""
    price = desk.catalogue.prices.of(one.meter.id)
    return charge(price, one.consumed, one.credited) if price else 0


@router.get("/v1/customers/{id}/state", responses=gives(ref("CustomerState")))
async def get_customer_state(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """A customer with subscriptions, benefits and the balance of every meter."""
    return await _answered(desk, desk.catalogue.customer(token.organization_id, str(id)))


@router.get(BY_EXTERNAL_ID + "/state", responses=gives(ref("CustomerState")))
async def get_customer_state_by_external_id(desk: AtDesk, token: Reader, external_id: str) -> Response:
    """The same, by the id that the organization gave the customer."""
    return await _answered(desk, desk.catalogue.customer_by_external_id(token.organization_id, external_id))


async def _answered(desk: Desk, customer: Customer | None) -> Response:
    if customer is None:
        raise NotFound
    as_of = desk.view.as_of  # before the numbers are read: they may be newer than this says, never older
    return answer(await state_of(desk, customer), as_of)
