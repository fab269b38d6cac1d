"""Routes of the customer portal: what one customer may see with a session token of its own.

Polar's routes are ``customer-portal/meters``, ``benefit-grants``, ``customers/me`` and
``customer-session/introspect``. ``usage`` is Meterstream's own: usage, limit, period, percentage and credit history in
one answer. Its usage is that of the balance: what arrived since the newest reset. ``usage/history`` is what happened
when, as ``GET /v1/usage`` counts it. A customer sees a meter if an active subscription, an active grant or a direct
credit gives it to them, if they used it and it has a price, and if they have units left because their usage is
negative (prepaid).
"""

import re
from collections.abc import Iterator
from datetime import datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from aggregator.api import route_answers
from aggregator.api.requests import (
    SEARCH_LENGTH_MAX,
    AtDesk,
    Forbidden,
    Ids,
    Texts,
    WhichPage,
    answer,
    caught_up,
    desk,
    known_only,
    listed,
    on_page,
    order,
)
from aggregator.api.schemas import gives, page_of
from aggregator.api.usage import METERS_MAX, Question, shown_meter, used
from aggregator.service import answers
from aggregator.service.balances import CustomerMeter, customer_meter, from_memory, numbers_of
from aggregator.service.charges import Charge, charges_of
from aggregator.service.customer_meter_sort import sort_key
from aggregator.service.customer_state import grant_properties, meter_numbers
from aggregator.service.errors import NotFound, Refused
from aggregator.service.serializers import number, portal_customer_shape
from aggregator.service.service import Desk
from aggregator.store.queries.scope import NOBODY, Scope
from meters.catalogue.access import Denied, authorize_customer
from meters.catalogue.catalogue import Customer, CustomerSession
from meters.ledger.benefits import METER_CREDIT, Grant
from meters.ledger.ledger import Account
from meters.meter import Meter
from meters.polar_webhooks import here as local_ids
from meters.polar_webhooks import meters_here
from meters.tariff import tariff_of

router = APIRouter(prefix="/v1/customer-portal", tags=["customer portal"])

SORTINGS = (
    "created_at", "modified_at", "meter_id", "meter_name", "consumed_units", "credited_units", "balance",
)  # fmt: skip
CREDITS_SHOWN_MAX = 100
"""Entries of the history of credits: eight years of months."""

_PERCENT = Context(prec=60, rounding=ROUND_HALF_UP)  # the widest amount, a hundred times, with two decimals
_HUNDREDTH = Decimal("0.01")


async def customer_session(request: Request) -> CustomerSession:
    """Who looks: the session in the ``Authorization`` header. Raises Forbidden."""
    here = await desk(request)
    outcome = authorize_customer(request.headers.get("authorization"), here.catalogue, here.now())
    if isinstance(outcome, Denied):
        raise Forbidden(outcome)
    await known_only(request)
    await caught_up(request, outcome.organization_id)
    return outcome


Viewer = Annotated[CustomerSession, Depends(customer_session)]


def _customer(here: Desk, session: CustomerSession) -> Customer:
    customer = here.catalogue.customer(session.organization_id, session.customer_id)
    if customer is None:
        raise NotFound
    return customer


def _visible(here: Desk, customer: Customer) -> Iterator[Meter]:
    """The meters that are this customer's to see."""
    paid = meters_here(here.catalogue, customer.organization_id, here.catalogue.benefits.paid_meters(customer.id))
    for meter in here.catalogue.meters_of(customer.organization_id):
        account = here.view.ledger.account(customer.id, meter.id)
        is_given = meter.id in paid or _is_credited(account)
        if meter.archived_at is None and (is_given or _is_charged(here, customer, meter)):
            yield meter


def _is_charged(here: Desk, customer: Customer, meter: Meter) -> bool:
    """Return True if the customer's usage has a price or is prepaid, also while the usage is still being counted."""
    used = from_memory(here, customer, meter)
    if tariff_of(here.catalogue, customer, meter) is not None:
        return used is None or used.count > 0
    return used is not None and used.value < 0


def _is_credited(account: Account | None) -> bool:
    return account is not None and any(credit.cause == "credit" for credit in account.credits)


