"""Build webhook messages from causes: customer states and threshold crossings, as of the moment of building.

``messages_of`` takes the causes of the outbox and returns a ``Telling``: messages to store, and decisions about
thresholds that were crossed. Nearly all data comes from memory, so a thousand customers take about a second; during
that time the event loop gets a turn every few milliseconds, so that other requests are answered.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from aggregator.decode.directory import EXTERNAL
from aggregator.engine.change_events import Review
from aggregator.service.balances import CustomerMeter, customer_meter
from aggregator.service.customer_state import state_of
from aggregator.service.errors import PASSING
from aggregator.service.serializers import customer_shape, number
from aggregator.service.service import Desk
from aggregator.store.webhook_outbox import Cause, Message
from meters import exact
from meters.catalogue.catalogue import Customer
from meters.exact import EXACT
from meters.webhooks import API_VERSION, STATE_CHANGED, THRESHOLD_REACHED, Endpoint, ThresholdCleared, ThresholdReached

logger = structlog.get_logger("webhooks")

BEGINNING = "beginning"  # the cycle of a customer who never had a reset
TURN_S = 0.005  # at work between two turns of the event loop: as long as somebody else's answer may wait
T = TypeVar("T")


class Telling(NamedTuple):
    """Messages to write down, and decisions about thresholds, which are told when they are true.

    ``kept`` are customers whose state cannot be told yet, by the one of their causes that stays until it can.
    """

    messages: list[Message]
    decisions: list[ThresholdReached | ThresholdCleared]
    kept: dict[int, Customer]


class Moved(NamedTuple):
    """A customer, when the first of the causes came to be, and its number."""

    customer: Customer
    caused_at: datetime
    cause: int


async def messages_of(desk: Desk, causes: Sequence[Cause], now: datetime, resting: Collection[str] = ()) -> Telling:
    """What the causes give reason to tell. Raises Unavailable between two engines.

    Who is ``resting`` is not looked at: another cause stays for them.
    """
    telling = Telling([], [], {})
    moved: dict[str, Moved] = {}
    async for cause in by_turns(causes):
        if cause.change is not None:
            reached = msgspec.json.decode(cause.change, type=ThresholdReached)
            telling.messages.extend(_reached(desk, reached, cause, now))
        elif (customer := _customer(desk, cause)) is not None and customer.id not in resting:
            first = moved.get(customer.id) or Moved(customer, cause.caused_at, cause.number)
            moved[customer.id] = first._replace(caused_at=min(cause.caused_at, first.caused_at))
    async for customer, caused_at, first_cause in by_turns(moved.values()):
        try:
            await _tell(telling, desk, customer, caused_at, now)
        except PASSING:
            telling.kept[first_cause] = customer
        except Exception:  # of one customer: all the others, of every organization, are told
            logger.exception("webhook_has_no_words", customer_id=customer.id)
    return telling


async def looked_at(desk: Desk, customers: Sequence[Customer], cause: Cause, review: Review, now: datetime) -> Telling:
    """What there is to tell of customers who are looked at again. ``kept`` has those of whom it cannot be told yet."""
    telling = Telling([], [], {})
    place = 0
    async for customer in by_turns(customers):
        try:
            await _tell(telling, desk, customer, cause.caused_at, now, has_states=review.has_states)
        except PASSING:
            telling.kept[place] = customer
        except Exception:  # of one customer: all the others are told
            logger.exception("webhook_has_no_words", customer_id=customer.id)
        place += 1
    return telling


def missed(desk: Desk, cause: Cause, review: Review, known: Collection[str], now: datetime) -> list[Message]:
    """The thresholds that were reached while an endpoint was disabled, for this endpoint."""
    if review.since is None:
        return []
    webhooks, found = desk.catalogue.webhooks, list[Message]()
    for reached in list(webhooks.reached.values()):
        is_ours = webhooks.thresholds[reached.threshold_id].organization_id == cause.organization_id
        if is_ours and reached.at >= review.since and reached.id not in known:
            found += [one for one in _reached(desk, reached, cause, now) if one.endpoint_id == review.endpoint_id]
    return found


async def by_turns(things: Iterable[T]) -> AsyncIterator[T]:
    """The same things; every few milliseconds the event loop goes on with something else before the next one."""
    ends_s = time.monotonic() + TURN_S
    for thing in things:
        if time.monotonic() >= ends_s:
            await asyncio.sleep(0)
            ends_s = time.monotonic() + TURN_S
        yield thing


async def _tell(
    telling: Telling, desk: Desk, customer: Customer, caused_at: datetime, now: datetime, *, has_states: bool = True
) -> None:
    telling.decisions.extend(await _thresholds(desk, customer))
    endpoints = _endpoints(desk, customer.organization_id, STATE_CHANGED) if has_states else []
    if endpoints:
        body, id = _body(STATE_CHANGED, await state_of(desk, customer), now), desk.new_id()
        telling.messages.extend(_messages(id, endpoints, STATE_CHANGED, customer.id, body, caused_at, now))


def _customer(desk: Desk, cause: Cause) -> Customer | None:
    """Who moved, deleted or not; None for usage that is nobody's yet."""
    if cause.customer_id is not None:
        return desk.catalogue.customers.get(cause.customer_id)
    if cause.text is None:
        return None
    if cause.kind == EXTERNAL:
        return desk.catalogue.customer_by_external_id(cause.organization_id, cause.text)
    return desk.catalogue.customer(cause.organization_id, cause.text)


