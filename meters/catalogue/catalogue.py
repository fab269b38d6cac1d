"""The catalogue: organizations, tokens, customers, meters and sessions, folded from decisions.

A decision (``OrganizationCreated``, ``TokenCreated``, ``MeterUpdated``, ...) is one JSON line in the stream
``usage.control``. ``encode_changes`` writes decisions that belong together as one record of several lines, so that
all of them are stored or none; ``decode_changes`` reads a record. ``Catalogue.apply`` folds one decision into the
current state.

A decision carries the whole new state of one thing, so applying it twice changes nothing, and a reader that starts in
the middle of a repeated part reaches the same state. Unknown types are skipped, so an old process survives the
decisions of a newer one.
"""

import heapq
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec

from meters import exact
from meters.aggregation import Aggregation
from meters.catalogue.polar_facts import DeliveryApplied, Mirror
from meters.event_values import PREFIX, written
from meters.filters import Filter, filter_json, parse_filter
from meters.ledger.benefits import BenefitChange, Benefits
from meters.ledger.joined import CustomersJoined, Joined
from meters.ledger.ledger import CreditChange
from meters.ledger.price import MeterPriced, Prices, SubscriptionPriced
from meters.meter import Meter
from meters.webhooks import WebhookChange, Webhooks

# Sessions of the customer portal: a credential that shows one customer their own data for an hour. Only its digest is
# stored. Expired sessions are removed when the next one is created, so their number stays near the number of
# customers who looked at their usage within an hour.

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


class Organization(msgspec.Struct, frozen=True):
    """A tenant. Nothing of one is visible to another."""

    id: str
    name: str
    created_at: datetime


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """An organization's credential; ``sha256`` is the hex digest of the secret, which is kept nowhere."""

    id: str
    organization_id: str
    name: str
    sha256: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


INDIVIDUAL: Final = "individual"
TEAM: Final = "team"


class Customer(msgspec.Struct, frozen=True, kw_only=True):
    """Someone an organization knows. Usage may name the customer by ``id`` or by ``external_id``.

    Customers written down before ``type`` was kept are individuals.
    """

    id: str
    organization_id: str
    created_at: datetime
    type: Literal["individual", "team"] = INDIVIDUAL
    external_id: str | None = None
    email: str | None = None
    name: str | None = None
    metadata: dict[str, Any] = {}
    modified_at: datetime | None = None
    deleted_at: datetime | None = None


class OrganizationCreated(msgspec.Struct, frozen=True, tag_field="type", tag="organization.created"):
    """There is a new tenant."""

    organization: Organization


class TokenCreated(msgspec.Struct, frozen=True, tag_field="type", tag="token.created"):
    """A credential is good from now on."""

    token: Token


class TokenRevoked(msgspec.Struct, frozen=True, tag_field="type", tag="token.revoked"):
    """A credential is good no longer."""

    id: str
    revoked_at: datetime


class CustomerCreated(msgspec.Struct, frozen=True, tag_field="type", tag="customer.created"):
    """An organization knows someone new."""

    customer: Customer


class CustomerUpdated(msgspec.Struct, frozen=True, tag_field="type", tag="customer.updated"):
    """The customer's new state, whole."""

    customer: Customer


class CustomerDeleted(msgspec.Struct, frozen=True, tag_field="type", tag="customer.deleted"):
    """The customer may not be named any more; usage that named the customer stays."""

    id: str
    deleted_at: datetime


class MeterCreated(msgspec.Struct, frozen=True, tag_field="type", tag="meter.created"):
    """An organization measures something new, from the beginning of its events."""

    meter: Meter


class MeterUpdated(msgspec.Struct, frozen=True, tag_field="type", tag="meter.updated"):
    """The meter's new state, whole."""

    meter: Meter


class DeadLetterReplayed(msgspec.Struct, frozen=True, tag_field="type", tag="dead_letter.replayed"):
    """The line at this place, which could not be counted, was sent again or let go. Keeps the list short."""

    log_partition: int
    log_offset: int
    line: int
    replayed_at: datetime


