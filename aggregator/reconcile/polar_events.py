"""Compare single events and balances with Polar's.

``OwnUsage`` is our side, restricted to what is forwarded. ``Balances`` compares customers' credited and consumed
units. ``Events`` finds the events that differ: it splits a day into parts until a part is small or equal, lists the
events of both sides, and pairs them (``polar_pairing.py``).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from aggregator.reconcile.polar_pairing import Pair, Seen, key_of, mark_of, pair, seen, settled, takes_back, value
from aggregator.reconcile.polar_reader import (
    DAY,
    HOUR,
    STEP,
    Both,
    Forwarded,
    Interval,
    Part,
    Reader,
    Scope,
    Series,
    asked,
    day_of,
    days,
    exclusive,
    halves,
    hour,
    hours_of,
    midnight,
    near,
)
from aggregator.reconcile.report import SHOWN_EVENTS_MAX, Cause, Counted, Difference, Quantities, Repair, Worth, add
from meters import exact
from meters.aggregation import considers
from meters.catalogue.catalogue import meter_json
from meters.event_values import Facts
from meters.exact import EXACT, amount_text
from meters.filters import matches
from meters.meter import Meter
from meters.timestamps import utc_text

# Our side, as far as it is forwarded.
#
# A selection keeps some events here, and a forwarding that began later left out earlier ones. Polar has none of those
# from us, so they are left out of counts, lists and quantities. Where all events of a meter are forwarded, the
# meter's own quantities are used; otherwise the usage of the forwarded events is added up here.

FEED_ROWS = 10_000
ADDED_UP_MAX = 200_000  # events of a day that are added up here: some seconds, and some hundred megabytes


class OwnUsage:
    """Our side, as far as it is forwarded. Only our own server is asked, without a limit of requests."""

    def __init__(self, here: Reader, forwarded: Forwarded) -> None:
        self._here, self._forwarded = here, forwarded

    @property
    def began(self) -> datetime | None:
        """Since when."""
        return self._forwarded.began

    def count(self, part: Part) -> int:
        """How many events of a part are forwarded."""
        return self._count(part, self._forwarded.selection, self._forwarded.begin)

    def feed(self, part: Part) -> Iterator[Seen]:
        """Those events, as they are forwarded."""
        given = {**self._forwarded.selection, **_range(part)}
        position, left = self._forwarded.begin, self.count(part)
        while left > 0:
            answer = self._here.get("/v1/feed/", **given, position=position, limit=FEED_ROWS)
            for item in answer["items"]:
                yield seen(item["event"], datetime.fromisoformat(item["ingested_at"]), item["place"])
            left -= len(answer["items"])
            if answer["position"] == position:
                return
            position = answer["position"]  # which moves over what is not wanted, too

    def came_in(self, part: Part, since: datetime) -> bool:
        """Whether any of them came in at this instant or later."""
        given = {**self._forwarded.selection, **_range(part), "since": utc_text(since)}
        return bool(self._here.get("/v1/feed/traffic", **given)["events"])

    def customers(self, part: Part, limit: int) -> tuple[list[str], int]:
        """The external ids of those with most of these events, most first; and how many have any."""
        given = {**self._forwarded.selection, **_range(part), "position": self._forwarded.begin, "limit": limit}
        answer = self._here.get("/v1/feed/customers", **given)
        named = [row.get("external_customer_id") for row in answer["items"]]
        return list(dict.fromkeys(who for who in named if who is not None)), int(answer["count"])

    def is_whole(self, meter: Meter, part: Part | None = None) -> bool:
        """Whether everything that the meter counts of a part, or ever, is forwarded."""
        if self._forwarded.is_all:
            return True
        own = exact.encode(meter_json(meter)["filter"]).decode()
        selection = dict(self._forwarded.selection)
        both = f'{{"conjunction":"and","clauses":[{own},{selection["filter"]}]}}' if "filter" in selection else own
        forwarded = self._count(part, {**selection, "filter": both}, self._forwarded.begin)
        return forwarded == self._count(part, {"filter": own}, "")

    def series(self, meter: Meter, part: Part, interval: Interval, who: str | None = None) -> Series:
        """The meter's quantities of whole days or hours, of a customer or of all, as far as they are forwarded.

        A day of which only a part is forwarded, and that is too large to be added up, is left out.
        """
        if self.is_whole(meter, part):
            return asked(self._here, meter.id, part, interval, who)[0]
        if part.until - part.since <= DAY:
            return self._added_up(meter, part, interval, who)
        found: Series = {}
        for day in days(part):
            found |= self.series(meter, day, interval, who)
        return found

    def total(self, meter: Meter, part: Part) -> Decimal | None:
        """The meter's own total over whole days; None where not all of it is forwarded."""
        return asked(self._here, meter.id, part, "day")[1] if self.is_whole(meter, part) else None

    def _added_up(self, meter: Meter, part: Part, interval: Interval, who: str | None) -> Series:
        if self.count(part) > ADDED_UP_MAX:
            return {}
        start, step = part.since, STEP[interval]
        found: dict[datetime, list[Facts]] = {start + n * step: [] for n in range((part.until - part.since) // step)}
        for event in self.feed(part):
            if who in (None, event.who):
                found[(midnight if interval == "day" else hour)(event.timestamp)].append(event.facts)
        return {at: value(meter, facts) for at, facts in found.items()}

    def _count(self, part: Part | None, selection: Mapping[str, Any], position: str) -> int:
        given = {**selection, **(_range(part) if part else {})}
        return int(self._here.get("/v1/feed/backlog", **given, position=position)["events"])


def _range(part: Part) -> dict[str, str]:
    return {"start_timestamp": utc_text(part.since), "end_timestamp": utc_text(part.until)}


# Balances: what was credited, and what was used since the last reset, on both sides.

NAMED_MAX = 5  # balances that a note names
_PARTS = ("credited_units", "consumed_units")


class _Row(NamedTuple):
    """What is kept of a balance: there is one for each customer and meter."""

    credited_units: Decimal
    consumed_units: Decimal
    modified_at: datetime | None


_Rows = Mapping[tuple[str, str], _Row]  # by the customer's external id (or id), and the id of our meter


class Balances:
    """Compare balances of both sides. ``notes`` say what was not compared."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, worth: Worth) -> None:
        self._here, self._there, self._scope, self._worth = here, there, scope, worth
        self._unjudged: Counter[str] = Counter()
        self.counted = Counted("customers' meters", 0)
        self.notes: list[str] = []

    def compare(self, meters: Sequence[Both], moved: Callable[[Both, str], Decimal | None]) -> list[Difference]:
        """What differs. ``moved`` is what events that differ make of a customer's usage of a meter,
        None where they make something of it and nobody can tell what."""
        known = {both.here.id: both for both in meters}
        here = _rows(self._here, {id: id for id in known})
        there = _rows(self._there, {both.there: id for id, both in known.items()})
        keys = sorted(here.keys() & there.keys(), key=lambda key: (key[0], known[key[1]].here.name, key[1]))
        found: list[Difference] = []
        for who, id in keys:
            rows = here[who, id], there[who, id]
            found += self._compare(known[id], who, rows, moved(known[id], who))
        self.counted = Counted("customers' meters", len(keys), len(found))
        names = {id: both.here.name for id, both in known.items()}
        why = "which says nothing, because not all that this meter counts here is forwarded"
        self.notes += [
            f"{name}: in {count} balances the usage is another one over there, {why}"
            for name, count in self._unjudged.items()
        ]
        self.notes += [*_alone("here", here, there, names), *_alone("over there", there, here, names)]
        return found

    def _compare(
        self, both: Both, who: str, rows: tuple[_Row, _Row], moved: Decimal | None
    ) -> Iterator[Difference]:
        name = both.here.name
        for part in _PARTS:
            ours, theirs = (getattr(row, part) for row in rows)
            is_usage = part == "consumed_units"
            if is_usage and self._scope.settles and _moved_since(self._scope.usage_before(both), *rows):
                continue  # usage is on its way, or Polar has yet to add it up
            if is_usage and moved is None:
                continue  # those events are named already, and such a value cannot be split among them
            explained = EXACT.add(ours, moved) if is_usage and moved is not None else ours
            if theirs == explained:
                continue
            if is_usage and not OwnUsage(self._here, self._scope.forwarded(both)).is_whole(both.here):
                self._unjudged[name] += 1
                continue
            what = f"{part.replace('_', ' ')}: {amount_text(theirs)} over there, {amount_text(ours)} here"
            cause, repair = (Cause.LOST if theirs < ours else Cause.DOUBLED), Repair.DECIDE
            if is_usage and near(theirs, explained):
                cause, repair = Cause.ROUNDING, Repair.NOTHING
            elif is_usage:
                cause = Cause.LATE
                what += "; no event says why: usage arrived on the other side of a reset, and counts in another period"
            quantities = {both.here.id: EXACT.subtract(theirs, explained)}
            yield Difference(
                check="upstream", cause=cause, where=f"{name}, customer {who}", what=what, repair=repair,
                quantities=self._worth.named(quantities), cents=self._worth.cents(quantities),
            )  # fmt: skip


def _rows(side: Reader, meters: Mapping[str, str]) -> _Rows:
    """One side's balances in meters that are compared: the ids of ours, by those that this side knows them by."""
    rows: dict[tuple[str, str], _Row] = {}
    for row in side.pages("/v1/customer-meters/"):
        if (id := meters.get(row["meter_id"])) is not None:
            who, modified_at = str(row["customer"].get("external_id") or row["customer_id"]), row.get("modified_at")
            credited, consumed = (Decimal(str(row[part])) for part in _PARTS)
            rows[who, id] = _Row(credited, consumed, datetime.fromisoformat(modified_at) if modified_at else None)
    return rows


def _moved_since(instant: datetime, *sides: _Row) -> bool:
    """Whether either side's balance moved at this time or later."""
    return any(side.modified_at >= instant for side in sides if side.modified_at)


def _alone(where: str, mine: _Rows, others: _Rows, names: Mapping[str, str]) -> Iterator[str]:
    """What to say of balances that stand on one side only: the customer is unknown on the other one, or used nothing
    that it counts."""
    used = [key for key in mine.keys() - others.keys() if any(getattr(mine[key], part) for part in _PARTS)]
    alone = sorted((who, names[id]) for who, id in used)
    if alone:
        named = ", ".join(f"{name} of {who}" for who, name in alone[:NAMED_MAX])
        more = f" and {len(alone) - NAMED_MAX} more" if len(alone) > NAMED_MAX else ""
        yield f"balances that stand {where} alone, and are not compared: {named}{more}"


# Events.
#
# Requests to Polar are limited and requests to Meterstream are not, so parts are first compared by counts, and by
# quantities where the counts agree. Listed events are paired within a part, and at the end across all parts.
#
# Both sides keep changing while they are read. Polar's side is listed first, because its events were counted here
# before; later events of ours are recognized by their time of arrival. Polar's events are identified by id: the pages
# of a list shift when an event is inserted, and events with equal times may appear on two pages or on none.
#
# Polar counts an event whose parent is missing, but does not list it. So an unlisted event with a parent is reported
# as lost only where quantities lack it as well.

LISTED_MAX = 1_000  # events of a part that is listed rather than halved: ten requests
PART_MIN = timedelta(minutes=1)
_CORRECTABLE = {Cause.DOUBLED, Cause.CHANGED, Cause.LATE}  # what is over there is wrong, if the log is right


class Events:
    """Find events that differ. ``pairs`` are the events that are not alike on both sides."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, worth: Worth) -> None:
        self._here, self._there, self._scope, self._worth = here, there, scope, worth
        self.ours = OwnUsage(here, scope.raw)
        self.pairs: list[Pair] = []
        self.listed = 0
        self.unlisted = 0  # events that wait for their parents over there, and count
        self.meters: Sequence[Meter] = ()  # all that may count an event over there, where they are known to be all
        self._taken_back: Counter[str] = Counter()
        self._moved: defaultdict[tuple[datetime | None, str | None], Quantities] = defaultdict(dict)
        self._moved_pairs = 0  # of ``pairs``, from the first on, are in ``_moved``

    def differ(self, part: Part) -> bool:
        """Whether the sides have different numbers of events, as far as that can be our doing."""
        here, began = self.ours.count(part), self._scope.raw.began
        if not here and began is not None and part.until <= began:
            return False
        return here != self._count_there(part)

    def narrow(self, part: Part, content_differs: Callable[[Part], bool]) -> None:
        """List the part, or what differs of it. ``content_differs`` tells of whole hours whose counts agree whether
        anything differs in them that is not found yet."""
        there = self._count_there(part)
        if max(self.ours.count(part), there) <= LISTED_MAX or part.until - part.since <= PART_MIN:
            self._list(part, there)
            return
        alike = []
        for half in halves(part):
            if self.differ(half):
                self.narrow(half, content_differs)
            elif self.ours.count(half):
                alike.append(half)
        for half in alike:
            if content_differs(hours_of(half)):
                self.narrow(half, content_differs)

    def finish(self, agreeing_hours: Callable[[Part], set[datetime]]) -> Iterator[Difference]:
        """Pair what is left over across parts, and tell it by hour, cause and repair. ``agreeing_hours`` are those of a
        day in which all quantities are explained by the events that are found to differ."""
        doubled = [found for found in self.pairs if found.cause is Cause.DOUBLED]
        others = [found for found in self.pairs if found.cause is not Cause.DOUBLED]
        ours = [found.ours for found in others if found.ours is not None]
        theirs = [found.theirs for found in others if found.theirs is not None]
        self.pairs = pair(ours, theirs) + doubled
        self._set_aside_unlisted(agreeing_hours)
        conflicts = self._conflicts() if any(found.cause is Cause.CHANGED for found in self.pairs) else ""
        by_cause: defaultdict[tuple[datetime, Cause], list[Pair]] = defaultdict(list)
        for found in self.pairs:
            if self._is_on_its_way(found):
                continue
            event, cause = _either(found), found.cause
            if cause is Cause.CHANGED and found.ours and f'"{found.ours.external_id}"' in conflicts:
                cause = Cause.CONFLICT
            if cause is Cause.LOST and found.ours and self._scope.is_pending(found.ours):
                cause = Cause.LATE
            by_cause[hour(event.timestamp), cause].append(found)
        for (at, cause), pairs in sorted(by_cause.items()):
            for repair, group in self._by_repair(cause, pairs).items():
                yield self._told(cause, at, repair, group)

    def _by_repair(self, cause: Cause, pairs: Sequence[Pair]) -> dict[Repair, list[tuple[Pair, str]]]:
        """Each with what takes it back, if anything can: what cannot be mended must not keep its hour from being."""
        groups: defaultdict[Repair, list[tuple[Pair, str]]] = defaultdict(list)
        for found in pairs:
            correction = self._correction(cause, found)
            if cause is Cause.LATE and found.theirs is None:
                repair = Repair.WAIT
            elif correction:
                repair = Repair.CORRECT
            elif cause is Cause.LOST and not self._refusal(found):
                repair = Repair.SEND
            else:
                repair = Repair.DECIDE
            groups[repair].append((found, correction))
        return groups

    def _refusal(self, found: Pair) -> str:
        """What Polar says of an event of ours that it refuses for good."""
        return self._scope.refused.get(found.ours.external_id, "") if found.ours else ""

    def _set_aside_unlisted(self, agreeing_hours: Callable[[Part], set[datetime]]) -> None:
        """Take out of the pairs what seems lost, has a parent, and is missing in no quantity of its hour."""
        missing: defaultdict[datetime, list[Pair]] = defaultdict(list)
        others: list[Pair] = []
        for found in self.pairs:
            may_be_there = found.cause is Cause.LOST and found.ours is not None and found.ours.has_parent
            (missing[hour(_either(found).timestamp)] if may_be_there else others).append(found)
        self.pairs = others
        self._moved.clear()
        self._moved_pairs = 0
        agreeing = {day: agreeing_hours(day) for day in sorted({day_of(at) for at in missing})}
        for at, pairs in missing.items():
            if at in agreeing[day_of(at)]:
                self.unlisted += len(pairs)
            else:
                self.pairs += pairs

    def moved(self, part: Part | None = None, who: str | None = None) -> Quantities:
        """What the pairs make of quantities: theirs minus ours, by meter; of whole hours, or of a customer, or of all.

        Kept by hour and customer: after a day of losses there are many pairs, and many who ask.
        """
        for found in self.pairs[self._moved_pairs :]:
            self._keep(found)
        self._moved_pairs = len(self.pairs)
        if part is None:
            return self._moved[None, who]
        quantities: Quantities = {}
        for number in range((part.until - part.since) // HOUR):
            add(quantities, self._moved.get((part.since + number * HOUR, who), {}))
        return quantities

    def _keep(self, found: Pair) -> None:
        for event, sign in _signed(found):
            more = self._worth.of(self._scope.organization_id, event.facts)
            for at in (hour(event.timestamp), None):
                for who in (event.who, None):
                    add(self._moved[at, who], more, sign)

    def inside(self, part: Part) -> list[Seen]:
        """Every event of the part that differs, of either side."""
        events = [event for found in self.pairs for event in (found.ours, found.theirs) if event is not None]
        return [event for event in events if part.since <= event.timestamp < part.until]

    def customers_of(self, meter: Meter) -> set[str]:
        """Who has an event that differs and that the meter counts, on either side."""
        differing = (event for found in self.pairs for event, _ in _signed(found))
        return {
            event.who for event in differing
            if matches(meter.filter, event.facts) and considers(meter.aggregation, event.facts)
        }  # fmt: skip

    def _is_on_its_way(self, found: Pair) -> bool:
        if found.cause is not Cause.LOST or found.ours is None or found.ours.ingested_at is None:
            return False
        return max(found.ours.ingested_at, found.ours.timestamp) >= self._scope.arrived_before

    def _count_there(self, part: Part) -> int:
        answer = self._there.get("/v1/events/", **exclusive(part), source="user", limit=1)
        return int(answer["pagination"]["total_count"])

    def _list(self, part: Part, count: int) -> None:
        theirs, taken_back = settled(self._listed(part, count))
        ours = list(self.ours.feed(part))
        self._taken_back += taken_back
        self.listed += len(ours)
        self.pairs += pair(ours, self._sent_from_here(theirs, ours))

    def _listed(self, part: Part, count: int) -> list[Seen]:
        """Their events of a part, each once. Where some of the ``count`` are left out they are listed once more, from
        the other end."""
        found: dict[str, Seen] = {}
        for sorting in ("timestamp", "-timestamp"):
            listing = self._there.pages("/v1/events/", **exclusive(part), source="user", sorting=sorting)
            found |= {str(event["id"]): seen(event) for event in listing}
            if len(found) >= count:
                break
        return list(found.values())

    def _sent_from_here(self, theirs: list[Seen], ours: Sequence[Seen]) -> list[Seen]:
        """Theirs without what somebody else may have sent rightly: events from before forwarding began, save ours."""
        began = self._scope.raw.began
        if began is None:
            return theirs
        known = {key_of(event) for event in ours}
        return [event for event in theirs if event.timestamp >= began or key_of(event) in known]

    def _conflicts(self) -> str:
        """The lines that contradicted an event that was first, as text to look for ids in."""
        letters = self._here.pages("/v1/dead-letters/", include_replayed=True)
        contrary = (letter for letter in letters if letter["reason"] == "conflict")
        whole = (self._here.get(f"/v1/dead-letters/{one['id']}") if one["is_cut"] else one for one in contrary)
        return "\n".join(letter["raw"] for letter in whole)

    def _told(self, cause: Cause, at: datetime, repair: Repair, group: Sequence[tuple[Pair, str]]) -> Difference:
        pairs = [found for found, _ in group]
        quantities: Quantities = {}
        for event, sign in (signed for found in pairs for signed in _signed(found)):
            add(quantities, self._worth.of(self._scope.organization_id, event.facts), sign)
        refused = {words for found in pairs if (words := self._refusal(found))}
        payload: dict[str, Any] = {}
        if repair in (Repair.SEND, Repair.CORRECT) and self._scope.doubt:
            repair, payload = Repair.DECIDE, {"doubt": self._scope.doubt}
        if repair in (Repair.SEND, Repair.CORRECT):
            ours = [found.ours for found in pairs if found.ours is not None]
            sent = [(event.external_id, utc_text(event.timestamp)) for event in ours]
            payload = {"events": sent, "corrections": [correction for _, correction in group if correction]}
        return Difference(
            check="upstream", cause=cause, repair=repair, count=len(pairs), window=(at, at + HOUR),
            where=_either(pairs[0]).label if len(pairs) == 1 else f"{at:%Y-%m-%d %H}:00 UTC",
            what="; ".join(dict.fromkeys([
                *(_sentence(found, cause) for found in pairs[:3]), *(f"Polar refuses it: {words}" for words in refused),
            ])),
            events=[_either(found).label for found in pairs[:SHOWN_EVENTS_MAX]],
            quantities=self._worth.named({id: amount for id, amount in quantities.items() if amount}),
            cents=self._worth.cents(quantities),
            payload=payload,
        )  # fmt: skip

    def _correction(self, cause: Cause, found: Pair) -> str:
        """The event that takes back what is wrong over there; nothing where none can."""
        if cause not in _CORRECTABLE or found.theirs is None or not found.theirs.is_named or _is_elsewhere(found):
            return ""
        mark = mark_of(found.theirs)
        body = takes_back(found.theirs, self.meters, self._taken_back[mark])
        if body is None:
            return ""
        self._taken_back[mark] += 1
        return body.decode()


def _signed(found: Pair) -> list[tuple[Seen, int]]:
    """The pair's events, and whether each is too much over there or missing."""
    return [(event, sign) for event, sign in ((found.ours, -1), (found.theirs, 1)) if event is not None]


def _either(found: Pair) -> Seen:
    event = found.ours or found.theirs
    assert event is not None
    return event


def _is_elsewhere(found: Pair) -> bool:
    """Whether it counts for another customer over there, which may be one person by two names: no event can tell."""
    return found.ours is not None and found.theirs is not None and found.ours.who != found.theirs.who


def _sentence(found: Pair, cause: Cause) -> str:
    match cause:
        case Cause.LATE if found.theirs is None:
            return "it is counted here and waits for the forwarder"
        case Cause.LATE if found.ours and found.theirs:
            here, there = utc_text(found.ours.timestamp), utc_text(found.theirs.timestamp)
            return f"happened {here}, and counts over there in {there}"
        case Cause.CHANGED | Cause.CONFLICT if found.ours and found.theirs:
            return _contents(found.ours, found.theirs)
        case Cause.LOST:
            return "it is counted here and missing over there"
        case Cause.DOUBLED:
            return "over there it is counted more often than here"
        case _:
            return "over there is an event that we never counted"


def _contents(ours: Seen, theirs: Seen) -> str:
    """The customer and the parts of the metadata, as far as they are not alike."""
    here = {"the customer": ours.who, **json.loads(ours.content)}
    there = {"the customer": theirs.who, **json.loads(theirs.content)}
    parts = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    return ", ".join(f"{key}: {here.get(key, 'nothing')} here, {there.get(key, 'nothing')} over there" for key in parts)
