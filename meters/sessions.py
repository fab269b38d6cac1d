"""Customers at the portal: a credential that shows one customer what is theirs, for an hour.

As with an organization's token, only the digest is kept. A session that has expired is forgotten when the next one is
made, so there are never many more than the customers who look at their usage within an hour.
"""

import heapq
from datetime import datetime, timedelta

import msgspec

SESSION_PREFIX = "polar_cst_"
"""How every customer's token begins, because Polar's clients look at it."""

SESSION_LIFE = timedelta(hours=1)
"""As with Polar: the token goes to a browser, and the application makes another one for the next visit."""


class CustomerSession(msgspec.Struct, frozen=True, kw_only=True):
    """A customer's credential; ``sha256`` is the hex digest of the secret, which is kept nowhere."""

    id: str
    organization_id: str
    customer_id: str
    sha256: str
    created_at: datetime
    expires_at: datetime
    return_url: str | None = None


class CustomerSessionCreated(msgspec.Struct, frozen=True, tag_field="type", tag="customer_session.created"):
    """A customer may look until the session expires."""

    session: CustomerSession


SessionChange = CustomerSessionCreated


class Sessions:
    """The sessions that may still be good, by the digest of their secret."""

    def __init__(self) -> None:
        self._by_digest: dict[str, CustomerSession] = {}
        self._ends: list[tuple[datetime, str]] = []  # a heap: nobody pays for looking through all of them

    def apply(self, change: object) -> None:
        """Take in one change; others than the above are somebody else's."""
        if isinstance(change, CustomerSessionCreated):
            session = change.session
            while self._ends and self._ends[0][0] <= session.created_at:
                self._forget(*heapq.heappop(self._ends))
            self._by_digest[session.sha256] = session
            heapq.heappush(self._ends, (session.expires_at, session.sha256))

    def _forget(self, expires_at: datetime, digest: str) -> None:
        known = self._by_digest.get(digest)
        if known and known.expires_at <= expires_at:  # else it was told again, with a later end
            del self._by_digest[digest]

    def find(self, digest: str, now: datetime) -> CustomerSession | None:
        """The session of a secret's digest, unless it has expired; the instant of expiry counts as expired."""
        session = self._by_digest.get(digest)
        return session if session and now < session.expires_at else None
