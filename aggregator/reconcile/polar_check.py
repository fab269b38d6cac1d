"""Check Meterstream against a Polar organization: events, quantities by day, and customers' balances.

``UpstreamCheck.run`` compares both sides, which have the same API. Requests to Polar are limited, so each step asks
for as little as shows a difference: one request for a day's number of events, one for a year of a meter's days. Days
that differ are narrowed down to single events (``polar_events.py``). The remaining differences of a quantity are
explained by Polar's own events (``SystemEvents``), the rounding of doubles, or another reading of the meter's filter.
``Customers`` compares quantities by customer. Usage of the settle window may still be on its way and is left out, and
so are events that are not forwarded.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from aggregator.forward.feed_client import ROLLUP_NAME
from aggregator.reconcile.polar_events import Balances, Events, OwnUsage
from aggregator.reconcile.polar_pairing import OTHERS, Seen, seen, value
from aggregator.reconcile.polar_reader import (
    DAY,
    HOUR,
    POINTS_AT_ONCE,
    Both,
    Part,
    Reader,
    Scope,
    Series,
    asked,
    day_of,
    days,
    exclusive,
    near,
    since,
)
from aggregator.reconcile.report import SHOWN_EVENTS_MAX, Cause, Check, Counted, Difference, Repair, Worth
from meters.aggregation import amount_of, considers, exact_sum, is_summable
from meters.catalogue.catalogue import meter_json
from meters.event import SYSTEM
from meters.event_values import is_built_in
from meters.exact import EXACT, amount_text
from meters.filters import Filter, matches
from meters.meter import Meter

# Quantities by day and customer: usage that was attributed to the wrong customer changes no total of a day.
#
# A customer's days cost one request for each meter. So the customers with the most events are compared, up to the
# request limit.

REQUESTS_MAX = 300  # for them, of one run: a minute of the usual limit


class Used(NamedTuple):
    """What a customer used of a meter, by day, on both sides."""

    both: Both
    who: str
    here: Series
    there: Series

    def differing(self) -> Iterator[tuple[datetime, Decimal, Decimal]]:
        """Days, ours and theirs, where they are not the same."""
        for day, ours in self.here.items():
            theirs = self.there.get(day, Decimal(0))
            if not near(ours, theirs):
                yield day, ours, theirs


class Customers:
    """Compare quantities by day and customer. ``used`` is what was compared, ``notes`` say what was not."""

    def __init__(self, here: Reader, there: Reader, scope: Scope) -> None:
        self._here, self._there, self._scope = here, there, scope
        self.used: list[Used] = []
        self.notes: list[str] = []

    def compare(self, meters: Sequence[Both]) -> Counted:
        """Ask both sides. A meter of which only a part is forwarded is left out."""
        range_ = Part(self._scope.since, self._scope.until)
        whole = [both for both in meters if self._ours(both).is_whole(both.here, range_)]
        left_out = [both.here.name for both in meters if both not in whole]
        if left_out:
            self.notes.append(
                f"{', '.join(left_out)}: not compared customer by customer, because only a part is forwarded"
            )
        for both, who in self._wanted(whole, range_):
            there = asked(self._there, both.there, range_, "day", who)[0]
            here = asked(self._here, both.here.id, range_, "day", who)[0]
            self.used.append(Used(both, who, since(here, self._ours(both).began), there))
        days = sum(len(used.here) for used in self.used)
        different = sum(1 for used in self.used for _ in used.differing())
        return Counted("quantities, by day and customer", days, different)

    def _wanted(self, meters: Sequence[Both], range_: Part) -> list[tuple[Both, str]]:
        if not meters:
            return []
        requests = len(meters) * -(-(range_.until - range_.since) // (POINTS_AT_ONCE * DAY))
        most = max(REQUESTS_MAX // requests, 1)
        names, count = self._ours(meters[0]).customers(range_, most)
        if len(names) < count:
            self.notes.append(f"compared customer by customer: the {len(names):,} with most events, of {count:,}")
        return [(both, who) for both in meters for who in names]

    def _ours(self, both: Both) -> OwnUsage:
        return OwnUsage(self._here, self._scope.forwarded(both))


# Events that Polar writes itself, such as "order paid" or "credit granted".
#
# Polar counts them in a meter's quantities where its filter accepts them, but in no balance. A meter that counts
# events without a filter differs by them on every day on which Polar wrote one. They are requested only for days that
# differ.

class SystemEvents:
    """Events that Polar writes itself. ``told`` are the names of those that explained something, by meter name."""

    def __init__(self, there: Reader) -> None:
        self._there = there
        self._days: dict[datetime, list[Seen]] = {}
        self.told: defaultdict[str, set[str]] = defaultdict(set)

    def counted(self, meter: Meter, part: Part, who: str | None = None) -> list[Seen]:
        """Those that the meter counts over there, of one customer or of all. A part lies within a day."""
        return [
            event for event in self._of_day(day_of(part.since))
            if part.since <= event.timestamp < part.until and who in (None, event.who)
            and matches(meter.filter, event.facts) and considers(meter.aggregation, event.facts)
        ]  # fmt: skip

    def added(self, meter: Meter, part: Part, who: str | None = None) -> Decimal:
        """What they make of a meter whose quantities can be added."""
        return value(meter, [event.facts for event in self.counted(meter, part, who)])

    def explain(self, meter: Meter, part: Part) -> None:
        """Remember that they did."""
        self.told[meter.name] |= {event.name for event in self.counted(meter, part)}

    def notes(self) -> list[str]:
        """What a person should know of it."""
        return [
            f"{name}: Polar counts events of its own as well ({', '.join(sorted(events))}), which is no difference"
            for name, events in self.told.items()
        ]

    def _of_day(self, day: Part) -> list[Seen]:
        if day.since not in self._days:
            listing = self._there.pages("/v1/events/", **exclusive(day), source=SYSTEM, sorting="timestamp")
            self._days[day.since] = list({str(event["id"]): seen(event) for event in listing}.values())
        return self._days[day.since]


# The check.

READ_MAX = 20_000  # events that are read in the other two ways, to see what an invoice would count


class UpstreamCheck:
    """One run. ``here`` and ``there`` are asked, nothing is changed on either side."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, meters: Sequence[Meter], worth: Worth) -> None:
        self._here, self._there, self._scope, self._own, self._worth = here, there, scope, meters, worth
        self.check = Check(name="upstream", sides="our events, quantities and balances, and Polar's")
        self._events = Events(here, there, scope, worth)
        self._system = SystemEvents(there)
        self._customers = Customers(here, there, scope)
        self._rolled_up = False
        self._told: set[tuple[str, datetime]] = set()  # meters and days that a difference speaks of as a whole

    def run(self) -> Check:
        """Compare."""
        meters = self._matched_meters()
        series = {both.here.id: self._series(both) for both in meters}
        self.check.counted.append(self._customers.compare(meters))
        if not self._rolled_up:
            self._compare_events(meters, series)
        for both in meters:
            self._judge(both, *series[both.here.id])
        self._judge_customers()
        if not self._rolled_up:
            self._other_readings(meters)
        self._balances(meters)
        self.check.notes += [*self._customers.notes, *self._system.notes()]
        return self.check

    # ---- meters and their quantities

    def _matched_meters(self) -> list[Both]:
        there = list(self._there.pages("/v1/meters/", is_archived=False))
        matched, alike = [], 0
        for meter, other in _namesakes(self._own, there):
            if other is None:
                self.check.notes.append(f"{meter.name}: there is no meter of this name over there, or no further one")
                continue
            is_rolled = ROLLUP_NAME in str(other["filter"])
            if is_rolled:
                self._rolled_up = True
            elif not _is_alike(meter, other):
                ours = _definition(meter_json(meter))
                what = f"the meter is another one over there: {_definition(other)} instead of {ours}"
                self._add(Cause.FILTER_SEMANTICS, meter.name, what)
            else:
                alike += 1
            matched.append(Both(meter, other["id"], is_rolled))
        if alike == len(there):  # no meter over there that we do not know
            self._events.meters = [both.here for both in matched]
        if self._rolled_up:
            why = "events are forwarded as sums of windows"
            self.check.notes.append(f"{why}, so only quantities are compared, without windows that are not over")
        return matched

    def _ours(self, both: Both) -> OwnUsage:
        return OwnUsage(self._here, self._scope.forwarded(both))

    def _series(self, both: Both) -> tuple[Series, Series]:
        """By day, theirs read first: what it has was counted here before. Days that cannot be judged are left out."""
        range_, ours, name = Part(self._scope.since, self._scope.until), self._ours(both), both.here.name
        there, total_there = asked(self._there, both.there, range_, "day")
        here, total_here = ours.series(both.here, range_, "day"), ours.total(both.here, range_)
        here = since(here, ours.began)
        if left_out := len(there) - len(here):
            why = "forwarding began later, or only a part of very many events is forwarded"
            self.check.notes.append(f"{name}: the quantities of {left_out} days are not compared, because {why}")
            total_here = None
        same = sum(near(amount, there.get(day, Decimal(0))) for day, amount in here.items())
        totals = ("", "") if total_here is None else (amount_text(total_here), amount_text(total_there))
        self.check.counted.append(Counted(f"{name}, by day", len(here), len(here) - same, *totals))
        if total_here is not None and same == len(here) and not near(total_here, total_there):
            self._outside_the_range(both.here, *totals)
        return here, there

    def _outside_the_range(self, meter: Meter, ours: str, theirs: str) -> None:
        if meter.aggregation.func in ("avg", "unique"):
            what = f"every day agrees; the total over there is {theirs} over all time, ours {ours} over the range"
            self._add(Cause.OUTSIDE_THE_RANGE, f"{meter.name}, total", what, Repair.NOTHING)

    def _compare_events(self, meters: Sequence[Both], series: Mapping[str, tuple[Series, Series]]) -> None:
        whole = list(days(Part(self._scope.since, self._scope.until)))
        suspects = [day for day in whole if self._events.differ(day)]
        self.check.counted.append(Counted("days, by number of events", len(whole), len(suspects)))
        for day in whole:
            if day not in suspects and next(self._unexplained_on(day, meters, series), None):
                suspects.append(day)
        for day in sorted(suspects):
            self._events.narrow(day, lambda part: self._content_differs(part, meters, series))
        for difference in self._events.finish(lambda day: self._agreeing_hours(day, meters)):
            self.check.add(difference)
        if self._events.unlisted:
            why = "Polar lists an event once its parent is there; quantities of their hours agree, so nothing is lost"
            self.check.notes.append(f"{self._events.unlisted:,} events whose parents are missing are not listed: {why}")
        count = len(self._events.pairs)
        self.check.counted.append(Counted("events, one by one where days differ", self._events.listed, count))

    def _unexplained_on(
        self, day: Part, meters: Sequence[Both], series: Mapping[str, tuple[Series, Series]]
    ) -> Iterator[tuple[Both, str | None]]:
        """Meters, and customers of meters, whose quantities of a day say otherwise than the events found to differ."""
        at = day_of(day.since).since
        for both in meters:
            here, there = series[both.here.id]
            if at in here and not self._is_explained(both, day_of(at), here[at], there.get(at, Decimal(0))):
                yield both, None
        for used in self._customers.used:
            for when, ours, theirs in used.differing():
                if when == at and not self._is_explained(used.both, day_of(at), ours, theirs, used.who):
                    yield used.both, used.who

    def _content_differs(
        self, part: Part, meters: Sequence[Both], series: Mapping[str, tuple[Series, Series]]
    ) -> bool:
        """Whether any of these says so of a part with whole hours."""
        unexplained = self._unexplained_on(part, meters, series)
        return any(not all(self._hours(both, part, who).values()) for both, who in unexplained)

    def _agreeing_hours(self, day: Part, meters: Sequence[Both]) -> set[datetime]:
        """Hours in which every meter's quantities are known and explained."""
        by_meter = [self._hours(both, day) for both in meters]
        return set.intersection(*({at for at, agrees in hours.items() if agrees} for hours in by_meter or [{}]))

    def _hours(self, both: Both, part: Part, who: str | None = None) -> dict[datetime, bool]:
        """Hours by when they begin, and whether the quantities of each are explained."""
        there = asked(self._there, both.there, part, "hour", who)[0]
        ours = self._ours(both)
        here = since(ours.series(both.here, part, "hour", who), ours.began)
        return {
            at: self._is_explained(both, Part(at, at + HOUR), amount, there.get(at, Decimal(0)), who)
            for at, amount in here.items()
        }

    def _is_explained(self, both: Both, part: Part, ours: Decimal, theirs: Decimal, who: str | None = None) -> bool:
        """Whether the quantities of a part agree, but for events that differ by themselves and Polar's own."""
        if not is_summable(both.here.aggregation):
            found = [event.facts for event in self._events.inside(part)]
            return near(ours, theirs) or bool(value(both.here, found))
        explained = EXACT.add(ours, self._moved(both, part, who))
        return near(theirs, explained) or near(theirs, EXACT.add(explained, self._system.added(both.here, part, who)))

    def _moved(self, both: Both, part: Part | None, who: str | None = None) -> Decimal:
        return self._events.moved(part, who).get(both.here.id, Decimal(0))

    # ---- what events do not explain

    def _judge(self, both: Both, here: Series, there: Series) -> None:
        for day, ours in here.items():
            theirs = there.get(day, Decimal(0))
            explained = EXACT.add(ours, self._moved(both, day_of(day)))
            if theirs == explained or self._moves(both, day):
                continue
            named = [event.facts for event in self._events.inside(day_of(day))]
            if not is_summable(both.here.aggregation) and value(both.here, named):
                continue  # events that differ are named already, and such a value cannot be split among them
            if not self._is_system(both, day, theirs, explained):
                self._told.add((both.here.id, day))
                self._unexplained(both, day, (ours, theirs, explained))

    def _moves(self, both: Both, day: datetime) -> bool:
        """Whether the sums of a day move while they are read: it goes on, or usage of it came in just now. Events are
        compared one by one all the same."""
        before = self._scope.usage_before(both)
        if self._scope.settles and day + DAY > before:
            return True
        return self._ours(both).came_in(day_of(day), before)

    def _is_system(self, both: Both, day: datetime, theirs: Decimal, explained: Decimal) -> bool:
        """Whether Polar's own events make the rest of what differs."""
        own = [event.facts for event in self._system.counted(both.here, day_of(day))]
        if not own:
            return False
        if is_summable(both.here.aggregation):
            found = EXACT.add(explained, value(both.here, own))
        else:
            found = value(both.here, [*(event.facts for event in self._ours(both).feed(day_of(day))), *own])
        if near(found, theirs):
            self._system.explain(both.here, day_of(day))
            return True
        return False

    def _unexplained(self, both: Both, day: datetime, amounts: tuple[Decimal, Decimal, Decimal]) -> None:
        meter, (ours, theirs, explained) = both.here, amounts
        said = f"{amount_text(theirs)} over there, {amount_text(ours)} here"
        where, window = f"{meter.name}, {day:%Y-%m-%d}", (day, day + DAY)
        quantities = {meter.id: EXACT.subtract(theirs, explained)}
        events = [] if near(theirs, explained) else list(self._ours(both).feed(day_of(day)))
        if near(theirs, explained, _without_signs(meter, events)):
            what = f"{said}: the same amounts, added as doubles"
            self._add(Cause.ROUNDING, where, what, Repair.NOTHING, window=window, quantities=quantities)
            return
        for who, reading in OTHERS.items():
            read = _read_otherwise(meter, events, who)
            if read and near(value(meter, [event.facts for event in events], reading), theirs):
                what = f"{said}: with the filter read as Polar's {who} read it, our events give the same; " \
                       f"{len(read)} of them are read differently"  # fmt: skip
                self._add(Cause.FILTER_SEMANTICS, where, what, window=window, quantities=quantities, events=read)
                return
        self._add(Cause.UNKNOWN, where, said, window=window, quantities=quantities)

    def _judge_customers(self) -> None:
        for used in self._customers.used:
            for day, ours, theirs in used.differing():
                if (used.both.here.id, day) not in self._told:
                    self._judge_customer(used, day, ours, theirs)

    def _judge_customer(self, used: Used, day: datetime, ours: Decimal, theirs: Decimal) -> None:
        both, part = used.both, day_of(day)
        if self._is_explained(both, part, ours, theirs, used.who) or self._moves(both, day):
            return
        explained = EXACT.add(ours, self._moved(both, part, used.who))
        self._add(
            Cause.UNKNOWN, f"{both.here.name}, {day:%Y-%m-%d}, customer {used.who}",
            f"{amount_text(theirs)} over there, {amount_text(ours)} here", window=(day, day + DAY),
            quantities={both.here.id: EXACT.subtract(theirs, explained)},
        )  # fmt: skip

    def _other_readings(self, meters: Sequence[Both]) -> None:
        """What an invoice would count otherwise than a balance, by Polar's own two readings of one filter."""
        looked_at = [both.here for both in meters if _reads_metadata(both.here.filter)]
        events: list[Seen] = []
        for event in self._events.ours.feed(Part(self._scope.since, self._scope.until)) if looked_at else ():
            events.append(event)
            if len(events) >= READ_MAX:
                self.check.notes.append(f"the first {READ_MAX:,} events were read as invoices read them")
                break
        for meter in looked_at:
            read = _read_otherwise(meter, events, "invoices")
            facts = [event.facts for event in events]
            balance, invoice = value(meter, facts), value(meter, facts, OTHERS["invoices"])
            if read:
                what = f"a balance counts {amount_text(balance)} and an invoice {amount_text(invoice)}: Polar reads " \
                       f"{len(read)} events differently there. Compare values of one type only."  # fmt: skip
                quantities = {meter.id: EXACT.subtract(invoice, balance)}
                self._add(Cause.FILTER_SEMANTICS, f"{meter.name}, filter", what, quantities=quantities, events=read)
        self.check.counted.append(Counted("events, read as invoices read them", len(events) * len(looked_at)))

    def _balances(self, meters: Sequence[Both]) -> None:
        balances = Balances(self._here, self._there, self._scope, self._worth)
        touched = {
            both.here.id: self._events.customers_of(both.here)
            for both in meters if not is_summable(both.here.aggregation)
        }  # fmt: skip

        def moved(both: Both, who: str) -> Decimal | None:
            return None if who in touched.get(both.here.id, ()) else self._moved(both, None, who)

        for difference in balances.compare(meters, moved):
            self.check.add(difference)
        self.check.counted.append(balances.counted)
        self.check.notes += balances.notes

    def _add(
        self, cause: Cause, where: str, what: str, repair: Repair = Repair.DECIDE, *,
        window: tuple[datetime, datetime] | None = None, quantities: Mapping[str, Decimal] | None = None,
        events: Sequence[str] = (),
    ) -> None:  # fmt: skip
        given = quantities or {}
        self.check.add(Difference(
            check="upstream", cause=cause, where=where, what=what, repair=repair, window=window,
            events=list(events[:SHOWN_EVENTS_MAX]), count=max(len(events), 1),
            quantities=self._worth.named(given), cents=self._worth.cents(given),
        ))  # fmt: skip


