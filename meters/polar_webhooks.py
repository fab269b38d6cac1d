"""Polar's webhook payloads, read as facts and decisions.

``read`` turns a payload into ``News``: the decisions to write (facts of ``meters.catalogue.polar_facts``; changes of
customers, benefits, grants and subscriptions) and the customers that the payload concerns. It raises ``Unreadable``
for a payload of another form. ``meter_of`` and ``meters_here`` map Polar's meters to meters here. Types that concern
neither usage nor credits are skipped.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from msgspec.structs import replace

from meters.catalogue.catalogue import (
    INDIVIDUAL,
    TEAM,
    Catalogue,
    Change,
    Customer,
    CustomerCreated,
    CustomerDeleted,
    CustomerUpdated,
)
from meters.catalogue.polar_facts import GONE, Credited, DeliveryApplied, Fact, Known, Linked, Period, Revoked, Told
from meters.event import is_storable
from meters.ledger.benefits import METER_CREDIT, Benefit, BenefitSet, Grant, GrantSet, Subscription, SubscriptionSet
from meters.ledger.joined import CustomersJoined
from meters.ledger.price import ProductPrice, SubscriptionPriced, parse_price
from meters.meter import Meter
from meters.timestamps import sortable_text

# Mapping of meters. What Polar stated is stored under Polar's id of the meter, because the mapping to a meter here
# may be set later, and may change. So every reader applies the mapping when it reads.

METER_KEY = "polar_meter_id"
"""The key of a meter's metadata that says which of Polar's meters it is, where its id is another one."""

BenefitOrGrant = TypeVar("BenefitOrGrant", Benefit, Grant)


def meter_of(catalogue: Catalogue, organization_id: str, polar_id: str) -> Meter | None:
    """The organization's meter that is Polar's: of the same id, or said to be so in its metadata."""
    if (same := catalogue.meter(organization_id, polar_id)) is not None:
        return same
    return next((one for one in catalogue.meters_of(organization_id) if one.metadata.get(METER_KEY) == polar_id), None)


def meters_here(catalogue: Catalogue, organization_id: str, polar_ids: Iterable[str]) -> list[str]:
    """The ids of the meters here that these are, each once, without those that are not known here."""
    found = (meter_of(catalogue, organization_id, polar_id) for polar_id in polar_ids)
    return list(dict.fromkeys(meter.id for meter in found if meter is not None))


def here(catalogue: Catalogue, thing: BenefitOrGrant) -> BenefitOrGrant:
    """The same with the id that its meter has here; with Polar's, while the meter is not known."""
    name = "meter_id" if isinstance(thing, Benefit) else "last_credited_meter_id"
    known = meters_here(catalogue, thing.organization_id, filter(None, [getattr(thing, name)]))
    return replace(thing, **{name: known[0]}) if known else thing


# Payloads. A customer of Polar's is the customer here with its id, or else with its external id. If there is none,
# one is created with Polar's id; when that customer later gets an external id that exists here, both are merged.
# Deletions go by id alone. The newest state of an object wins, and a deletion is newer than every state.

T = TypeVar("T")


class Unreadable(ValueError):
    """The payload is not of the shape that its type has; the message says where."""


class _Customer(msgspec.Struct):
    id: str
    created_at: datetime
    modified_at: datetime | None = None
    deleted_at: datetime | None = None
    type: str | None = None
    external_id: str | None = None
    email: str | None = None
    name: str | None = None
    metadata: dict[str, Any] = {}


class _Benefit(msgspec.Struct):
    id: str
    type: str
    created_at: datetime
    modified_at: datetime | None = None
    is_deleted: bool = False
    description: str = ""
    metadata: dict[str, Any] = {}
    properties: dict[str, Any] = {}


class _GrantProperties(msgspec.Struct):
    last_credited_meter_id: str | None = None
    last_credited_units: int | None = None
    last_credited_at: datetime | None = None


