"""What Polar told, as facts, and what follows from all of them for a customer's credits.

Webhooks come late, twice and in any order. So a delivery is not carried out: it adds facts to a set (this was credited
then, this period began then), and the ledger is brought to what the whole set says. The newest state of a thing wins by
the time that Polar gives it, never by when it was heard.

Two kinds of cuts follow, as Polar makes them: a subscription with a price for a meter begins that meter anew with each
of its periods; a benefit that credits again begins it anew only where nothing else did since it credited last.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

import msgspec

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


class Began(msgspec.Struct, frozen=True, tag_field="fact", tag="began"):
    """A period of a subscription that has a price for the meter began, or its last one ended."""

    customer_id: str
    meter_id: str
    at: datetime


class Credited(msgspec.Struct, frozen=True, tag_field="fact", tag="credited"):
    """A grant credited units. ``told`` is the state of the grant that says so: the first one after it is right.

    Later ones speak of what the benefit has become meanwhile.
    """

    customer_id: str
    meter_id: str
    grant_id: str
    at: datetime
    units: int
    rollover: bool
    told: datetime


class Revoked(msgspec.Struct, frozen=True, tag_field="fact", tag="revoked"):
    """A grant was taken back, with what it credited last."""

    grant_id: str
    at: datetime


Fact = Known | Linked | Began | Credited | Revoked


class DeliveryApplied(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="polar.delivered"):
    """A webhook of Polar's was taken in."""

    organization_id: str
    delivery_id: str
    kind: str
    at: datetime
    facts: list[Fact] = []


class Story(msgspec.Struct):
    """What is known of one customer and one of Polar's meters."""

    began: set[datetime] = msgspec.field(default_factory=set)
    credited: dict[tuple[str, datetime], Credited] = {}


class Given(NamedTuple):
    """Units that should be in the ledger. ``revoked`` is when they were taken back again."""

    fact: Credited
    is_cycle: bool
    revoked: datetime | None


class Wanted(NamedTuple):
    """What the ledger should have of a customer's meter, in the order of time."""

    given: list[Given]
    cuts: list[datetime]


class Mirror:
    """The facts so far, folded."""

    def __init__(self) -> None:
        self._deliveries: set[tuple[str, str]] = set()
        self._versions: dict[tuple[str, str], str] = {}
        self._links: dict[tuple[str, str], str] = {}
        self._names: dict[tuple[str, str], dict[str, None]] = {}  # Polar's ids that were ever linked to one here
        self._stories: dict[str, dict[str, Story]] = {}  # by customer and Polar's meter
        self._revoked: dict[str, set[datetime]] = {}  # by grant

    def apply(self, change: object) -> None:
        """Take in one change; others than the above are somebody else's."""
        if isinstance(change, DeliveryApplied):
            self._deliveries.add((change.organization_id, change.delivery_id))
            for fact in change.facts:
                self._learn(change.organization_id, fact)

    def _learn(self, organization_id: str, fact: Fact) -> None:
        match fact:
            case Known(thing, version):
                place = organization_id, thing
                self._versions[place] = max(version, self._versions.get(place, ""))
            case Linked(polar_id, customer_id):
                self._links[organization_id, polar_id] = customer_id
                self._names.setdefault((organization_id, customer_id), {})[polar_id] = None
            case Began(customer_id, meter_id, at):
                self._story(customer_id, meter_id).began.add(at)
            case Credited(customer_id, meter_id, grant_id, at):
                credited = self._story(customer_id, meter_id).credited
                credited[grant_id, at] = min(fact, credited.get((grant_id, at), fact), key=_first_told)
            case Revoked(grant_id, at):
                self._revoked.setdefault(grant_id, set()).add(at)

    def _story(self, customer_id: str, meter_id: str) -> Story:
        return self._stories.setdefault(customer_id, {}).setdefault(meter_id, Story())

    def heard(self, organization_id: str, delivery_id: str) -> bool:
        """Whether the delivery was taken in before."""
        return (organization_id, delivery_id) in self._deliveries

    def is_news(self, organization_id: str, fact: Known) -> bool:
        """Whether nothing newer is known of the thing."""
        return fact.version > self._versions.get((organization_id, fact.thing), "")

    def is_mirrored(self, organization_id: str, thing: str) -> bool:
        """Whether the thing (such as ``grant:ID``) is Polar's: it is changed there, and the news of it come here."""
        return (organization_id, thing) in self._versions

    def newest(self, organization_id: str, things: Iterable[str]) -> str:
        """The newest state that was heard of any of the things; empty where nothing was."""
        return max((self._versions.get((organization_id, thing), "") for thing in things), default="")

    def linked(self, organization_id: str, polar_id: str) -> str | None:
        """The customer here that Polar's is."""
        return self._links.get((organization_id, polar_id))

    def living(self, organization_id: str, customer_id: str) -> list[str]:
        """Polar's customers that are this one here, without those that were deleted there."""
        ids = self._names.get((organization_id, customer_id), ())
        linked = [id for id in ids if self._links[organization_id, id] == customer_id]
        return [id for id in linked if not self.is_gone(organization_id, f"customer:{id}")]

    def is_gone(self, organization_id: str, thing: str) -> bool:
        """Whether the thing was deleted at Polar."""
        return self._versions.get((organization_id, thing)) == GONE

    def meters(self, customer_id: str) -> Iterable[str]:
        """Polar's meters of which something is known for a customer."""
        return list(self._stories.get(customer_id, ()))

    def customers(self, meter_id: str) -> list[str]:
        """The customers of whom something is known for one of Polar's meters."""
        return [customer_id for customer_id, stories in list(self._stories.items()) if meter_id in stories]

    def wanted(self, customer_id: str, meter_id: str) -> Wanted:
        """What follows for a customer's meter from all that is known."""
        story = self._stories.get(customer_id, {}).get(meter_id, Story())
        cuts = set(story.began)
        given: list[Given] = []
        last: dict[str, int] = {}  # by grant: what it credited last, as a place in ``given``
        for fact in sorted(story.credited.values(), key=lambda fact: (fact.at, fact.grant_id)):
            place = last.get(fact.grant_id)
            before = None if place is None else given[place]
            revoked = None if before is None else self._revoked_within(fact.grant_id, before.fact.at, fact.at)
            if place is not None and before is not None:
                given[place] = before._replace(revoked=revoked)
            is_cycle = before is not None and revoked is None
            if before is not None and is_cycle and not any(before.fact.at < cut <= fact.at for cut in cuts):
                cuts.add(fact.at)
            last[fact.grant_id] = len(given)
            given.append(Given(fact, is_cycle, None))
        for grant_id, place in last.items():
            revoked = self._revoked_within(grant_id, given[place].fact.at, None)
            given[place] = given[place]._replace(revoked=revoked)
        return Wanted(given, sorted(cuts))

    def _revoked_within(self, grant_id: str, since: datetime, until: datetime | None) -> datetime | None:
        """When the grant was first taken back from one credit to before the next."""
        times = self._revoked.get(grant_id, ())
        return min((at for at in times if at >= since and (until is None or at < until)), default=None)


def _first_told(fact: Credited) -> tuple[datetime, int, bool]:
    return fact.told, fact.units, fact.rollover