def _endpoints(desk: Desk, organization_id: str, type: str) -> list[Endpoint]:
    return [one for one in desk.catalogue.webhooks.endpoints_of(organization_id) if one.hears(type)]


def _body(type: str, data: object, now: datetime) -> str:
    stamp = now.replace(tzinfo=UTC)
    return exact.encode({"type": type, "timestamp": stamp, "api_version": API_VERSION, "data": data}).decode()


def _messages(
    id: str, endpoints: Sequence[Endpoint], type: str, customer_id: str, body: str, caused_at: datetime, now: datetime
) -> list[Message]:
    return [
        Message(
            id=id, endpoint_id=endpoint.id, organization_id=endpoint.organization_id, type=type, body=body,
            customer_id=customer_id, caused_at=caused_at, created_at=now, due_at=now,
        )
        for endpoint in endpoints
    ]  # fmt: skip


def _reached(desk: Desk, reached: ThresholdReached, cause: Cause, now: datetime) -> list[Message]:
    """A threshold that was reached, in the numbers of then."""
    threshold = desk.catalogue.webhooks.thresholds[reached.threshold_id]
    customer, meter = desk.catalogue.customers[reached.customer_id], desk.catalogue.meters[threshold.meter_id]
    data = {
        "threshold_id": threshold.id,
        "measure": threshold.measure,
        "value": number(threshold.value),
        "unit": threshold.unit,
        "reached_at": reached.at,
        "cycle": reached.cycle,
        "consumed_units": number(reached.consumed),
        "credited_units": number(reached.credited),
        "balance": number(EXACT.subtract(reached.credited, reached.consumed)),
        "meter": {"id": meter.id, "name": meter.name},
        "customer": customer_shape(customer),
    }
    endpoints = _endpoints(desk, threshold.organization_id, THRESHOLD_REACHED)
    body = _body(THRESHOLD_REACHED, data, now)
    return _messages(reached.id, endpoints, THRESHOLD_REACHED, customer.id, body, cause.caused_at, now)


async def _thresholds(desk: Desk, customer: Customer) -> list[ThresholdReached | ThresholdCleared]:
    """The thresholds that this customer crossed since they were looked at last, to either side."""
    webhooks = desk.catalogue.webhooks
    if not _endpoints(desk, customer.organization_id, THRESHOLD_REACHED) or customer.deleted_at is not None:
        return []
    found: list[ThresholdReached | ThresholdCleared] = []
    of_meters: dict[str, CustomerMeter] = {}
    for threshold in webhooks.thresholds_of(customer.organization_id):
        meter = desk.catalogue.meters[threshold.meter_id]
        whose = threshold.customer_id
        if whose is not None and desk.catalogue.customer_named(threshold.organization_id, whose) != customer.id:
            continue
        if meter.archived_at is not None:
            continue
        one = of_meters.get(meter.id) or await customer_meter(desk, customer, meter)
        of_meters[meter.id] = one
        known = webhooks.reached.get((threshold.id, customer.id))
        is_reached = _has_anything(one) and threshold.is_reached(one.consumed, one.credited)
        cycle = one.since.isoformat() if one.since else BEGINNING
        if is_reached and (known is None or known.cycle != cycle):
            found.append(ThresholdReached(
                id=desk.new_id(), threshold_id=threshold.id, customer_id=customer.id, cycle=cycle, at=desk.now(),
                consumed=one.consumed, credited=one.credited,
            ))  # fmt: skip
        elif not is_reached and known is not None:
            found.append(ThresholdCleared(threshold.id, customer.id, desk.now()))
    return found


def _has_anything(one: CustomerMeter) -> bool:
    """A customer who never used the meter and was never credited has no balance that could be low."""
    return one.account is not None or one.consumption.count > 0
