"""Routes of credits and resets: units given by hand, taken back, and the manual end of a period.

``give_credits`` and ``take_back_credits`` change a customer's credited units; ``list_credits`` shows every movement.
``reset_meters`` begins new windows. ``used_until`` and ``carried`` compute which units roll over at a reset; the
benefit routes use them as well.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from hashlib import sha256
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from msgspec.structs import replace

from aggregator.api.bodies import body_as, fields_of, mapping_of, moment, refuse_organization
from aggregator.api.customers import customer_by_id
from aggregator.api.idempotency import IN_PROGRESS, Key, Once, only_once, used_for_another
from aggregator.api.requests import AtDesk, WhichPage, allow, answer, body_of, listed, on_page
from aggregator.api.schemas import CreditCreate, ResetCreate, gives, page_of, takes
from aggregator.service import answers
from aggregator.service.cuts import Counted, counted
from aggregator.service.errors import NotFound, Refused
from aggregator.service.serializers import credit_shape, reset_shape
from aggregator.service.service import Desk
from meters import exact
from meters.catalogue.access import reading, writing
from meters.catalogue.catalogue import Customer, Token
from meters.ledger.ledger import (
    ZERO,
    Credit,
    CreditGranted,
    MeterReset,
    in_window,
    newest_window,
    revocation_id,
)
from meters.meter import Meter
from meters.timestamps import sortable_text

router = APIRouter(tags=["credits"])
Reader = Annotated[Token, Depends(allow(reading("customers") | {"customer_meters:read"}))]
Writer = Annotated[Token, Depends(allow(writing("customers")))]


@router.post(
    "/v1/customers/{id}/credits",
    status_code=201,
    openapi_extra=takes(CreditCreate),
    responses=gives(answers.Credit, status=201) | IN_PROGRESS,
)
async def give_credits(request: Request, desk: AtDesk, token: Writer, id: UUID, key: Key = None) -> Response:
    """Credit ``units`` of a meter; with ``rollover`` what is left of them at a reset goes into the next window."""
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        customer_by_id(desk, token, id)
        meter_id, units, rollover = _fields(desk, token, await body_of(request))
        async with desk.turn_of(lambda: customer_by_id(desk, token, id)), desk.deciding:
            customer = customer_by_id(desk, token, id)
            known = _given_before(desk, token, key, [customer.id, meter_id, units, rollover])
            if known is not None:
                return answer(credit_shape(known, customer.id, meter_id), desk.view.as_of, 201)
            account = desk.view.ledger.account(customer.id, meter_id)
            credit = CreditGranted(
                id=desk.new_id(), organization_id=token.organization_id, customer_id=customer.id, meter_id=meter_id,
                units=Decimal(units), rollover=rollover, at=in_window(account, desk.decided_at()),
            )  # fmt: skip
            return await once.decide(credit_shape(credit, customer.id, meter_id), 201, credit)


def _given_before(desk: Desk, token: Token, key: str | None, said: list[object]) -> CreditGranted | None:
    """What an older version gave under a key, which it kept with the credit, whichever customer's. Raises Refused."""
    known = desk.view.ledger.by_key(token.organization_id, key) if key is not None else None
    if known is not None and known.content != sha256(exact.encode(said)).hexdigest():
        raise used_for_another(key or "")
    return known


def _fields(desk: Desk, token: Token, body: object) -> tuple[str, int, bool]:
    given = mapping_of(body)
    refuse_organization(given)
    fields = fields_of(CreditCreate, given)
    meter = desk.catalogue.meter(token.organization_id, str(fields["meter_id"]).lower())
    if meter is None:
        raise Refused("meter_id", ("body", "meter_id"), "Meter not found.", fields["meter_id"])
    return meter.id, fields["units"], fields.get("rollover", False)