class _Grant(msgspec.Struct):
    id: str
    created_at: datetime
    customer_id: str
    benefit: _Benefit
    modified_at: datetime | None = None
    granted_at: datetime | None = None
    revoked_at: datetime | None = None
    is_granted: bool = True
    is_revoked: bool = False
    subscription_id: str | None = None
    customer: _Customer | None = None
    properties: _GrantProperties | None = None
    previous_properties: _GrantProperties | None = None


class _Priced(msgspec.Struct):
    id: str | None = None
    meter_id: str | None = None
    unit_amount: Any = None
    cap_amount: Any = None
    price_currency: str | None = None


class _Subscription(msgspec.Struct):
    id: str
    created_at: datetime
    status: str
    customer_id: str
    product_id: str
    current_period_start: datetime
    amount: int = 0
    currency: str = "usd"
    recurring_interval: str = "month"
    modified_at: datetime | None = None
    current_period_end: datetime | None = None
    current_meter_period_start: datetime | None = None
    current_meter_period_end: datetime | None = None
    trial_start: datetime | None = None
    trial_end: datetime | None = None
    cancel_at_period_end: bool = False
    canceled_at: datetime | None = None
    started_at: datetime | None = None
    ends_at: datetime | None = None
    ended_at: datetime | None = None
    discount_id: str | None = None
    seats: int | None = None
    units: int | None = None
    custom_field_data: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    customer: _Customer | None = None
    prices: list[_Priced] = []
    meters: list[_Priced] = []


class _Order(msgspec.Struct):
    customer: _Customer


class News(NamedTuple):
    """What a delivery makes: decisions, the last of which remembers the delivery, and whom it concerns.

    There are no decisions where all of it was known before. It concerns Polar's customer, and the customers here that
    it is and was. ``notes`` says what of it is not taken, and why.
    """

    changes: list[Change]
    polar_customer_id: str
    customer_ids: list[str]
    notes: list[str]


def _must_be_uuid(id: str) -> None:
    try:
        is_one = str(UUID(id)) == id.lower()
    except ValueError:
        is_one = False
    if not is_one:
        raise Unreadable("a customer's id should be a UUID")


