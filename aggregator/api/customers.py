"""Routes of customers, their state and their portal sessions.

Customers are created, listed, exported, changed and deleted, by Meterstream's id or by the organization's external id.
``named_customer`` finds the customer that a body names; the benefit routes use it, too.
"""

import asyncio
import csv
import io
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from decimal import Decimal
from heapq import merge
from itertools import islice
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse

from aggregator.api import route_answers
from aggregator.api.bodies import body_as, fields_of, mapping_of, refuse_organization
from aggregator.api.requests import (
    BY_EXTERNAL_ID,
    BY_METADATA,
    SEARCH_LENGTH_MAX,
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
    order,
)
from aggregator.api.schemas import CustomerCreate, CustomerSessionCreate, CustomerUpdate, gives, page_of, takes
from aggregator.service import answers
from aggregator.service.customer_state import state_of
from aggregator.service.errors import Malformed, NotFound, Refused
from aggregator.service.serializers import customer_shape
from aggregator.service.service import Desk, Order, Page, Patience
from meters import exact
from meters.catalogue.access import digest, reading, writing
from meters.catalogue.catalogue import (
    INDIVIDUAL,
    SESSION_LIFE,
    SESSION_PREFIX,
    TEAM,
    Catalogue,
    Customer,
    CustomerCreated,
    CustomerDeleted,
    CustomerSession,
    CustomerSessionCreated,
    CustomerUpdated,
    Token,
)
from meters.errors import detail
from meters.exact import decimal_text
from meters.log import format_position
from meters.timestamps import utc_text

# Customers: only the fields that usage metering needs.

router = APIRouter(tags=["customers"])
Reader = Annotated[Token, Depends(allow(reading("customers")))]
Writer = Annotated[Token, Depends(allow(writing("customers")))]
_GONE = gives(status=204)
CUSTOMERS_AT_ONCE = 2_000
"""Customers that are looked through and sorted while everybody waits, in about 10 ms; more get a thread."""

EXPORTED = ("ID", "External ID", "Created At", "Email", "Name", "Metadata")
_CSV = gives() | {200: {"description": "The file", "content": {"text/csv": {"schema": {"type": "string"}}}}}

CLEARED_BY_NULL = ("external_id", "name")
"""What null takes away in a change, as with Polar; an external id that was given cannot be taken, and is refused."""


def customers_mentioned(customers: Iterable[Customer], search: str) -> list[Customer]:
    """Those whose name, email or external id holds the text, whatever its case."""
    wanted = search.lower()
    return [
        found
        for found in customers
        if any(wanted in (text or "").lower() for text in (found.name, found.email, found.external_id))
    ]


def _subscribes(catalogue: Catalogue, customer: Customer) -> bool:
    """Whether a subscription of the customer's goes on, be it one whose payment is late (Polar's rule)."""
    held = catalogue.benefits.subscriptions_of(customer.id)
    return any(one.is_active or one.status == "past_due" for one in held)


@router.post(
    "/v1/customers/",
    status_code=201,
    openapi_extra=takes(CustomerCreate),
    responses=gives(answers.Customer, status=201),
)
async def create_customer(request: Request, desk: AtDesk, token: Writer) -> Response:
    """Make a customer: ``email``, and if wanted ``external_id``, ``name`` and ``metadata``.

    With the ``type`` ``team`` there may be no ``email``.
    """
    fields = _fields(CustomerCreate, await body_of(request))
    async with desk.deciding:
        _refuse_taken(desk.catalogue, token.organization_id, fields)
        customer = Customer(
            id=desk.new_id(), organization_id=token.organization_id, created_at=desk.decided_at(), **fields
        )  # fmt: skip
        await desk.decide(CustomerCreated(customer))
    return answer(customer_shape(customer), desk.view.as_of, 201)


