"""Reviews: customers whom one decision may move, without a movement of their own, are looked at again.

A meter that is made with history or edited, a threshold whose line is passed when it is made, and an endpoint that is
enabled again each give reason to look at many customers. The review stays in the outbox until the last of them was
looked at, a page at a time. After a restart it begins anew: a state that was told is not told again.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from aggregator.engine.change_events import Review
from aggregator.service.balances import in_memory
from aggregator.service.service import Desk
from aggregator.store.queries.scope import naive
from aggregator.store.webhook_outbox import Cause
from aggregator.webhooks.messages import by_turns
from meters.catalogue.catalogue import Customer

CUSTOMERS_AT_ONCE = 500
"""Customers of a review between two looks at the outbox: a state takes some tenths of a millisecond."""

COUNTED_WITHIN = timedelta(minutes=10)
"""How long a review waits for a meter's history to be counted; then its customers are asked about one by one."""


class Left(NamedTuple):
    """The customers of a review that are still to be looked at; ``rests_until_s`` where some could not be told yet."""

    customers: list[Customer]
    rests_until_s: float = 0.0


async def whom(
    desk: Desk, cause: Cause, review: Review, others: Collection[str], now: datetime
) -> list[Customer] | None:
    """Return the customers to look at; None while the meter is being counted.

    ``others`` are ids that the outbox adds: who was told of the meter, or lacks what an endpoint did not take.
    """
    if review.meter_id is not None and _is_counting(desk, review.meter_id) and now - cause.caused_at < COUNTED_WITHIN:
        return None
    if review.customer_id is not None:
        whose = desk.catalogue.customer_named(cause.organization_id, review.customer_id)
        one = desk.catalogue.customers.get(whose)
        return [one] if one else []
    found: list[Customer] = []
    async for customer in by_turns(list(desk.catalogue.customers.values())):
        if customer.organization_id == cause.organization_id and (
            customer.id in others or _is_concerned(desk, customer, review)
        ):
            found.append(customer)
    return found


def _is_counting(desk: Desk, meter_id: str) -> bool:
    meter = desk.catalogue.meters.get(meter_id)
    return meter is not None and meter.archived_at is None and desk.view.totals.arrivals(meter) is None


def _is_concerned(desk: Desk, customer: Customer, review: Review) -> bool:
    """Whether the customer has anything of the meter, or moved since the endpoint was disabled."""
    meters = desk.catalogue.meters_of(customer.organization_id)
    if review.since is None:
        found = in_memory(desk, [(customer, meter) for meter in meters if meter.id == review.meter_id])
        return customer.deleted_at is None and (found is None or bool(found))
    since = review.since
    benefits, times = desk.catalogue.benefits, [customer.created_at, customer.modified_at]
    times += [time for one in benefits.grants_of(customer.id) for time in (one.created_at, one.modified_at)]
    times += [time for one in benefits.subscriptions_of(customer.id) for time in (one.created_at, one.modified_at)]
    if _is_after(since, *times):
        return True
    if customer.deleted_at is not None:
        return customer.deleted_at >= since
    have = in_memory(desk, [(customer, meter) for meter in meters if meter.archived_at is None])
    return have is None or any(_is_after(since, one.modified_at) for one in have)


def _is_after(since: datetime, *times: datetime | None) -> bool:
    return any(time is not None and naive(time) >= naive(since) for time in times)


def page_of(left: Left) -> tuple[list[Customer], Sequence[Customer]]:
    """Return the next customers, and those after them."""
    return left.customers[:CUSTOMERS_AT_ONCE], left.customers[CUSTOMERS_AT_ONCE:]
