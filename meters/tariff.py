"""The prices that a customer pays for a meter: which price applies, and from when on.

``tariff_of`` chooses. A customer with an active subscription pays the prices that the subscription states for the
meter. Any other customer pays the meter's own price, if it has one. The meter's own price also applies where a
subscription has a price that nobody has stated, as in logs of versions that did not read Polar's prices. Where two
active subscriptions have a price for the meter, the newer one pays: usage is billed once.
"""

from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from meters.catalogue.catalogue import Catalogue, Customer
from meters.ledger.benefits import Subscription
from meters.ledger.price import FREE, Price, SubscriptionPriced
from meters.meter import Meter
from meters.polar_webhooks import meters_here


class Step(NamedTuple):
    """A price from a time on (None: from the beginning). The price is None where it is not known."""

    since: datetime | None
    price: Price | None


class Tariff(NamedTuple):
    """The prices of one customer's usage of one meter, in the order of time, and the subscription that pays them."""

    steps: list[Step]
    subscription: Subscription | None

    @property
    def price(self) -> Price | None:
        """The price of usage from now on; None where it is not known."""
        return self.steps[-1].price

    @property
    def is_trial(self) -> bool:
        """Whether usage costs nothing yet: Polar bills no usage of a trial."""
        return self.subscription is not None and self.subscription.status == "trialing"


def tariff_of(catalogue: Catalogue, customer: Customer, meter: Meter) -> Tariff | None:
    """Return the prices of a customer's usage of a meter; None where nothing has a price for it."""
    general = catalogue.prices.of(meter.id)
    paying = _paying(catalogue, customer, meter)
    if paying is not None:
        told = catalogue.prices.of_subscription(paying.id)
        steps = [Step(one.at, _stated(catalogue, one, meter, general)) for one in told] or [Step(None, general)]
        return Tariff(_merged(steps), paying)
    return None if general is None else Tariff([Step(None, general)], None)


def unit_amounts(catalogue: Catalogue, meter: Meter) -> set[Decimal]:
    """Return the prices of a unit that anybody pays for a meter now."""
    general = catalogue.prices.of(meter.id)
    found = {general} if general else set()
    for held in catalogue.benefits.active_subscriptions(meter.organization_id):
        if meter.id in meters_here(catalogue, meter.organization_id, held.meter_ids):
            told = catalogue.prices.of_subscription(held.id)
            found |= {price for one in told[-1:] if (price := _stated(catalogue, one, meter, general)) is not None}
    return {price.unit_amount for price in found}


def _paying(catalogue: Catalogue, customer: Customer, meter: Meter) -> Subscription | None:
    """The customer's newest active subscription that has a price for the meter."""
    held = [one for one in catalogue.benefits.subscriptions_of(customer.id) if one.is_active]
    priced = [one for one in held if meter.id in meters_here(catalogue, meter.organization_id, one.meter_ids)]
    return max(priced, key=lambda one: (one.created_at, one.id), default=None)


def _stated(catalogue: Catalogue, told: SubscriptionPriced, meter: Meter, general: Price | None) -> Price | None:
    """The price at one time. A product that states other meters' prices alone does not charge for this one."""
    for one in told.prices:
        if meter.id in meters_here(catalogue, meter.organization_id, [one.meter_id]):
            return one.price or general
    return FREE


def _merged(steps: list[Step]) -> list[Step]:
    """The same steps without those that change nothing. The first one holds from the beginning."""
    merged = [Step(None, steps[0].price)]
    for step in steps[1:]:
        if step.price != merged[-1].price:
            merged.append(step)
    return merged
