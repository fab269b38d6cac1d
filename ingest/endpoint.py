"""``POST /v1/events/ingest``: who asks, how much, and how it is sent. What is sent is ``ingest.intake``'s.

The checks come in Polar's order, each answering for itself: token and scope, the token's quota, the encoding and length
of the body; then the body.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from ingest import answers
from ingest.answers import JSON, Answer
from ingest.body import ENCODINGS, Receive, read
from ingest.intake import Intake
from ingest.limits import BODY_BYTES_MAX, BODY_DEADLINE_S, IN_FLIGHT_BYTES_MAX, InFlight, RequestQuota
from ingest.request import Opened, read_preferences
from ingest.tail import CatalogueTail
from meters.access import Denied, authorize, good_credential, is_good, writing
from meters.catalogue import Token
from meters.log import Log

SCOPES = writing("events")

Headers = Mapping[bytes, bytes]


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint's bounds. An operator sets ``requests_per_minute``."""

    body_bytes_max: int = BODY_BYTES_MAX
    body_deadline_s: float = BODY_DEADLINE_S
    in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX
    requests_per_minute: int = 0  # for each token, and each customer at the portal; 0 sets no limit


class IngestEndpoint:
    """Judges requests by their heads; their bodies it hands to its intake."""

    def __init__(self, log: Log, tail: CatalogueTail, settings: EndpointSettings) -> None:
        self.in_flight = InFlight(settings.in_flight_bytes_max)
        self.intake = Intake(log, tail, self.in_flight, settings.body_bytes_max)
        self._tail = tail
        self._settings = settings
        self._quota = RequestQuota(settings.requests_per_minute)

    async def __call__(self, headers: Headers, length: int, receive: Receive) -> Answer:
        """The answer to one request. ``headers`` are lower case, ``length`` is the Content-Length. Raises Gone."""
        opened = self.open(headers, length)
        if isinstance(opened, Answer):
            return opened
        settings = self._settings
        body = await read(receive, settings.body_deadline_s, self.in_flight, settings.body_bytes_max)
        if isinstance(body, Answer):
            return body
        try:
            return await self.intake.taken(opened, body)
        finally:
            self.in_flight.give_back(len(body))

    def open(self, headers: Headers, length: int) -> Opened | Answer:
        """Judge a request by its head."""
        if not self._tail.current:
            return answers.unavailable("CatalogueUnavailable", "Tokens are not known yet.", 1)
        now = datetime.now(UTC)
        token = authorize(_authorization(headers), SCOPES, self._tail.catalogue, now)
        if isinstance(token, Denied):
            challenge = ((name.lower().encode(), value.encode()) for name, value in token.headers.items())
            return Answer(token.status, token.body, (JSON, *challenge))
        wait_s = self._quota.wait_s(token.id, time.monotonic())
        if wait_s:
            return answers.too_many_requests(wait_s)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if encoding not in ENCODINGS:
            return answers.unsupported_encoding()
        if length > self._settings.body_bytes_max:
            return answers.too_large(self._settings.body_bytes_max)
        return Opened(token, encoding, read_preferences(headers.get(b"prefer", b"")))

    def open_again(self, before: Opened, headers: Headers, length: int) -> Opened | Answer:
        """The same for a head that was judged before: nothing in it can have changed but what its token is good for."""
        token = before.token
        is_good_still = self._tail.catalogue.tokens.get(token.sha256) is token and is_good(token, datetime.now(UTC))
        if not is_good_still or not self._tail.current or length > self._settings.body_bytes_max:
            return self.open(headers, length)
        wait_s = self._quota.wait_s(token.id, time.monotonic())
        return answers.too_many_requests(wait_s) if wait_s else before

    def organization_of(self, headers: Headers, now: datetime) -> str:
        """Whose good token, or whose customer's session, the request shows; empty where it shows none."""
        shown = good_credential(_authorization(headers), self._tail.catalogue, now)
        return shown.organization_id if shown else ""

    def too_many(self, headers: Headers, now: datetime) -> Answer | None:
        """The answer to a token or a customer who asked too often. Whoever shows neither is refused elsewhere."""
        if not self._settings.requests_per_minute:
            return None
        shown = good_credential(_authorization(headers), self._tail.catalogue, now)
        if shown is None:
            return None
        key = shown.id if isinstance(shown, Token) else shown.customer_id  # of whom there are fewer than of sessions
        wait_s = self._quota.wait_s(key, time.monotonic())
        return answers.too_many_requests(wait_s) if wait_s else None


def _authorization(headers: Headers) -> str:
    return headers.get(b"authorization", b"").decode("latin-1")
