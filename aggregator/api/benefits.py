"""Routes of benefits and their grants (section 6 of Polar's contract).

Benefits have Polar's paths and shapes. Granting, renewing (``cycle``) and revoking are Meterstream's own routes, for
organizations that do not sell through Polar; they have the effects of Polar's own steps. Every step is idempotent: a
second grant or revocation changes nothing, and a cycle that names its ``at`` happens once, as does every request with
an ``Idempotency-Key`` (``idempotency.py``).

Benefits and grants that came from Polar's webhooks can only be changed at Polar while a Polar source exists.
Otherwise a step made here, and Polar's webhook about the same step, would both count.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from msgspec.structs import replace

from aggregator.api.bodies import body_as, moment
from aggregator.api.credits import Overtaken, used_until, with_usage
from aggregator.api.customers import has_texts, named_customer
from aggregator.api.idempotency import IN_PROGRESS, Key, Once, only_once
from aggregator.api.requests import (
    BY_METADATA,
    SEARCH_LENGTH_MAX,
    AtDesk,
    Ids,
    MetadataTexts,
    Texts,
    WhichPage,
    allow,
    answer,
    includes,
    listed,
    on_page,
    order,
)
from aggregator.api.schemas import (
    BenefitCreate,
    BenefitGrantCreate,
    BenefitGrantStep,
    BenefitUpdate,
    gives,
    page_of,
    takes,
)
from aggregator.service import answers
from aggregator.service.customer_state import grant_properties
from aggregator.service.cuts import Counted
from aggregator.service.errors import Conflict, Malformed, NotFound, Refused
from aggregator.service.serializers import customer_shape
from aggregator.service.service import Desk
from meters.catalogue.access import reading, writing
from meters.catalogue.catalogue import Customer, Token
from meters.ledger.benefits import (
    METER_CREDIT,
    Benefit,
    BenefitSet,
    Grant,
    GrantSet,
    Step,
    cycled,
    grant_id,
    granted,
    is_credited,
    movement_id,
    needs_reset,
    revoked,
)
from meters.ledger.ledger import Account, CreditGranted, MeterReset
from meters.meter import parse_metadata
from meters.polar_webhooks import here

router = APIRouter(tags=["benefits"])
Reader = Annotated[Token, Depends(allow(reading("benefits")))]
Writer = Annotated[Token, Depends(allow(writing("benefits")))]


GRANTS_AT_ONCE = 200
"""Grants that the deletion of a benefit revokes together: their customers' other movements wait meanwhile."""


def benefit_shape(benefit: Benefit) -> answers.Benefit:
    """A benefit in Polar's shape."""
    return answers.Benefit(
        id=benefit.id,
        created_at=benefit.created_at,
        modified_at=benefit.modified_at,
        description=benefit.description,
        is_deleted=benefit.deleted_at is not None,
        organization_id=benefit.organization_id,
        metadata=benefit.metadata,
        properties=answers.BenefitProperties(benefit.meter_id, benefit.units, benefit.rollover),
    )


def grant_shape(grant: Grant, benefit: Benefit, customer: Customer) -> answers.BenefitGrant:
    """A grant in Polar's shape."""
    return answers.BenefitGrant(
        id=grant.id,
        created_at=grant.created_at,
        modified_at=grant.modified_at,
        granted_at=grant.granted_at,
        is_granted=grant.is_held,
        revoked_at=grant.revoked_at,
        is_revoked=grant.revoked_at is not None,
        subscription_id=grant.subscription_id,
        customer_id=grant.customer_id,
        benefit_id=grant.benefit_id,
        customer=customer_shape(customer),
        benefit=benefit_shape(benefit),
        properties=grant_properties(grant),
    )


def benefit_of(desk: Desk, token: Token, id: UUID) -> Benefit:
    """The organization's benefit. Raises NotFound."""
    benefit = desk.catalogue.benefits.benefits.get(str(id))
    if benefit is None or benefit.organization_id != token.organization_id or benefit.deleted_at:
        raise NotFound
    return here(desk.catalogue, benefit)


