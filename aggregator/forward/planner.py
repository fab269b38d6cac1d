"""Plan what to send next, and interpret Polar's answers. Pure: no clock, no files, no network.

A *slice* is a run of items in the order in which they arrived. Each item is sent, parked (its timestamp is still in
the future for Polar) or condemned (Polar refuses this item or fails on it). ``take`` cuts a slice to the request
limits, ``judge`` turns an answer into a verdict, and ``isolate``, ``apart``, ``probing`` and ``halves`` split a slice
that failed until the bad event stands alone.

A slice is completed as a whole and recorded in one transaction, so at every moment taken = accepted + parked +
condemned.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from aggregator.forward.polar_client import Answer, is_passing
from meters.log import FeedPlace

ALONE_MAX = 8  # events that Polar names as bad are sent alone to be sure; of more than these its word is taken
PROBE_EVENTS = 100  # of the first request after a pause: enough to learn, little to lose
ENVELOPE_BYTES = len(b'{"events":[]}')
WORDS_MAX = 2_000  # characters kept of what Polar said


class Reached(NamedTuple):
    """Where a reader stands, and the witnesses of that place; None in a file of a version that wrote none."""

    position: dict[int, FeedPlace]
    witnesses: dict[int, str] | None


class Item(msgspec.Struct):
    """An event on its way. Times are UTC, microseconds. ``number`` is its row when it comes from the waiting ones."""

    lane: str
    external_id: str
    who: str
    timestamp_us: int
    ingested_us: int
    body: bytes
    partition: int = 0
    offset: int = 0
    line: int = 0
    number: int = 0
    due_us: int = 0
    condemned: str = ""

    @property
    def is_sent(self) -> bool:
        """Whether it belongs into the request."""
        return not (self.due_us or self.condemned)


class Slice(msgspec.Struct):
    """Items in order. ``behind`` is where the reader stands behind them, when that is further than the last item."""

    lane: str
    items: list[Item]
    behind: Reached | None = None

    @property
    def sent(self) -> list[Item]:
        """The items of the request, in order."""
        return [item for item in self.items if item.is_sent]

    def body(self) -> bytes:
        """The request's bytes."""
        return b'{"events":[' + b",".join(item.body for item in self.items if item.is_sent) + b"]}"

    def cut(self, *bounds: int) -> list["Slice"]:
        """The same in several slices: ``bounds`` are indices of items, ascending."""
        edges = [0, *bounds, len(self.items)]
        parts = [Slice(self.lane, self.items[a:b]) for a, b in pairwise(edges) if a < b]
        parts[-1].behind = self.behind
        return parts


class Accepted(NamedTuple):
    """Polar has them all. ``duplicates`` of them it had before."""

    inserted: int
    duplicates: int


class Bad(NamedTuple):
    """The content is refused: nothing of it was taken. ``accused`` is what is said of single events, by index."""

    words: str
    accused: dict[int, str]
    is_future: bool


class Later(NamedTuple):
    """It may work another time; ``after_s`` is Polar's own wish. ``fault`` is what it says with a server's error."""

    reason: str
    after_s: str | None = None
    is_slow: bool = False
    fault: str = ""


class Stop(NamedTuple):
    """It will not work until somebody does something; the reason says what."""

    reason: str


Verdict = Accepted | Bad | Later | Stop


class _Counts(msgspec.Struct):
    """What an answer to events that were taken says."""

    inserted: int
    duplicates: int = 0


def judge(answer: Answer, count: int) -> Verdict:
    """What an answer to ``count`` events means."""
    status = answer.status
    if answer.is_success:
        return _accepted(answer, count)
    if status in (400, 413, 422):
        return _bad(answer)
    if status in (401, 403):
        return Stop(
            f"Polar answers {status} ({answer.words()}): give a token of its organization with the scope events:write "
            "in METERSTREAM_POLAR_TOKEN and start again, or mend it there and `meterstream forward resume`"
        )
    if is_passing(status):
        wish = answer.headers.get("retry-after")
        fault = f"status {status}: {answer.words()}"[:WORDS_MAX] if status >= 500 else ""
        return Later(f"status {status}", wish, is_slow=status in (408, 504), fault=fault)
    return Stop(
        f"the server answers {status} to /v1/events/ingest: {answer.words()}. Is METERSTREAM_POLAR_SERVER right? "
        "Then start again or `meterstream forward resume`"
    )