class _Reading:
    """One delivery on its way to decisions."""

    def __init__(self, catalogue: Catalogue, organization_id: str, now: datetime) -> None:
        self.catalogue, self.organization_id, self.now = catalogue, organization_id, now
        self.facts: list[Fact] = []
        self.periods: list[Period] = []
        self.changes: list[Change] = []
        self.notes: list[str] = []
        self.polar_id = self.customer_id = ""

    def _is_news(self, thing: str, version: str) -> bool:
        fact = Known(thing, version)
        is_news = self.catalogue.mirror.is_news(self.organization_id, fact)
        if is_news:
            self.facts.append(fact)
        return is_news

    def customer(self, told: _Customer, *, is_gone: bool = False) -> None:
        if is_gone or told.deleted_at is not None:
            self._gone(told)
            return
        if told.external_id is not None and not is_storable(told.external_id):
            raise Unreadable("external_id has a character that no event can hold")
        told.external_id = told.external_id or None  # an empty one names nobody
        self.polar_id = told.id
        known, is_news = self._linked(told.id), self._is_news(f"customer:{told.id}", _version(told))
        if known is None or (is_news and known.id == told.id):
            known = self._named(told) or known
        self.customer_id = known.id if known else told.id
        if known or is_news:
            self.facts.append(Linked(told.id, self.customer_id))
            self._join(told.id, self.customer_id)
        if not is_news:
            return
        if known is not None and self._is_older(told, known):
            return
        fields: dict[str, Any] = {
            "type": TEAM if told.type == TEAM else INDIVIDUAL,
            "email": told.email,
            "name": told.name,
            "metadata": told.metadata,
            "modified_at": _utc(told.modified_at),
            "external_id": self._external_id(told, known),
        }
        if known is not None:
            self.changes.append(CustomerUpdated(replace(known, **fields)))
        else:
            _must_be_uuid(told.id)  # as every id of Polar's is, and as our own ids are made of
            made = Customer(
                id=told.id, organization_id=self.organization_id, created_at=_utc(told.created_at) or self.now, **fields
            )  # fmt: skip
            self.changes.append(CustomerCreated(made))

    def _external_id(self, told: _Customer, known: Customer | None) -> str | None:
        """Polar's, if it has one that is nobody else's here; otherwise the known one, which once given stays."""
        stays = known.external_id if known else None
        if told.external_id is None:
            return stays
        holder = self._called(told.external_id)
        return told.external_id if holder is None or holder.id == self.customer_id else stays

    def _is_older(self, told: _Customer, known: Customer) -> bool:
        """Whether another of Polar's customers that are this one here was told of in a newer state."""
        mirror = self.catalogue.mirror
        others = (f"customer:{id}" for id in mirror.living(known.id) if id != told.id)
        return _version(told) < mirror.newest(self.organization_id, others)

    def _gone(self, told: _Customer) -> None:
        """The customer here goes with Polar's, unless another one of Polar's is the same customer here.

        The external id says nothing of who goes: somebody else may have it by the time that this is heard.
        """
        known = self._linked(told.id)
        self.polar_id, self.customer_id = told.id, known.id if known else told.id
        is_news = self._is_news(f"customer:{told.id}", GONE)
        living = self.catalogue.mirror.living(self.customer_id)
        if known is not None and is_news and all(id == told.id for id in living):
            self.changes.append(CustomerDeleted(known.id, _utc(told.deleted_at) or self.now))

    def _named(self, told: _Customer) -> Customer | None:
        """Who has the external id; nobody's is that of a customer who is deleted."""
        if told.external_id is None or self.catalogue.mirror.is_gone(self.organization_id, f"customer:{told.id}"):
            return None
        return self._called(told.external_id)

    def _called(self, external_id: str) -> Customer | None:
        """Who has the external id now. Who had it before is another customer of Polar's."""
        found = self.catalogue.customer_by_external_id(self.organization_id, external_id)
        return found if found is not None and found.external_id == external_id else None

    def _join(self, polar_id: str, customer_id: str) -> None:
        """Let Polar's id name the customer here, with everything that is known under it."""
        if self.catalogue.customer_named(self.organization_id, polar_id) != customer_id:
            self.changes.append(
                CustomersJoined(organization_id=self.organization_id, id=polar_id, into=customer_id, at=self.now)
            )

    def _linked(self, polar_id: str) -> Customer | None:
        linked = self.catalogue.mirror.linked(self.organization_id, polar_id) or polar_id
        for id in (polar_id, linked):
            _own(self.catalogue.customers.get(id), self.organization_id)
        return self.catalogue.customer(self.organization_id, linked)

    def _whose(self, told: _Customer | None, polar_id: str) -> str:
        if told is not None:
            self.customer(told)
        self.polar_id = polar_id
        self.customer_id = self.customer_id or self.catalogue.mirror.linked(self.organization_id, polar_id) or polar_id
        return self.customer_id

    def grant(self, told: _Grant) -> None:
        """What the grant credited; an end took it back if the properties now say negative units, and if not, not.

        Where they say no units, as in payloads of others than Polar, an end takes back what was credited last.
        """
        if told.benefit.type != METER_CREDIT:
            return
        customer_id = self._whose(told.customer, told.customer_id)
        given = _read(told.benefit.properties, _Given)
        for properties in (told.previous_properties, told.properties):
            if properties is not None and properties.last_credited_at is not None and properties.last_credited_units:
                self.facts.append(Credited(
                    told.customer_id, properties.last_credited_meter_id or given.meter_id, told.id,
                    _at(properties.last_credited_at), properties.last_credited_units, given.rollover,
                    _at(told.modified_at or told.created_at),
                ))  # fmt: skip
        if told.is_revoked and told.revoked_at is not None:
            says_units = told.properties is not None and bool(told.properties.last_credited_units)
            self.facts.append(Revoked(told.id, _at(told.revoked_at), takes=not says_units))
        self.benefit(told.benefit)
        self._held(told, customer_id)

    def benefit(self, told: _Benefit) -> None:
        """What the benefit gives now, or that it is no more."""
        if told.type != METER_CREDIT:
            return
        given = _read(told.properties, _Given)
        _own(self.catalogue.benefits.benefits.get(told.id), self.organization_id)
        if self._is_news(f"benefit:{told.id}", GONE if told.is_deleted else _version(told)):
            self.changes.append(BenefitSet(Benefit(
                id=told.id, organization_id=self.organization_id, description=told.description, units=given.units,
                meter_id=given.meter_id, rollover=given.rollover, metadata=told.metadata,
                created_at=_at(told.created_at), modified_at=_utc(told.modified_at),
                deleted_at=_at(told.modified_at or told.created_at) if told.is_deleted else None,
            )))  # fmt: skip

    def _held(self, told: _Grant, customer_id: str) -> None:
        _own(self.catalogue.benefits.grants.get(told.id), self.organization_id)
        if not self._is_news(f"grant:{told.id}", _version(told)):
            return
        last = told.properties if told.properties and told.properties.last_credited_at else told.previous_properties
        last = last or _GrantProperties()
        revoked_at = _utc(told.revoked_at) if told.is_revoked else None
        self.changes.append(GrantSet(Grant(
            id=told.id, organization_id=self.organization_id, benefit_id=told.benefit.id, customer_id=customer_id,
            created_at=_at(told.created_at), granted_at=_at(told.granted_at or told.created_at),
            modified_at=_utc(told.modified_at), revoked_at=revoked_at, is_granted=told.is_granted,
            subscription_id=told.subscription_id,
            last_credited_meter_id=last.last_credited_meter_id,
            last_credited_units=last.last_credited_units, last_credited_at=_utc(last.last_credited_at),
        )))  # fmt: skip

    def subscription(self, told: _Subscription) -> None:
        customer_id = self._whose(told.customer, told.customer_id)
        _own(self.catalogue.benefits.subscriptions.get(told.id), self.organization_id)
        priced = list(dict.fromkeys(one.meter_id for one in (*told.prices, *told.meters) if one.meter_id))
        told_times = (told.current_period_start, told.current_meter_period_start, told.ended_at)
        starts = sorted({_at(time) for time in told_times if time is not None})
        changed = _at(told.modified_at or told.created_at)
        self.periods += [Period(told.id, told.customer_id, at, sorted(priced), changed) for at in starts]
        self._prices(told, changed)
        if self._is_news(f"subscription:{told.id}", _version(told)):
            shared = set(_Subscription.__struct_fields__) & set(Subscription.__struct_fields__)
            fields = {name: _plain(getattr(told, name)) for name in shared}
            fields |= {
                "organization_id": self.organization_id,
                "customer_id": customer_id,
                "meter_ids": priced,
                "price_id": next((one.id for one in told.prices), None),
            }
            self.changes.append(SubscriptionSet(Subscription(**fields)))

    def _prices(self, told: _Subscription, changed: datetime) -> None:
        """The prices that the subscription pays from this state on. One that cannot be taken is kept as not known."""
        currency, prices = self.catalogue.currency(self.organization_id, but=told.id), list[ProductPrice]()
        metered = {one.meter_id: one for one in (*told.meters, *told.prices) if one.meter_id is not None}
        for meter_id, one in metered.items():
            stated = {"unit_amount": one.unit_amount, "cap_amount": one.cap_amount,
                      "currency": one.price_currency or told.currency}  # fmt: skip
            price = parse_price(stated)
            if isinstance(price, list):
                self.notes.append(f"the price of Polar's meter {meter_id} is not taken: {price[0]['msg']}")
            elif currency is not None and price.currency != currency:
                self.notes.append(
                    f"the price of Polar's meter {meter_id} is not taken: it is in {price.currency}, and this "
                    f"organization's prices are in {currency}; an organization has one currency"
                )
            else:
                currency = price.currency
                prices.append(ProductPrice(meter_id=meter_id, price=price))
                continue
            prices.append(ProductPrice(meter_id=meter_id, price=None))
        priced = SubscriptionPriced(
            organization_id=self.organization_id, subscription_id=told.id, product_id=told.product_id, at=changed,
            prices=prices,
        )  # fmt: skip
        if self.catalogue.prices.is_news(priced):
            self.changes.append(priced)

    def decisions(self, delivery_id: str, kind: str) -> list[Change]:
        """What there is to decide. Polar tells the same again and again; what is known already is not kept again."""
        facts, periods = list(filter(self._adds, self.facts)), list(filter(self._adds, self.periods))
        if not (self.changes or facts or periods):
            return []
        applied = DeliveryApplied(
            organization_id=self.organization_id, delivery_id=delivery_id, kind=kind, at=self.now, facts=facts,
            periods=periods,
        )  # fmt: skip
        return [*self.changes, applied]

    def _adds(self, told: Told) -> bool:
        return self.catalogue.mirror.is_news(self.organization_id, told)


