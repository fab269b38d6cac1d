"""Polar's webhooks in: ``POST /webhooks/polar``. What Polar decided about customers and credits becomes true here.

The signature says which organization a delivery is for: each has the secrets of its own sources. The facts of a
delivery are made durable first; then the ledger is brought to what all facts together call for. Both are repeated
without harm, so a delivery that was interrupted is finished by its repetition, and one that was finished changes
nothing.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec.structs import replace

from aggregator.api.balances import consumed_between
from aggregator.api.desk import AtDesk, Desk
from aggregator.api.errors import BodyTooLarge, Malformed, json_response
from aggregator.api.limits import BODY_BYTES_MAX
from aggregator.api.schemas import gives, ref
from meters import exact_json
from meters.catalogue import Customer
from meters.credit import CreditGranted, MeterReset, MovementWithdrawn
from meters.detail import detail
from meters.ledger import ZERO, Account, Credit, Reset, rollover_units
from meters.meter import Meter
from meters.mirror import Given, Wanted
from meters.polar import News, Unreadable, meter_of, read
from meters.signatures import Rejection, rejection
from meters.webhooks import Source

router = APIRouter(tags=["webhooks"])
OURS = "polar:"
"""How the ids of movements begin that follow from what Polar told."""

Movement = CreditGranted | MeterReset


@router.post("/webhooks/polar", status_code=202, responses=gives(ref("WebhookAccepted"), 202))
async def receive_polar_webhook(request: Request, desk: AtDesk) -> Response:
    """For Polar: take in a signed webhook. Types that say nothing of usage or credits are accepted and passed over."""
    body = await _body(request)
    source = _source(desk, request, body)
    if isinstance(source, Rejection):
        return json_response(401, {"error": "InvalidSignature", "detail": f"Not accepted: {source}."})
    payload = _payload(body)
    organization_id, delivery_id = source.organization_id, request.headers["webhook-id"]
    async with desk.deciding:
        heard = desk.catalogue.mirror.heard(organization_id, delivery_id)
        news = _news(desk, organization_id, delivery_id, payload)
        if news is not None:
            if not heard:
                await desk.decide(*news.changes)
            await _settle(desk, organization_id, news.customer_id)
    status = "ignored" if news is None else "repeated" if heard else "accepted"
    return json_response(202, {"status": status})


async def _body(request: Request) -> bytes:
    """The bytes as they were sent: the signature is over them."""
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > BODY_BYTES_MAX:
            raise BodyTooLarge
    return bytes(received)


def _source(desk: Desk, request: Request, body: bytes) -> Source | Rejection:
    """Whose secret signed this. With several organizations it is the secret that tells them apart."""
    sources = [source for source in desk.catalogue.webhooks.sources.values() if not source.deleted_at]
    found = Rejection.SIGNATURE
    for source in sources:
        outcome = rejection([source.secret.value], request.headers, body, int(desk.now().timestamp()))
        if outcome is None:
            return source
        found = outcome
    return found


def _payload(body: bytes) -> dict[str, Any]:
    try:
        payload = exact_json.decode(body)
    except ValueError as error:
        place = getattr(error, "pos", 0)
        raise Malformed([detail("json_invalid", ("body", place), "JSON decode error", {})]) from error
    if not isinstance(payload, dict) or not isinstance(payload.get("type"), str):
        raise Malformed([detail("missing", ("body", "type"), "Field required")])
    return payload


def _news(desk: Desk, organization_id: str, delivery_id: str, payload: dict[str, Any]) -> News | None:
    try:
        return read(
            desk.catalogue, organization_id, delivery_id=delivery_id, kind=payload["type"], data=payload.get("data"),
            now=desk.now(),
        )  # fmt: skip
    except Unreadable as error:
        raise Malformed([detail("value_error", ("body", "data"), str(error))]) from error


async def _settle(desk: Desk, organization_id: str, customer_id: str | None) -> None:
    """Bring a customer's accounts to what the facts call for, as far as their meters are known here."""
    customer = desk.catalogue.customer(organization_id, customer_id or "")
    if customer is None:
        return
    changes: list[Movement | MovementWithdrawn] = []
    for polar_id in desk.catalogue.mirror.meters(customer.id):
        meter = meter_of(desk.catalogue, organization_id, polar_id)
        if meter is not None:
            wanted = desk.catalogue.mirror.wanted(customer.id, polar_id)
            changes += await _movements(desk, customer, meter, wanted)
    if changes:
        await desk.decide(*changes)


