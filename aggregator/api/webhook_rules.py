"""What is watched, and who is listened to: thresholds of meters, and the sources of webhooks that come in.

A threshold is a line in a customer's usage or balance; reaching it is told to the endpoints that want
``meter.threshold_reached``. A source is another system that signs what it sends with a secret, at present Polar.
"""

from uuid import UUID

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec.structs import replace

from aggregator.api import route_answers
from aggregator.api.bodies import body_as, shaped
from aggregator.api.requests import AtDesk, WhichPage, answer, body_of, listed, on_page
from aggregator.api.schemas import MeterThresholdCreate, WebhookSourceCreate, gives, page_of, takes
from aggregator.api.webhook_endpoints import Reader, Writer
from aggregator.service.errors import NotFound, Refused
from aggregator.service.service import Desk
from meters import exact_json
from meters.amount import DECIMALS, INTEGER_DIGITS_MAX, is_number_text, parse_amount
from meters.catalogue import Token
from meters.webhooks import SigningSecret, Source, SourceSet, Threshold, ThresholdSet

router = APIRouter(tags=["webhooks"])

THRESHOLDS_MAX = 200
"""Thresholds of an organization: all of them are looked at whenever one of its customers moved."""

SOURCES_MAX = 5
"""Sources of an organization: a delivery is held against every secret there is."""


def threshold_shape(threshold: Threshold) -> route_answers.MeterThreshold:
    """A threshold."""
    value = msgspec.Raw(exact_json.encode(threshold.value))
    return route_answers.MeterThreshold(**msgspec.structs.asdict(threshold) | {"value": value})


def source_shape(source: Source) -> route_answers.WebhookSource:
    """A source without its secret."""
    shown = route_answers.WebhookSource.__struct_fields__
    return route_answers.WebhookSource(**{name: getattr(source, name) for name in shown})


@router.post(
    "/v1/webhooks/thresholds",
    status_code=201,
    openapi_extra=takes(MeterThresholdCreate),
    responses=gives(route_answers.MeterThreshold, status=201),
)
async def create_threshold(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Watch a line: ``usage`` from below or ``balance`` from above, in units or in percent of the credits."""
    given = await body_of(request)
    body = shaped(MeterThresholdCreate, given)
    meter_id, customer_id = str(body.meter_id), str(body.customer_id) if body.customer_id else None
    async with desk.deciding:
        _check(desk, token, body, given["value"])
        threshold = Threshold(
            id=desk.new_id(), organization_id=token.organization_id, meter_id=meter_id, measure=body.measure,
            unit=body.unit, value=body.value, customer_id=customer_id, created_at=desk.now(),
        )  # fmt: skip
        await desk.decide(ThresholdSet(threshold))
    return answer(threshold_shape(threshold), desk.view.as_of, 201)


def _check(desk: Desk, token: Token, body: MeterThresholdCreate, value: object) -> None:
    if (isinstance(value, str) and not is_number_text(value)) or parse_amount(str(body.value)) != body.value:
        message = f"Input should be a number of at most {INTEGER_DIGITS_MAX} digits and {DECIMALS} decimals"
        raise Refused("value_error", ("body", "value"), message)
    if desk.catalogue.meter(token.organization_id, str(body.meter_id)) is None:
        raise Refused("value_error", ("body", "meter_id"), "Meter does not exist.", str(body.meter_id))
    if body.customer_id is not None and not desk.catalogue.customer(token.organization_id, str(body.customer_id)):
        raise Refused("value_error", ("body", "customer_id"), "Customer does not exist.", str(body.customer_id))
    if len(desk.catalogue.webhooks.thresholds_of(token.organization_id)) >= THRESHOLDS_MAX:
        raise Refused("value_error", ("body",), f"An organization has at most {THRESHOLDS_MAX} thresholds.")


@router.get("/v1/webhooks/thresholds", responses=gives(page_of(route_answers.MeterThreshold)))
async def list_thresholds(desk: AtDesk, token: Reader, page: WhichPage) -> Response:
    """The organization's thresholds, oldest first."""
    found = desk.catalogue.webhooks.thresholds_of(token.organization_id)
    return answer(listed([threshold_shape(one) for one in on_page(found, page)], len(found), page), desk.view.as_of)


@router.delete("/v1/webhooks/thresholds/{id}", status_code=204, responses=gives(status=204))
async def delete_threshold(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Watch this line no longer."""
    async with desk.deciding:
        threshold = desk.catalogue.webhooks.thresholds.get(str(id))
        if threshold is None or threshold.organization_id != token.organization_id or threshold.deleted_at:
            raise NotFound
        await desk.decide(ThresholdSet(replace(threshold, deleted_at=desk.now())))
    return Response(status_code=204)


@router.post(
    "/v1/webhooks/sources",
    status_code=201,
    openapi_extra=takes(WebhookSourceCreate),
    responses=gives(route_answers.WebhookSource, status=201),
)
async def create_source(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Listen to what a Polar organization sends to ``/webhooks/polar``, signed with this ``secret``."""
    body = await body_as(WebhookSourceCreate, request)
    async with desk.deciding:
        webhooks = desk.catalogue.webhooks
        if len(webhooks.sources_of(token.organization_id)) >= SOURCES_MAX:
            raise Refused("value_error", ("body",), f"An organization has at most {SOURCES_MAX} sources.")
        if any(one.secret.value == body.secret and not one.deleted_at for one in list(webhooks.sources.values())):
            raise Refused("value_error", ("body", "secret"), "This secret is in use: it would not say who sent.")
        source = Source(
            id=desk.new_id(), organization_id=token.organization_id, secret=SigningSecret(body.secret),
            name=body.name, created_at=desk.now(),
        )  # fmt: skip
        await desk.decide(SourceSet(source))
    return answer(source_shape(source), desk.view.as_of, 201)


@router.get("/v1/webhooks/sources", responses=gives(page_of(route_answers.WebhookSource)))
async def list_sources(desk: AtDesk, token: Reader, page: WhichPage) -> Response:
    """The systems that are listened to, oldest first."""
    found = desk.catalogue.webhooks.sources_of(token.organization_id)
    return answer(listed([source_shape(one) for one in on_page(found, page)], len(found), page), desk.view.as_of)


@router.delete("/v1/webhooks/sources/{id}", status_code=204, responses=gives(status=204))
async def delete_source(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Listen no longer."""
    async with desk.deciding:
        source = desk.catalogue.webhooks.sources.get(str(id))
        if source is None or source.organization_id != token.organization_id or source.deleted_at:
            raise NotFound
        await desk.decide(SourceSet(replace(source, deleted_at=desk.now(), secret=SigningSecret(""))))
    return Response(status_code=204)