def _fields(kind: type[CustomerUpdate], body: object) -> dict[str, Any]:
    """The fields that the body gives; null is as good as nothing, but for a field that it clears."""
    given = mapping_of(body)
    refuse_organization(given)
    needs_email = kind is CustomerCreate and given.get("email") is None and given.get("type") != TEAM
    missing = [detail("missing", ("body", "email"), "Field required", given)] if needs_email else []
    fields = fields_of(kind, given, missing)
    return {name: value for name, value in fields.items() if value is not None or name in CLEARED_BY_NULL}


def _refuse_taken(
    catalogue: Catalogue, organization_id: str, fields: dict[str, Any], but: Customer | None = None
) -> None:
    """Nobody is given another's external id or address. ``but`` is the one who keeps what it has."""
    external_id = fields.get("external_id")
    owner = catalogue.customer_by_external_id(organization_id, external_id) if external_id is not None else None
    if owner is not None and owner != but:
        message = "A customer with this external ID already exists."
        raise Refused("value_error", ("body", "external_id"), message, external_id)
    email = fields.get("email")
    present = but.email.lower() if but is not None and but.email is not None else None
    if email is not None and email.lower() != present and catalogue.customers_by_email(organization_id, email):
        message = "A customer with this email address already exists."
        raise Refused("value_error", ("body", "email"), message, email)


@router.get("/v1/customers/", openapi_extra=BY_METADATA, responses=gives(page_of(answers.Customer)))
async def list_customers(
    desk: AtDesk, token: Reader, page: WhichPage, metadata: MetadataTexts, email: str | None = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None, sorting: Texts = None,
    organization_id: Ids = None, active: bool | None = None,
) -> Response:  # fmt: skip
    """The organization's customers, newest first; ``active`` are those with a subscription."""
    chosen = order(sorting, ("created_at", "email", "name"), "-created_at")
    as_of = desk.view.as_of
    known = desk.catalogue.customers_of(token.organization_id) if includes(organization_id, token) else []

    def listing(patience: Patience) -> tuple[list[Customer], int]:
        found = [
            customer
            for customer in patience.each(known)
            if (email is None or (customer.email or "").lower() == email.lower())
            and has_texts(customer.metadata, metadata)
            and (active is None or _subscribes(desk.catalogue, customer) is active)
        ]
        found = customers_mentioned(patience.each(found), query) if query else found
        return _in_order(found, chosen, page), len(found)

    found, total = listing(Patience()) if len(known) <= CUSTOMERS_AT_ONCE else await desk.look(token, listing)
    return answer(listed([customer_shape(customer) for customer in found], total, page), as_of)


def _in_order(found: list[Customer], chosen: Order, page: Page) -> list[Customer]:
    """A page of them. They are sorted in parts, because nobody else gets the interpreter meanwhile."""

    def key(customer: Customer) -> tuple[Any, str]:
        return getattr(customer, chosen.by) or "", customer.id

    falls = not chosen.ascending
    starts = range(0, len(found), CUSTOMERS_AT_ONCE)
    parts = [sorted(found[start : start + CUSTOMERS_AT_ONCE], key=key, reverse=falls) for start in starts]
    first = min(page.offset, len(found))
    return list(islice(merge(*parts, key=key, reverse=falls), first, first + page.limit))


DIGITS_MAX = 60
"""Digits before or after the point of a number that is looked for in plain notation; 1e999999999 takes a gigabyte."""