def counts_of(answer: Answer) -> Accepted:
    """What a success says of the events that were sent. Raises ValueError."""
    said = msgspec.convert(answer.json(), _Counts)
    return Accepted(said.inserted, said.duplicates)


def _accepted(answer: Answer, count: int) -> Verdict:
    try:
        said = counts_of(answer)
    except ValueError:
        return Later("an answer that cannot be read")
    return said if sum(said) == count else Later(f"an answer for {sum(said)} of {count} events")


def _bad(answer: Answer) -> Bad:
    accused: dict[int, str] = {}
    is_future = False
    for entry in _details(answer):
        loc, message = entry.get("loc"), str(entry.get("msg", ""))
        if isinstance(loc, list) and len(loc) > 2 and loc[:2] == ["body", "events"] and type(loc[2]) is int:
            words = f"{'.'.join(map(str, loc[3:]))}: {message}"
            accused[loc[2]] = f"{accused[loc[2]]}; {words}" if loc[2] in accused else words
            is_future = is_future or (loc[-1] == "timestamp" and "past" in message)
    return Bad(answer.words()[:WORDS_MAX], accused, is_future)


def _details(answer: Answer) -> list[dict[str, Any]]:
    try:
        found = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def isolate(refused: Slice, bad: Bad) -> list[Slice]:
    """What to do instead of a slice that was refused, in order.

    Its only event is condemned. Events that Polar names are set alone, or, if they are many, condemned at its word; if
    it names none, the slice is halved.
    """
    places = [place for place, item in enumerate(refused.items) if item.is_sent]
    accused = {places[index]: words for index, words in bad.accused.items() if 0 <= index < len(places)}
    if len(places) == 1:
        refused.items[places[0]].condemned = (accused.get(places[0]) or bad.words)[:WORDS_MAX]
        return [refused]
    if not accused:
        return refused.cut(places[len(places) // 2])
    if len(accused) > ALONE_MAX:
        for place, words in accused.items():
            refused.items[place].condemned = words[:WORDS_MAX]
        return [refused]
    return _alone(refused, accused)


def apart(whole: Slice, external_ids: Collection[str]) -> list[Slice]:
    """The slice with each of these events alone, in order."""
    return _alone(whole, [place for place, item in enumerate(whole.items) if item.external_id in external_ids])


def _alone(whole: Slice, places: Collection[int]) -> list[Slice]:
    bounds = {bound for place in places for bound in (place, place + 1) if bound < len(whole.items)}
    return whole.cut(*sorted(bounds - {0}))


def park(items: Sequence[Item], now_us: int, skew_us: int, waiting: dict[str, int]) -> None:
    """Set ``due_us`` of what cannot be sent yet, and note it in ``waiting``, {customer: when the last one is due}.

    An event whose time is not past waits until it is. Later events of its customer wait behind it, to keep the order.
    """
    for item in items:
        due_us = max(waiting.get(item.who, 0), item.timestamp_us + skew_us)
        if due_us > now_us or item.who in waiting:
            item.due_us = waiting[item.who] = due_us


def take(items: Sequence[Item], events_max: int, bytes_max: int) -> int:
    """How many items from the first on fit into a request; at least one, if there is any."""
    size, events = ENVELOPE_BYTES, 0
    for count, item in enumerate(items):
        if not item.is_sent:
            continue
        size, events = size + len(item.body) + 1, events + 1
        if events > 1 and (events > events_max or size > bytes_max):
            return count
    return len(items)


def probing(whole: Slice, size: int = PROBE_EVENTS) -> list[Slice]:
    """The slice with its first events apart, if it has more than ``size``."""
    places = [place for place, item in enumerate(whole.items) if item.is_sent]
    return whole.cut(places[size]) if len(places) > size else [whole]


def halves(whole: Slice) -> list[Slice]:
    """The slice in two, if it sends more than one event."""
    return probing(whole, max(1, len(whole.sent) // 2))