def _shape(one: CustomerMeter) -> route_answers.PortalMeter:
    meter = one.meter
    return route_answers.PortalMeter(
        *meter_numbers(one),
        customer_id=one.customer.id,
        balance=number(one.balance),
        meter=route_answers.PortalMeterName(meter.id, meter.created_at, meter.modified_at, meter.name),
    )


@router.get("/meters/", responses=gives(page_of(route_answers.PortalMeter)))
async def list_portal_meters(
    here: AtDesk, session: Viewer, page: WhichPage, meter_id: Ids = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None, sorting: Texts = None,
) -> Response:  # fmt: skip
    """The customer's meters; ``query`` looks for a part of the name."""
    chosen = order(sorting, SORTINGS, "-modified_at")
    customer = _customer(here, session)
    wanted = None if meter_id is None else set(map(str, meter_id))
    found = [
        await customer_meter(here, customer, meter)
        for meter in _visible(here, customer)
        if (query or "").lower() in meter.name.lower() and (wanted is None or meter.id in wanted)
    ]
    found.sort(key=lambda one: (sort_key(one, chosen.by), one.id), reverse=not chosen.ascending)
    return answer(listed([_shape(one) for one in on_page(found, page)], len(found), page), here.view.as_of)


@router.get("/meters/{id}", responses=gives(route_answers.PortalMeter))
async def get_portal_meter(here: AtDesk, session: Viewer, id: UUID) -> Response:
    """One of the customer's meters."""
    customer = _customer(here, session)
    for meter in _visible(here, customer):
        one = await customer_meter(here, customer, meter)
        if one.id == str(id):
            return answer(_shape(one), here.view.as_of)
    raise NotFound


def _grant_shape(here: Desk, customer: Customer, grant: Grant) -> route_answers.PortalBenefitGrant:
    benefit = local_ids(here.catalogue, here.catalogue.benefits.benefits[grant.benefit_id])
    owner = here.catalogue.organizations[customer.organization_id]
    return route_answers.PortalBenefitGrant(
        id=grant.id, created_at=grant.created_at, modified_at=grant.modified_at, granted_at=grant.granted_at,
        revoked_at=grant.revoked_at, customer_id=customer.id, benefit_id=benefit.id,
        subscription_id=grant.subscription_id, is_granted=grant.is_held, is_revoked=grant.revoked_at is not None,
        customer=portal_customer_shape(customer),
        benefit=route_answers.PortalBenefit(
            id=benefit.id, created_at=benefit.created_at, modified_at=benefit.modified_at,
            description=benefit.description, is_deleted=benefit.deleted_at is not None, organization_id=owner.id,
            organization=route_answers.PortalOrganization(
                id=owner.id, created_at=owner.created_at, modified_at=None, name=owner.name, slug=slug(owner.name),
            ),
            properties=answers.BenefitProperties(benefit.meter_id, benefit.units, benefit.rollover),
        ),
        properties=grant_properties(grant),
    )  # fmt: skip


def slug(name: str) -> str:
    """Return a name as it would stand in an address: small letters, digits and hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


@router.get("/benefit-grants/", responses=gives(page_of(route_answers.PortalBenefitGrant)))
async def list_portal_grants(
    here: AtDesk, session: Viewer, page: WhichPage,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None, type: Texts = None,
    benefit_id: Ids = None, checkout_id: Ids = None, order_id: Ids = None, subscription_id: Ids = None,
    member_id: Ids = None, sorting: Texts = None,
) -> Response:  # fmt: skip
    """List the customer's grants. There are no checkouts, orders or members here, so their filters find nothing."""
    chosen = order(sorting, ("product_benefit", "granted_at", "type", "organization"), "product_benefit")
    customer, benefits = _customer(here, session), here.catalogue.benefits
    found = [
        local_ids(here.catalogue, grant)
        for grant in benefits.grants_of(customer.id)
        if (query or "").lower() in benefits.benefits[grant.benefit_id].description.lower()
        and (type is None or METER_CREDIT in type)
        and (benefit_id is None or grant.benefit_id in map(str, benefit_id))
        and (subscription_id is None or grant.subscription_id in {str(id) for id in subscription_id})
        and checkout_id is order_id is member_id is None
    ]
    # one type and one organization: the time of the grant is the only order there is
    found.sort(key=lambda grant: (grant.granted_at, grant.id), reverse=not chosen.ascending)
    shapes = [_grant_shape(here, customer, grant) for grant in on_page(found, page)]
    return answer(listed(shapes, len(found), page), here.view.as_of)


