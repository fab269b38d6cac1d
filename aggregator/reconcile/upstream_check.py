"""Our server against a Polar organization: events, quantities by day, customers' meters. Both sides speak one API.

Requests over there are few and precious, so every step asks for as little as tells the sides apart. A day's number of
events costs one request, a year of a meter's days another one. Days that differ are narrowed down to single events
(``upstream_events``). What those do not explain of a quantity is judged by itself: the digits of doubles, or another
reading of the meter's filter. What came in within the settle window may still be on its way and is not compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from aggregator.forward.polar_event import ROLLUP_NAME
from aggregator.reconcile.pairing import Seen
from aggregator.reconcile.readings import OTHERS, value
from aggregator.reconcile.report import SHOWN_EVENTS_MAX, Cause, Check, Counted, Difference, Repair
from aggregator.reconcile.upstream_events import Events
from aggregator.reconcile.upstream_scope import DAY, HOUR, Part, Reader, Scope, days, midnight, near, text
from aggregator.reconcile.worth import Worth
from meters.amount import EXACT, amount_text
from meters.catalogue import meter_json
from meters.filter import Filter, matches
from meters.meter import Meter
from meters.property import is_built_in
from meters.timestamp import MICROSECOND

DAYS_AT_ONCE = 366  # the longest range of days that one request may ask for
READ_MAX = 20_000  # events that are read in the other two ways, to see what an invoice would count
_PARTS = ("credited_units", "consumed_units")
_Series = dict[datetime, Decimal]


class _Both(NamedTuple):
    """A meter here, and the id of its namesake over there."""

    here: Meter
    there: str


class UpstreamCheck:
    """One run. ``here`` and ``there`` are asked, nothing is changed on either side."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, meters: Sequence[Meter], worth: Worth) -> None:
        self._here, self._there, self._scope, self._own, self._worth = here, there, scope, meters, worth
        self.check = Check(name="upstream", sides="our events, quantities and balances, and Polar's")
        self._events = Events(here, there, scope, worth)
        self._rolled_up = False

    def run(self) -> Check:
        """Compare."""
        meters = self._matched_meters()
        series = {both.here.name: self._series(both) for both in meters}
        if not self._rolled_up:
            self._compare_events(meters, series)
        for both in meters:
            self._judge(both, *series[both.here.name])
        if not self._rolled_up:
            self._other_readings(meters)
        self._customer_meters({both.here.name for both in meters})
        return self.check

    # ---- meters and their quantities

    def _matched_meters(self) -> list[_Both]:
        there = {meter["name"]: meter for meter in self._there.pages("/v1/meters/", is_archived=False)}
        matched, alike = [], set[str]()
        for meter in self._own:
            other = there.get(meter.name)
            if other is None:
                self.check.notes.append(f"{meter.name}: there is no meter of this name over there")
                continue
            ours = meter_json(meter)
            if ROLLUP_NAME in str(other["filter"]):
                self._rolled_up = True
            elif (ours["filter"], ours["aggregation"]) != (other["filter"], other["aggregation"]):
                what = f"the meter is another one over there: {_definition(other)} instead of {_definition(ours)}"
                self._add(Cause.FILTER_SEMANTICS, meter.name, what)
            else:
                alike.add(meter.name)
            matched.append(_Both(meter, other["id"]))
        if there.keys() == alike:  # no meter over there that we do not know
            self._events.meters = [both.here for both in matched]
        if self._rolled_up:
            self.check.notes.append("events are forwarded as sums of windows, so only quantities are compared")
        return matched

    def _series(self, both: _Both) -> tuple[_Series, _Series]:
        here, total_here = self._by_day(self._here, both.here.id)
        there, total_there = self._by_day(self._there, both.there)
        same = sum(near(amount, there.get(day, Decimal(0))) for day, amount in here.items())
        self.check.counted.append(Counted(
            f"{both.here.name}, by day", len(here), len(here) - same, amount_text(total_here), amount_text(total_there),
        ))  # fmt: skip
        func = both.here.aggregation.func
        if func in ("avg", "unique") and same == len(here) and not near(total_here, total_there):
            what = f"every day agrees; the total over there is {amount_text(total_there)} over all time, " \
                   f"ours {amount_text(total_here)} over the range"  # fmt: skip
            self._add(Cause.OUTSIDE_THE_RANGE, f"{both.here.name}, total", what, Repair.NOTHING)
        return here, there

    def _by_day(self, side: Reader, meter_id: str) -> tuple[_Series, Decimal]:
        found: _Series = {}
        total, start = Decimal(0), midnight(self._scope.since)
        while start < self._scope.until:
            end = min(start + (DAYS_AT_ONCE - 1) * DAY, midnight(self._scope.until - MICROSECOND))
            answer = _quantities(side, meter_id, start, end, "day")
            for point in answer["quantities"]:
                found[datetime.fromisoformat(point["timestamp"])] = Decimal(str(point["quantity"]))
            total, start = total + Decimal(str(answer["total"])), end + DAY
        return found, total

    def _compare_events(self, meters: Sequence[_Both], series: Mapping[str, tuple[_Series, _Series]]) -> None:
        whole = list(days(Part(self._scope.since, self._scope.until)))
        suspects = [day for day in whole if self._events.differ(day)]
        self.check.counted.append(Counted("days, by number of events", len(whole), len(suspects)))
        for day in whole:
            at = midnight(day.since)
            pairs = [(here.get(at, Decimal(0)), there.get(at, Decimal(0))) for here, there in series.values()]
            if day not in suspects and not all(near(*pair) for pair in pairs):
                suspects.append(day)
        for day in sorted(suspects):
            self._events.narrow(day, lambda part: self._content_differs(part, meters))
        for difference in self._events.finish():
            self.check.add(difference)
        count = len(self._events.pairs)
        self.check.counted.append(Counted("events, one by one where days differ", self._events.listed, count))

    def _content_differs(self, part: Part, meters: Sequence[_Both]) -> bool:
        """Whether any meter of a part with whole hours differs; a smaller part is taken to."""
        if part.until - part.since < HOUR or part.since.minute or part.since.second:
            return True
        asked = part.since, part.until - HOUR, "hour"
        for both in meters:
            here, there = _quantities(self._here, both.here.id, *asked), _quantities(self._there, both.there, *asked)
            if not near(Decimal(str(here["total"])), Decimal(str(there["total"]))):
                return True
        return False

    # ---- what events do not explain

    def _judge(self, both: _Both, here: _Series, there: _Series) -> None:
        for day, ours in here.items():
            if self._scope.settles and day + DAY > self._scope.arrived_before:
                continue  # the day goes on: its sums move while they are read, and its events are compared one by one
            theirs = there.get(day, Decimal(0))
            explained = EXACT.add(ours, self._events.moved(day).get(both.here.name, Decimal(0)))
            if theirs == explained:
                continue
            named = [event.facts for event in self._events.of_day(day)]
            if both.here.aggregation.func not in ("count", "sum") and value(both.here, named):
                continue  # events that differ are named already, and such a value cannot be split among them
            self._unexplained(both.here, day, (ours, theirs, explained))

    def _unexplained(self, meter: Meter, day: datetime, amounts: tuple[Decimal, Decimal, Decimal]) -> None:
        ours, theirs, explained = amounts
        said = f"{amount_text(theirs)} over there, {amount_text(ours)} here"
        where, window = f"{meter.name}, {day:%Y-%m-%d}", (day, day + DAY)
        quantities = {meter.name: EXACT.subtract(theirs, explained)}
        if near(theirs, explained):
            what = f"{said}: the same amounts, added as doubles"
            self._add(Cause.ROUNDING, where, what, Repair.NOTHING, window=window, quantities=quantities)
            return
        events = list(self._events.feed(Part(day, day + DAY)))
        for who, reading in OTHERS.items():
            if near(value(meter, [event.facts for event in events], reading), theirs):
                read = _read_otherwise(meter, events, who)
                what = f"{said}: with the filter read as Polar's {who} read it, our events give the same; " \
                       f"{len(read)} of them are read differently"  # fmt: skip
                self._add(Cause.FILTER_SEMANTICS, where, what, window=window, quantities=quantities, events=read)
                return
        self._add(Cause.UNKNOWN, where, said, window=window, quantities=quantities)

    def _other_readings(self, meters: Sequence[_Both]) -> None:
        """What an invoice would count otherwise than a balance, by Polar's own two readings of one filter."""
        asked = [both.here for both in meters if _reads_metadata(both.here.filter)]
        events: list[Seen] = []
        for event in self._events.feed(Part(self._scope.since, self._scope.until)) if asked else ():
            events.append(event)
            if len(events) >= READ_MAX:
                self.check.notes.append(f"the first {READ_MAX:,} events were read as invoices read them")
                break
        for meter in asked:
            read = _read_otherwise(meter, events, "invoices")
            facts = [event.facts for event in events]
            balance, invoice = value(meter, facts), value(meter, facts, OTHERS["invoices"])
            if read:
                what = f"a balance counts {amount_text(balance)} and an invoice {amount_text(invoice)}: Polar reads " \
                       f"{len(read)} events differently there. Compare values of one type only."  # fmt: skip
                quantities = {meter.name: EXACT.subtract(invoice, balance)}
                self._add(Cause.FILTER_SEMANTICS, f"{meter.name}, filter", what, quantities=quantities, events=read)
        self.check.counted.append(Counted("events, read as invoices read them", len(events) * len(asked)))

    # ---- balances

    def _customer_meters(self, names: set[str]) -> None:
        here, there = _balances(self._here), _balances(self._there)
        keys = sorted(key for key in here.keys() & there.keys() if key[1] in names)
        found = [difference for key in keys for difference in self._balance(key, here[key], there[key])]
        for difference in found:
            self.check.add(difference)
        self.check.counted.append(Counted("customers' meters", len(keys), len(found)))

    def _balance(self, key: tuple[str, str], here: dict[str, Any], there: dict[str, Any]) -> Iterator[Difference]:
        who, name = key
        for part in _PARTS:
            ours, theirs = Decimal(str(here[part])), Decimal(str(there[part]))
            is_usage = part == "consumed_units"
            if is_usage and self._scope.settles and _moved_since(self._scope.arrived_before, here, there):
                continue  # usage is on its way, or Polar has yet to add it up
            moved = self._events.moved(who=who).get(name, Decimal(0)) if is_usage else Decimal(0)
            explained = EXACT.add(ours, moved)
            if theirs == explained:
                continue
            what = f"{part.replace('_', ' ')}: {amount_text(theirs)} over there, {amount_text(ours)} here"
            cause, repair = (Cause.LOST if theirs < ours else Cause.DOUBLED), Repair.DECIDE
            if is_usage and near(theirs, explained):
                cause, repair = Cause.ROUNDING, Repair.NOTHING
            elif is_usage:
                cause = Cause.LATE
                what += "; no event says why: usage arrived on the other side of a reset, and counts in another period"
            quantities = {name: EXACT.subtract(theirs, explained)}
            yield Difference(
                check="upstream", cause=cause, where=f"{name}, customer {who}", what=what, repair=repair,
                quantities=quantities, cents=self._worth.cents(self._scope.organization_id, quantities),
            )  # fmt: skip

    def _add(
        self, cause: Cause, where: str, what: str, repair: Repair = Repair.DECIDE, *,
        window: tuple[datetime, datetime] | None = None, quantities: Mapping[str, Decimal] | None = None,
        events: Sequence[str] = (),
    ) -> None:  # fmt: skip
        given = dict(quantities or {})
        self.check.add(Difference(
            check="upstream", cause=cause, where=where, what=what, repair=repair, window=window, quantities=given,
            events=list(events[:SHOWN_EVENTS_MAX]), count=max(len(events), 1),
            cents=self._worth.cents(self._scope.organization_id, given),
        ))  # fmt: skip


