"""The route ``POST /webhooks/polar``: accepts Polar's signed webhooks about customers, benefits and subscriptions.

The signature determines the organization, because each organization's sources have their own secrets. First the facts
of a delivery become durable; then ``aggregator.service.polar_accounts`` settles the accounts. Both steps are
idempotent, so a repeated delivery completes an interrupted one and otherwise changes nothing.

Anybody can send to this route. So the headers are checked before the body is read, and signatures are verified in a
thread, one delivery at a time: requests without a valid secret delay only this route.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from aggregator.api import route_answers
from aggregator.api.requests import POLAR_BODY_BYTES_MAX, AtDesk, bytes_of, decoded, json_response
from aggregator.api.schemas import gives
from aggregator.service.errors import Malformed
from aggregator.service.polar_accounts import settle
from aggregator.service.service import Desk
from meters.catalogue.catalogue import Change, CustomerCreated, CustomerDeleted, CustomerUpdated
from meters.catalogue.polar_facts import DeliveryApplied, Linked
from meters.errors import detail
from meters.ledger.benefits import BenefitSet
from meters.ledger.joined import CustomersJoined
from meters.polar_webhooks import News, Unreadable, read
from meters.webhooks import Rejection, Source, is_signed, rejection

router = APIRouter(tags=["webhooks"])


@router.post("/webhooks/polar", status_code=202, responses=gives(route_answers.WebhookAccepted, status=202))
async def receive_polar_webhook(request: Request, desk: AtDesk) -> Response:
    """For Polar: take in a signed webhook. Types that say nothing of usage or credits are accepted and passed over."""
    rejected = rejection(request.headers, int(desk.now().timestamp()))
    if rejected is not None:
        return _not_believed(rejected)
    body = await bytes_of(request, POLAR_BODY_BYTES_MAX)  # as they were sent: the signature is over them
    source = await _source(desk, request.headers, body)
    if source is None:
        return _not_believed(Rejection.SIGNATURE)
    payload = _payload(body)
    organization_id, delivery_id = source.organization_id, request.headers["webhook-id"]
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
    status: Literal["ignored", "repeated", "accepted"]
    status = "ignored" if news is None else "repeated" if heard else "accepted"
    return json_response(202, route_answers.WebhookAccepted(status))


def _not_believed(reason: Rejection) -> Response:
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
    of each of its customers, and its newest state has to be the last.
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
    kinds = BenefitSet | CustomerCreated | CustomerDeleted | CustomersJoined | CustomerUpdated
    return is_link or isinstance(change, kinds)


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
            now=desk.now(),
        )  # fmt: skip
    except Unreadable as error:
        raise Malformed([detail("value_error", ("body", "data"), str(error))]) from error