def _namesakes(
    own: Sequence[Meter], there: Sequence[dict[str, Any]]
) -> Iterator[tuple[Meter, dict[str, Any] | None]]:
    """Our meters, each with another one over there of its name: where several are called so, with one that is alike."""
    left, found = list(there), dict[str, dict[str, Any]]()
    for must_be_alike in (True, False):
        for meter in own:
            called = [other for other in left if other["name"] == meter.name and meter.id not in found]
            for other in [other for other in called if _is_alike(meter, other) or not must_be_alike][:1]:
                found[meter.id] = other
                left.remove(other)
    return ((meter, found.get(meter.id)) for meter in own)


def _is_alike(meter: Meter, other: Mapping[str, Any]) -> bool:
    ours = meter_json(meter)
    return (ours["filter"], ours["aggregation"]) == (other["filter"], other["aggregation"])


def _read_otherwise(meter: Meter, events: Sequence[Seen], who: str) -> list[str]:
    """The events that another reading of the meter's filter takes and ours does not, or the reverse."""
    reading = OTHERS[who]
    return [
        event.label for event in events
        if reading(meter.filter, event.facts) is not matches(meter.filter, event.facts)
    ]  # fmt: skip


def _without_signs(meter: Meter, events: Sequence[Seen]) -> Decimal:
    """What a sum of the events would be if none of them was negative; nothing for what is no sum."""
    if meter.aggregation.func != "sum":
        return Decimal(0)
    counted = [event.facts for event in events if matches(meter.filter, event.facts)]
    amounts = [amount_of(facts, meter.aggregation.property or "") for facts in counted]
    return exact_sum(abs(amount) for amount in amounts if amount)


def _reads_metadata(filter: Filter) -> bool:
    """Whether the filter looks at anything whose type depends on the sender."""
    return any(
        _reads_metadata(part) if isinstance(part, Filter) else not is_built_in(part.property) for part in filter.clauses
    )


def _definition(meter: Mapping[str, Any]) -> str:
    return msgspec.json.encode([meter["filter"], meter["aggregation"]]).decode()