@router.get("/benefit-grants/{id}", responses=gives(route_answers.PortalBenefitGrant))
async def get_portal_grant(here: AtDesk, session: Viewer, id: UUID) -> Response:
    """One of the customer's grants."""
    customer = _customer(here, session)
    for grant in here.catalogue.benefits.grants_of(customer.id):
        if grant.id == str(id):
            return answer(_grant_shape(here, customer, local_ids(here.catalogue, grant)), here.view.as_of)
    raise NotFound


@router.get("/customer-session/introspect", responses=gives(route_answers.PortalSession))
async def introspect_customer_session(here: AtDesk, session: Viewer) -> Response:
    """Until when this token is good."""
    return answer(route_answers.PortalSession(session.expires_at, session.return_url), here.view.as_of)


@router.get("/customers/me", responses=gives(answers.PortalCustomer))
async def get_portal_customer(here: AtDesk, session: Viewer) -> Response:
    """The customer: what is theirs, and nothing that the organization keeps about them."""
    return answer(portal_customer_shape(_customer(here, session)), here.view.as_of)


@router.get("/usage", responses=gives(route_answers.PortalUsage))
async def get_portal_usage(here: AtDesk, session: Viewer) -> Response:
    """What a portal shows: for each meter usage, limit, period, percentage and the history of credits."""
    as_of = here.view.as_of
    customer = _customer(here, session)
    found = [await customer_meter(here, customer, meter) for meter in _visible(here, customer)]
    charges = await charges_of(here, found)
    shown = [_display(here, one, charges.get(one.id)) for one in found]
    return answer(route_answers.PortalUsage(customer.id, shown), as_of)


@router.get("/usage/history", responses=gives(route_answers.UsageAnswer))
async def get_portal_history(here: AtDesk, session: Viewer, question: Question, meter_id: Ids = None) -> Response:
    """Return the customer's usage over time, as `GET /v1/usage` counts it: of all meters, or of those in `meter_id`."""
    customer = _customer(here, session)
    wanted = None if meter_id is None else set(map(str, meter_id))
    meters = [meter for meter in _visible(here, customer) if wanted is None or meter.id in wanted]
    if len(meters) > METERS_MAX:
        raise Refused("value_error", ("query", "meter_id"), f"Name the meters, {METERS_MAX} at most at a time")
    scope = Scope(organization=NOBODY, subjects=partial(numbers_of, here, customer))
    return await used(here, session.organization_id, meters, question, scope)


def _display(here: Desk, one: CustomerMeter, charge: Charge | None) -> route_answers.PortalUsageItem:
    starts, ends = _period(here, one)
    price = charge.tariff.price if charge else None
    limit = one.credited if one.credited > 0 else None
    credits = sorted(one.account.credits, key=lambda credit: credit.sort_key, reverse=True) if one.account else []
    meter = one.meter
    return route_answers.PortalUsageItem(
        meter=shown_meter(meter),
        usage=number(one.consumed),
        limit=None if limit is None else number(limit),
        balance=number(one.balance),
        percentage=None if limit is None else number(percentage(one.consumed, limit)),
        period=route_answers.PortalPeriod(starts, ends),
        amount=charge.amount if charge else None,
        currency=price.currency if price else None,
        credits=[
            route_answers.PortalCredit(credit.at, number(credit.units), credit.cause, credit.rollover)
            for credit in credits[:CREDITS_SHOWN_MAX]
        ],
    )


def percentage(consumed: Decimal, limit: Decimal) -> Decimal:
    """The part of the limit that is used, in percent with two decimals; over 100 where more was used."""
    return _PERCENT.divide(_PERCENT.multiply(100, consumed), limit).quantize(_HUNDREDTH, context=_PERCENT)


def _period(here: Desk, one: CustomerMeter) -> tuple[datetime | None, datetime | None]:
    """Since when usage counts, and until when where a subscription says so."""
    for subscription in here.catalogue.benefits.subscriptions_of(one.customer.id):
        priced = meters_here(here.catalogue, one.customer.organization_id, subscription.meter_ids)
        if subscription.is_active and one.meter.id in priced:
            starts = subscription.current_meter_period_start or subscription.current_period_start
            return one.since or starts, subscription.current_meter_period_end or subscription.current_period_end
    return one.since, None
