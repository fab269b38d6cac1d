"""Balances: what a customer used of a meter, was credited, and has left.

``customer_meter`` and ``customer_meters`` return ``CustomerMeter`` objects, which lists, customer states, portal
sessions and webhooks share. ``consumed_between`` measures a stretch of time from the store.

Balances come from memory: the ledger has the credits, the running totals have the usage since the newest reset. The
store is queried only while a meter is being backfilled, and for a ``unique`` meter with more distinct values than
memory keeps.
"""

from asyncio import sleep
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import NamedTuple

from aggregator.service.errors import PRESENT_S_MAX
from aggregator.service.service import Desk, Here
from aggregator.store.queries import usage
from aggregator.store.queries.scope import NOBODY, Scope
from aggregator.store.queries.usage import Question
from aggregator.view import EVER, Consumption, Unavailable
from meters.catalogue.catalogue import Customer
from meters.exact import EXACT
from meters.ledger.ledger import ZERO, Account, customer_meter_id, customer_of
from meters.meter import Meter
from meters.timestamps import instant_of

RECOUNTED_MAX = 100
"""Customer meters that one request may have counted from the store: a page's worth."""


class CustomerMeter(NamedTuple):
    """One customer's meter, as of now. ``account`` is None where there was never a credit or a reset."""

    customer: Customer
    meter: Meter
    account: Account | None
    consumption: Consumption

    @property
    def id(self) -> str:
        """The same for the same customer and meter, always."""
        return customer_meter_id(self.customer.id, self.meter.id)

    @property
    def created_at(self) -> datetime:
        """When there first were both the customer and the meter."""
        return max(self.customer.created_at, self.meter.created_at)

    @property
    def modified_at(self) -> datetime | None:
        """When the newest usage arrived or the newest movement of credits took place, and not before ``created_at``.

        Usage may arrive before the meter is made that counts it, or the customer whom it names.
        """
        times = [self.consumption.last_at, self.account.moved_at if self.account else None]
        newest = max((time for time in times if time is not None), default=None)
        return newest and max(newest, self.created_at)

    @property
    def since(self) -> datetime | None:
        """Where the window begins; None: with the first event."""
        return self.account.since if self.account else None

    @property
    def consumed(self) -> Decimal:
        """Units used in the window."""
        return self.consumption.value

    @property
    def credited(self) -> Decimal:
        """Units credited in the window, the sum never below zero."""
        return self.account.credited if self.account else ZERO

    @property
    def balance(self) -> Decimal:
        """What is left: below zero where more was used than credited."""
        return EXACT.subtract(self.credited, self.consumed)


Pair = tuple[Customer, Meter]

UNKNOWN = Consumption(0, ZERO, None)
"""Stands for what memory does not have."""


async def customer_meters(desk: Desk, pairs: Sequence[Pair]) -> list[CustomerMeter]:
    """Those of the pairs where there is anything: usage that the meter counts, or a credit, or a reset.

    Raises Unavailable where memory does not have too many of them.
    """
    read = [_read(desk, customer, meter) for customer, meter in pairs]
    missing = [one for one in read if one.consumption is UNKNOWN]
    if len(missing) > RECOUNTED_MAX:
        raise Unavailable("meters are still being counted")
    recounted = await _recount(desk, missing) if missing else {}
    whole = [one._replace(consumption=recounted.get(one.id, one.consumption)) for one in read]
    return _not_empty(whole)


def in_memory(desk: Desk, pairs: Sequence[Pair]) -> list[CustomerMeter] | None:
    """The same without asking the store; None where memory does not have all of it."""
    read = [_read(desk, customer, meter) for customer, meter in pairs]
    return None if any(one.consumption is UNKNOWN for one in read) else _not_empty(read)


def _not_empty(read: Sequence[CustomerMeter]) -> list[CustomerMeter]:
    return [one for one in read if one.account is not None or one.consumption.count]


async def customer_meter(desk: Desk, customer: Customer, meter: Meter) -> CustomerMeter:
    """One pair, whether there is anything or not."""
    one = _read(desk, customer, meter)
    return one if one.consumption is not UNKNOWN else one._replace(consumption=(await _recount(desk, [one]))[one.id])


