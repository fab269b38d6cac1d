"""Who may do what, and what the others are told."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from meters.catalogue.access import (
    SCOPES,
    TOKEN_PREFIX,
    Denied,
    authorize,
    authorize_customer,
    digest,
    reading,
    writing,
)
from meters.catalogue.catalogue import (
    Catalogue,
    Customer,
    CustomerCreated,
    CustomerSession,
    CustomerSessionCreated,
    Token,
    TokenCreated,
    TokenRevoked,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = TOKEN_PREFIX + "Uxr3-x"
WRITER = Token(
    id="t1", organization_id="o1", name="ingest", sha256=digest(SECRET), scopes=["events:write"], created_at=NOW
)


def ask(header: str | None, scopes: frozenset[str] = writing("events"), token: Token = WRITER) -> Token | Denied:
    """What an ``Authorization`` header is worth."""
    return authorize(header, scopes, Catalogue([TokenCreated(token)]), NOW)


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   ", " Bearer "])
def test_a_good_token_is_taken(scheme: str) -> None:
    """The scheme does not mind case."""
    assert ask(scheme + SECRET) == WRITER


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", SECRET, f"Basic {SECRET}", f"Token {SECRET}", f"Bearer{SECRET}"]
)
def test_without_credentials_nobody_is_known(header: str | None) -> None:
    """401, and Polar's body and challenge."""
    denied = ask(header)
    assert isinstance(denied, Denied)
    assert denied.status == 401
    assert json.loads(denied.body) == {"error": "Unauthorized", "detail": "Unauthorized"}
    assert denied.headers == {"WWW-Authenticate": 'Bearer realm="polar"'}


@pytest.mark.parametrize(
    "secret", [SECRET + "x", SECRET[:-1], SECRET.upper(), digest(SECRET), TOKEN_PREFIX, "é", "\ud800", f"{SECRET} x"]
)
def test_a_wrong_token_is_invalid(secret: str) -> None:
    """401 for any guess, the digest of the right one too."""
    denied = ask(f"Bearer {secret}")
    assert isinstance(denied, Denied)
    assert denied.status == 401
    assert json.loads(denied.body)["error"] == "invalid_token"
    assert denied.headers["WWW-Authenticate"].startswith('Bearer realm="polar", error="invalid_token", error_desc')


def test_a_good_credential_of_the_other_kind_is_not_called_expired() -> None:
    """Polar answers it as it answers nobody: a client would throw away what is good."""
    until = NOW + timedelta(hours=1)
    catalogue = Catalogue([
        TokenCreated(WRITER), CustomerCreated(Customer(id="c1", organization_id="o1", created_at=NOW)),
        CustomerSessionCreated(CustomerSession(
            id="s1", organization_id="o1", customer_id="c1", sha256=digest("polar_cst_x"), created_at=NOW,
            expires_at=until,
        )),
    ])  # fmt: skip
    for denied in (
        authorize("Bearer polar_cst_x", writing("events"), catalogue, NOW),
        authorize_customer(f"Bearer {SECRET}", catalogue, NOW),
    ):
        assert isinstance(denied, Denied)
        assert (denied.status, b"invalid_token" in denied.body) == (401, False)
        assert denied.headers == {"WWW-Authenticate": 'Bearer realm="polar"'}
    late = authorize("Bearer polar_cst_x", writing("events"), catalogue, until)
    assert isinstance(late, Denied)
    assert b"invalid_token" in late.body


@pytest.mark.parametrize(("expires_in_s", "good"), [(-1, False), (0, False), (1, True)])
def test_a_token_is_good_until_it_expires(expires_in_s: int, good: bool) -> None:
    """The instant of expiry is past."""
    token = replace(WRITER, expires_at=NOW + timedelta(seconds=expires_in_s))
    assert isinstance(ask(f"Bearer {SECRET}", token=token), Token) is good


def test_a_revoked_token_is_good_no_longer() -> None:
    """From the moment the revocation is known."""
    catalogue = Catalogue([TokenCreated(WRITER), TokenRevoked("t1", NOW)])
    denied = authorize(f"Bearer {SECRET}", writing("events"), catalogue, NOW)
    assert isinstance(denied, Denied)
    assert b"invalid_token" in denied.body


def test_a_revoked_token_does_not_come_back() -> None:
    """Not even where its creation is read again."""
    catalogue = Catalogue([TokenCreated(WRITER), TokenRevoked("t1", NOW), TokenCreated(WRITER)])
    assert isinstance(authorize(f"Bearer {SECRET}", writing("events"), catalogue, NOW), Denied)


def test_a_missing_scope_is_named() -> None:
    """403, and the scopes of which any would do."""
    denied = ask(f"Bearer {SECRET}", reading("meters"))
    assert isinstance(denied, Denied)
    assert denied.status == 403
    assert json.loads(denied.body)["error"] == "insufficient_scope"
    assert denied.headers["WWW-Authenticate"].endswith('scope="meters:read meters:write"')


def test_whoever_may_write_may_read() -> None:
    """And not the reverse."""
    reader = replace(WRITER, scopes=["events:read"])
    assert isinstance(ask(f"Bearer {SECRET}", reading("events")), Token)
    assert isinstance(ask(f"Bearer {SECRET}", reading("events"), reader), Token)
    assert isinstance(ask(f"Bearer {SECRET}", writing("events"), reader), Denied)


def test_no_answer_repeats_the_secret() -> None:
    """Neither body nor headers."""
    denied = ask(f"Bearer {SECRET}", reading("meters"))
    assert isinstance(denied, Denied)
    assert SECRET not in denied.body.decode() + str(denied.headers)
    assert set(WRITER.scopes) <= set(SCOPES)