@router.get("/v1/customers/{id}/credits", responses=gives(page_of(answers.Credit)))
async def list_credits(
    desk: AtDesk, token: Reader, id: UUID, page: WhichPage, meter_id: UUID | None = None
) -> Response:  # fmt: skip
    """Every movement of the customer's credited units, newest first."""
    customer = customer_by_id(desk, token, id)
    found = [
        (credit, meter.id)
        for meter in desk.catalogue.meters_of(token.organization_id)
        if meter_id is None or meter.id == str(meter_id)
        for credit in _credits(desk, customer, meter.id)
    ]
    found.sort(key=lambda one: one[0].sort_key, reverse=True)
    shapes = [credit_shape(credit, customer.id, of) for credit, of in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


def _credits(desk: Desk, customer: Customer, meter_id: str) -> list[Credit]:
    account = desk.view.ledger.account(customer.id, meter_id)
    return account.credits if account is not None else []


@router.delete("/v1/customers/{id}/credits/{credit_id}", responses=gives(answers.Credit) | IN_PROGRESS)
async def take_back_credits(
    request: Request, desk: AtDesk, token: Writer, id: UUID, credit_id: str, key: Key = None
) -> Response:
    """Take a credit back: all of it in the window in which it was given, afterwards what of it was carried over.

    Repeating this takes nothing more.
    """
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        async with desk.turn_of(lambda: customer_by_id(desk, token, id)), desk.deciding:  # after a reset under way
            customer = customer_by_id(desk, token, id)
            credit, meter_id = _credit(desk, token, customer, credit_id)
            account = desk.view.ledger.account(customer.id, meter_id)
            taken = next((c for c in _credits(desk, customer, meter_id) if c.id == revocation_id(credit.id)), None)
            if taken is not None:
                return await once.decide(credit_shape(taken, customer.id, meter_id), 200)
            by_hand = credit.cause == "credit"  # a benefit's credits go with its grant
            if not by_hand or not newest_window(account).of(credit.id):
                message = "Only units that were given by hand, and that no reset has ended, can be taken back."
                raise Refused("value_error", ("path", "credit_id"), message, credit_id)
            back = CreditGranted(
                id=revocation_id(credit.id), organization_id=token.organization_id, customer_id=customer.id,
                meter_id=meter_id, units=-credit.units, rollover=credit.rollover, cause="revoke", reference=credit.id,
                at=max(in_window(account, desk.decided_at()), credit.at), takes=credit.id,
            )  # fmt: skip
            return await once.decide(credit_shape(back, customer.id, meter_id), 200, back)


def _credit(desk: Desk, token: Token, customer: Customer, credit_id: str) -> tuple[Credit, str]:
    for meter in desk.catalogue.meters_of(token.organization_id):
        for credit in _credits(desk, customer, meter.id):
            if credit.id == credit_id:
                return credit, meter.id
    raise NotFound


# Resets, for organizations without renewed benefits.
#
# The units that roll over are computed once, from all usage that arrived before the reset, and are part of the
# decision. A reset that names its time happens once; a repetition gets the first answer again.

@router.post(
    "/v1/customers/{id}/resets",
    status_code=201,
    openapi_extra=takes(ResetCreate),
    responses=gives(answers.Reset, status=201) | IN_PROGRESS,
)
async def reset_meters(request: Request, desk: AtDesk, token: Writer, id: UUID, key: Key = None) -> Response:
    """Begin a customer's meters anew: usage counts from nothing, and only what rolls over is left of the credits."""
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        customer_by_id(desk, token, id)
        asked = await body_as(ResetCreate, request)
        async with desk.turn_of(lambda: customer_by_id(desk, token, id)):
            while (made := await _reset(desk, token, id, asked, once)) is None:
                pass
        return made


async def _reset(desk: Desk, token: Token, id: UUID, asked: ResetCreate, once: Once) -> Response | None:
    """The answer to the reset that is made, or was; None where it has to be worked out again."""
    customer = customer_by_id(desk, token, id)
    at = moment(asked.at, desk.decided_at(), too_late="A meter cannot begin anew in the future.")
    change = MeterReset(
        id=f"{customer.id}:{sortable_text(at)}", organization_id=token.organization_id,
        customer_id=customer.id, meter_ids=[], at=at,
    )  # fmt: skip
    used = await used_until(desk, customer, _meters(desk, token, asked), change)
    async with desk.deciding:
        customer, meters = customer_by_id(desk, token, id), _meters(desk, token, asked)
        made = {meter.id: kept for meter in meters if (kept := _made(desk, change.id, customer, meter.id)) is not None}
        change, others = replace(change, rollover={of: kept for of, kept in made.items() if kept > 0}), []
        try:
            for meter in meters:
                if meter.id not in made:
                    change, later = with_usage(desk, customer, meter, change, used)
                    others += later
        except Overtaken:
            return None
        change = replace(change, meter_ids=[meter.id for meter in meters])
        begun = [change] if len(made) < len(meters) else []
        return await once.decide(reset_shape(change), 201, *begun, also=others)


def _meters(desk: Desk, token: Token, asked: ResetCreate) -> list[Meter]:
    meters = {meter.id: meter for meter in desk.catalogue.meters_of(token.organization_id)}
    if asked.meter_ids == "all":
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


async def used_until(
    desk: Desk, customer: Customer, meters: Iterable[Meter], reset: MeterReset
) -> dict[str, Counted]:  # fmt: skip
    """By meter, the usage that decides what the reset, and those after it, carry over. Raises Unavailable."""
    found = {}
    for meter in meters:
        alone = replace(reset, meter_ids=[meter.id])
        found[meter.id] = await counted(desk, customer, meter, [alone], reset.at)
    return found


def with_usage(
    desk: Desk, customer: Customer, meter: Meter, reset: MeterReset, used: Mapping[str, Counted]
) -> tuple[MeterReset, list[MeterReset]]:
    """The reset with the meter's usage and what it carries over, and the usage of the resets after it.

    Raises Overtaken where ``used`` was counted by what is not so any more.
    """
    known = used.get(meter.id)
    if known is None or not known.basis.holds(desk, customer, meter):
        raise Overtaken
    return known.added_to(reset, meter.id), known.of_others(reset)