class RecordsGivenUp(msgspec.Struct, frozen=True, tag_field="type", tag="records.given_up"):
    """An operator decided that these records, which left the log before they were counted, are never counted.

    They are those of a partition of ``usage.events`` from offset ``position`` up to ``start``. ``by`` names the user of
    the operating system and the machine.
    """

    log_partition: int
    position: int
    start: int
    given_up_at: datetime
    by: str

    @property
    def words(self) -> str:
        """What was given up, when and by whom."""
        records = self.start - self.position
        return (
            f"{records} records of usage.events, {self.log_partition}:{self.position} up to {self.start}, were given "
            f"up on {self.given_up_at:%Y-%m-%d %H:%M} UTC by {self.by}: they are not in any total"
        )


_MeterChange = MeterCreated | MeterUpdated
_PlainChange = (
    OrganizationCreated
    | TokenCreated
    | TokenRevoked
    | CustomerCreated
    | CustomerUpdated
    | CustomerDeleted
    | DeadLetterReplayed
    | RecordsGivenUp
    | CreditChange
    | MeterPriced
    | SubscriptionPriced
    | BenefitChange
    | DeliveryApplied
    | SessionChange
    | WebhookChange
)
Change = _MeterChange | _PlainChange

# One decoder for each type: a decoder of the union would compare all types for each line.
_PLAIN_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    str(kind.__struct_config__.tag): exact.decoder(kind) for kind in get_args(_PlainChange)
}
_METER_CHANGES: dict[str, type[MeterCreated] | type[MeterUpdated]] = {
    str(kind.__struct_config__.tag): kind for kind in get_args(_MeterChange)
}


class _Typed(msgspec.Struct):
    type: str


_TYPE = msgspec.json.Decoder(_Typed)


def encode_change(change: Change) -> bytes:
    """One line of JSON, without the newline."""
    if isinstance(change, _MeterChange):
        return exact.encode({"type": change.__struct_config__.tag, "meter": meter_json(change.meter)})
    return exact.encode(change)


def encode_changes(changes: Iterable[Change]) -> bytes:
    """A record's value: a line for each, all of them decided or none."""
    return b"\n".join(map(encode_change, changes))


def decode_changes(value: bytes) -> list[Change]:
    """The changes of a record, in their order, without those that this version does not know. Raises ValueError."""
    return [change for line in value.split(b"\n") if (change := decode_change(line)) is not None]


def decode_change(line: bytes) -> Change | None:
    """The change that a line states; None for a type that this version does not know, and for an empty line.

    A log that may have holes gives an empty record where nothing but the marker of a transaction is. Raises ValueError
    for what is no change at all: only our own processes write the control stream, so that is damage.
    """
    if not line:
        return None
    type_ = _TYPE.decode(line).type
    if type_ in _METER_CHANGES:
        return _METER_CHANGES[type_](meter_from_json(exact.decode(line).get("meter")))
    decoder = _PLAIN_DECODERS.get(type_)
    if decoder is None:
        return None
    change: Change = decoder.decode(line)
    return change


def meter_json(meter: Meter) -> dict[str, Any]:
    """A meter in Polar's shape, filter and all."""
    record = {name: getattr(meter, name) for name in meter.__struct_fields__}
    aggregation: dict[str, Any] = {"func": meter.aggregation.func}
    if meter.aggregation.property is not None:
        aggregation["property"] = written(meter.aggregation.property)
    return record | {"filter": filter_json(meter.filter), "aggregation": aggregation}


class _MeterRecord(Meter, frozen=True, kw_only=True):
    filter: Any


def meter_from_json(record: object) -> Meter:
    """The inverse of ``meter_json``. Raises ValueError for what is no meter."""
    held = msgspec.convert(record, _MeterRecord)
    filter = parse_filter(held.filter)
    if not isinstance(filter, Filter):
        raise ValueError(f"a stored meter's filter is refused: {filter}")
    fields = {name: getattr(held, name) for name in Meter.__struct_fields__}
    func, property = held.aggregation.func, held.aggregation.property
    aggregation = Aggregation(func, property and property.removeprefix(PREFIX))
    return Meter(**fields | {"filter": filter, "aggregation": aggregation})


