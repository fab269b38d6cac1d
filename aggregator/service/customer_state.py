"""A customer's state: the customer with subscriptions, granted benefits and balances (contract, section 7.1).

``state_of`` builds the object that the API, the portal and the webhook ``customer.state_changed`` share.
``state_in_memory`` returns it only when memory has all of it, for fast reads. The state is computed when it is asked
for, so it is as current as the balances.
"""

from collections.abc import Mapping
from datetime import datetime

import msgspec

from aggregator.service import answers
from aggregator.service.balances import CustomerMeter, Pair, customer_meters, in_memory
from aggregator.service.charges import Charge, charges_in_memory, charges_of
from aggregator.service.serializers import customer_shape, number
from aggregator.service.service import Desk
from meters.catalogue.catalogue import Customer
from meters.ledger.benefits import Grant, Subscription
from meters.polar_webhooks import here, meters_here


async def state_of(desk: Desk, customer: Customer) -> answers.CustomerState:
    """The state as of now. Raises Unavailable while too many meters are still being counted.

    A customer who was deleted has no meters any more: usage under the same names is nobody's, or another customer's.
    """
    found = await customer_meters(desk, _pairs(desk, customer))
    return _state(desk, customer, found, await charges_of(desk, found))


def state_in_memory(desk: Desk, customer: Customer) -> answers.CustomerState | None:
    """Return the same state without asking the store; None where memory does not have all of it."""
    found = in_memory(desk, _pairs(desk, customer))
    charges = None if found is None else charges_in_memory(desk, found)
    return None if found is None or charges is None else _state(desk, customer, found, charges)


def _pairs(desk: Desk, customer: Customer) -> list[Pair]:
    every = [] if customer.deleted_at else desk.catalogue.meters_of(customer.organization_id)
    return [(customer, meter) for meter in every]


def _state(
    desk: Desk, customer: Customer, found: list[CustomerMeter], charges: Mapping[str, Charge]
) -> answers.CustomerState:
    catalogue = desk.catalogue
    by_meter = {one.meter.id: one for one in found}
    subscriptions = [one for one in catalogue.benefits.subscriptions_of(customer.id) if one.is_active]
    grants = [one for one in catalogue.benefits.grants_of(customer.id) if one.is_held]
    return answers.CustomerState(
        **msgspec.structs.asdict(customer_shape(customer)),
        active_subscriptions=[_subscription(desk, one, by_meter, charges) for one in subscriptions],
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
            answers.CustomerStateMeter(*meter_numbers(one), number(one.balance))
            for one in sorted(found, key=lambda one: (one.created_at, one.id))
        ],
    )


def meter_numbers(one: CustomerMeter) -> tuple[str, datetime, datetime | None, str, msgspec.Raw, msgspec.Raw]:
    """The fields of ``answers.MeterNumbers``, with which every shape of a customer's meter begins."""
    numbers = number(one.consumed), number(one.credited)
    return one.id, one.created_at, one.modified_at, one.meter.id, *numbers


def grant_properties(grant: Grant) -> answers.GrantProperties:
    """What a grant credited last; nothing before it did."""
    if grant.last_credited_at is None:
        return answers.GrantProperties()
    return answers.GrantProperties(grant.last_credited_meter_id, grant.last_credited_units, grant.last_credited_at)


def _subscription(
    desk: Desk, held: Subscription, by_meter: Mapping[str, CustomerMeter], charges: Mapping[str, Charge]
) -> answers.CustomerStateSubscription:
    """The subscription with its meters. A meter whose amount is not known is left out: Polar's clients take no null."""
    shown = answers.CustomerStateSubscription.__struct_fields__
    fields = {name: getattr(held, name) for name in held.__struct_fields__ if name in shown}
    meters = [
        answers.CustomerStateSubscriptionMeter(*meter_numbers(one), amount)
        for id in meters_here(desk.catalogue, held.organization_id, held.meter_ids)
        if (one := by_meter.get(id)) and (amount := _amount(held, charges.get(one.id))) is not None
    ]
    return answers.CustomerStateSubscription(**fields, meters=meters)


def _amount(held: Subscription, charge: Charge | None) -> int | None:
    """Cents that the subscription pays for the period so far; None where that is not known.

    Usage is billed once, so a subscription beside the one that pays has nothing to pay.
    """
    if charge is None:
        return None
    paying = charge.tariff.subscription
    return charge.amount if paying is None or paying.id == held.id else 0
