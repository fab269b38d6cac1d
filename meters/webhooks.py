"""Webhook endpoints, event types, thresholds and signatures.

``Webhooks`` folds the decisions about endpoints (which receive webhooks), sources (whose webhooks are received) and
thresholds. ``signature`` signs a body and ``is_signed`` checks one, by Standard Webhooks. An ``Endpoint`` receives
changes of a customer's state, or thresholds of meters that were reached.
"""

import contextlib
import hmac
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal, TypeVar, get_args

import msgspec

from meters.exact import EXACT

# Signatures. The signed text is ``id.timestamp.body``. The standard's key is the secret without ``whsec_``, decoded
# from base64; Polar's key is the UTF-8 of the whole secret as its dashboard shows it. Both are in use, so an incoming
# webhook may be signed with either. The body is the received bytes: a body that was parsed and written again has
# another signature.

PREFIX = "whsec_"
TOLERANCE_S = 300
"""Seconds that a sender's clock may be off; who records a delivery has no longer than this to repeat it."""

ID_LENGTH_MAX = 256
"""Characters of a delivery's id: a UUID has 36; it is kept for as long as the log."""

SIGNATURES_MAX = 10
"""Signatures in one header: one per valid secret. More would be work for whoever has none."""

_SECONDS_DIGITS_MAX = 12  # of a timestamp: until the year 33658


class Rejection(StrEnum):
    """Why a delivery is not believed."""

    HEADERS = "webhook-id, webhook-timestamp or webhook-signature is missing or malformed"
    TOO_OLD = "webhook-timestamp is too old"
    TOO_NEW = "webhook-timestamp is in the future"
    SIGNATURE = "no signature matches"


def keys(secret: str) -> list[bytes]:
    """Every key that a secret may stand for: Polar's reading first, the standard's where it is one."""
    found = [secret.encode()]
    with contextlib.suppress(ValueError):  # not base64: nobody can have meant it that way
        found.append(b64decode(secret.removeprefix(PREFIX), validate=True))
    return [key for key in found if key]


def signature(key: bytes, id: str, timestamp: str, body: bytes) -> str:
    """One signature, with its version in front."""
    signed = hmac.new(key, f"{id}.{timestamp}.".encode(), sha256)
    signed.update(body)  # not copied, and other threads run meanwhile
    return "v1," + b64encode(signed.digest()).decode()


def rejection(headers: Mapping[str, str], now_s: int) -> Rejection | None:
    """Why a delivery should not be believed whoever signed it; None where its signature is worth looking at.

    ``headers`` has lower-case names; ``now_s`` are seconds since 1970. It costs next to nothing, so it is asked first.
    """
    id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    given = headers.get("webhook-signature", "").split()
    if not (0 < len(id) <= ID_LENGTH_MAX and id.isprintable() and 0 < len(given) <= SIGNATURES_MAX):
        return Rejection.HEADERS
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= _SECONDS_DIGITS_MAX):
        return Rejection.HEADERS
    if int(timestamp) < now_s - TOLERANCE_S:
        return Rejection.TOO_OLD
    if int(timestamp) > now_s + TOLERANCE_S:
        return Rejection.TOO_NEW
    return None


