"""The forwarder: reads the feed and sends its events to Polar, at least once, each customer's in order.

``Forwarder.turn`` does one step and returns how long to wait. A step reads a page of the feed, sends the next slice
(chosen by ``planner.py``), and records the outcome in one transaction of the state file (``state.py``). ``Skew``
estimates how far Polar's clock is behind, and ``Suspects`` finds single events that Polar fails on.

Only one request is in progress at a time. This keeps each customer's events in order without bookkeeping, and costs
nothing where requests are scarce, since a batch carries thousands of events.

The forwarder is a process of its own and a client of the feed: the store's file has one owner, slow work here must
not delay counting, and a crash here must not interrupt it.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Set
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import structlog

from aggregator.forward.feed_client import Away, Elsewhere, Selection, Source, item_of, piece_at, rollup_item
from aggregator.forward.planner import (
    Accepted,
    Bad,
    Item,
    Later,
    Reached,
    Slice,
    Stop,
    Verdict,
    apart,
    halves,
    isolate,
    judge,
    park,
    probing,
    take,
)
from aggregator.forward.polar_client import BODY_BYTES_MAX, Circuit, NoAnswer, Upstream, jitter
from aggregator.forward.state import WAITING, WAITING_MAX, Replay, State
from meters.backoff import RETRY_AFTER_S_MAX, retry_after_s
from meters.log import FeedPlace, format_places

# Clock skew. Pure: no clock, no files, no network.
#
# Polar's clock is visible only when Polar rejects a timestamp as in the future. So the assumed skew grows with each
# rejection and is halved after five minutes without one. If Polar's clock stays behind, this costs an occasional
# refused request; if it was corrected, events soon stop waiting.
#
# The client library (``ingest/client/sender.py``) reads the server's time from the ``Date`` header of a refusal
# instead. Polar's header is written by a proxy, whose clock is not the one that judges an event's time.

SKEW_FIRST_US = 2_000_000  # assumed when Polar first calls an event's time the future
SKEW_MAX_US = 600_000_000  # no honest clock is ten minutes behind; what it refuses then is the event's own fault
EASE_US = 300_000_000  # without a refusal, until less is assumed


class Skew:
    """The assumed lag of Polar's clock: doubled on each rejection, halved after EASE_US without one."""

    def __init__(self) -> None:
        self._us, self._changed_us = 0, 0

    def at(self, now_us: int) -> int:
        """What is assumed now, in microseconds."""
        self._changed_us = min(self._changed_us, now_us)  # a clock that was set back makes nobody wait for the old time
        while self._us and now_us - self._changed_us >= EASE_US:
            self._us = self._us // 2 if self._us > SKEW_FIRST_US else 0
            self._changed_us += EASE_US
        return self._us

    def grow(self, now_us: int) -> int:
        """Polar called an event's time the future: take its clock to be further behind; what is assumed from now on."""
        self._us = min(max(SKEW_FIRST_US, 2 * self.at(now_us)), SKEW_MAX_US)
        self._changed_us = now_us
        return self._us


# Poison events: an event that makes Polar fail is told apart from a Polar that is down. Pure.
#
# Both cause a server error (5xx). The next request tells them apart: an event is at fault if it fails alone and Polar
# accepts the next request, several times. While Polar is down the next request fails as well, so an outage of any
# length condemns no event.

STRIKES_MAX = 5  # each needs a minute and another request that passes: what passes by itself is over by then
PAUSE_US = 60_000_000  # between two tries of an event that failed alone, while the others go on
FAULTS_UNTIL_CUT = 3  # failures in a row, three seconds: hiccups are over, and the circuit is not open yet


class Suspects:
    """Strikes against events, by external id. Kept in memory: a restart begins to count again."""

    def __init__(self) -> None:
        self._strikes: dict[str, int] = {}
        self._latest: str | None = None

    @property
    def struck(self) -> Set[str]:
        """The events with a strike or more: they are sent alone."""
        return self._strikes.keys()

    @property
    def is_open(self) -> bool:
        """Whether the next request decides if the last failure is a strike."""
        return self._latest is not None

    def failed(self, external_id: str) -> bool:
        """It failed alone. Whether it did so once too often."""
        self._latest = None
        if self._strikes.get(external_id, 0) >= STRIKES_MAX:
            del self._strikes[external_id]
            return True
        self._latest = external_id
        return False

    def others_failed(self) -> None:
        """A request failed: what failed before it may be Polar's fault."""
        self._latest = None

    def accepted(self, external_ids: Collection[str]) -> None:
        """These were taken: nothing is held against them any more, and the one that failed before them has a strike."""
        if self._latest is not None and self._latest not in external_ids:
            self._strikes[self._latest] = self._strikes.get(self._latest, 0) + 1
        self._latest = None
        for external_id in self._strikes.keys() & set(external_ids):
            del self._strikes[external_id]


