"""Charges: the estimated cost of a customer's running period, meter by meter.

``charges_of`` returns a ``Charge`` for each customer meter that has a price. An amount is None where a price of the
period is not known. The customer state, the portal and ``GET /v1/customers/{id}/charges`` share these amounts.

Usage costs the price of the time at which it arrived. So where a subscription's price changed within the period, the
usage before the change is counted from the store. Polar splits only what can be added up, counts and sums; for other
aggregations the newest price holds for the whole period.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from aggregator.service.balances import CustomerMeter, usage_until
from aggregator.service.service import Desk, Here
from meters.aggregation import is_summable
from meters.ledger.price import Price, charge_parts
from meters.tariff import Step, Tariff, tariff_of

STEPS_MAX = 24
"""Prices of one period that are told apart, newest first: each costs a store query. Earlier usage costs the oldest."""


class Charge(NamedTuple):
    """The price of a customer meter and the cents of its period so far; None where a price is not known."""

    tariff: Tariff
    amount: int | None


async def charges_of(desk: Desk, found: Sequence[CustomerMeter]) -> dict[str, Charge]:
    """Return the charges of customer meters by their ids, without meters that have no price. Raises Unavailable."""
    every = {one.id: charge for one in found if (charge := _simple(desk, one)) is not None}
    split = {one.id: (one, steps) for one in found if (steps := _steps(desk, one))}
    if not split:
        return every
    organization_id = next(iter(split.values()))[0].customer.organization_id

    def count(here: Here) -> dict[str, list[Decimal]]:
        return {
            id: [usage_until(desk, here, one, step.since) for step in steps[1:] if step.since is not None]
            for id, (one, steps) in split.items()
        }

    counted, _ = await desk.ask_about(organization_id, count)
    for id, (one, steps) in split.items():
        amount = _amount(zip((step.price for step in steps), [*counted[id], one.consumed], strict=True), one.credited)
        every[id] = every[id]._replace(amount=amount)
    return every


def charges_in_memory(desk: Desk, found: Sequence[CustomerMeter]) -> dict[str, Charge] | None:
    """Return the same charges without asking the store; None where a price changed within a period."""
    if any(_steps(desk, one) for one in found):
        return None
    return {one.id: charge for one in found if (charge := _simple(desk, one)) is not None}


def _simple(desk: Desk, one: CustomerMeter) -> Charge | None:
    """The charge by the newest price."""
    tariff = tariff_of(desk.catalogue, one.customer, one.meter)
    if tariff is None:
        return None
    return Charge(tariff, 0 if tariff.is_trial else _amount([(tariff.price, one.consumed)], one.credited))


def _steps(desk: Desk, one: CustomerMeter) -> list[Step]:
    """The prices of the period, where there are several that matter: the first one holds from its beginning."""
    tariff = tariff_of(desk.catalogue, one.customer, one.meter)
    if tariff is None or tariff.is_trial or not is_summable(one.meter.aggregation):
        return []
    later = [step for step in tariff.steps[1:] if _is_within(step.since, one.since, desk.now())]
    first = len(tariff.steps) - len(later) - 1
    return tariff.steps[first:][-STEPS_MAX:] if later else []


def _is_within(at: datetime | None, since: datetime | None, now: datetime) -> bool:
    return at is not None and (since is None or at > since) and at <= now


def _amount(parts: Iterable[tuple[Price | None, Decimal]], credited: Decimal) -> int | None:
    known = list[tuple[Price, Decimal]]()
    for price, consumed in parts:
        if price is None:
            return None
        known.append((price, consumed))
    return charge_parts(known, credited)