def _grant_of(desk: Desk, token: Token, id: UUID) -> tuple[Grant, Benefit, Customer]:
    grant = desk.catalogue.benefits.grants.get(str(id))
    customer = desk.catalogue.customer(token.organization_id, grant.customer_id) if grant else None
    if grant is None or grant.organization_id != token.organization_id or customer is None:
        raise NotFound
    benefit = desk.catalogue.benefits.benefits[grant.benefit_id]
    return here(desk.catalogue, grant), here(desk.catalogue, benefit), customer


def _must_be_ours(desk: Desk, token: Token, thing: str, id: str) -> None:
    """Of Polar's grants and benefits every step is made there, while a source tells of it here. Raises Refused."""
    is_told = bool(desk.catalogue.webhooks.sources_of(token.organization_id))
    if is_told and desk.catalogue.mirror.is_mirrored(token.organization_id, f"{thing}:{id}"):
        raise Refused("value_error", ("path", "id"), f"This {thing} is Polar's: change it there.", id)


def _checked(desk: Desk, token: Token, body: BenefitCreate | BenefitUpdate) -> None:
    if body.metadata is not None and isinstance(found := parse_metadata(body.metadata, ("body", "metadata")), list):
        raise Malformed(found)
    if body.properties is not None:
        meter_id = str(body.properties.meter_id)
        if desk.catalogue.meter(token.organization_id, meter_id) is None:
            raise Refused("value_error", ("body", "properties", "meter_id"), "Meter does not exist.", meter_id)


