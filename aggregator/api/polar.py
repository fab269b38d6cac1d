"""Polar's webhooks: the route ``POST /webhooks/polar`` accepts them when signed, two lists show what became of them.

The signature determines the organization, because each organization's sources have their own secrets. First the facts
of a delivery become durable; then ``aggregator.service.polar_accounts`` settles the accounts. Both steps are
idempotent, so a repeated delivery completes an interrupted one and otherwise changes nothing.

Anybody can send to this route. So the headers are checked before the body is read, and signatures are verified in a
thread, one delivery at a time: requests without a valid secret delay only this route.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import structlog
from fastapi import APIRouter, Depends, Request, Response
from msgspec import UNSET

from aggregator.api import route_answers
from aggregator.api.bodies import body_as
from aggregator.api.requests import (
    POLAR_BODY_BYTES_MAX,
    AtDesk,
    WhichPage,
    allow,
    answer,
    bytes_of,
    decoded,
    json_response,
    known_only,
    listed,
    on_page,
)
from aggregator.api.schemas import PolarObject, PolarObjects, gives, page_of, takes
from aggregator.service.errors import PASSING, Malformed
from aggregator.service.polar_accounts import settle
from aggregator.service.polar_inbox import REASONS_MAX, TEXT_LENGTH_MAX, Outcome, Received, waiting
from aggregator.service.service import Desk
from meters.catalogue.access import reading, writing
from meters.catalogue.catalogue import Change, CustomerCreated, CustomerDeleted, CustomerUpdated, Token
from meters.catalogue.polar_facts import Credited, DeliveryApplied, Linked
from meters.errors import detail
from meters.ledger.benefits import BenefitSet
from meters.ledger.joined import CustomersJoined
from meters.ledger.price import SubscriptionPriced
from meters.polar_webhooks import METER_KEY, News, Unreadable, meter_of, read
from meters.webhooks import Rejection, Source, is_signed, rejection

logger = structlog.get_logger("aggregator.api.polar")
router = APIRouter(tags=["webhooks"])
Reader = Annotated[Token, Depends(allow(reading("webhooks")))]
Writer = Annotated[Token, Depends(allow(writing("webhooks")))]


@router.post(
    "/webhooks/polar",
    status_code=202,
    dependencies=[Depends(known_only)],
    responses=gives(route_answers.WebhookAccepted, status=202),
)
async def receive_polar_webhook(request: Request, desk: AtDesk) -> Response:
    """For Polar: take in a signed webhook. Types that say nothing of usage or credits are accepted and passed over."""
    rejected = rejection(request.headers, int(desk.now().timestamp()))
    if rejected is not None:
        return _not_believed(desk, rejected)
    body = await bytes_of(request, POLAR_BODY_BYTES_MAX)  # as they were sent: the signature is over them
    source = await _source(desk, request.headers, body)
    if source is None:
        return _not_believed(desk, Rejection.SIGNATURE)
    delivery_id, kind = request.headers["webhook-id"], ""
    try:
        payload = _payload(body)
        kind = payload["type"]
        taken = await _take(desk, source.organization_id, delivery_id, payload)
    except (Malformed, *PASSING) as error:
        is_refused = isinstance(error, Malformed)
        words = [entry["msg"] for entry in error.details] if isinstance(error, Malformed) else [str(error)]
        _note(desk, source.organization_id, delivery_id, kind, Taken("refused" if is_refused else "failed", words))
        raise
    _note(desk, source.organization_id, delivery_id, kind, taken)
    notes = taken.reasons if taken.outcome == "applied" and taken.reasons else UNSET
    return json_response(202, route_answers.WebhookAccepted(_STATUS[taken.outcome], notes))


class Taken(NamedTuple):
    """The outcome of a delivery, and its reasons."""

    outcome: Outcome
    reasons: list[str]


_STATUS: Mapping[Outcome, Literal["accepted", "repeated", "ignored"]] = {
    "applied": "accepted", "known": "repeated", "ignored": "ignored"
}  # fmt: skip


async def _take(desk: Desk, organization_id: str, delivery_id: str, payload: dict[str, Any]) -> Taken:
    """Make the delivery's facts durable and settle the accounts. Raises Malformed, and errors that pass."""
    is_done = False
    while not is_done:
        whom = _whom(desk, organization_id, payload.get("data"))
        async with desk.turn(organization_id, *whom):
            if not whom >= _whom(desk, organization_id, payload.get("data")):
                continue  # the customer became another one while this waited for its turn
            heard = desk.catalogue.mirror.heard(organization_id, delivery_id)
            news = _news(desk, organization_id, delivery_id, payload)
            if news is not None:
                if not heard:
                    news = await _decide(desk, news, lambda: _news(desk, organization_id, delivery_id, payload))
                await settle(desk, organization_id, news.customer_ids)
            is_done = True
    if news is None:
        return Taken("ignored", ["this type says nothing about usage, credits or subscriptions"])
    if heard:
        return Taken("known", ["this delivery was applied before"])
    return Taken("applied", [*news.notes, *_waiting(desk, organization_id, news)])


def _waiting(desk: Desk, organization_id: str, news: News) -> list[str]:
    """What of the news is kept and has no effect yet."""
    facts = [fact for change in news.changes if isinstance(change, DeliveryApplied) for fact in change.facts]
    named = dict.fromkeys(fact.meter_id for fact in facts if isinstance(fact, Credited))
    return [
        f"credits wait: no meter here is linked to Polar's meter {id}; set {METER_KEY} in a meter's metadata"
        for id in named
        if meter_of(desk.catalogue, organization_id, id) is None
    ]


