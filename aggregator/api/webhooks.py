"""Routes of webhooks: endpoints, the delivery log, thresholds and the sources of incoming webhooks.

Endpoints and deliveries have Polar's paths. Thresholds and sources are Meterstream's own. ``aggregator.webhooks``
sends the webhooks; ``polar.py`` receives those of a source.
"""

import asyncio
import secrets
from base64 import b64encode
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from msgspec.structs import replace

from aggregator.api import route_answers
from aggregator.api.bodies import body_as, shaped
from aggregator.api.requests import (
    IDENTIFIERS_MAX,
    SEARCH_LENGTH_MAX,
    AtDesk,
    Ids,
    Instant,
    WhichPage,
    allow,
    answer,
    body_of,
    includes,
    listed,
    on_page,
    texts,
)
from aggregator.api.schemas import (
    MeterThresholdCreate,
    WebhookEndpointCreate,
    WebhookEndpointUpdate,
    WebhookSourceCreate,
    gives,
    page_of,
    takes,
)
from aggregator.service.errors import Conflict, NotFound, Refused
from aggregator.service.service import Desk, Here
from aggregator.store import webhook_outbox
from aggregator.store.queries.scope import aware, naive
from aggregator.webhooks import targets
from meters import exact
from meters.catalogue.access import reading, writing
from meters.catalogue.catalogue import Token
from meters.exact import DECIMALS, INTEGER_DIGITS_MAX, is_number_text, parse_amount
from meters.log import format_position
from meters.webhooks import (
    EVENT_TYPES,
    PREFIX,
    Endpoint,
    EndpointSet,
    EventType,
    Heard,
    SigningSecret,
    Source,
    SourceSet,
    Threshold,
    ThresholdSet,
)

# Endpoints.
#
# A secret is shown once, when it is created. Other answers have ``MASKED`` in its place, because Polar's clients
# require a text. After a rotation the old secret keeps signing for a day beside the new one, so that a receiver can
# change over without rejecting a message.

router = APIRouter(tags=["webhooks"])
Reader = Annotated[Token, Depends(allow(reading("webhooks")))]
Writer = Annotated[Token, Depends(allow(writing("webhooks")))]

ENDPOINTS_MAX = 20
"""Endpoints of an organization: each is told everything, one request at a time."""

SECRET_BYTES = 32
"""Of a signing secret: as long as the digest it goes into."""

MASKED = f"{PREFIX}..."
"""Stands for a secret, and has nothing of it."""

ROTATION = timedelta(days=1)
"""How long the old secret signs beside the new one: time for a person to change a setting."""


def new_secret() -> str:
    """A secret that nobody has seen, in the standard's form."""
    return PREFIX + b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def endpoint_shape(endpoint: Endpoint, secret: str = MASKED) -> route_answers.WebhookEndpoint:
    """An endpoint without its secrets. Every delivery has the signature of Standard Webhooks, beside Polar's."""
    shown = route_answers.WebhookEndpoint.__struct_fields__
    fields = {name: getattr(endpoint, name) for name in endpoint.__struct_fields__ if name in shown}
    return route_answers.WebhookEndpoint(**fields, enabled=endpoint.disabled_at is None, secret=secret)


def endpoint_of(desk: Desk, token: Token, id: UUID) -> Endpoint:
    """The organization's endpoint. Raises NotFound."""
    endpoint = desk.catalogue.webhooks.endpoints.get(str(id))
    if endpoint is None or endpoint.organization_id != token.organization_id or endpoint.deleted_at:
        raise NotFound
    return endpoint


def _check_url(request: Request, url: str) -> None:
    reason = targets.refusal(url, private_allowed=request.app.state.private_targets)
    if reason is not None:
        raise Refused("value_error", ("body", "url"), reason[:1].upper() + reason[1:] + ".", url)