async def _movements(
    desk: Desk, customer: Customer, meter: Meter, wanted: Wanted
) -> list[Movement | MovementWithdrawn]:
    """What has to be decided so that the account holds what is wanted and nothing else of ours."""
    account = desk.view.ledger.account(customer.id, meter.id) or Account()
    have = {credit.id for credit in account.credits if _is_ours(credit)}
    have |= {reset.id for reset in account.resets if _is_ours(reset)}
    credits = [change for given in wanted.given for change in _credits(customer, meter, given)]
    kept_until = _kept_until(account, credits, wanted.cuts)
    if kept_until is None:
        return []
    resets = await _resets(desk, customer, meter, account, credits, wanted.cuts, kept_until)
    should: dict[str, Movement] = {credit.id: credit for credit in credits}
    should |= {reset.id: reset for reset in resets}
    withdrawn = [
        MovementWithdrawn(
            id=id, organization_id=customer.organization_id, customer_id=customer.id, meter_id=meter.id
        )
        for id in sorted(have - should.keys())
    ]  # fmt: skip
    return [*withdrawn, *(change for id, change in should.items() if id not in have)]


def _credits(customer: Customer, meter: Meter, given: Given) -> list[CreditGranted]:
    fact = given.fact
    name = f"{OURS}{fact.grant_id}:{_text(fact.at)}:{fact.units}{'r' if fact.rollover else ''}"
    credit = CreditGranted(
        id=name, organization_id=customer.organization_id, customer_id=customer.id, meter_id=meter.id, at=fact.at,
        units=Decimal(fact.units), rollover=fact.rollover, cause="cycle" if given.is_cycle else "grant",
        reference=fact.grant_id,
    )  # fmt: skip
    if given.revoked is None:
        return [credit]
    taken = replace(credit, id=f"{name}:{_text(given.revoked)}", units=-credit.units, at=given.revoked, cause="revoke")
    return [credit, taken]


def _kept_until(account: Account, credits: Sequence[CreditGranted], cuts: Sequence[datetime]) -> datetime | None:
    """The time before which the account holds what is wanted already; None where it does so altogether."""
    have = {credit.id: credit.at for credit in account.credits if _is_ours(credit) and credit.cause != "rollover"}
    should = {credit.id: credit.at for credit in credits}
    made = {reset.at for reset in account.resets if _is_ours(reset)}
    differing = [(have | should)[id] for id in have.keys() ^ should.keys()]
    return min([*differing, *(made ^ set(cuts))], default=None)


async def _resets(
    desk: Desk, customer: Customer, meter: Meter, account: Account, credits: Sequence[CreditGranted],
    cuts: Sequence[datetime], kept_until: datetime,
) -> list[MeterReset]:  # fmt: skip
    """The cuts with what each carries over, which depends on everything before it and on nothing after it."""
    carried = {credit.id: credit.units for credit in account.credits if credit.cause == "rollover"}
    made = {reset.at: carried.get(reset.id, ZERO) for reset in account.resets if _is_ours(reset)}
    before = Account(
        [credit for credit in account.credits if not _is_ours(credit)] + [_held(credit) for credit in credits],
        [reset for reset in account.resets if not _is_ours(reset)],
    )
    found = []
    for at in cuts:
        units = made[at] if at < kept_until else await _carried(desk, customer, meter, _until(before, at), at)
        reset = MeterReset(
            id=f"{OURS}{customer.id}:{meter.id}:{_text(at)}:{units}", organization_id=customer.organization_id,
            customer_id=customer.id, meter_ids=[meter.id], at=at, rollover={meter.id: units},
        )  # fmt: skip
        found.append(reset)
        before.resets.append(Reset(at, reset.id))
        before.credits.append(Credit(at, reset.id, units, True, "rollover"))
    return found


async def _carried(desk: Desk, customer: Customer, meter: Meter, before: Account, at: datetime) -> Decimal:
    if not any(credit.rollover for credit in before.window()):
        return ZERO
    return rollover_units(before, await consumed_between(desk, customer, meter, before.since, at), until=at)


def _until(account: Account, at: datetime) -> Account:
    """The account as it was before a time."""
    return Account(
        sorted((credit for credit in account.credits if credit.at < at), key=lambda credit: credit.place),
        sorted((reset for reset in account.resets if reset.at < at), key=lambda reset: reset.place),
    )


def _held(credit: CreditGranted) -> Credit:
    return Credit(credit.at, credit.id, credit.units, credit.rollover, credit.cause)


def _is_ours(one: Credit | Reset) -> bool:
    return one.id.startswith(OURS)


def _text(instant: datetime) -> str:
    return instant.isoformat(timespec="microseconds")
