"""Meters: made, shown and changed (section 3.1 of Polar's contract). In ``query`` wildcards are plain characters."""

from typing import Annotated
from uuid import UUID

import structlog
from fastapi import APIRouter, Depends, Query, Request, Response

from aggregator.api.bodies import known_fields, refuse_organization
from aggregator.api.customers import has_texts
from aggregator.api.limits import SEARCH_LENGTH_MAX
from aggregator.api.requests import (
    BY_METADATA,
    AtDesk,
    Ids,
    MetadataTexts,
    Texts,
    WhichPage,
    allow,
    answer,
    body_of,
    includes,
    listed,
    on_page,
    order,
)
from aggregator.api.schemas import MeterCreate, MeterUpdate, gives, page_of, takes
from aggregator.service import answers
from aggregator.service.errors import PASSING, Malformed, NotFound, Refused
from aggregator.service.polar_accounts import settle_meter
from aggregator.service.serializers import meter_shape
from aggregator.service.service import Desk
from meters.access import reading, writing
from meters.catalogue import MeterCreated, MeterUpdated, Token
from meters.detail import Detail
from meters.meter import Meter, new_meter, updated_meter
from meters.polar_meters import meters_here

logger = structlog.get_logger("aggregator.api.meters")
router = APIRouter(tags=["meters"])
Reader = Annotated[Token, Depends(allow(reading("meters")))]
Writer = Annotated[Token, Depends(allow(writing("meters")))]
METERS = "meters"  # their changes wait for each other: nobody else may wait while what Polar told is counted


def meter_of(desk: Desk, token: Token, id: UUID) -> Meter:
    """The organization's meter. Raises NotFound."""
    meter = desk.catalogue.meter(token.organization_id, str(id))
    if meter is None:
        raise NotFound
    return meter


@router.post(
    "/v1/meters/",
    status_code=201,
    openapi_extra=takes(MeterCreate),
    responses=gives(answers.Meter, status=201),
)
async def create_meter(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Make a meter. It counts every stored event that its filter lets through, from the first one on."""
    body = known_fields(MeterCreate, await body_of(request))
    if isinstance(body, dict):
        refuse_organization(body)
    async with desk.settling(token.organization_id, METERS):
        async with desk.deciding:
            meter = new_meter(body, id=desk.new_id(), organization_id=token.organization_id, created_at=desk.now())
            if isinstance(meter, list):
                raise Malformed(meter)
            await desk.decide(MeterCreated(meter))
        try:
            await settle_meter(desk, meter)
        except PASSING:  # the meter is made; whoever were told otherwise would make another one
            logger.warning("meter_not_settled", meter_id=meter.id, help="PATCH its metadata to credit what Polar told")
    return answer(meter_shape(meter), desk.view.as_of, 201)


@router.get("/v1/meters/", openapi_extra=BY_METADATA, responses=gives(page_of(answers.Meter)))
async def list_meters(
    desk: AtDesk, token: Reader, page: WhichPage, metadata: MetadataTexts, organization_id: Ids = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None, is_archived: bool | None = None,
    sorting: Texts = None,
) -> Response:  # fmt: skip
    """The organization's meters, by name."""
    chosen = order(sorting, ("name", "created_at"), "name")
    found = [
        meter
        for meter in (desk.catalogue.meters_of(token.organization_id) if includes(organization_id, token) else ())
        if (query or "").lower() in meter.name.lower()
        and is_archived in (None, meter.archived_at is not None)
        and has_texts(meter.metadata, metadata)
    ]
    found.sort(key=lambda meter: (getattr(meter, chosen.by), meter.id), reverse=not chosen.ascending)
    shapes = [meter_shape(meter) for meter in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


@router.get("/v1/meters/{id}", responses=gives(answers.Meter))
async def get_meter(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One meter."""
    return answer(meter_shape(meter_of(desk, token, id)), desk.view.as_of)


@router.patch("/v1/meters/{id}", openapi_extra=takes(MeterUpdate), responses=gives(answers.Meter))
async def update_meter(request: Request, desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Change what is named in the body."""
    meter_of(desk, token, id)
    body = known_fields(MeterUpdate, await body_of(request))
    async with desk.settling(token.organization_id, METERS):
        async with desk.deciding:
            meter = meter_of(desk, token, id)
            changed = updated_meter(meter, body, modified_at=desk.now())
            if isinstance(changed, list):
                raise _complaint(changed)
            if changed.archived_at and not meter.archived_at and _is_attached(desk, meter):
                message = "This meter is still attached to a price or a benefit."
                raise Refused("value_error", ("body", "is_archived"), message, True)
            await desk.decide(MeterUpdated(changed))
        if isinstance(body, dict) and body.get("metadata") is not None:
            # also as it was: what follows from it may not have been done
            await settle_meter(desk, changed)
    return answer(meter_shape(changed), desk.view.as_of)


def _is_attached(desk: Desk, meter: Meter) -> bool:
    """Whether anything is sold or given by this meter.

    A subscription is for it while somebody would tell here that it ended.
    """
    catalogue, organization_id = desk.catalogue, meter.organization_id
    named = {benefit.meter_id for benefit in catalogue.benefits.benefits_of(organization_id)}
    if catalogue.webhooks.sources_of(organization_id):
        named |= catalogue.benefits.priced_meters(organization_id)
    return catalogue.prices.of(meter.id) is not None or meter.id in meters_here(catalogue, organization_id, named)


def _complaint(details: list[Detail]) -> Exception:
    """The lock is a rule of business, everything else one of form; form comes first."""
    malformed = [entry for entry in details if entry["type"] != "forbidden"]
    if malformed:
        return Malformed(malformed)
    first = details[0]
    refused = Refused(first["type"], tuple(first["loc"]), first["msg"], first["input"])
    refused.details = details
    return refused