def _note(desk: Desk, organization_id: str, delivery_id: str, kind: str, taken: Taken) -> None:
    desk.inbox.note(organization_id, Received(delivery_id, kind, desk.now(), *taken))
    logger.info(
        "polar_webhook", organization_id=organization_id, delivery_id=delivery_id[:TEXT_LENGTH_MAX],
        type=kind[:TEXT_LENGTH_MAX], outcome=taken.outcome, reasons=taken.reasons[:REASONS_MAX],
    )  # fmt: skip


@router.get("/v1/webhooks/polar/deliveries", responses=gives(page_of(route_answers.PolarDelivery)))
async def list_polar_deliveries(desk: AtDesk, token: Reader, page: WhichPage) -> Response:
    """List the newest incoming webhooks of Polar's, newest first, and what became of each.

    At most 200 are kept. After a restart those that were applied remain.
    """
    found = desk.inbox.received(desk.catalogue, token.organization_id)
    shapes = [route_answers.PolarDelivery(*one) for one in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


@router.post(
    "/v1/webhooks/polar/objects", openapi_extra=takes(PolarObjects), responses=gives(route_answers.PolarObjectsTaken)
)
async def apply_polar_objects(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Apply customers and benefits as Polar's API shows them, as if webhooks had brought them.

    An object that is known already changes nothing.
    """
    body = await body_as(PolarObjects, request)
    items = [await _apply(desk, token.organization_id, one, dry_run=body.dry_run) for one in body.objects]
    return answer(route_answers.PolarObjectsTaken(items), desk.view.as_of)


async def _apply(
    desk: Desk, organization_id: str, one: PolarObject, *, dry_run: bool
) -> route_answers.PolarObjectTaken:
    id, version = str(one.data.get("id")), one.data.get("modified_at") or one.data.get("created_at")
    payload = {"type": f"{one.type}.updated", "data": one.data}
    delivery_id = f"pull:{one.type}:{id}:{version}"[:TEXT_LENGTH_MAX]
    try:
        news = _news(desk, organization_id, delivery_id, payload)
        if news is not None and not news.changes:
            taken = Taken("known", [])
        elif dry_run:
            taken = Taken("applied", [])
        else:
            taken = await _take(desk, organization_id, delivery_id, payload)
    except Malformed as error:
        taken = Taken("refused", [entry["msg"] for entry in error.details])
    return route_answers.PolarObjectTaken(id[:TEXT_LENGTH_MAX], *taken)


@router.get("/v1/webhooks/polar/waiting", responses=gives(page_of(route_answers.PolarWaiting)))
async def list_polar_waiting(desk: AtDesk, token: Reader, page: WhichPage) -> Response:
    """List Polar's meters whose credits wait, because no meter here is linked to them.

    Set `polar_meter_id` in a meter's metadata, and the credits count.
    """
    found = waiting(desk.catalogue, token.organization_id)
    shapes = [route_answers.PolarWaiting(*one) for one in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


def _not_believed(desk: Desk, reason: Rejection) -> Response:
    desk.inbox.counts["unsigned"] += 1
    return json_response(401, {"error": "InvalidSignature", "detail": f"Not accepted: {reason}."})


def _whom(desk: Desk, organization_id: str, data: object) -> set[str]:
    """The customers that a delivery is about: Polar's, those here that it is or was, and the one that has its name."""
    told = data if isinstance(data, dict) else {}
    customer = told.get("customer", told)
    external_id = customer.get("external_id") if isinstance(customer, dict) else None
    polar_id = str(told.get("customer_id") or told.get("id"))
    found = {polar_id, *desk.catalogue.mirror.once(organization_id, polar_id)}
    if isinstance(external_id, str):
        named = desk.catalogue.customer_by_external_id(organization_id, external_id)
        found |= {named.id} if named else set()
    return found


async def _decide(desk: Desk, news: News, read_again: Callable[[], News | None]) -> News:
    """Decide, and alone where others may decide the same, by what is true then.

    No two customers may have one name, and none may go while it becomes somebody else's. A benefit comes with the news
    of each of its customers, and its newest state has to be the last. All prices of an organization have one currency.
    """
    if not any(map(_is_of_several, news.changes)):
        await desk.decide(*news.changes)
        return news
    async with desk.deciding:
        news = read_again() or news
        await desk.decide(*news.changes)
        return news


def _is_of_several(change: Change) -> bool:
    is_link = isinstance(change, DeliveryApplied) and any(isinstance(fact, Linked) for fact in change.facts)
    shared = BenefitSet | CustomerCreated | CustomerDeleted | CustomersJoined | CustomerUpdated | SubscriptionPriced
    return is_link or isinstance(change, shared)


async def _source(desk: Desk, headers: Mapping[str, str], body: bytes) -> Source | None:
    """Whose secret signed this. With several organizations it is the secret that tells them apart. Raises Busy."""
    sources = [source for source in list(desk.catalogue.webhooks.sources.values()) if not source.deleted_at]
    async with desk.verifying.turn():
        return await asyncio.to_thread(_signer, sources, headers, body)


def _signer(sources: Sequence[Source], headers: Mapping[str, str], body: bytes) -> Source | None:
    return next((source for source in sources if is_signed(source.secret.value, headers, body)), None)


def _payload(body: bytes) -> dict[str, Any]:
    payload = decoded(body)
    if not isinstance(payload, dict) or not isinstance(payload.get("type"), str):
        raise Malformed([detail("missing", ("body", "type"), "Field required")])
    return payload


def _news(desk: Desk, organization_id: str, delivery_id: str, payload: dict[str, Any]) -> News | None:
    try:
        return read(
            desk.catalogue, organization_id, delivery_id=delivery_id, kind=payload["type"], data=payload.get("data"),
            now=desk.decided_at(),
        )  # fmt: skip
    except Unreadable as error:
        raise Malformed([detail("value_error", ("body", "data"), str(error))]) from error
