"""Access: scopes, authorization, and references to customers and organizations.

``authorize`` checks an organization's token and scope, ``authorize_customer`` a session of the customer portal. Both
look the credential up in the ``Catalogue``, and return ``Denied``, with Polar's answer, if access is not allowed.
``reference_refusals`` returns a refusal for each customer, member or organization id in an event that does not exist.
The gateway and the query API use this module.
"""

import hmac
from datetime import datetime
from hashlib import sha256

import msgspec

from meters.catalogue.catalogue import Catalogue, CustomerSession, Token
from meters.errors import Reason, Refusal
from meters.event import Event

# Authorization. A credential is sent as ``Authorization: Bearer ...``. Only the SHA-256 of a token is stored and
# looked up, so the time of an answer reveals nothing about how much of a guess was right. Refusals equal Polar's,
# headers included, so that Polar's clients raise the errors they know.

TOKEN_PREFIX = "polar_oat_"  # noqa: S105 - a prefix, not a secret
"""How every token begins, because Polar's clients look at it."""

API_VERSION_DEFAULT = b"2026-04"
"""The version of Polar's API that an answer is of, unless the request names another."""

SCOPES = (
    "events:read",
    "events:write",
    "meters:read",
    "meters:write",
    "customers:read",
    "customers:write",
    "customer_meters:read",
    "metrics:read",
    "organizations:read",
    "benefits:read",
    "benefits:write",
    "customer_sessions:write",
    "webhooks:read",
    "webhooks:write",
)

AUDIT = "audit:read"
"""Reading the whole store, tenants and all, for reconciliation. No token has it unless its operator says so by name."""

_INVALID = "The access token provided is expired, revoked, malformed, or invalid for other reasons."
_INSUFFICIENT = "The request requires higher privileges than provided by the access token."
_REALM = 'Bearer realm="polar"'


class Denied(msgspec.Struct, frozen=True):
    """The answer to who may not: status, JSON body, and the headers that belong to it."""

    status: int
    body: bytes
    headers: dict[str, str]


def digest(token: str) -> str:
    """What is kept of a token: SHA-256 in hex. Tokens are long and random, so a slow hash would add nothing."""
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def reading(resource: str) -> frozenset[str]:
    """The scopes of which any one allows reading: whoever may write may read."""
    return frozenset({f"{resource}:read", f"{resource}:write"})


def writing(resource: str) -> frozenset[str]:
    """The scope that allows writing."""
    return frozenset({f"{resource}:write"})


def authorize(header: str | None, scopes: frozenset[str], catalogue: Catalogue, now: datetime) -> Token | Denied:
    """The token in an ``Authorization`` header, where it is good now and has any of the scopes.

    A customer's session is good too, but not here: Polar answers it as if there were nothing.
    """
    secret = _presented(header)
    if secret is None:
        return _UNAUTHORIZED
    token = _good(secret, catalogue, now)
    if token is None:
        return _UNAUTHORIZED if _session(secret, catalogue, now) else _refused(401, "invalid_token", _INVALID, "")
    if scopes.isdisjoint(token.scopes):
        return _refused(403, "insufficient_scope", _INSUFFICIENT, f', scope="{" ".join(sorted(scopes))}"')
    return token


def authorize_customer(header: str | None, catalogue: Catalogue, now: datetime) -> CustomerSession | Denied:
    """The customer's session in an ``Authorization`` header. An organization's token is not one."""
    secret = _presented(header)
    if secret is None:
        return _UNAUTHORIZED
    session = _session(secret, catalogue, now)
    if session is None:
        return _UNAUTHORIZED if _good(secret, catalogue, now) else _refused(401, "invalid_token", _INVALID, "")
    return session


def good_credential(header: str | None, catalogue: Catalogue, now: datetime) -> Token | CustomerSession | None:
    """The token or the customer's session in an ``Authorization`` header, where it is good now, whatever it may do."""
    secret = _presented(header)
    return (_good(secret, catalogue, now) or _session(secret, catalogue, now)) if secret else None


def _good(secret: str, catalogue: Catalogue, now: datetime) -> Token | None:
    token = _find(secret, catalogue)
    return token if token and is_good(token, now) else None


def _session(secret: str, catalogue: Catalogue, now: datetime) -> CustomerSession | None:
    session = catalogue.sessions.find(digest(secret), now)
    known = session and catalogue.customer(session.organization_id, session.customer_id)
    return session if known else None


def _presented(header: str | None) -> str | None:
    """The secret in an ``Authorization`` header."""
    scheme, _, secret = (header or "").strip().partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


def is_good(token: Token, now: datetime) -> bool:
    """Whether the token is neither revoked nor expired; the instant of expiry counts as expired."""
    return token.revoked_at is None and (token.expires_at is None or now < token.expires_at)


def _find(secret: str, catalogue: Catalogue) -> Token | None:
    presented = digest(secret)
    token = catalogue.tokens.get(presented)
    kept = token.sha256 if token else digest("")
    return token if hmac.compare_digest(presented, kept) else None


def _refused(status: int, error: str, description: str, suffix: str) -> Denied:
    challenge = f'{_REALM}, error="{error}", error_description="{description}"{suffix}'
    return _denied(status, {"error": error, "error_description": description}, challenge)


def _denied(status: int, body: dict[str, str], challenge: str) -> Denied:
    return Denied(status, msgspec.json.encode(body), {"WWW-Authenticate": challenge})


_UNAUTHORIZED = _denied(401, {"error": "Unauthorized", "detail": "Unauthorized"}, _REALM)


# References in an event, checked after the event itself was found valid. The gateway accepts organization tokens
# only, so an event that names an organization is refused there. (Tokens of Polar's users, whose events name their
# organization, occur in the conformance cases only.) External customer ids are not checked: usage may arrive before
# the customer is created.

def reference_refusals(
    event: Event, catalogue: Catalogue, *, token_organization_id: str | None, index: int = 0
) -> list[Refusal]:
    """The names in an event that mean nothing.

    ``token_organization_id`` is the organization whose token sent the event, and None where each event names its own.
    """
    refusals = _organization_refusals(event, catalogue, token_organization_id, index)
    organization_id = token_organization_id or event.organization_id or ""
    if event.customer_id is not None and catalogue.customer(organization_id, event.customer_id) is None:
        refusals.append(Reason.CUSTOMER_UNKNOWN.at(index, "customer_id", input=event.customer_id))
    if event.member_id is not None:  # there are no members yet, so no id can be one
        refusals.append(Reason.MEMBER_UNKNOWN.at(index, "member_id", input=event.member_id))
    return refusals


def _organization_refusals(
    event: Event, catalogue: Catalogue, token_organization_id: str | None, index: int
) -> list[Refusal]:
    named = event.organization_id
    if token_organization_id is not None:
        return [] if named is None else [Reason.ORGANIZATION_TOKEN.at(index, "organization_id", input=named)]
    if named is None:
        return [Reason.ORGANIZATION_MISSING.at(index, "organization_id")]
    known = named in catalogue.organizations
    return [] if known else [Reason.ORGANIZATION_UNKNOWN.at(index, "organization_id", input=named)]