def is_signed(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether a holder of the secret signed a delivery that there is no ``rejection`` of. Reads all of the body."""
    id, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
    presented = [text.encode() for text in headers["webhook-signature"].split()]
    wanted = [signature(key, id, timestamp, body).encode() for key in keys(secret)]
    matches = [hmac.compare_digest(one, other) for one in wanted for other in presented]
    return any(matches)


# Endpoints, sources and thresholds. A threshold is reached once each time it is crossed, and once in each cycle (from
# one reset to the next). Reaching it is a decision in the log, so a rebuilt store does not report it again. For the
# same reason the log has, for each endpoint, the log position up to which everything was delivered.
#
# Secrets must be stored to sign with; nothing shows them, not even an error's text.

EventType = Literal["customer.state_changed", "meter.threshold_reached"]
"""What an endpoint can be told of."""

EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
STATE_CHANGED, THRESHOLD_REACHED = EVENT_TYPES

API_VERSION = "2026-10"
"""Of Polar's API, whose words all messages are in: its newer clients want to be told."""


class SigningSecret(msgspec.Struct, frozen=True):
    """A secret that signs until it expires."""

    value: str
    expires_at: datetime | None = None

    def __repr__(self) -> str:
        return "SigningSecret(...)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class Heard(msgspec.Struct, frozen=True):
    """Everything before these positions of the log: of ``usage.events`` as in ``As-Of``, and of ``usage.control``."""

    events: str
    control: int


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An address that wants to be told. The newest secret stands first; the others are on their way out."""

    id: str
    organization_id: str
    url: str
    events: list[str]
    secrets: list[SigningSecret]
    created_at: datetime
    begins_at: "Heard"
    name: str | None = None
    modified_at: datetime | None = None
    disabled_at: datetime | None = None
    disabled_reason: str | None = None
    deleted_at: datetime | None = None

    def hears(self, type: str) -> bool:
        """Whether it is told of this type of event now."""
        return type in self.events and self.disabled_at is None and self.deleted_at is None


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """An organization of Polar's that may tell us what it decided, by the secret it signs with."""

    id: str
    organization_id: str
    secret: SigningSecret
    created_at: datetime
    name: str | None = None
    deleted_at: datetime | None = None


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """A line to watch: of one customer, or of every customer when ``customer_id`` is None.

    ``usage`` is reached from below, ``balance`` from above. ``percent`` is of the credits of the cycle, and without
    credits there is nothing to take a part of.
    """

    id: str
    organization_id: str
    meter_id: str
    measure: Literal["usage", "balance"]
    unit: Literal["units", "percent"]
    value: Decimal
    created_at: datetime
    customer_id: str | None = None
    deleted_at: datetime | None = None

    def is_reached(self, consumed: Decimal, credited: Decimal) -> bool:
        """Whether the line is reached at this usage and these credits."""
        if self.unit == "percent" and credited <= 0:
            return False
        line = self.value
        if self.unit == "percent":
            line = EXACT.divide(EXACT.multiply(self.value, credited), Decimal(100))
        return consumed >= line if self.measure == "usage" else EXACT.subtract(credited, consumed) <= line


class EndpointSet(msgspec.Struct, frozen=True, tag_field="type", tag="webhook_endpoint.set"):
    """The endpoint's new state, whole."""

    endpoint: Endpoint


class SourceSet(msgspec.Struct, frozen=True, tag_field="type", tag="webhook_source.set"):
    """The source's new state, whole."""

    source: Source


class ThresholdSet(msgspec.Struct, frozen=True, tag_field="type", tag="meter_threshold.set"):
    """The threshold's new state, whole."""

    threshold: Threshold


class ThresholdReached(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="meter_threshold.reached"):
    """A customer reached a line in a cycle. The numbers are those that were seen then."""

    id: str
    threshold_id: str
    customer_id: str
    cycle: str
    at: datetime
    consumed: Decimal
    credited: Decimal


class ThresholdCleared(msgspec.Struct, frozen=True, tag_field="type", tag="meter_threshold.cleared"):
    """The customer is on the other side of the line again, so it can be reached again."""

    threshold_id: str
    customer_id: str
    at: datetime


class EndpointSettled(msgspec.Struct, frozen=True, tag_field="type", tag="webhook_endpoint.settled"):
    """Of everything before these positions the endpoint was told, or never will be."""

    endpoint_id: str
    heard: Heard


WebhookChange = (
    EndpointSet | SourceSet | ThresholdSet | ThresholdReached | ThresholdCleared | EndpointSettled
)  # fmt: skip

T = TypeVar("T", Endpoint, Source, Threshold)


def _kept(things: dict[str, T], organization_id: str) -> list[T]:
    every = list(things.values())  # at once: decisions come in on the thread that counts
    return [one for one in every if one.organization_id == organization_id and not one.deleted_at]


class Webhooks:
    """The decisions above, folded. ``apply`` takes them in the order of the control stream."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.sources: dict[str, Source] = {}
        self.thresholds: dict[str, Threshold] = {}
        self.reached: dict[tuple[str, str], ThresholdReached] = {}  # by threshold and customer
        self.settled: dict[str, Heard] = {}  # by endpoint
        self.listening: dict[str, list[Heard]] = {}  # by organization: what each of its endpoints was told already

    def apply(self, change: object) -> None:
        """Take in one change; others than the above are somebody else's."""
        match change:
            case EndpointSet(endpoint):
                self.endpoints[endpoint.id] = endpoint
                self._listen()
            case SourceSet(source):
                self.sources[source.id] = source
            case ThresholdSet(threshold):
                self.thresholds[threshold.id] = threshold
            case ThresholdReached(threshold_id=threshold_id, customer_id=customer_id):
                self.reached[threshold_id, customer_id] = change
            case ThresholdCleared(threshold_id, customer_id):
                self.reached.pop((threshold_id, customer_id), None)
            case EndpointSettled(endpoint_id, heard):
                self.settled[endpoint_id] = heard
                self._listen()

    def listening_after(self, changes: Iterable[object]) -> dict[str, list[Heard]]:
        """``listening`` as it will be with these changes, which are not taken in yet."""
        coming = [change for change in changes if isinstance(change, EndpointSet | EndpointSettled)]
        if not coming:
            return self.listening
        after = Webhooks()
        after.endpoints, after.settled = dict(self.endpoints), dict(self.settled)
        for change in coming:
            after.apply(change)
        return after.listening

    def endpoints_of(self, organization_id: str) -> list[Endpoint]:
        """The organization's endpoints, oldest first, without those that were deleted."""
        return _kept(self.endpoints, organization_id)

    def sources_of(self, organization_id: str) -> list[Source]:
        """The organization's sources, oldest first, without those that were deleted."""
        return _kept(self.sources, organization_id)

    def thresholds_of(self, organization_id: str) -> list[Threshold]:
        """The organization's thresholds, oldest first, without those that were deleted."""
        return _kept(self.thresholds, organization_id)

    def heard(self, endpoint: Endpoint) -> Heard:
        """What the endpoint was told already, or came before it."""
        return self.settled.get(endpoint.id, endpoint.begins_at)

    def _listen(self) -> None:
        self.listening = {}
        for endpoint in self.endpoints.values():
            if any(endpoint.hears(type) for type in EVENT_TYPES):
                self.listening.setdefault(endpoint.organization_id, []).append(self.heard(endpoint))