# The loop.

BATCH_EVENTS = 2_000  # Polar matches every event with every meter before it answers; this takes it about a second
BATCH_EVENTS_MIN = 10  # of a batch that was cut because Polar was too slow for larger ones
PAGE_EVENTS = 10_000  # read from the feed at once
IDLE_S = 0.5  # between two looks at a feed that had nothing
CIRCUIT_US_MAX = int((RETRY_AFTER_S_MAX + 1) * 1e6)  # the longest pause that it makes
LOOK_S = 1.0  # how soon a wish of an operator is heard
NOTE_US = 2_000_000  # how often the backlog is counted, at most
NOTE_SHARE = 20  # and so many times as long as it took last: a filter over a large backlog is work for the store
RATE_US = 60_000_000  # the time over which the rate is taken
ROLLUP_GRACE_US = 5_000_000  # so long after its end a window is added up: by then its events are in the store
NOTE_LATE_US = 60_000_000  # what was sent after the last note of a forwarder that was killed came in before then
RAW, ROLLUP = "raw", "rollup"
ADOPT = (
    "Nothing is sent until you choose where to begin in the log that is here: `meterstream forward adopt --from TIME` "
    "sends what came in since then (the time of the restored backup), `--from beginning` all of it, `--from now` "
    "nothing older; or bring the right log back and `meterstream forward resume`"
)

logger = structlog.get_logger("aggregator.forward")


