"""A customer's state: who they are, what they pay for, what they were given, what is left (contract, section 7.1).

The same object is answered here and told to webhooks. It is worked out from memory when it is asked for, so it is as
new as the balances are.
"""

from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Response

from aggregator.api import answers
from aggregator.api.balances import CustomerMeter, customer_meters
from aggregator.api.benefits import grant_properties
from aggregator.api.desk import AtDesk, Desk, allow, answer
from aggregator.api.errors import NotFound
from aggregator.api.paths import BY_EXTERNAL_ID
from aggregator.api.schemas import gives
from aggregator.api.shapes import customer_shape, number
from meters.access import reading
from meters.benefits import Subscription
from meters.catalogue import Customer, Token
from meters.polar_meters import here, meters_here
from meters.price import charge

router = APIRouter(tags=["customers"])
Reader = Annotated[Token, Depends(allow(reading("customers")))]


async def state_of(desk: Desk, customer: Customer) -> answers.CustomerState:
    """The state as of now. Raises Unavailable while too many meters are still being counted.

    A customer who was deleted has no meters any more: usage under the same names is nobody's, or another customer's.
    """
    catalogue = desk.catalogue
    every = [] if customer.deleted_at else catalogue.meters_of(customer.organization_id)
    found = await customer_meters(desk, [(customer, meter) for meter in every])
    by_meter = {one.meter.id: one for one in found}
    subscriptions = [one for one in catalogue.benefits.subscriptions_of(customer.id) if one.is_active]
    grants = [one for one in catalogue.benefits.grants_of(customer.id) if one.is_held]
    return answers.CustomerState(
        **msgspec.structs.asdict(customer_shape(customer)),
        active_subscriptions=[_subscription(desk, one, by_meter) for one in subscriptions],
        granted_benefits=[
            answers.CustomerStateBenefitGrant(
                id=grant.id,
                created_at=grant.created_at,
                modified_at=grant.modified_at,
                granted_at=grant.granted_at,
                benefit_id=grant.benefit_id,
                benefit_metadata=catalogue.benefits.benefits[grant.benefit_id].metadata,
                properties=grant_properties(here(catalogue, grant)),
            )
            for grant in grants
        ],
        active_meters=[
            answers.CustomerStateMeter(**meter_numbers(one), balance=number(one.balance))
            for one in sorted(found, key=lambda one: (one.created_at, one.id))
        ],
    )


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


def _subscription(
    desk: Desk, held: Subscription, by_meter: dict[str, CustomerMeter]
) -> answers.CustomerStateSubscription:
    shown = answers.CustomerStateSubscription.__struct_fields__
    fields = {name: getattr(held, name) for name in held.__struct_fields__ if name in shown}
    meters = [
        answers.CustomerStateSubscriptionMeter(**meter_numbers(one), amount=_amount(desk, one))
        for id in meters_here(desk.catalogue, held.organization_id, held.meter_ids)
        if (one := by_meter.get(id))
    ]
    return answers.CustomerStateSubscription(**fields, meters=meters)


def _amount(desk: Desk, one: CustomerMeter) -> int:
    """Cents for the period so far, where the meter's price is known."""
    price = desk.catalogue.prices.of(one.meter.id)
    return charge(price, one.consumed, one.credited) if price else 0


@router.get("/v1/customers/{id}/state", responses=gives(answers.CustomerState))
async def get_customer_state(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """A customer with subscriptions, benefits and the balance of every meter."""
    return await _answered(desk, desk.catalogue.customer(token.organization_id, str(id)))


@router.get(BY_EXTERNAL_ID + "/state", responses=gives(answers.CustomerState))
async def get_customer_state_by_external_id(desk: AtDesk, token: Reader, external_id: str) -> Response:
    """The same, by the id that the organization gave the customer."""
    return await _answered(desk, desk.catalogue.customer_by_external_id(token.organization_id, external_id))


async def _answered(desk: Desk, customer: Customer | None) -> Response:
    if customer is None:
        raise NotFound
    as_of = desk.view.as_of  # before the numbers are read: they may be newer than this says, never older
    return answer(await state_of(desk, customer), as_of)
