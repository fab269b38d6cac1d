"""Events of both sides: counted by day, halved where the counts differ, listed and paired where a part is small.

A request over there is precious and one here is not, so parts are told apart by counts, and by quantities where the
counts agree. What is listed is paired (``pairing``), within a part first and over all parts in the end.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from decimal import Decimal

from aggregator.reconcile.correction import mark_of, settled, takes_back
from aggregator.reconcile.pairing import Pair, Seen, pair, seen
from aggregator.reconcile.report import SHOWN_EVENTS_MAX, Cause, Difference, Repair
from aggregator.reconcile.upstream_scope import HOUR, Part, Reader, Scope, exclusive, midnight, text
from aggregator.reconcile.worth import Worth, add
from meters.meter import Meter

LISTED_MAX = 1_000  # events of a part that is listed rather than halved: ten requests
PART_MIN = timedelta(minutes=1)
FEED_ROWS = 10_000
_CORRECTABLE = {Cause.DOUBLED, Cause.CHANGED, Cause.LATE}  # what is over there is wrong, if the log is right


class Events:
    """See the module. ``pairs`` is what the sides do not have alike."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, worth: Worth) -> None:
        self._here, self._there, self._scope, self._worth = here, there, scope, worth
        self.pairs: list[Pair] = []
        self.listed = 0
        self.meters: Sequence[Meter] = ()  # all that may count an event over there, where they are known to be all
        self._taken_back: Counter[str] = Counter()

    def differ(self, part: Part) -> bool:
        """Whether the sides have different numbers of events."""
        return self._count_here(part) != self._count_there(part)

    def narrow(self, part: Part, content_differs: Callable[[Part], bool]) -> None:
        """List the part, or the halves of it that differ. ``content_differs`` tells where the counts agree."""
        here, there = self._count_here(part), self._count_there(part)
        if max(here, there) <= LISTED_MAX or part.until - part.since <= PART_MIN:
            self._list(part)
            return
        middle = part.since + (part.until - part.since) / 2
        for half in (Part(part.since, middle), Part(middle, part.until)):
            if self.differ(half) or (here == there and content_differs(half)):
                self.narrow(half, content_differs)

    def feed(self, part: Part) -> Iterator[Seen]:
        """Our events of a part, as they are forwarded."""
        given = {**self._scope.selection, "start_timestamp": text(part.since), "end_timestamp": text(part.until)}
        position, left = "", self._count_here(part)
        while left > 0:
            answer = self._here.get("/v1/feed/", **given, position=position, limit=FEED_ROWS)
            for item in answer["items"]:
                yield seen(item["event"], datetime.fromisoformat(item["ingested_at"]), item["place"])
            left -= len(answer["items"])
            if answer["position"] == position:
                return
            position = answer["position"]  # which moves over what is not wanted, too

    def finish(self) -> Iterator[Difference]:
        """Pair what is left over across parts, and tell it by cause and hour."""
        doubled = [found for found in self.pairs if found.cause is Cause.DOUBLED]
        others = [found for found in self.pairs if found.cause is not Cause.DOUBLED]
        ours = [found.ours for found in others if found.ours is not None]
        theirs = [found.theirs for found in others if found.theirs is not None]
        self.pairs = pair(ours, theirs) + doubled
        conflicts = self._conflicts() if any(found.cause is Cause.CHANGED for found in self.pairs) else ""
        groups: defaultdict[tuple[datetime, Cause], list[Pair]] = defaultdict(list)
        for found in self.pairs:
            if self._is_on_its_way(found):
                continue
            event, cause = _either(found), found.cause
            if cause is Cause.CHANGED and found.ours and f'"{found.ours.external_id}"' in conflicts:
                cause = Cause.CONFLICT
            if cause is Cause.LOST and found.ours and self._scope.is_pending(found.ours.place):
                cause = Cause.LATE
            groups[event.timestamp.replace(minute=0, second=0, microsecond=0), cause].append(found)
        for (hour, cause), pairs in sorted(groups.items()):
            yield self._told(cause, hour, pairs)

    def moved(self, day: datetime | None = None, who: str | None = None) -> dict[str, Decimal]:
        """What the pairs make of quantities: theirs minus ours, by meter; of one day or customer, or altogether."""
        quantities: dict[str, Decimal] = {}
        for found in self.pairs:
            self._move(quantities, found, day, who)
        return quantities

    def of_day(self, day: datetime) -> list[Seen]:
        """Every event of the day that differs, of either side."""
        events = [event for found in self.pairs for event in (found.ours, found.theirs) if event is not None]
        return [event for event in events if midnight(event.timestamp) == day]

    def _is_on_its_way(self, found: Pair) -> bool:
        if found.cause is not Cause.LOST or found.ours is None or found.ours.ingested_at is None:
            return False
        return max(found.ours.ingested_at, found.ours.timestamp) >= self._scope.arrived_before

    def _count_here(self, part: Part) -> int:
        given = {**self._scope.selection, "start_timestamp": text(part.since), "end_timestamp": text(part.until)}
        return int(self._here.get("/v1/feed/backlog", **given)["events"])

    def _count_there(self, part: Part) -> int:
        answer = self._there.get("/v1/events/", **exclusive(part), source="user", limit=1)
        return int(answer["pagination"]["total_count"])

    def _list(self, part: Part) -> None:
        ours = list(self.feed(part))
        found = self._there.pages("/v1/events/", **exclusive(part), source="user", sorting="timestamp")
        theirs, taken_back = settled([seen(event) for event in found])
        self._taken_back += taken_back
        self.listed += len(ours)
        self.pairs += pair(ours, theirs)

    def _conflicts(self) -> str:
        """The lines that contradicted an event that was first, as text to look for ids in."""
        letters = self._here.pages("/v1/dead-letters/", include_replayed=True)
        return "\n".join(letter["raw"] for letter in letters if letter["reason"] == "conflict")

    def _told(self, cause: Cause, hour: datetime, pairs: Sequence[Pair]) -> Difference:
        quantities: dict[str, Decimal] = {}
        for found in pairs:
            self._move(quantities, found)
        refused = {word for found in pairs if found.ours and (word := self._scope.refused.get(found.ours.external_id))}
        repair, corrections = Repair.DECIDE, self._corrections(cause, pairs)
        if cause is Cause.LATE and all(found.theirs is None for found in pairs):
            repair = Repair.WAIT
        elif corrections:
            repair = Repair.CORRECT
        elif cause is Cause.LOST and not refused:
            repair = Repair.SEND
        sent = [(found.ours.external_id, text(found.ours.timestamp)) for found in pairs if found.ours is not None]
        return Difference(
            check="upstream", cause=cause, repair=repair, count=len(pairs), window=(hour, hour + HOUR),
            where=_either(pairs[0]).label if len(pairs) == 1 else f"{hour:%Y-%m-%d %H}:00 UTC",
            what="; ".join(dict.fromkeys([
                *(_sentence(found, cause) for found in pairs[:3]), *(f"Polar refuses it: {word}" for word in refused),
            ])),
            events=[_either(found).label for found in pairs[:SHOWN_EVENTS_MAX]],
            quantities={name: amount for name, amount in quantities.items() if amount},
            cents=self._worth.cents(self._scope.organization_id, quantities),
            payload={"events": sent, "corrections": corrections} if repair in (Repair.SEND, Repair.CORRECT) else {},
        )  # fmt: skip

    def _corrections(self, cause: Cause, pairs: Sequence[Pair]) -> list[str]:
        """What takes back everything that is wrong over there; nothing where not all of it can be."""
        bodies: list[str] = []
        for found in pairs if cause in _CORRECTABLE else ():
            body, mark = None, ""
            if found.theirs is not None and found.theirs.is_named:
                mark = mark_of(found.theirs)
                body = takes_back(found.theirs, self.meters, self._taken_back[mark])
            if body is None:
                return []
            self._taken_back[mark] += 1
            bodies.append(body.decode())
        return bodies

    def _move(
        self, quantities: dict[str, Decimal], found: Pair, day: datetime | None = None, who: str | None = None
    ) -> None:
        for event, sign in ((found.ours, -1), (found.theirs, 1)):
            if event is None or (day is not None and midnight(event.timestamp) != day) or who not in (None, event.who):
                continue
            add(quantities, self._worth.of(self._scope.organization_id, event.facts), sign)


def _either(found: Pair) -> Seen:
    event = found.ours or found.theirs
    assert event is not None
    return event


def _sentence(found: Pair, cause: Cause) -> str:
    match cause:
        case Cause.LATE if found.theirs is None:
            return "it is counted here and waits for the forwarder"
        case Cause.LATE if found.ours and found.theirs:
            return f"happened {text(found.ours.timestamp)}, and counts over there in {text(found.theirs.timestamp)}"
        case Cause.CHANGED | Cause.CONFLICT if found.ours and found.theirs:
            return _contents(found.ours, found.theirs)
        case Cause.LOST:
            return "it is counted here and missing over there"
        case Cause.DOUBLED:
            return "over there it is counted more often than here"
        case _:
            return "over there is an event that we never counted"


def _contents(ours: Seen, theirs: Seen) -> str:
    """The parts of the metadata that are not alike."""
    here, there = json.loads(ours.content), json.loads(theirs.content)
    parts = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    return ", ".join(f"{key}: {here.get(key, 'nothing')} here, {there.get(key, 'nothing')} over there" for key in parts)