class RolledMeter(NamedTuple):
    """A meter whose usage is sent added up. ``function`` is count or sum; others cannot be put together again."""

    id: str
    function: str


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator set. ``is_raw``: events are sent one by one; ``begin``: beginning or now."""

    selection: Selection = Selection()
    is_raw: bool = True
    begin: str = "beginning"
    meters: tuple[RolledMeter, ...] = ()
    window_s: int = 60
    batch_events: int = BATCH_EVENTS
    batch_bytes: int = BODY_BYTES_MAX


class Forwarder:
    """Read the feed and send it to Polar. ``turn`` does one step and returns how long to wait; its owner repeats it."""

    def __init__(
        self, source: Source, upstream: Upstream, state: State, wishes: Wishes, draw: Callable[[], float] = jitter
    ) -> None:
        self._source, self._upstream, self._state, self._wishes = source, upstream, state, wishes
        self._clock, self._draw = upstream.window.clock, draw
        self._circuit = Circuit()
        self._suspects = Suspects()
        self._last: Item | None = None  # what Polar took last
        self._slices: list[Slice] = []  # a stack: the next one to send is the last
        self._page: Slice | None = None  # what was read and is not yet cut into slices
        self._events_max = wishes.batch_events
        self._skew = Skew()
        self._rolled_us = 0
        self._stopped_us = 0
        self._note_due_us = 0
        self._turn_of = 0
        self._is_caught_up = False
        self._is_recognized = False
        self._sent: deque[tuple[int, int]] = deque()

    def run(self) -> None:
        """Forward until the clock's pause raises."""
        while True:
            self._clock.pause(self.turn())

    def turn(self) -> float:
        """Do the next thing; the seconds until the one after it."""
        now_us = self._clock.now_us()
        flags = self._state.flags()
        try:
            if flags.get("adopt"):
                self._begin_anew(flags["adopt"])
            if not self._is_recognized:
                if self._is_stopped(flags):
                    return LOOK_S
                self._recognize(flags)
            self._note(now_us)
            wait_s = self._blocked(flags, now_us)
            if wait_s:
                return wait_s
            work = self._next(now_us)
        except Away as away:
            self._state.set(waits_for=str(away))
            if away.is_denied:
                raise
            return LOOK_S
        except Elsewhere as found:
            self._state.set(is_elsewhere=True)
            self._stop(f"{found}. {ADOPT}")
            return LOOK_S
        if work is None:
            self._vouch()
            return IDLE_S
        self._send(work)
        return self._spacing_s()

    def _spacing_s(self) -> float:
        """How long to let events gather before the next request. A trickle leaves half of the limit to others."""
        if self._slices or self._page or not self._is_caught_up:
            return 0.0
        window = self._upstream.window
        return 2 * window.period_s / window.requests_max

    def _blocked(self, flags: dict[str, object], now_us: int) -> float:
        """How long nothing may be sent; 0 when it may."""
        if flags.get("paused"):
            return LOOK_S
        if self._is_stopped(flags):
            return LOOK_S
        if flags.get("stopped"):  # resumed; or a forwarder before this one stopped, and this one asks anew
            self._stopped_us = 0
            self._state.set(stopped=None, is_elsewhere=None)
        if 0 < self._circuit.open_until_us - now_us <= CIRCUIT_US_MAX:  # it is longer when the clock was set back
            return min((self._circuit.open_until_us - now_us) / 1e6, LOOK_S)
        return min(self._upstream.window.wait_s(), LOOK_S)

    def _is_stopped(self, flags: Mapping[str, object]) -> bool:
        """Whether this forwarder stopped and nobody resumed it."""
        return bool(self._stopped_us) and int(str(flags.get("resumed_us", 0))) <= self._stopped_us

    def _next(self, now_us: int) -> Slice | None:
        """The next slice: what was begun, what has waited, rollups that are due, then the feed. Raises Away."""
        if self._slices:
            return self._slices.pop()
        waited = self._state.due(now_us, self._events_max)
        if waited:
            whole = Slice(WAITING, waited[: take(waited, self._events_max, self._wishes.batch_bytes)])
            return self._first_of(apart(whole, self._suspects.struck))
        if self._wishes.meters and self._roll(now_us):
            return self._next(now_us)
        if self._page is None:
            self._page = self._read(now_us)
        return self._cut() if self._page else None

    def _cut(self) -> Slice:
        """A slice from the front of the page."""
        page = self._page
        assert page is not None
        bound = take(page.items, self._events_max, self._wishes.batch_bytes)
        first, *rest = page.cut(bound) if bound < len(page.items) else [page]
        self._page = rest[0] if rest else None
        return first

    def _read(self, now_us: int) -> Slice | None:
        """The next page of one of the lanes that take turns; None when none of them has anything."""
        if self._state.waiting()[0] >= WAITING_MAX:
            return None
        lanes: list[Replay | None] = [*self._state.replays(), None]
        lanes = lanes if self._wishes.is_raw else []  # where Polar has sums, an event of them would count once more
        for _ in lanes:
            self._turn_of += 1
            lane = lanes[self._turn_of % len(lanes)]
            page = self._read_lane(lane, now_us)
            if page:
                return page
        return None

    def _is_past_sent(self, position: Mapping[int, FeedPlace]) -> bool:
        """Whether a replay has everything before it that was sent. A store that is made again does not, for a while."""
        sent = self._state.position(RAW)
        return all(position.get(partition, (0, 0)) >= place for partition, place in sent.items())

    def _read_lane(self, replay: Replay | None, now_us: int) -> Slice | None:
        selection, lane = self._wishes.selection, RAW
        if replay:
            selection, lane = msgspec.structs.replace(selection, since=replay.since, until=replay.until), replay.lane
        reached = self._reached(lane)
        page = self._source.page(reached, selection, PAGE_EVENTS)
        self._state.set(waits_for=None)
        self._is_caught_up = page.is_last
        items = [item_of(entry, lane) for entry in page.entries]
        if items:
            park(items, now_us, self._skew.at(now_us), self._state.waiting_customers())
            return Slice(lane, items, page.reached)
        if page.reached != reached:
            self._state.mark(lane, [], page.reached, now_us)
        if replay and page.is_last and self._is_past_sent(page.reached.position):
            self._state.end_replay(replay.number, now_us)
        return None

    def _reached(self, lane: str) -> Reached:
        if lane in (RAW, ROLLUP) and not self._state.knows(lane):
            begin = self._source.end() if self._wishes.begin == "now" else Reached({}, {})
            self._state.begin(lane, begin, self._clock.now_us())
        return self._state.reached(lane)

    def _recognize(self, flags: Mapping[str, Any]) -> None:
        """Take positions that an earlier version wrote without witnesses for places of this log, if they can be.

        Nothing before such a position came in after that version was last at work. Raises Away, Elsewhere.
        """
        seen_us = flags.get("seen_us")
        for lane in (RAW, ROLLUP, *(replay.lane for replay in self._state.replays())):
            position, witnesses = self._state.reached(lane)
            if witnesses is not None:
                continue
            reached, newest_us = self._source.at(position)
            if seen_us is not None and newest_us is not None and newest_us > seen_us + NOTE_LATE_US:
                newest = datetime.fromtimestamp(newest_us / 1e6, UTC).isoformat(timespec="seconds")
                raise Elsewhere(
                    f"An event before the position {format_places(position)} came in at {newest}, after forwarding "
                    "was last at work, and was never sent: it is a position of another log"
                )
            self._state.recognize(lane, reached.witnesses or {})
        self._is_recognized = True

    def _begin_anew(self, begin: str) -> None:
        """Read the log that is here from where an operator wants it: beginning, now, or a time of ingestion."""
        if begin == "now":
            reached = self._source.end()
        else:
            reached = Reached({}, {}) if begin == "beginning" else self._source.since(begin)
        self._slices, self._page = [], None
        begins = {lane: reached for lane in (RAW, ROLLUP) if self._state.knows(lane)}
        self._state.begin_anew(begins, self._clock.now_us())
        self._stopped_us = 0
        logger.warning("forwarding_adopted_log", begin=begin, position=format_places(reached.position))

    def _roll(self, now_us: int) -> bool:
        """Add up the windows that are over; whether there were any."""
        window_us = self._wishes.window_s * 1_000_000
        before_us = (now_us - ROLLUP_GRACE_US) // window_us * window_us
        if before_us <= self._rolled_us or self._state.waiting()[0] >= WAITING_MAX:
            return False
        begin = self._reached(ROLLUP)
        functions = dict(self._wishes.meters)
        before = datetime.fromtimestamp(before_us // 1_000_000, UTC)
        groups, reached = self._source.rollup(begin, list(functions), before, self._wishes.window_s)
        if reached == begin:
            self._rolled_us = before_us
            return False
        piece = piece_at(begin.position)
        self._state.roll(
            [rollup_item(group, functions[group.meter_id], self._wishes.window_s, piece, now_us) for group in groups],
            reached,
        )
        return True

    def _remembered(self) -> Item | None:
        """What Polar took last before this process began, as far as that was written down."""
        known = self._state.flags().get("taken_last")
        if known is None:
            return None
        id, body = known["external_id"], known["body"].encode()
        return Item(lane=RAW, external_id=id, who="", timestamp_us=0, ingested_us=0, body=body)

    def _send(self, work: Slice) -> None:
        if self._circuit.state(self._clock.now_us()) != "closed":
            work = self._first_of(probing(work))
        sent = work.sent
        if not sent:
            self._state.mark(work.lane, work.items, work.behind, self._clock.now_us())
            return
        match verdict := self._ask(work):
            case Accepted():
                self._accepted(work, verdict)
            case Bad():
                self._circuit.succeeded()
                self._refused(work, verdict)
            case Later():
                self._postpone(work, verdict)
            case Stop(reason):
                self._slices.append(work)
                self._stop(reason)

    def _ask(self, work: Slice) -> Verdict:
        try:
            verdict = judge(self._upstream.ingest(work.body()), len(work.sent))
        except NoAnswer as lost:
            verdict = Later(str(lost), is_slow=lost.is_timeout)
        self._state.count("", requests=1)
        return verdict

    def _vouch(self) -> None:
        """Where nothing else is there to show whether Polar takes events: send again what it took last, a duplicate."""
        last = (self._last or self._remembered()) if self._suspects.is_open else None
        if last is None:
            return
        match self._ask(Slice(RAW, [last])):
            case Accepted() | Bad():  # a refusal by name, too, is an answer that only a Polar at work gives
                self._circuit.succeeded()
                self._suspects.accepted([last.external_id])
            case Stop(reason):
                self._stop(reason)
            case _:
                self._circuit.failed(self._clock.now_us(), None, self._draw())
                self._suspects.others_failed()

    def _first_of(self, parts: list[Slice]) -> Slice:
        """The first of these, with the rest behind it on the stack."""
        self._slices += reversed(parts[1:])
        return parts[0]

    def _accepted(self, work: Slice, verdict: Accepted) -> None:
        now_us = self._clock.now_us()
        self._circuit.succeeded()
        answer = verdict._asdict()
        self._state.mark(work.lane, work.items, work.behind, now_us, **answer)
        self._suspects.accepted([item.external_id for item in work.sent])
        self._last = work.sent[-1]
        self._sent.append((now_us, len(work.sent)))
        self._events_max = min(self._wishes.batch_events, self._events_max + self._events_max // 10 + 1)

    def _refused(self, work: Slice, bad: Bad) -> None:
        self._state.count("", refused=1)
        if bad.is_future and self._wait_longer(work):
            self._slices.append(work)
            return
        self._slices += reversed(isolate(work, bad))
        for item in work.items:
            if item.condemned:
                logger.warning("event_refused", external_id=item.external_id, words=item.condemned)

    def _wait_longer(self, work: Slice) -> bool:
        """Polar's clock is behind ours: take it to be further behind; whether that parks anything of the slice."""
        now_us = self._clock.now_us()
        newest_us = max(item.timestamp_us for item in work.sent)
        if newest_us < now_us - SKEW_MAX_US or self._skew.at(now_us) >= SKEW_MAX_US:
            return False
        skew_us = self._skew.grow(now_us)
        logger.warning("polar_clock_behind", seconds=skew_us / 1e6)
        waiting = self._state.waiting_customers()
        mine = {} if work.lane == WAITING else waiting  # what waits has no one of its own to wait behind
        park([item for item in work.items if item.is_sent], now_us, skew_us, mine)
        waiting |= mine
        for behind in (*reversed(self._slices), *([self._page] if self._page else [])):
            park([item for item in behind.items if item.is_sent], now_us, skew_us, waiting)
        return True

    def _postpone(self, work: Slice, later: Later) -> None:
        now_us = self._clock.now_us()
        self._state.count("", postponed=1)
        self._suspects.others_failed()
        pause_s = self._circuit.failed(now_us, retry_after_s(later.after_s, now_us), self._draw())
        parts, sent = [work], len(work.sent)
        if later.is_slow and sent > BATCH_EVENTS_MIN:
            parts = halves(work)
            self._events_max = max(BATCH_EVENTS_MIN, min(self._events_max, sent) // 2)
        elif later.fault:
            parts = self._narrow(work, later.fault, now_us)
        self._slices += reversed(parts)
        self._state.set(last_failure=later.reason, last_failure_us=now_us)
        logger.warning("forwarding_postponed", reason=later.reason, pause_s=round(pause_s, 2))

    def _narrow(self, work: Slice, fault: str, now_us: int) -> list[Slice]:
        """What to do instead of a slice that gets a server's error: the same a few times, then halves of it.

        Its only event is set aside while the others go on, and condemned when it failed alone too often.
        """
        first = work.sent[0]
        if self._circuit.failures < FAULTS_UNTIL_CUT and first.external_id not in self._suspects.struck:
            return [work]
        if len(work.sent) > 1:
            return halves(work)
        if not self._suspects.failed(first.external_id):
            self._set_aside(work, first, now_us + PAUSE_US)
            return []
        first.condemned = fault
        logger.warning("event_refused", external_id=first.external_id, words=fault)
        return [work]

    def _set_aside(self, work: Slice, item: Item, until_us: int) -> None:
        """Park the only event of a slice, and what follows of its customer."""
        item.due_us = until_us
        if self._last is not None:  # a restart must not leave the event without anything that speaks for Polar
            self._state.set(taken_last={"external_id": self._last.external_id, "body": self._last.body.decode()})
        self._state.mark(work.lane, work.items, work.behind, self._clock.now_us())
        if item.lane == ROLLUP:
            return
        self._state.hold(item.who, until_us)
        for behind in (*self._slices, *([self._page] if self._page else [])):
            for later in behind.items:
                if later.is_sent and later.who == item.who and later.lane != ROLLUP:
                    later.due_us = until_us

    def _stop(self, reason: str) -> None:
        self._stopped_us = self._clock.now_us()
        self._state.set(stopped=reason)
        logger.error("forwarding_stopped", reason=reason)

    def _note(self, now_us: int) -> None:
        """Write down what operators and monitors want to know. Raises Away."""
        if now_us < self._note_due_us:
            return
        self._note_due_us = now_us + NOTE_US
        while self._sent and self._sent[0][0] < now_us - RATE_US:
            self._sent.popleft()
        rate = sum(events for _, events in self._sent) / (RATE_US / 1e6)
        self._state.set(
            seen_us=now_us, circuit=self._circuit.state(now_us), open_until_us=self._circuit.open_until_us,
            rate=round(rate, 1), batch_events=self._events_max, skew_us=self._skew.at(now_us),
            server=self._upstream.url, is_raw=self._wishes.is_raw, window_s=self._wishes.window_s,
        )  # fmt: skip
        lane, selection = (RAW, self._wishes.selection) if self._wishes.is_raw else (ROLLUP, Selection())
        pending, oldest_us = self._source.backlog(self._reached(lane).position, selection)
        self._state.set(pending=pending, oldest_us=oldest_us)
        self._note_due_us = max(self._note_due_us, now_us + NOTE_SHARE * (self._clock.now_us() - now_us))
