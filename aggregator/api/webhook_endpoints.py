"""Webhooks out: who is told, what was told, and telling it again. Paths are Polar's.

A secret is shown when it is made and never again; other answers have ``MASKED`` in its place, because Polar's clients
insist on a text. Rotating leaves the old one signing for a day beside the new one, so
that a receiver can change over without missing anything.
"""

import secrets
from base64 import b64encode
from datetime import datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from msgspec.structs import replace

from aggregator.api import route_answers
from aggregator.api.bodies import body_as
from aggregator.api.requests import AtDesk, Ids, WhichPage, allow, answer, includes, listed, on_page
from aggregator.api.schemas import WebhookEndpointCreate, WebhookEndpointUpdate, gives, page_of, takes
from aggregator.service.errors import NotFound, Refused
from aggregator.service.service import Desk
from aggregator.webhooks import targets
from meters.access import reading, writing
from meters.catalogue import Token
from meters.log import format_position
from meters.signatures import PREFIX
from meters.webhooks import EVENT_TYPES, Endpoint, EndpointSet, EventType, Heard, SigningSecret

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