class Names(NamedTuple):
    """How events may name one customer or several: by ids, and by external ids."""

    ids: tuple[str, ...]
    external_ids: tuple[str, ...]


class Catalogue:
    """The decisions so far. Read by everyone, changed by ``apply`` alone, in the order of the control stream."""

    def __init__(self, changes: Iterable[Change] = ()) -> None:
        self.organizations: dict[str, Organization] = {}
        self.tokens: dict[str, Token] = {}  # by sha256
        self.customers: dict[str, Customer] = {}
        self.meters: dict[str, Meter] = {}
        self.prices = Prices()
        self.given_up: dict[tuple[int, int, int], RecordsGivenUp] = {}
        self.benefits, self.sessions, self.webhooks, self.mirror = Benefits(), Sessions(), Webhooks(), Mirror()
        self._external: dict[tuple[str, str], str] = {}  # ids of customers, by organization and external id
        self._former: dict[str, tuple[str, ...]] = {}  # further external ids of a customer
        self._joined = Joined()
        self._emails: dict[tuple[str, str], dict[str, None]] = {}  # whose an address is, in lower case
        self._meters: dict[str, dict[str, Meter]] = {}
        self._living: dict[str, dict[str, Customer]] = {}
        for change in changes:
            self.apply(change)

    def apply(self, change: Change) -> None:
        """Take in one change; taking it in again changes nothing."""
        match change:
            case OrganizationCreated(organization):
                self.organizations[organization.id] = organization
            case TokenCreated(token):
                self.tokens.setdefault(token.sha256, token)
            case TokenRevoked(id, revoked_at):
                self._revoke(id, revoked_at)
            case CustomerCreated(customer) | CustomerUpdated(customer):
                self._put(customer)
            case CustomerDeleted(id, deleted_at):
                if id in self.customers:
                    self._put(msgspec.structs.replace(self.customers[id], deleted_at=deleted_at))
            case MeterCreated(meter) | MeterUpdated(meter):
                self.meters[meter.id] = meter
                self._meters.setdefault(meter.organization_id, {})[meter.id] = meter
            case DeadLetterReplayed():
                pass  # concerns the store alone
            case RecordsGivenUp():
                self.given_up.setdefault((change.log_partition, change.position, change.start), change)
            case CustomersJoined():
                self._join(change)
            case _:
                for part in (self.prices, self.benefits, self.sessions, self.webhooks, self.mirror):
                    part.apply(change)

    def _revoke(self, id: str, revoked_at: datetime) -> None:
        for token in self.tokens.values():
            if token.id == id:
                self.tokens[token.sha256] = msgspec.structs.replace(token, revoked_at=revoked_at)
                return

    def _join(self, change: CustomersJoined) -> None:
        """Give the names of a customer to another one; the first is not one of its own any more."""
        into = self._joined.join(change)
        retired = self.customers.get(change.id)
        if into is not None and retired is not None:
            names = self.names_of(retired).external_ids
            names = tuple(name for name in names if self._external.get((retired.organization_id, name)) == retired.id)
            self._put(msgspec.structs.replace(retired, deleted_at=retired.deleted_at or change.at))
            self._former[into] = (*self._former.get(into, ()), *names)
            self._external.update(((retired.organization_id, name), into) for name in names)
        for part in (self.benefits, self.mirror):
            part.apply(change)

    def _put(self, customer: Customer) -> None:
        organization_id, id, known = customer.organization_id, customer.id, self.customers.get(customer.id)
        if customer.deleted_at is None and self._joined.customer_of(organization_id, id) != id:
            return  # decided before the customer became another one
        if known and known.external_id not in (None, customer.external_id):
            self._former[id] = (*self._former.get(id, ()), known.external_id)
        if known and known.email is not None:
            address = (known.organization_id, known.email.lower())
            if owners := self._emails.get(address):
                owners.pop(known.id, None)
                if not owners:
                    del self._emails[address]
        self.customers[id] = customer
        living = self._living.setdefault(organization_id, {})
        if customer.deleted_at is None:
            living[id] = customer
            if customer.email is not None:
                self._emails.setdefault((organization_id, customer.email.lower()), {})[id] = None
            if customer.external_id is not None:
                self._external[organization_id, customer.external_id] = id
        else:
            living.pop(id, None)
            for name in self.names_of(customer).external_ids:
                if self._external.get((organization_id, name)) == id:  # another may have the name by now
                    del self._external[organization_id, name]

    def customer(self, organization_id: str, id: str) -> Customer | None:
        """The organization's customer that this id names, unless deleted: of this id, or joined with the one of it."""
        found = self.customers.get(id)
        if found is None or found.deleted_at:
            found = self.customers.get(self._joined.customer_of(organization_id, id))
        return found if found and found.organization_id == organization_id and not found.deleted_at else None

    def customer_named(self, organization_id: str, id: str) -> str:
        """The id of the customer that an id names, whether there is such a customer or not."""
        return self._joined.customer_of(organization_id, id)

    def names_of(self, customer: Customer) -> "Names":
        """Every name under which usage is the customer's, its present external id and its own id first."""
        organization_id, id = customer.organization_id, customer.id
        former = [name for name in self._former.get(id, ()) if self._external.get((organization_id, name)) == id]
        externals = dict.fromkeys(name for name in (customer.external_id, *former) if name is not None)
        return Names((id, *self._joined.others(organization_id, id)), tuple(externals))

    def customers_of(self, organization_id: str) -> list[Customer]:
        """The organization's customers, oldest first, without those that are deleted."""
        return list(self._living.get(organization_id, {}).values())

    def customer_by_external_id(self, organization_id: str, external_id: str) -> Customer | None:
        """The organization's customer that it calls so itself, or called so before, unless deleted."""
        return self.customers.get(self._external.get((organization_id, external_id), ""))

    def customers_by_email(self, organization_id: str, email: str) -> list[str]:
        """The ids of the organization's customers with this address, whatever its case, without the deleted ones.

        Here an address is given once; Polar tells of customers who share one.
        """
        return list(self._emails.get((organization_id, email.lower()), ()))

    def meter(self, organization_id: str, id: str) -> Meter | None:
        """The organization's meter of this id, archived or not."""
        found = self.meters.get(id)
        return found if found and found.organization_id == organization_id else None

    def meters_of(self, organization_id: str) -> list[Meter]:
        """The organization's meters, archived ones too, in the order of their creation."""
        return list(self._meters.get(organization_id, {}).values())

    def currency(self, organization_id: str, *, but: str = "") -> str | None:
        """Return the currency of the organization's prices; None while nothing has a price.

        Prices of meters count, and those of active subscriptions. ``but`` is the id of a meter or subscription whose
        prices do not count, because they are about to change.
        """
        meters = [self.prices.of(meter.id) for meter in self.meters_of(organization_id) if meter.id != but]
        held = [one.id for one in self.benefits.active_subscriptions(organization_id) if one.id != but]
        newest = [told[-1] for id in held if (told := self.prices.of_subscription(id))]
        prices = [*meters, *(one.price for told in newest for one in told.prices)]
        return next((price.currency for price in prices if price is not None), None)

    def names(
        self, organization_id: str, customer_ids: Iterable[str], external_ids: Iterable[str]
    ) -> "Names":  # fmt: skip
        """Every name of the customers asked for, each once.

        A name that no customer has stays: usage may carry it all the same.
        """
        ids, externals = dict.fromkeys(customer_ids), dict.fromkeys(external_ids)
        found = [self.customer(organization_id, id) for id in ids]
        found += [self.customer_by_external_id(organization_id, name) for name in externals]
        for customer in filter(None, found):
            more = self.names_of(customer)
            ids.update(dict.fromkeys(more.ids))
            externals.update(dict.fromkeys(more.external_ids))
        return Names(tuple(ids), tuple(externals))
