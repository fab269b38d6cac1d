"""Events that Polar writes itself (an order was paid, a credit was given), which no log of ours holds.

They count in a meter's quantities there wherever its filter lets them through, and in no balance. A meter without a
filter that counts events differs by them on every day on which Polar had something to do. Only days that differ are
asked about.
"""

from collections import defaultdict
from datetime import datetime
from decimal import Decimal

from aggregator.reconcile.pairing import Seen, seen
from aggregator.reconcile.readings import value
from aggregator.reconcile.upstream_scope import Part, Reader, day_of, exclusive
from meters.aggregation import considers
from meters.event import SYSTEM
from meters.filter import matches
from meters.meter import Meter


class SystemEvents:
    """See the module. ``told`` are the names of those that explained something, by the meter's name."""

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
