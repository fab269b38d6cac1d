"""Facts about customers that Polar's webhooks state, merged independently of their order.

``meters.polar_webhooks`` reads a delivery into facts (``Known``, ``Linked``, ``Credited``, ``Revoked``) and periods.
Those that are new are stored in the control stream as one ``DeliveryApplied``. ``Mirror`` merges all facts and
derives from them the credits and resets (``Wanted``) that the ledger should have for a customer and a meter.

Polar may deliver webhooks late, twice and in any order. So a fact names the version of the object that states it, and
the result depends on the set of facts alone.
"""

from collections import deque
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

import msgspec

from meters.ledger.joined import CustomersJoined

RECENT_MAX = 200
"""Deliveries of an organization that are shown: a day's worth of news for some hundred customers."""

GONE = "deleted"
"""The last state of a thing: later than every time."""


class Known(msgspec.Struct, frozen=True, tag_field="fact", tag="known"):
    """Of a thing (such as ``customer:ID``) this state was heard. States are ordered as texts."""

    thing: str
    version: str


class Linked(msgspec.Struct, frozen=True, tag_field="fact", tag="linked"):
    """Polar's customer is this one here."""

    polar_id: str
    customer_id: str


class Credited(msgspec.Struct, frozen=True, tag_field="fact", tag="credited"):
    """A grant credited units, or took back where they are negative what it had credited last.

    ``told`` is the state of the grant that says so: the first one after it is right. Later ones speak of what the
    benefit has become meanwhile.
    """

    polar_customer_id: str
    meter_id: str
    grant_id: str
    at: datetime
    units: int
    rollover: bool
    told: datetime


class Revoked(msgspec.Struct, frozen=True, tag_field="fact", tag="revoked"):
    """A grant ended. ``takes``: with what it credited last, if that is there still.

    Otherwise its units stay, or a ``Credited`` says that they went. Of one end that is told both ways it does not take.
    """

    grant_id: str
    at: datetime
    takes: bool


class Period(msgspec.Struct, frozen=True):
    """A subscription of Polar's customer began a period at a time, or ended, with a price for these of Polar's meters.

    ``told`` is the state of the subscription that says so: the first one after it is right. A product that it is
    changed to in the middle of a period begins nothing anew.
    """

    subscription_id: str
    polar_customer_id: str
    at: datetime
    meter_ids: list[str]
    told: datetime


Fact = Known | Linked | Credited | Revoked
Told = Fact | Period


class DeliveryApplied(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="polar.delivered"):
    """A webhook of Polar's was taken in, and this of it was news. One that tells nothing new is not written down."""

    organization_id: str
    delivery_id: str
    kind: str
    at: datetime
    facts: list[Fact] = []
    periods: list[Period] = []


PolarKey = tuple[str, str]
"""An organization with an id of Polar's."""


class Story(msgspec.Struct):
    """What is known of one customer and one of Polar's meters."""

    began: set[datetime] = msgspec.field(default_factory=set)
    credited: dict[tuple[str, datetime], Credited] = {}

    def take_in(self, other: "Story") -> None:
        """Know what another one knows, too."""
        self.began |= other.began
        for fact in list(other.credited.values()):
            self.credit(fact)

    def credit(self, fact: Credited) -> None:
        """Know of a credit, as it was told first."""
        if self.is_news(fact):
            self.credited[fact.grant_id, fact.at] = fact

    def is_news(self, fact: Credited) -> bool:
        """Whether nobody told of the credit yet, or only later."""
        known = self.credited.get((fact.grant_id, fact.at))
        return known is None or _first_told(fact) < _first_told(known)


class Given(NamedTuple):
    """Units that should be in the ledger. ``revoked`` is when they went again, where no units of their own say so."""

    fact: Credited
    is_cycle: bool
    revoked: datetime | None


class Wanted(NamedTuple):
    """What the ledger should have of a customer's meter, in the order of time."""

    given: list[Given]
    cuts: list[datetime]