class _Given(msgspec.Struct):
    meter_id: str
    units: int
    rollover: bool = False


def read(
    catalogue: Catalogue, organization_id: str, *, delivery_id: str, kind: str, data: object, now: datetime
) -> News | None:
    """What a delivery of a type makes; None for a type that is passed over. Raises Unreadable."""
    reading = _Reading(catalogue, organization_id, now)
    handlers: dict[str, Callable[[], None]] = {
        "customer": lambda: reading.customer(_read(data, _Customer), is_gone=kind == "customer.deleted"),
        "benefit": lambda: reading.benefit(_read(data, _Benefit)),
        "benefit_grant": lambda: reading.grant(_read(data, _Grant)),
        "subscription": lambda: reading.subscription(_read(data, _Subscription)),
        "order": lambda: reading.customer(_read(data, _Order).customer),
    }
    resource, _, event = kind.partition(".")
    if resource not in handlers or (resource == "order" and event != "paid"):
        return None
    handlers[resource]()
    once = catalogue.mirror.once(organization_id, reading.polar_id)
    concerned = sorted({reading.polar_id, reading.customer_id, *once})
    return News(reading.decisions(delivery_id, kind), reading.polar_id, concerned, reading.notes)


def _own(thing: Any, organization_id: str) -> None:
    """Whatever carries this id belongs to the organization. Raises Unreadable."""
    if thing is not None and thing.organization_id != organization_id:
        raise Unreadable("this id is another's")