def has_texts(metadata: dict[str, Any], wanted: dict[str, list[str]]) -> bool:
    """Whether each key has one of the texts."""
    return all(key in metadata and _text(metadata[key]) in found for key, found in wanted.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(Decimal(value))  # of any number of digits
    if not isinstance(value, Decimal):
        return str(value)
    return decimal_text(value) if abs(value.adjusted()) <= DIGITS_MAX else str(value)


@router.get("/v1/customers/export", responses=_CSV)
async def export_customers(desk: AtDesk, token: Reader, organization_id: Ids = None) -> Response:
    """All customers as a CSV file, oldest first. Polar's file has the columns of a billing address, too."""
    known = desk.catalogue.customers_of(token.organization_id) if includes(organization_id, token) else []
    as_of = format_position(desk.view.as_of)
    headers = {"Content-Disposition": 'attachment; filename="customers.csv"', "As-Of": as_of}
    return StreamingResponse(_csv(known), media_type="text/csv", headers=headers)


async def _csv(customers: Sequence[Customer]) -> AsyncIterator[str]:
    """Write customers as CSV, some at a time, because other requests wait meanwhile."""
    for first in range(0, max(1, len(customers)), CUSTOMERS_AT_ONCE):
        text = io.StringIO()
        rows = csv.writer(text)
        if first == 0:
            rows.writerow(EXPORTED)
        for one in customers[first : first + CUSTOMERS_AT_ONCE]:
            metadata = exact.encode(one.metadata).decode() if one.metadata else ""
            rows.writerow((one.id, one.external_id, utc_text(one.created_at), one.email, one.name, metadata))
        yield text.getvalue()
        await asyncio.sleep(0)


@router.get(BY_EXTERNAL_ID, responses=gives(answers.Customer))
async def get_customer_by_external_id(desk: AtDesk, token: Reader, external_id: str) -> Response:
    """One customer, by the id that its organization gave it."""
    return answer(customer_shape(_called(desk, token, external_id)), desk.view.as_of)


@router.patch(BY_EXTERNAL_ID, openapi_extra=takes(CustomerUpdate), responses=gives(answers.Customer))
async def update_customer_by_external_id(
    request: Request, desk: AtDesk, token: Writer, external_id: str
) -> Response:  # fmt: skip
    """As below, by the organization's own id."""
    return await _update(request, desk, lambda: _called(desk, token, external_id))


@router.delete(BY_EXTERNAL_ID, status_code=204, responses=_GONE)
async def delete_customer_by_external_id(desk: AtDesk, token: Writer, external_id: str) -> Response:
    """As below, by the organization's own id."""
    return await _delete(desk, lambda: _called(desk, token, external_id))


@router.get("/v1/customers/{id}", responses=gives(answers.Customer))
async def get_customer(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One customer."""
    return answer(customer_shape(customer_by_id(desk, token, id)), desk.view.as_of)


@router.patch("/v1/customers/{id}", openapi_extra=takes(CustomerUpdate), responses=gives(answers.Customer))
async def update_customer(request: Request, desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Change what is named in the body; null clears a ``name``. An external id can be given once and stays; a team
    stays one."""
    return await _update(request, desk, lambda: customer_by_id(desk, token, id))


@router.delete("/v1/customers/{id}", status_code=204, responses=_GONE)
async def delete_customer(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """The customer cannot be named any more. Usage stays stored, and its external id is free for another customer."""
    return await _delete(desk, lambda: customer_by_id(desk, token, id))


def customer_by_id(desk: Desk, token: Token, id: UUID) -> Customer:
    """The organization's customer. Raises NotFound."""
    customer = desk.catalogue.customer(token.organization_id, str(id))
    if customer is None:
        raise NotFound
    return customer


def _called(desk: Desk, token: Token, external_id: str) -> Customer:
    customer = desk.catalogue.customer_by_external_id(token.organization_id, external_id)
    if customer is None:
        raise NotFound
    return customer


async def _update(request: Request, desk: Desk, find: Callable[[], Customer]) -> Response:
    find()
    fields = _fields(CustomerUpdate, await body_of(request))
    async with desk.deciding:
        customer = find()
        if customer.external_id is not None and fields.get("external_id", customer.external_id) != customer.external_id:
            message = "The external ID of a customer cannot be changed."
            raise Refused("value_error", ("body", "external_id"), message, fields["external_id"])
        if customer.type == TEAM and fields.get("type") == INDIVIDUAL:
            message = f"Customer type cannot be downgraded from '{TEAM}' to '{INDIVIDUAL}'."
            raise Refused("value_error", ("body", "type"), message, INDIVIDUAL)
        _refuse_taken(desk.catalogue, customer.organization_id, fields, but=customer)
        changed = msgspec.structs.replace(customer, modified_at=desk.decided_at(), **fields)
        await desk.decide(CustomerUpdated(changed))
    return answer(customer_shape(changed), desk.view.as_of)


async def _delete(desk: Desk, find: Callable[[], Customer]) -> Response:
    async with desk.deciding:
        await desk.decide(CustomerDeleted(find().id, desk.decided_at()))
    return Response(status_code=204)


@router.get("/v1/customers/{id}/state", responses=gives(answers.CustomerState))
async def get_customer_state(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """A customer with subscriptions, benefits and the balance of every meter."""
    return await _state(desk, customer_by_id(desk, token, id))


@router.get(BY_EXTERNAL_ID + "/state", responses=gives(answers.CustomerState))
async def get_customer_state_by_external_id(desk: AtDesk, token: Reader, external_id: str) -> Response:
    """The same, by the id that the organization gave the customer."""
    return await _state(desk, _called(desk, token, external_id))


async def _state(desk: Desk, customer: Customer) -> Response:
    as_of = desk.view.as_of  # before the numbers are read: they may be newer than this says, never older
    return answer(await state_of(desk, customer), as_of)


# Portal sessions: an application requests a session token and passes it to its customer's browser.

sessions_router = APIRouter(tags=["customer portal"])
SessionWriter = Annotated[Token, Depends(allow(writing("customer_sessions")))]
SECRET_BYTES = 32  # 256 bits, more than anybody can guess
NAMES = ("customer_id", "external_customer_id", "customer_external_id")


def named_customer(desk: Desk, token: Token, body: Any) -> Customer:
    """The customer that a body names by ``customer_id`` or an external id. Raises Malformed, Refused."""
    name, given = next(((name, value) for name in NAMES if (value := getattr(body, name, None)) is not None), ("", ""))
    if not name:
        raise Malformed([detail("missing", ("body", "customer_id"), "Field required")])
    catalogue = desk.catalogue
    found = (
        catalogue.customer(token.organization_id, str(given))
        if name == "customer_id"
        else catalogue.customer_by_external_id(token.organization_id, given)
    )
    if found is None:
        raise Refused("value_error", ("body", name), "Customer does not exist.", str(given))
    return found


@sessions_router.post(
    "/v1/customer-sessions/",
    status_code=201,
    openapi_extra=takes(CustomerSessionCreate),
    responses=gives(route_answers.CustomerSession, status=201),
)
async def create_customer_session(request: Request, desk: AtDesk, token: SessionWriter) -> Response:
    """A ``token`` that shows one customer what is theirs, for an hour. It is not shown again."""
    body = await body_as(CustomerSessionCreate, request)
    secret = SESSION_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    customer, now = named_customer(desk, token, body), desk.now()
    session = CustomerSession(
        id=desk.new_id(), organization_id=token.organization_id, customer_id=customer.id, sha256=digest(secret),
        created_at=now, expires_at=now + SESSION_LIFE, return_url=body.return_url,
    )  # fmt: skip
    await desk.decide(CustomerSessionCreated(session))  # beside others: no session depends on another
    return answer(session_shape(session, customer, secret), desk.view.as_of, 201)


def session_shape(session: CustomerSession, customer: Customer, secret: str) -> route_answers.CustomerSession:
    """A session with its secret. The portal is the application's: this product serves the numbers for it."""
    return route_answers.CustomerSession(
        id=session.id,
        created_at=session.created_at,
        modified_at=None,
        expires_at=session.expires_at,
        return_url=session.return_url,
        customer_id=customer.id,
        customer=customer_shape(customer),
        token=secret,
    )