class Mirror:
    """The facts so far, folded. They are of Polar's customers: whose they are here follows when it is asked.

    Asked in one thread while another one applies: what is looked at is copied first.
    """

    def __init__(self) -> None:
        self._deliveries: set[PolarKey] = set()
        self._versions: dict[PolarKey, str] = {}
        self._links: dict[PolarKey, tuple[str, ...]] = {}  # the customers here that Polar's was, the last it is
        self._names: dict[str, tuple[PolarKey, ...]] = {}  # Polar's ids that were ever linked to one here
        self._stories: dict[PolarKey, dict[str, Story]] = {}  # by customer and Polar's meter
        self._periods: dict[PolarKey, dict[tuple[str, datetime], Period]] = {}  # by customer, as told first
        self._credited: dict[str, dict[str, dict[PolarKey, None]]] = {}  # customers by organization and Polar's meter
        self._recent: dict[str, deque[DeliveryApplied]] = {}  # by organization, the newest last, without facts
        self._revoked: dict[str, dict[datetime, bool]] = {}  # by grant: when it ended, and whether that takes

    def apply(self, change: object) -> None:
        """Take in one change; others than the above are somebody else's."""
        if isinstance(change, DeliveryApplied):
            self._deliveries.add((change.organization_id, change.delivery_id))
            recent = self._recent.setdefault(change.organization_id, deque(maxlen=RECENT_MAX))
            recent.append(msgspec.structs.replace(change, facts=[], periods=[]))
            for told in (*change.facts, *change.periods):
                if self.is_news(change.organization_id, told):
                    self._learn(change.organization_id, told)
        elif isinstance(change, CustomersJoined) and change.id != change.into:
            for key in self._names.get(change.id, ()):
                if self._links[key][-1] == change.id:
                    self._link(key, change.into)

    def is_news(self, organization_id: str, told: Told) -> bool:
        """Whether it adds anything to what is known. What does not now never will; of links the last one holds."""
        match told:
            case Known(thing, version):
                return version > self._versions.get((organization_id, thing), "")
            case Linked(polar_id, customer_id):
                return customer_id != self.linked(organization_id, polar_id)
            case Credited(polar_customer_id, meter_id):
                story = self._stories.get((organization_id, polar_customer_id), {}).get(meter_id)
                return story is None or story.is_news(told)
            case Revoked(grant_id, at, takes):
                took = self._revoked.get(grant_id, {}).get(at)
                return took is None or (took and not takes)
            case Period(subscription_id, polar_customer_id, at):
                period = self._periods.get((organization_id, polar_customer_id), {}).get((subscription_id, at))
                return period is None or (told.told, told.meter_ids) < (period.told, period.meter_ids)

    def _learn(self, organization_id: str, told: Told) -> None:
        match told:
            case Known(thing, version):
                self._versions[organization_id, thing] = version
            case Linked(polar_id, customer_id):
                self._link((organization_id, polar_id), customer_id)
            case Credited(polar_customer_id, meter_id):
                stories = self._stories.setdefault((organization_id, polar_customer_id), {})
                stories.setdefault(meter_id, Story()).credit(told)
                credited = self._credited.setdefault(organization_id, {}).setdefault(meter_id, {})
                credited[organization_id, polar_customer_id] = None
            case Revoked(grant_id, at, takes):
                self._revoked.setdefault(grant_id, {})[at] = takes
            case Period(subscription_id, polar_customer_id, at):
                self._periods.setdefault((organization_id, polar_customer_id), {})[subscription_id, at] = told

    def _link(self, key: PolarKey, customer_id: str) -> None:
        self._links[key] = (*(id for id in self._links.get(key, ()) if id != customer_id), customer_id)
        names = self._names.get(customer_id, ())
        self._names[customer_id] = names if key in names else (*names, key)

    def heard(self, organization_id: str, delivery_id: str) -> bool:
        """Whether the delivery was taken in before."""
        return (organization_id, delivery_id) in self._deliveries

    def recent(self, organization_id: str) -> list[DeliveryApplied]:
        """Return the newest deliveries that were applied, oldest first, without their facts."""
        return list(self._recent.get(organization_id, ()))

    def credited_meters(self, organization_id: str) -> list[str]:
        """Return Polar's meters of which anybody was credited."""
        return list(self._credited.get(organization_id, ()))

    def credits(self, organization_id: str, meter_id: str) -> list[Credited]:
        """Return all credits of one of Polar's meters, of all customers."""
        keys = list(self._credited.get(organization_id, {}).get(meter_id, ()))
        return [fact for key in keys for fact in list(self._stories[key][meter_id].credited.values())]

    def is_mirrored(self, organization_id: str, thing: str) -> bool:
        """Whether the thing (such as ``grant:ID``) is Polar's: it is changed there, and the news of it come here."""
        return (organization_id, thing) in self._versions

    def newest(self, organization_id: str, things: Iterable[str]) -> str:
        """The newest state that was heard of any of the things; empty where nothing was."""
        return max((self._versions.get((organization_id, thing), "") for thing in things), default="")

    def linked(self, organization_id: str, polar_id: str) -> str | None:
        """The customer here that Polar's is."""
        once = self.once(organization_id, polar_id)
        return once[-1] if once else None

    def once(self, organization_id: str, polar_id: str) -> tuple[str, ...]:
        """The customers here that Polar's is or was, the present one last."""
        return self._links.get((organization_id, polar_id), ())

    def living(self, customer_id: str) -> list[str]:
        """Polar's customers that are this one here, without those that were deleted there."""
        return [polar_id for _, polar_id in self._keys(customer_id)]

    def _keys(self, customer_id: str) -> list[PolarKey]:
        """Where the facts of a customer here are."""
        names = self._names.get(customer_id, ())
        linked = [key for key in names if self._links[key][-1] == customer_id]
        return [key for key in linked if not self.is_gone(key[0], f"customer:{key[1]}")]

    def is_gone(self, organization_id: str, thing: str) -> bool:
        """Whether the thing was deleted at Polar."""
        return self._versions.get((organization_id, thing)) == GONE

    def meters(self, customer_id: str) -> Iterable[str]:
        """Polar's meters of which something is known for a customer."""
        return dict.fromkeys(id for key in self._keys(customer_id) for id in self._meters(key))

    def _meters(self, key: PolarKey) -> set[str]:
        priced = {id for period in list(self._periods.get(key, {}).values()) for id in period.meter_ids}
        return priced.union(list(self._stories.get(key, ())))

    def customers(self, meter_id: str) -> list[str]:
        """The customers of whom something is known for one of Polar's meters."""
        found = [key for key in {**self._stories, **self._periods} if meter_id in self._meters(key)]
        return [id for key in found for id in self._links.get(key, ())[-1:]]

    def wanted(self, customer_id: str, *meter_ids: str) -> Wanted:
        """What follows from all that is known of a customer and those of Polar's meters that are one meter here."""
        story, asked = Story(), set(meter_ids)
        for key in self._keys(customer_id):
            for meter_id in asked.intersection(list(self._stories.get(key, ()))):
                story.take_in(self._stories[key][meter_id])
            periods = list(self._periods.get(key, {}).values())
            story.began |= {period.at for period in periods if not asked.isdisjoint(period.meter_ids)}
        return self._wanted(story)

    def _wanted(self, story: Story) -> Wanted:
        cuts = set(story.began)
        given: list[Given] = []
        last: dict[str, int] = {}  # by grant: what it credited last, as a place in ``given``
        for fact in sorted(story.credited.values(), key=lambda fact: (fact.at, fact.grant_id)):
            place = last.get(fact.grant_id)
            before = None if place is None else given[place].fact
            is_cycle = before is not None and self._is_renewed(before, fact)
            if place is not None and before is not None:
                given[place] = given[place]._replace(revoked=self._taken_back(before, fact.at))
                if is_cycle and not any(before.at < cut <= fact.at for cut in cuts):
                    cuts.add(fact.at)
            last[fact.grant_id] = len(given)
            given.append(Given(fact, is_cycle, None))
        for place in last.values():
            given[place] = given[place]._replace(revoked=self._taken_back(given[place].fact, None))
        return Wanted(given, sorted(cuts))

    def _is_renewed(self, before: Credited, fact: Credited) -> bool:
        """Whether the credit renews the one before it: nothing was taken back, and the grant did not end between."""
        return before.units > 0 and fact.units > 0 and self._ended(before, fact.at) is None

    def _taken_back(self, fact: Credited, until: datetime | None) -> datetime | None:
        """When the grant's end took the credit back; what takes back itself stays."""
        at, takes = self._ended(fact, until) or (None, False)
        return at if takes and fact.units > 0 else None

    def _ended(self, fact: Credited, until: datetime | None) -> tuple[datetime, bool] | None:
        """When the grant first ended from one credit to before the next, and whether that takes the credit back."""
        ends = list(self._revoked.get(fact.grant_id, {}).items())
        return min((end for end in ends if end[0] >= fact.at and (until is None or end[0] < until)), default=None)


def _first_told(fact: Credited) -> tuple[datetime, int, bool]:
    return fact.told, fact.units, fact.rollover