_FREE_KEYS = ("metadata", "custom_field_data")  # whose inner fields are the application's
_DEPTH_MAX = 6
"""Levels of a payload that are read: a grant's benefit's properties are on the third."""


def _without_nulls(value: object, depth: int = _DEPTH_MAX) -> object:
    """Return the value without fields that are null: Polar writes null for what it leaves out."""
    if depth == 0:
        return value
    if isinstance(value, list):
        return [_without_nulls(item, depth - 1) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inner if key in _FREE_KEYS else _without_nulls(inner, depth - 1)
        for key, inner in value.items()
        if inner is not None
    }


def _read(value: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(_without_nulls(value), kind)
    except msgspec.ValidationError as error:
        raise Unreadable(str(error)) from error


def _version(thing: _Customer | _Benefit | _Grant | _Subscription) -> str:
    return sortable_text(_at(thing.modified_at or thing.created_at))


def _at(instant: datetime) -> datetime:
    """In UTC; Polar's times without an offset are. Raises Unreadable."""
    try:
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except OverflowError as error:
        raise Unreadable("a time is out of range") from error


def _utc(instant: datetime | None) -> datetime | None:
    return None if instant is None else _at(instant)


def _plain(value: Any) -> Any:
    return _at(value) if isinstance(value, datetime) else value