@router.post(
    "/v1/webhooks/endpoints",
    status_code=201,
    openapi_extra=takes(WebhookEndpointCreate),
    responses=gives(route_answers.WebhookEndpoint, status=201),
)
async def create_webhook_endpoint(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Tell an address what happens. The answer has the ``secret``, which is not shown again."""
    body = await body_as(WebhookEndpointCreate, request)
    _check_url(request, body.url)
    async with desk.deciding:
        if len(desk.catalogue.webhooks.endpoints_of(token.organization_id)) >= ENDPOINTS_MAX:
            message = f"An organization has at most {ENDPOINTS_MAX} endpoints."
            raise Refused("value_error", ("body",), message)
        secret = new_secret()
        endpoint = Endpoint(
            id=desk.new_id(), organization_id=token.organization_id, url=body.url, name=body.name,
            events=_known(body.events), secrets=[SigningSecret(secret)], created_at=desk.now(),
            begins_at=Heard(format_position(desk.view.as_of), desk.view.control_position),
        )  # fmt: skip
        await desk.decide(EndpointSet(endpoint))
    return answer(endpoint_shape(endpoint, secret), desk.view.as_of, 201)


def _known(events: list[EventType]) -> list[str]:
    return [type for type in EVENT_TYPES if type in events]


@router.get("/v1/webhooks/endpoints", responses=gives(page_of(route_answers.WebhookEndpoint)))
async def list_webhook_endpoints(
    desk: AtDesk, token: Reader, page: WhichPage, organization_id: Ids = None
) -> Response:  # fmt: skip
    """The organization's endpoints, oldest first."""
    known = desk.catalogue.webhooks.endpoints_of(token.organization_id)
    found = known if includes(organization_id, token) else []
    shapes = [endpoint_shape(endpoint) for endpoint in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


@router.get("/v1/webhooks/endpoints/{id}", responses=gives(route_answers.WebhookEndpoint))
async def get_webhook_endpoint(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One endpoint."""
    return answer(endpoint_shape(endpoint_of(desk, token, id)), desk.view.as_of)


@router.patch(
    "/v1/webhooks/endpoints/{id}",
    openapi_extra=takes(WebhookEndpointUpdate),
    responses=gives(route_answers.WebhookEndpoint),
)
async def update_webhook_endpoint(request: Request, desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Change what is named in the body; ``enabled`` switches it off and on."""
    body = await body_as(WebhookEndpointUpdate, request)
    if body.url is not msgspec.UNSET:
        _check_url(request, body.url)
    async with desk.deciding:
        endpoint = _updated(endpoint_of(desk, token, id), body, desk.now())
        await desk.decide(EndpointSet(endpoint))
    return answer(endpoint_shape(endpoint), desk.view.as_of)


def _updated(endpoint: Endpoint, body: WebhookEndpointUpdate, now: datetime) -> Endpoint:
    changes: dict[str, Any] = {"modified_at": now}
    if body.url is not msgspec.UNSET:
        changes["url"] = body.url
    if body.events is not msgspec.UNSET:
        changes["events"] = _known(body.events)
    if body.name is not msgspec.UNSET:
        changes["name"] = body.name
    if body.enabled is True:
        changes |= {"disabled_at": None, "disabled_reason": None}
    elif body.enabled is False and endpoint.disabled_at is None:
        changes |= {"disabled_at": now, "disabled_reason": "switched off"}
    return replace(endpoint, **changes)


@router.patch("/v1/webhooks/endpoints/{id}/secret", responses=gives(route_answers.WebhookEndpoint))
async def rotate_webhook_secret(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Make a new ``secret``. The one before goes on signing for a day; older ones end now."""
    secret = new_secret()
    async with desk.deciding:
        endpoint, now = endpoint_of(desk, token, id), desk.now()
        before = SigningSecret(endpoint.secrets[0].value, now + ROTATION)
        endpoint = replace(endpoint, secrets=[SigningSecret(secret), before], modified_at=now)
        await desk.decide(EndpointSet(endpoint))
    return answer(endpoint_shape(endpoint, secret), desk.view.as_of)


@router.delete("/v1/webhooks/endpoints/{id}", status_code=204, responses=gives(status=204))
async def delete_webhook_endpoint(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Tell this address nothing more."""
    async with desk.deciding:
        endpoint = endpoint_of(desk, token, id)
        await desk.decide(EndpointSet(replace(endpoint, deleted_at=desk.now(), secrets=[])))
    return Response(status_code=204)


# The delivery log and redelivery. Entries are kept for 30 days, only in the store.

Types = Annotated[list[EventType] | None, Query(max_length=IDENTIFIERS_MAX)]


async def _sought(
    token: Reader, endpoint_id: Ids = None, start_timestamp: Instant | None = None,
    end_timestamp: Instant | None = None, succeeded: bool | None = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None,
    http_code_class: Literal["2xx", "3xx", "4xx", "5xx"] | None = None, event_type: Types = None,
) -> webhook_outbox.Sought:  # fmt: skip
    """What the parameters ask for. Both timestamps are exclusive."""
    return webhook_outbox.Sought(
        organization_id=token.organization_id, endpoint_ids=texts(endpoint_id), types=event_type,
        after=_stored(start_timestamp), before=_stored(end_timestamp), succeeded=succeeded,
        code_class=int(http_code_class[0]) if http_code_class else None, text=query,
    )  # fmt: skip


def _stored(instant: datetime | None) -> datetime | None:
    return None if instant is None else naive(instant)


@router.get("/v1/webhooks/deliveries", responses=gives(page_of(route_answers.WebhookDelivery)))
async def list_webhook_deliveries(
    desk: AtDesk, token: Reader, page: WhichPage, sought: Annotated[webhook_outbox.Sought, Depends(_sought)]
) -> Response:
    """Every attempt to deliver a webhook, newest first, with what came of it and what was sent."""

    def question(here: Here) -> tuple[list[dict[str, Any]], int]:
        return webhook_outbox.deliveries(here.connection, sought, page.limit, page.offset)

    (rows, total), as_of = await desk.ask(token, question)
    return answer(listed([_shape(row) for row in rows], total, page), as_of)


def _shape(row: dict[str, Any]) -> route_answers.WebhookDelivery:
    """An attempt. What an endpoint answers is not kept, so ``response`` is there only where it did not answer.

    Nothing is ever skipped or archived: no message is made for an endpoint that is disabled, and whatever is listed can
    be sent again.
    """
    status = row["status_code"]
    return route_answers.WebhookDelivery(
        id=row["id"],
        created_at=aware(row["started_at"]),
        modified_at=None,
        succeeded=status is not None and 200 <= status < 300,
        http_code=status,
        response=row["outcome"] if status is None else None,
        outcome=row["outcome"],
        took_ms=row["took_ms"],
        attempt=row["number"],
        endpoint_id=row["endpoint_id"],
        webhook_event=route_answers.WebhookEvent(
            id=row["message_id"],
            created_at=aware(row["made_at"]),
            modified_at=aware(row["settled_at"]) if row["settled_at"] else None,
            type=row["type"],
            customer_id=row["customer_id"],
            status=row["status"],
            payload=row["body"],
        ),
    )


@router.post(
    "/v1/webhooks/events/{id}/redeliver",
    status_code=202,
    responses=gives(route_answers.WebhookRedelivery, status=202),
)
async def redeliver_webhook_event(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Tell it again, word for word under the same ``webhook-id``, to every enabled endpoint that it was for."""
    count = await asyncio.to_thread(_again, desk, token, str(id))
    return answer(route_answers.WebhookRedelivery(str(id), count), desk.view.as_of, 202)


def _again(desk: Desk, token: Token, id: str) -> int:
    endpoints = desk.catalogue.webhooks.endpoints_of(token.organization_id)
    enabled = [endpoint.id for endpoint in endpoints if endpoint.disabled_at is None]
    with desk.view.outbox() as connection:
        count = webhook_outbox.deliver_again(connection, token.organization_id, id, enabled, naive(desk.now()))
        if not count and not webhook_outbox.knows(connection, token.organization_id, id):
            raise NotFound
    if not count:
        raise Conflict("Every endpoint that it was for is deleted or disabled.", is_passing=False)
    return count


# Thresholds and sources.
#
# A threshold is a line in a customer's usage or balance; reaching it sends ``meter.threshold_reached``. A source is
# another system, at present Polar, that signs its webhooks with a secret.

THRESHOLDS_MAX = 200
"""Thresholds of an organization: all of them are looked at whenever one of its customers moved."""

SOURCES_MAX = 5
"""Sources of an organization: a delivery is held against every secret there is."""


def threshold_shape(threshold: Threshold) -> route_answers.MeterThreshold:
    """A threshold."""
    value = msgspec.Raw(exact.encode(threshold.value))
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
