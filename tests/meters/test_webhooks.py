"""Whom to tell and when: thresholds, endpoints, and sessions that end."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace

from meters.catalogue.catalogue import SESSION_LIFE, CustomerSession, CustomerSessionCreated, Sessions
from meters.webhooks import (
    STATE_CHANGED,
    Endpoint,
    EndpointSet,
    EndpointSettled,
    Heard,
    SigningSecret,
    Source,
    SourceSet,
    Threshold,
    ThresholdCleared,
    ThresholdReached,
    ThresholdSet,
    Webhooks,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ENDPOINT = Endpoint(
    id="e", organization_id="o", url="https://example.com/", events=[STATE_CHANGED], created_at=NOW,
    secrets=[SigningSecret("whsec_hush")], begins_at=Heard("0:5", 7),
)  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "unit", "value", "consumed", "credited", "reached"),
    [
        ("usage", "units", 10, "9.999999999999", 0, False),
        ("usage", "units", 10, 10, 0, True),
        ("usage", "percent", 80, 79, 100, False),
        ("usage", "percent", 80, 80, 100, True),
        ("usage", "percent", 80, 5, 0, False),
        ("usage", "percent", "33.3", 1, 3, True),
        ("balance", "units", 5, 94, 100, False),
        ("balance", "units", 5, 95, 100, True),
        ("balance", "units", 0, 1, 0, True),
        ("balance", "units", -10, 9, 0, False),
        ("balance", "percent", 10, 89, 100, False),
        ("balance", "percent", 10, 90, 100, True),
        ("balance", "percent", 10, 500, 0, False),
        ("balance", "units", "-12345678901234567890123456.78", "12345678901234567890123456.779", 0, False),
    ],
)
def test_usage_reaches_a_line_from_below_and_a_balance_from_above(
    measure: Any, unit: Any, value: Any, consumed: Any, credited: Any, reached: bool
) -> None:
    """Exactly at the line it is reached; without credits there is no part of them."""
    line = Threshold(
        id="t", organization_id="o", meter_id="m", measure=measure, unit=unit, value=Decimal(value), created_at=NOW
    )
    assert line.is_reached(Decimal(consumed), Decimal(credited)) is reached


def test_a_threshold_is_reached_until_it_is_cleared() -> None:
    """For each customer by itself."""
    webhooks = Webhooks()
    reached = ThresholdReached(
        id="r", threshold_id="t", customer_id="c", cycle="x", at=NOW, consumed=Decimal(1), credited=Decimal(0)
    )
    for change in (reached, replace(reached, customer_id="d"), ThresholdCleared("t", "c", NOW)):
        webhooks.apply(change)
    assert list(webhooks.reached) == [("t", "d")]


def test_who_listens_and_since_when() -> None:
    """From its beginning, or as far as it was told; a disabled or deleted endpoint does not listen."""
    webhooks = Webhooks()
    webhooks.apply(EndpointSet(ENDPOINT))
    assert webhooks.listening == {"o": [Heard("0:5", 7)]}
    webhooks.apply(EndpointSettled("e", Heard("0:9", 8)))
    assert webhooks.listening == {"o": [Heard("0:9", 8)]}
    for gone in ({"disabled_at": NOW}, {"deleted_at": NOW}, {"events": []}):
        webhooks.apply(EndpointSet(replace(ENDPOINT, **gone)))
        assert webhooks.listening == {}


def test_a_secret_does_not_show_itself() -> None:
    """Not in an error's text, wherever it stands."""
    assert "hush" not in repr(ENDPOINT)
    assert "hush" not in str(EndpointSet(ENDPOINT))


def test_sessions_end_and_are_forgotten() -> None:
    """At the instant of expiry; the next one that is made takes the expired ones away."""
    sessions = Sessions()
    first = CustomerSession(
        id="1", organization_id="o", customer_id="c", sha256="a", created_at=NOW, expires_at=NOW + SESSION_LIFE
    )
    sessions.apply(CustomerSessionCreated(first))
    assert sessions.find("a", NOW) == first
    assert sessions.find("a", NOW + SESSION_LIFE) is None
    assert sessions.find("b", NOW) is None
    later = NOW + SESSION_LIFE + timedelta(seconds=1)
    second = replace(first, sha256="b", created_at=later, expires_at=later + SESSION_LIFE)
    sessions.apply(CustomerSessionCreated(second))
    assert sessions.find("a", NOW) is None
    assert sessions.find("b", later) is not None


@pytest.mark.parametrize(("credited", "consumed", "reached"), [("0.5", "0.4", True), ("0.5", "0.39", False)])
def test_a_part_of_less_than_one_unit_is_a_part(credited: str, consumed: str, reached: bool) -> None:
    """Eighty percent of half a unit are 0.4 units."""
    line = Threshold(
        id="t", organization_id="o", meter_id="m", measure="usage", unit="percent", value=Decimal(80), created_at=NOW
    )
    assert line.is_reached(Decimal(consumed), Decimal(credited)) is reached


def test_each_organization_has_its_own() -> None:
    """Endpoints, sources and thresholds, oldest first, without those that were deleted."""
    source = Source(id="s", organization_id="o", secret=SigningSecret("x"), created_at=NOW)
    line = Threshold(
        id="t", organization_id="o", meter_id="m", measure="usage", unit="units", value=Decimal(1), created_at=NOW
    )
    webhooks = Webhooks()
    for fields in ({"id": "1"}, {"id": "2"}, {"id": "3", "deleted_at": NOW}, {"id": "4", "organization_id": "p"}):
        webhooks.apply(EndpointSet(replace(ENDPOINT, **fields)))
        webhooks.apply(SourceSet(replace(source, **fields)))
        webhooks.apply(ThresholdSet(replace(line, **fields)))
    for kept in (webhooks.endpoints_of, webhooks.sources_of, webhooks.thresholds_of):
        found = {organization: [one.id for one in kept(organization)] for organization in "opq"}
        assert found == {"o": ["1", "2"], "p": ["4"], "q": []}


def test_who_will_listen_after_changes() -> None:
    """As if they were taken in, which they are not."""
    webhooks = Webhooks()
    webhooks.apply(EndpointSet(ENDPOINT))
    other = replace(ENDPOINT, id="f", begins_at=Heard("0:6", 8))
    settled = EndpointSettled("e", Heard("0:9", 9))
    assert webhooks.listening_after([EndpointSet(other), settled]) == {"o": [Heard("0:9", 9), Heard("0:6", 8)]}
    assert webhooks.listening_after([SigningSecret("x")]) == {"o": [Heard("0:5", 7)]}
    assert webhooks.listening == {"o": [Heard("0:5", 7)]}
