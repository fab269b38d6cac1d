"""Our side of a comparison with an upstream, as far as it is forwarded at all.

A selection keeps events here, and where forwarding began with what came from then on, it left out all that was before.
Polar has nothing of those from us, so they take no part in counts, lists or quantities. Where everything that a meter
counts is forwarded, its own quantities say what was used; where only a part is, the events of that part are added up.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from aggregator.reconcile.pairing import Seen, seen
from aggregator.reconcile.readings import value
from aggregator.reconcile.upstream_scope import (
    DAY,
    STEP,
    Forwarded,
    Interval,
    Part,
    Reader,
    Series,
    asked,
    days,
    hour,
    midnight,
    text,
)
from meters import exact_json
from meters.catalogue import meter_json
from meters.facts import Facts
from meters.meter import Meter

FEED_ROWS = 10_000
ADDED_UP_MAX = 200_000  # events of a day that are added up here: some seconds, and some hundred megabytes


class OwnUsage:
    """See the module. Asks nobody but our own server, as often as it likes."""

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
        given = {**self._forwarded.selection, **_range(part), "since": text(since)}
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
        own = exact_json.encode(meter_json(meter)["filter"]).decode()
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
    return {"start_timestamp": text(part.since), "end_timestamp": text(part.until)}