@router.post(
    "/v1/benefits/",
    status_code=201,
    openapi_extra=takes(BenefitCreate),
    responses=gives(answers.Benefit, status=201),
)
async def create_benefit(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Make a ``meter_credit`` benefit: units of a meter for every customer it is granted to."""
    body = await body_as(BenefitCreate, request)
    async with desk.deciding:
        _checked(desk, token, body)
        benefit = Benefit(
            id=desk.new_id(), organization_id=token.organization_id, description=body.description,
            meter_id=str(body.properties.meter_id), units=body.properties.units, rollover=body.properties.rollover,
            metadata=body.metadata, created_at=desk.decided_at(),
        )  # fmt: skip
        await desk.decide(BenefitSet(benefit))
    return answer(benefit_shape(benefit), desk.view.as_of, 201)


@router.get("/v1/benefits/", openapi_extra=BY_METADATA, responses=gives(page_of(answers.Benefit)))
async def list_benefits(
    desk: AtDesk, token: Reader, page: WhichPage, metadata: MetadataTexts, organization_id: Ids = None, id: Ids = None,
    exclude_id: Ids = None, type: Texts = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None, sorting: Texts = None,
) -> Response:  # fmt: skip
    """The organization's benefits, newest first."""
    chosen = order(sorting, ("created_at", "description", "type", "user_order"), "-created_at")
    found = [
        benefit
        for benefit in desk.catalogue.benefits.benefits_of(token.organization_id)
        if includes(organization_id, token)
        and _is_among(benefit.id, id)
        and not (exclude_id and _is_among(benefit.id, exclude_id))
        and (query or "").lower() in benefit.description.lower()
        and (type is None or METER_CREDIT in type)
        and has_texts(benefit.metadata, metadata)
    ]
    places = {str(one): place for place, one in enumerate(id or ())}
    # all are of one type, and the only order of the user's is that of the ids that are asked for
    found.sort(key=lambda one: (getattr(one, chosen.by, places.get(one.id, 0)), one.id), reverse=not chosen.ascending)
    shapes = [benefit_shape(here(desk.catalogue, benefit)) for benefit in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


def _named_by(desk: Desk, token: Token, ids: Ids, external_ids: Texts = None) -> set[str] | None:
    """Return the ids of the customers that one of these ids or external ids names; None for all customers."""
    if ids is None and external_ids is None:
        return None
    organization_id, catalogue = token.organization_id, desk.catalogue
    named = [catalogue.customer_by_external_id(organization_id, name) for name in external_ids or ()]
    found = {customer.id for customer in named if customer is not None}
    return found | {catalogue.customer_named(organization_id, str(id)) for id in ids or ()}


def _is_among(id: str, wanted: Ids) -> bool:
    return wanted is None or id in map(str, wanted)


@router.get("/v1/benefits/{id}", responses=gives(answers.Benefit))
async def get_benefit(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One benefit."""
    return answer(benefit_shape(benefit_of(desk, token, id)), desk.view.as_of)


@router.patch("/v1/benefits/{id}", openapi_extra=takes(BenefitUpdate), responses=gives(answers.Benefit))
async def update_benefit(request: Request, desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Change what is named in the body. What was given before stays as it is. A benefit of Polar's is changed there."""
    body = await body_as(BenefitUpdate, request)
    async with desk.deciding:
        benefit = benefit_of(desk, token, id)
        _must_be_ours(desk, token, "benefit", benefit.id)
        _checked(desk, token, body)
        changes: dict[str, Any] = {"modified_at": desk.decided_at()}
        changes |= {} if body.description is None else {"description": body.description}
        changes |= {} if body.metadata is None else {"metadata": body.metadata}
        if body.properties is not None:
            changes |= msgspec.structs.asdict(body.properties) | {"meter_id": str(body.properties.meter_id)}
        benefit = replace(benefit, **changes)
        await desk.decide(BenefitSet(benefit))
    return answer(benefit_shape(benefit), desk.view.as_of)


@router.delete("/v1/benefits/{id}", status_code=204, responses=gives(status=204) | IN_PROGRESS)
async def delete_benefit(request: Request, desk: AtDesk, token: Writer, id: UUID, key: Key = None) -> Response:
    """Give it to nobody any more, and take back what those who have it were credited last.

    A benefit of Polar's is deleted there. The benefit itself goes last: where this ends half way, a retry goes on.
    """
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        while (deleted := await _deleted(desk, token, id, once)) is None:
            pass
        return deleted


async def _deleted(desk: Desk, token: Token, id: UUID, once: Once) -> Response | None:
    """Revoke some of the benefit's grants; where there are none, delete it and return the answer."""
    some = desk.catalogue.benefits.grants_by(benefit_of(desk, token, id).id)[:GRANTS_AT_ONCE]
    async with desk.turn(token.organization_id, *(grant.customer_id for grant in some)), desk.deciding:
        benefit, now = benefit_of(desk, token, id), desk.decided_at()
        _must_be_ours(desk, token, "benefit", benefit.id)
        held = desk.catalogue.benefits.grants_by(benefit.id)
        turned = {grant.customer_id for grant in some}
        grants = [here(desk.catalogue, grant) for grant in held if grant.customer_id in turned]
        await desk.decide_each(_all(revoked(grant, benefit, now, _credited(desk, grant))) for grant in grants)
        return None if held else await once.decide(None, 204, BenefitSet(replace(benefit, deleted_at=now)))


def _credited(desk: Desk, grant: Grant) -> Account | None:
    """Where a grant's last credit went."""
    return desk.view.ledger.account(grant.customer_id, grant.last_credited_meter_id or "")


def _all(step: Step) -> list[CreditGranted | MeterReset | GrantSet]:
    return [*step.movements, GrantSet(step.grant)]


@router.get("/v1/benefits/{id}/grants", responses=gives(page_of(answers.BenefitGrant)))
async def list_grants(
    desk: AtDesk, token: Reader, page: WhichPage, id: UUID, is_granted: bool | None = None,
    customer_id: Ids = None, member_id: Ids = None,
) -> Response:  # fmt: skip
    """Who has or had the benefit, oldest first. Customers have it, so of members nobody does."""
    benefit = benefit_of(desk, token, id)
    wanted = _named_by(desk, token, customer_id)
    found = [
        (grant, customer)
        for grant in desk.catalogue.benefits.grants_by(benefit.id, held=False)
        if is_granted in (None, grant.is_held)
        and (wanted is None or grant.customer_id in wanted)
        and member_id is None
        and (customer := desk.catalogue.customer(token.organization_id, grant.customer_id))
    ]
    shapes = [grant_shape(here(desk.catalogue, grant), benefit, customer) for grant, customer in on_page(found, page)]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


@router.post(
    "/v1/benefits/{id}/grants",
    status_code=201,
    openapi_extra=takes(BenefitGrantCreate),
    responses=gives(answers.BenefitGrant, status=201) | IN_PROGRESS,
)
async def create_grant(request: Request, desk: AtDesk, token: Writer, id: UUID, key: Key = None) -> Response:
    """Grant the benefit to a customer and credit its units. A customer who has it keeps it as it is.

    A benefit of Polar's is granted there.
    """
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        body = await body_as(BenefitGrantCreate, request)
        while (made := await _granted(desk, token, id, body, once)) is None:
            pass
        return made


async def _granted(desk: Desk, token: Token, id: UUID, body: BenefitGrantCreate, once: Once) -> Response | None:
    """The answer to the grant that is made, or was; None where another customer has come to have the name."""
    benefit_of(desk, token, id)
    turned = named_customer(desk, token, body)
    async with desk.turn(token.organization_id, turned.id), desk.deciding:
        benefit, now = benefit_of(desk, token, id), desk.decided_at()
        _must_be_ours(desk, token, "benefit", benefit.id)
        customer = named_customer(desk, token, body)
        if customer.id != turned.id:
            return None
        grants = desk.catalogue.benefits.grants_of(customer.id)
        known = next((here(desk.catalogue, one) for one in grants if one.benefit_id == benefit.id), None)
        grant = known or Grant(
            id=grant_id(benefit.id, customer.id), organization_id=token.organization_id, benefit_id=benefit.id,
            customer_id=customer.id, created_at=now, granted_at=now,
        )  # fmt: skip
        if known is not None and known.is_held:
            return await once.decide(grant_shape(grant, benefit, customer), 201)
        step = granted(grant, benefit, now, desk.view.ledger.account(customer.id, benefit.meter_id))
        return await once.decide(grant_shape(step.grant, benefit, customer), 201, *_all(step))


@router.get("/v1/benefit-grants/", responses=gives(page_of(answers.BenefitGrant)))
async def list_all_grants(
    desk: AtDesk, token: Reader, page: WhichPage, organization_id: Ids = None, customer_id: Ids = None,
    external_customer_id: Texts = None, is_granted: bool | None = None, sorting: Texts = None,
) -> Response:  # fmt: skip
    """The grants of all benefits, newest first."""
    chosen = order(sorting, ("created_at", "granted_at", "revoked_at"), "-created_at")
    catalogue = desk.catalogue
    wanted = _named_by(desk, token, customer_id, external_customer_id)
    found = [
        (grant, benefit, customer)
        for benefit in catalogue.benefits.benefits_of(token.organization_id)
        if includes(organization_id, token) and benefit.deleted_at is None
        for grant in catalogue.benefits.grants_by(benefit.id, held=False)
        if is_granted in (None, grant.is_held)
        and (wanted is None or grant.customer_id in wanted)
        and (customer := catalogue.customer(token.organization_id, grant.customer_id))
    ]
    found.sort(key=lambda one: in_time(one[0], chosen.by), reverse=not chosen.ascending)
    shapes = [
        grant_shape(here(catalogue, grant), here(catalogue, benefit), customer)
        for grant, benefit, customer in on_page(found, page)
    ]
    return answer(listed(shapes, len(found), page), desk.view.as_of)


def in_time(grant: Grant, field: str) -> tuple[bool, datetime, str]:
    """Return the sort key of a grant by one of its times. A grant without it counts as the latest, as in PostgreSQL."""
    at: datetime | None = getattr(grant, field)
    return at is None, at or grant.created_at, grant.id


@router.get("/v1/benefit-grants/{id}", responses=gives(answers.BenefitGrant))
async def get_grant(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One grant."""
    return answer(grant_shape(*_grant_of(desk, token, id)), desk.view.as_of)


@router.post(
    "/v1/benefit-grants/{id}/cycle",
    openapi_extra=takes(BenefitGrantStep),
    responses=gives(answers.BenefitGrant) | IN_PROGRESS,
)
async def cycle_grant(request: Request, desk: AtDesk, token: Writer, id: UUID, key: Key = None) -> Response:
    """Begin a cycle: reset the meter, carry over what rolls over, credit again.

    Say ``at``, when it began, or send an ``Idempotency-Key``, so that a retry is harmless. A cycle that would credit
    nothing, because one that began later was credited before, is refused. A grant of Polar's is renewed there.
    """
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        body = await body_as(BenefitGrantStep, request, otherwise={})
        async with desk.turn_of(lambda: _grant_of(desk, token, id)[2]):
            while (made := await _cycled(desk, token, id, body, once)) is None:
                pass
        return made


async def _cycled(desk: Desk, token: Token, id: UUID, body: BenefitGrantStep, once: Once) -> Response | None:
    """The answer, the grant after its cycle; None where the cycle has to be worked out again."""
    grant, benefit, customer = _to_cycle(desk, token, id)
    at = moment(body.at, desk.decided_at(), too_late="A cycle that has not begun cannot be credited.")
    meter = desk.catalogue.meter(grant.organization_id, benefit.meter_id)
    begins = meter and _is_due(grant, at) and needs_reset(grant, desk.view.ledger.account(customer.id, meter.id))
    used = await used_until(desk, customer, [meter] if meter and begins else [], _begun(grant, customer, at))
    async with desk.deciding:
        grant, benefit, customer = _to_cycle(desk, token, id)
        if _is_due(grant, at):
            try:
                step, others = _cycle(desk, grant, benefit, customer, at, used)
            except Overtaken:
                return None
            return await once.decide(grant_shape(step.grant, benefit, customer), 200, *_all(step), also=others)
        if not _was_cycled(desk, grant, benefit, at):
            message = f"Nothing was credited: the grant's credit of {grant.last_credited_at} is not before this cycle."
            raise Conflict(message, is_passing=False)
        return await once.decide(grant_shape(grant, benefit, customer), 200)


def _was_cycled(desk: Desk, grant: Grant, benefit: Benefit, at: datetime) -> bool:
    meter_ids = {benefit.meter_id, grant.last_credited_meter_id or ""}
    return any(is_credited(grant, at, desk.view.ledger.account(grant.customer_id, id)) for id in meter_ids)


def _begun(grant: Grant, customer: Customer, at: datetime) -> MeterReset:
    """The reset that a cycle begins with, without its meter."""
    return MeterReset(
        id=movement_id(grant.id, at, "reset"), organization_id=grant.organization_id, customer_id=customer.id,
        meter_ids=[], at=at, reference=grant.id,
    )  # fmt: skip


def _to_cycle(desk: Desk, token: Token, id: UUID) -> tuple[Grant, Benefit, Customer]:
    """A grant that can be renewed here. Raises NotFound, Refused."""
    grant, benefit, customer = _grant_of(desk, token, id)
    _must_be_ours(desk, token, "grant", grant.id)
    if grant.revoked_at is not None:
        raise Refused("value_error", ("path", "id"), "This grant is revoked.", str(id))
    return grant, benefit, customer


def _is_due(grant: Grant, at: datetime) -> bool:
    return grant.last_credited_at is None or at > grant.last_credited_at


def _cycle(
    desk: Desk, grant: Grant, benefit: Benefit, customer: Customer, at: datetime, used: Mapping[str, Counted]
) -> tuple[Step, list[MeterReset]]:  # fmt: skip
    """The step, and usage that later resets carry over by."""
    begun, others = None, list[MeterReset]()
    meter = desk.catalogue.meter(grant.organization_id, benefit.meter_id)
    if meter is None:
        raise Refused("value_error", ("path", "id"), "The meter of this benefit is not known here.", benefit.meter_id)
    account = desk.view.ledger.account(customer.id, benefit.meter_id)
    if needs_reset(grant, account):
        alone = replace(_begun(grant, customer, at), meter_ids=[meter.id])
        begun, others = with_usage(desk, customer, meter, alone, used)
    return cycled(grant, benefit, at, begun, account), others


@router.post("/v1/benefit-grants/{id}/revoke", responses=gives(answers.BenefitGrant) | IN_PROGRESS)
async def revoke_grant(request: Request, desk: AtDesk, token: Writer, id: UUID, key: Key = None) -> Response:
    """Take the benefit back, with the units that it credited last. A grant of Polar's is revoked there."""
    async with only_once(request, desk, token, key) as once:
        if once.answered is not None:
            return once.answered
        async with desk.turn_of(lambda: _grant_of(desk, token, id)[2]), desk.deciding:
            grant, benefit, customer = _grant_of(desk, token, id)
            _must_be_ours(desk, token, "grant", grant.id)
            if grant.revoked_at is not None:
                return await once.decide(grant_shape(grant, benefit, customer), 200)
            step = revoked(grant, benefit, desk.decided_at(), _credited(desk, grant))
            return await once.decide(grant_shape(step.grant, benefit, customer), 200, *_all(step))