def _read(desk: Desk, customer: Customer, meter: Meter) -> CustomerMeter:
    """What memory has: the account once, so that credits and usage are of the same window."""
    account = desk.view.ledger.account(customer.id, meter.id)
    consumption = desk.view.totals.consumed(meter, numbers_of(desk, customer), account.since if account else None)
    return CustomerMeter(customer, meter, account, consumption or UNKNOWN)


def find(desk: Desk, organization_id: str, id: str) -> Pair | None:
    """Whose customer meter this is, and of which meter; None if it is nobody's in the organization."""
    for meter in desk.catalogue.meters_of(organization_id):
        customer = desk.catalogue.customer(organization_id, customer_of(id, meter.id))
        if customer is not None:
            return customer, meter
    return None


def from_memory(desk: Desk, customer: Customer, meter: Meter) -> Consumption | None:
    """What was used in the window, if memory has it."""
    found = _read(desk, customer, meter).consumption
    return None if found is UNKNOWN else found


def numbers_of(desk: Desk, customer: Customer) -> list[int]:
    """The numbers under which the customer's events are stored, by all of its names."""
    return desk.view.directory.find(customer.organization_id, desk.catalogue.names_of(customer))


async def consumed_between(
    desk: Desk, customer: Customer, meter: Meter, since: datetime | None, until: datetime
) -> Decimal:
    """The meter's value over what arrived in a stretch of time, counted from the store. Raises Unavailable.

    What is decided by it is decided for ever, so it is told only when everything that has arrived is counted, and
    nothing that belongs to it can still be on its way.
    """
    await _settled(desk, until)
    if not await desk.view.present(PRESENT_S_MAX):
        raise Unavailable("usage that came before this is still being counted", PRESENT_S_MAX)
    asked = _question(desk, customer, meter, since, until)
    organization_id = customer.organization_id
    measured, _ = await desk.ask_about(organization_id, lambda here: usage.value_of(here.connection, here.about(asked)))
    return measured.value(meter.aggregation)


def usage_until(desk: Desk, here: Here, one: CustomerMeter, until: datetime) -> Decimal:
    """Return the meter's value over what arrived in its window before a time, counted from the store."""
    asked = _question(desk, one.customer, one.meter, one.since, until)
    return usage.value_of(here.connection, here.about(asked)).value(one.meter.aggregation)


async def _settled(desk: Desk, until: datetime) -> None:
    """Wait until what was stamped before a time is in the log; once, since a clock may stand. Raises Unavailable."""
    wait_s = (until - desk.decided_at()).total_seconds() + desk.settled_s
    if 0 < wait_s <= PRESENT_S_MAX:
        await sleep(wait_s)
    if desk.decided_at() < until:
        raise Unavailable("the clock here is still to come to this time: send it again then", PRESENT_S_MAX)


async def _recount(desk: Desk, missing: Sequence[CustomerMeter]) -> dict[str, Consumption]:
    def count(here: Here) -> dict[str, Consumption]:
        found = {}
        for one in missing:
            asked = _question(desk, one.customer, one.meter, one.since)
            measured, last_at = usage.value_of(here.connection, here.about(asked)), _last_at(desk, one)
            is_used = last_at is not None and one.since is None  # also by events that have none of a meter's values
            found[one.id] = Consumption(measured.count or int(is_used), measured.value(asked.aggregation), last_at)
        return found

    counted, _ = await desk.ask_about(missing[0].customer.organization_id, count)
    return counted


def _last_at(desk: Desk, one: CustomerMeter) -> datetime | None:
    """When the newest event arrived that the meter counts of the customer; None where memory does not know that."""
    arrived = desk.view.totals.arrivals(one.meter)
    if arrived is None:
        return None
    numbers = [number for number in numbers_of(desk, one.customer) if number < len(arrived)]
    newest = max((int(arrived[number]) for number in numbers), default=EVER)
    return None if newest == EVER else instant_of(newest)


def _question(
    desk: Desk, customer: Customer, meter: Meter, since: datetime | None, until: datetime | None = None
) -> Question:
    scope = Scope(
        organization=NOBODY, subjects=partial(numbers_of, desk, customer), arrived_since=since, arrived_until=until
    )  # fmt: skip
    return Question(filter=meter.filter, aggregation=meter.aggregation, scope=scope)
