"""Sessions of customers: an application asks for a token and gives it to its customer's browser."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from aggregator.api import route_answers
from aggregator.api.bodies import body_as
from aggregator.api.requests import AtDesk, allow, answer
from aggregator.api.schemas import CustomerSessionCreate, gives, takes
from aggregator.service.errors import Malformed, Refused
from aggregator.service.serializers import customer_shape
from aggregator.service.service import Desk
from meters.access import digest, writing
from meters.catalogue import Customer, Token
from meters.detail import detail
from meters.sessions import SESSION_LIFE, SESSION_PREFIX, CustomerSession, CustomerSessionCreated

router = APIRouter(tags=["customer portal"])
Writer = Annotated[Token, Depends(allow(writing("customer_sessions")))]
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


@router.post(
    "/v1/customer-sessions/",
    status_code=201,
    openapi_extra=takes(CustomerSessionCreate),
    responses=gives(route_answers.CustomerSession, status=201),
)
async def create_customer_session(request: Request, desk: AtDesk, token: Writer) -> Response:
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
