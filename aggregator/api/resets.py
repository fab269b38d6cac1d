"""Beginning a customer's meters anew, by hand: the end of a period for whoever has no benefits that are renewed.

The units that are carried over are worked out here, once, from all that arrived before the reset; they are part of the
decision. A reset that names its time happens once, however often it is asked for, and is answered as the first time.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response

from aggregator.api.bodies import body_as, moment
from aggregator.api.customers import customer_by_id
from aggregator.api.requests import AtDesk, allow, answer
from aggregator.api.schemas import ResetCreate, gives, takes
from aggregator.service import answers
from aggregator.service.balances import consumed_between
from aggregator.service.errors import Refused
from aggregator.service.serializers import reset_shape
from aggregator.service.service import Desk
from meters.access import writing
from meters.aggregation import Aggregation
from meters.catalogue import Customer, Token
from meters.credit import MeterReset
from meters.filter import Filter
from meters.ledger import ZERO, Account, rollover_units
from meters.meter import Meter

router = APIRouter(tags=["credits"])
Writer = Annotated[Token, Depends(allow(writing("customers")))]


@router.post(
    "/v1/customers/{id}/resets",
    status_code=201,
    openapi_extra=takes(ResetCreate),
    responses=gives(answers.Reset, status=201),
)
async def reset_meters(request: Request, desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Begin a customer's meters anew: usage counts from nothing, and only what rolls over is left of the credits."""
    customer_by_id(desk, token, id)
    asked = await body_as(ResetCreate, request, otherwise={})
    async with desk.settling(token.organization_id, str(id)):
        while (change := await _reset(desk, token, id, asked)) is None:
            pass
    return answer(reset_shape(change), desk.view.as_of, 201)


async def _reset(desk: Desk, token: Token, id: UUID, asked: ResetCreate) -> MeterReset | None:
    """The reset that is made, or was; None where it has to be worked out again."""
    customer = customer_by_id(desk, token, id)
    at = moment(asked.at, desk.now(), too_late="A meter cannot begin anew in the future.")
    used = await used_until(desk, customer, _meters(desk, token, asked), at)
    async with desk.deciding:
        customer, meters = customer_by_id(desk, token, id), _meters(desk, token, asked)
        name = f"{customer.id}:{at.isoformat(timespec='microseconds')}"
        made = {meter.id: kept for meter in meters if (kept := _made(desk, name, customer, meter.id)) is not None}
        try:
            units = made | {one.id: carried(desk, customer, one, at, used) for one in meters if one.id not in made}
        except Overtaken:
            return None
        change = MeterReset(
            id=name, organization_id=token.organization_id, customer_id=customer.id, at=at,
            meter_ids=[meter.id for meter in meters], rollover={of: kept for of, kept in units.items() if kept > 0},
        )  # fmt: skip
        if len(made) < len(meters):
            await desk.decide(change)
    return change


def _meters(desk: Desk, token: Token, asked: ResetCreate) -> list[Meter]:
    meters = {meter.id: meter for meter in desk.catalogue.meters_of(token.organization_id)}
    if asked.meter_ids is None:
        return [meter for meter in meters.values() if meter.archived_at is None]
    ids = list(dict.fromkeys(map(str, asked.meter_ids)))
    for id in ids:
        if id not in meters:
            raise Refused("meter_id", ("body", "meter_ids"), "Meter not found.", id)
    return [meters[id] for id in ids]


def _made(desk: Desk, reset_id: str, customer: Customer, meter_id: str) -> Decimal | None:
    """What the reset of this id carried over; None where it is not made."""
    account = desk.view.ledger.account(customer.id, meter_id)
    if account is None or not any(reset.id == reset_id for reset in account.resets):
        return None
    return next((credit.units for credit in account.credits if credit.id == reset_id), ZERO)


class Overtaken(Exception):
    """Something else was decided meanwhile, by which other usage counts: ask for it again."""


class Used(NamedTuple):
    """What was used of a meter in the window that a reset would end, and all that this number depends on."""

    external_id: str | None
    filter: Filter
    aggregation: Aggregation
    since: datetime | None
    consumed: Decimal = ZERO


async def used_until(desk: Desk, customer: Customer, meters: Iterable[Meter], at: datetime) -> dict[str, Used]:
    """By meter, what was used before the reset where it decides what is carried over. Raises Unavailable.

    This waits for the store, so it is asked for before ``desk.deciding`` is held, for which every tenant waits.
    """
    found = {}
    for meter in meters:
        if account := _that_rolls_over(desk, customer, meter, at):
            consumed = await consumed_between(desk, customer, meter, account.since, at)
            found[meter.id] = _basis(customer, meter, account)._replace(consumed=consumed)
    return found


def carried(desk: Desk, customer: Customer, meter: Meter, at: datetime, used: Mapping[str, Used]) -> Decimal:
    """The units that a reset at this time carries over: what is left of rollover credits, others used up first.

    Raises Overtaken where ``used`` is not of the window that the reset ends by now.
    """
    account = _that_rolls_over(desk, customer, meter, at)
    if account is None:
        return ZERO
    known = used.get(meter.id)
    if known is None or known._replace(consumed=ZERO) != _basis(customer, meter, account):
        raise Overtaken
    return rollover_units(account, known.consumed, until=at)


def _that_rolls_over(desk: Desk, customer: Customer, meter: Meter, at: datetime) -> Account | None:
    """The account, where there is something that a reset at this time may carry over."""
    account = desk.view.ledger.account(customer.id, meter.id)
    if account is None or (account.since is not None and account.since >= at):
        return None
    return account if any(credit.rollover and credit.at < at for credit in account.window()) else None


def _basis(customer: Customer, meter: Meter, account: Account) -> Used:
    return Used(customer.external_id, meter.filter, meter.aggregation, account.since)
