"""Which sessions of customers are good, and what keeping them costs."""

import tracemalloc
from datetime import UTC, datetime, timedelta

from meters.catalogue.catalogue import SESSION_LIFE, CustomerSession, CustomerSessionCreated, Sessions

NOW = datetime(2026, 3, 1, tzinfo=UTC)
LIVE = 10_000
SMALL_BYTES = 4096


def created(name: str, at: datetime, life: timedelta = SESSION_LIFE) -> CustomerSessionCreated:
    """A session whose secret has this digest."""
    return CustomerSessionCreated(CustomerSession(
        id=name, organization_id="o1", customer_id="c1", sha256=name, created_at=at, expires_at=at + life,
    ))  # fmt: skip


def applied(sessions: Sessions, change: CustomerSessionCreated) -> int:
    """The most bytes that taking in a change took on the way."""
    tracemalloc.start()
    try:
        sessions.apply(change)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_session_costs_the_same_however_many_there_are() -> None:
    """They are not looked through, nor copied; now and then one finds the tables full, and makes them larger."""
    sessions = Sessions()
    for number in range(LIVE):
        sessions.apply(created(f"s{number}", NOW + timedelta(milliseconds=number)))
    more = [created(f"t{number}", NOW + timedelta(minutes=1)) for number in range(5)]
    assert min(applied(sessions, change) for change in more) < SMALL_BYTES


def test_what_has_expired_is_forgotten_whenever_it_was_told() -> None:
    """Sessions of different lives, told in any order; one that is told again is as good as it was told last."""
    sessions, hour = Sessions(), timedelta(hours=1)
    for change in (
        created("long", NOW, 3 * hour), created("again", NOW, hour), created("short", NOW, hour),
        created("again", NOW, 3 * hour), created("early", NOW - hour, 3 * hour),
    ):  # fmt: skip
        sessions.apply(change)
    sessions.apply(created("next", NOW + 2 * hour))
    known = {name for name in ("long", "again", "short", "early", "next") if sessions.find(name, NOW)}
    assert known == {"long", "again", "next"}
    assert sessions.find("long", NOW + 3 * hour) is None