def _moved_since(instant: datetime, *sides: dict[str, Any]) -> bool:
    """Whether either side's balance moved at this time or later."""
    return any(datetime.fromisoformat(side["modified_at"]) >= instant for side in sides if side.get("modified_at"))


def _quantities(side: Reader, meter_id: str, start: datetime, end: datetime, interval: str) -> dict[str, Any]:
    given = {"start_timestamp": text(start), "end_timestamp": text(end), "interval": interval}
    answer: dict[str, Any] = side.get(f"/v1/meters/{meter_id}/quantities", **given)
    return answer


def _balances(side: Reader) -> dict[tuple[str, str], dict[str, Any]]:
    """Customers' meters by the customer's external id (or id) and the meter's name."""
    rows = side.pages("/v1/customer-meters/")
    return {(str(row["customer"].get("external_id") or row["customer_id"]), row["meter"]["name"]): row for row in rows}


def _read_otherwise(meter: Meter, events: Sequence[Seen], who: str) -> list[str]:
    """The events that another reading of the meter's filter takes and ours does not, or the reverse."""
    reading = OTHERS[who]
    return [
        event.label for event in events
        if reading(meter.filter, event.facts) is not matches(meter.filter, event.facts)
    ]  # fmt: skip


def _reads_metadata(filter: Filter) -> bool:
    """Whether the filter looks at anything whose type depends on the sender."""
    return any(
        _reads_metadata(part) if isinstance(part, Filter) else not is_built_in(part.property) for part in filter.clauses
    )


def _definition(meter: Mapping[str, Any]) -> str:
    return msgspec.json.encode([meter["filter"], meter["aggregation"]]).decode()
