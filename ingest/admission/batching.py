"""Group commit for requests: bodies that arrive together are validated, appended and answered together.

* ``read_preferences``, ``Opened`` and ``Asked`` describe a request with events; ``accepted`` and ``unprocessable``
  make its answer.
* ``Turns`` runs the checks of bodies one by one, and lets the event loop serve its sockets in between.
* ``Batching`` collects ordinary bodies of one organization and validates them in one call.
* ``Gather`` collects log entries for each partition while an append to it is under way, and appends them as common
  records. It resolves each request when the appends of its own lines have returned.

One small request costs Python more than its event, and a record costs the log and its readers something whatever its
size. Nothing of one request shows in another's answer, and a request that comes alone does not wait.
"""

import asyncio
import functools
import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from ingest import metrics, responses
from ingest.admission.duplicates import Fingerprints, RecentIdentities, Verdict
from ingest.admission.partitioner import entries_of
from ingest.admission.validate import Admitted, RefusedBody, Tenant, read_together
from ingest.limits import ANSWER_BYTES_MAX, PARTITIONS_TOGETHER_MAX
from ingest.responses import JSON, Answer, failed
from meters.catalogue.catalogue import Token
from meters.log import USAGE_EVENTS, Entry, Log, Refused, format_position

# A request with events, from its head on: who asks, how its body is packed, what it asks for besides.
#
# ``Prefer`` (RFC 7240) may ask for more than Polar's API does: to keep the good events of a request in which others
# are refused, and to hear of each.

Respond = Callable[[Answer], None]


class Preferences(NamedTuple):
    """What a ``Prefer`` header (RFC 7240) may ask: to keep the good events, and to hear of each one."""

    lenient: bool
    representation: bool

    @property
    def applied(self) -> bytes:
        """The ``Preference-Applied`` header; empty for none."""
        names = [b"handling=lenient"] * self.lenient + [b"return=representation"] * self.representation
        return b", ".join(names)


NO_PREFERENCES = Preferences(lenient=False, representation=False)


def read_preferences(header: bytes) -> Preferences:
    """The preferences known here; others are ignored, as they may be."""
    if not header:
        return NO_PREFERENCES
    asked = {b"".join(part.partition(b";")[0].split()).lower() for part in header.split(b",")}
    return Preferences(b"handling=lenient" in asked, b"return=representation" in asked)


class Opened(NamedTuple):
    """A request that may send its body."""

    token: Token
    encoding: str
    preferences: Preferences


class Asked(NamedTuple):
    """A request whose body is whole. ``tell`` is called once, by the event loop."""

    opened: Opened
    tell: Respond


# Bodies are checked in turns, and between two turns the event loop looks at its sockets.
#
# Checking a body of a hundred unusual events takes about a millisecond, in which nothing else happens. When sixteen
# of them have arrived together and the loop runs one after the other, a read that came beside them waits for all
# sixteen, on its way to the query API and again on its way back. In turns it waits for one.

TURN_BYTES_MIN = 8 * 1024
"""Bytes of a body that is worth a turn: a smaller one is checked in the time of a few looks at the sockets."""


class Turns:
    """A line, first come first served. For one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._taken = False  # the next round of the loop

    def do(self, work: Callable[[], object]) -> None:
        """Do it when its turn comes: in the next round of the loop, if nobody else waits."""
        self._waiting.append(work)
        if not self._taken:
            self._taken = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        """Another round: it is the turn of whoever is first in line."""
        work = self._waiting.popleft()
        self._taken = bool(self._waiting)
        if self._taken:
            asyncio.get_running_loop().call_soon(self._next)
        work()


# What a sender of events hears: what became of them or is wrong with them, as much of it as was asked for.

def accepted(
    admitted: Admitted, verdicts: Sequence[Verdict] | None, preferences: Preferences, position: Mapping[int, int]
) -> Answer:
    """Events are in the log. ``verdicts`` are None where every one is new, as far as this process knows."""
    count = len(admitted.lines)
    rejected = len({refusal.index for refusal in admitted.refusals})
    [inserted] = inserted_of([count], [verdicts], rejected)
    if not preferences.applied:
        return counted(inserted, count, position)
    found: dict[str, Any] = {"inserted": inserted, "duplicates": count - inserted}
    if preferences.lenient:
        found["rejected"] = [
            {"index": refusal.index, "type": refusal.type, "loc": refusal.loc, "msg": refusal.msg}
            for refusal in admitted.refusals
        ]
    if preferences.representation:
        found["events"] = _representation(admitted, verdicts or [Verdict.ACCEPTED] * count)
    headers = JSON, _log_position(position), (b"preference-applied", preferences.applied)
    return Answer(200, msgspec.json.encode(found), headers)


def inserted_of(
    counts: Sequence[int], verdicts: Sequence[Sequence[Verdict] | None], rejected: int = 0
) -> list[int]:
    """How many of so many events in the log are new, by request. The metrics hear of all of them."""
    judged = [some for some in verdicts if some is not None]
    known = sum([some.count(Verdict.KNOWN) for some in judged])
    pairs = zip(counts, verdicts, strict=True)
    inserted = [count if some is None else some.count(Verdict.ACCEPTED) for count, some in pairs]
    metrics.count_events(sum(inserted), known, sum(counts), rejected)
    return inserted


def counted(inserted: int, count: int, position: Mapping[int, int]) -> Answer:
    """Polar's answer: two numbers."""
    body = b'{"inserted":%d,"duplicates":%d}' % (inserted, count - inserted)
    return Answer(200, body, (JSON, _log_position(position)))


def _log_position(position: Mapping[int, int]) -> tuple[bytes, bytes]:
    return b"log-position", format_position(position).encode()


def _representation(admitted: Admitted, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """What became of each event of the request, in its order."""
    kept = zip(admitted.indexes, verdicts, admitted.external_ids, strict=True)
    rows = [{"index": index, "verdict": verdict, "external_id": external_id} for index, verdict, external_id in kept]
    rejected = sorted({refusal.index for refusal in admitted.refusals})
    rows += [{"index": index, "verdict": Verdict.REJECTED, "external_id": None} for index in rejected]
    return sorted(rows, key=lambda row: row["index"])


def unprocessable(refused: RefusedBody) -> Answer:
    """Nothing is in the log: what is wrong, where it is not too long with what it is wrong with."""
    metrics.EVENTS_REJECTED.inc(len({entry["loc"][2] for entry in refused.detail if len(entry["loc"]) > 2}))
    found = responses.problem(422, refused.error, refused.detail)
    if len(found.body) <= ANSWER_BYTES_MAX:
        return found
    return responses.problem(422, refused.error, [entry | {"input": None} for entry in refused.detail])


# Requests that come together are written together: one record for each partition, not one for each request.
#
# A record costs the log, its brokers and every reader something, whatever is in it. A body of a hundred events is
# twelve records in as many partitions of Kafka, and a body of one event is one, too short to be packed. So while an
# append to a partition is under way, what comes for it meanwhile is gathered and goes into the next one, the lines of
# an organization as one record. Whoever comes alone is written at once, and nobody waits for company. A second append
# at a time would leave no disk idle for a moment, but two small ones cost more than one: on the embedded log a tenth
# of a gateway's CPU.
#
# A request is answered when the appends of its lines have returned, never before; what an append raises, all of its
# requests hear. Only a refusal, which is final, is of one request's making: then each is appended by itself. A
# partition whose broker is away holds up those who write to it, and nobody else: each has a lane of its own.
#
# Nothing here is a task: a request may have entries in every lane, and a task costs more than what it would do for
# one.

RECORD_BYTES_MAX = 256 * 1024
"""Of lines put together: by then a record's own cost is forgotten, and it is far from what any broker takes."""

GROUP_BYTES_MAX = 1024 * 1024
"""Of what is gathered: more is appended at once, whatever is under way."""

Outcome = Mapping[int, int] | Exception
"""By partition, the position behind lines, or why they may not be there."""
ReportOutcome = Callable[[Outcome], None]
TellSome = Callable[[Sequence[int], Outcome], None]
"""Hears of which requests, by number, the outcome is."""


class Gather:
    """In front of a log's stream of events, for one event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lanes: dict[int, _Lane] = {}

    def put(self, entries: Sequence[Entry], tell: ReportOutcome) -> None:
        """Make a request's entries durable, one or more and at most one for a partition, and tell it.

        What is told instead is what ``Log.append`` raises.
        """
        mask = sum(1 << entry.partition for entry in entries)
        self.put_together(entries, [mask], lambda _, outcome: tell(outcome))

    def put_together(self, entries: Sequence[Entry], masks: Sequence[int], tell: TellSome) -> None:
        """The same for requests that have lines in the same entries.

        ``masks`` are the sum of ``1 << partition`` for each request: it waits for its own partitions, and no others.
        """
        requests = _Requests(masks, tell)
        for entry in entries:
            self._lane(entry.partition).put(entry, requests)

    def append(self, entries: Sequence[Entry]) -> "asyncio.Future[Mapping[int, int]]":
        """The same, for a task. Raises what ``Log.append`` does."""
        told: asyncio.Future[Mapping[int, int]] = asyncio.get_running_loop().create_future()
        self.put(entries, functools.partial(_resolve, told))
        return told

    def _lane(self, partition: int) -> "_Lane":
        lane = self._lanes.get(partition)
        if lane is None:
            lane = self._lanes[partition] = _Lane(self._log)
        return lane


class _Requests:
    """What is known of entries and the requests that have lines in them."""

    __slots__ = ("_awaited", "_failures", "_position", "_tell", "_waiting")

    def __init__(self, masks: Sequence[int], tell: TellSome) -> None:
        self._waiting = list(enumerate(masks))
        self._awaited = functools.reduce(operator.or_, masks)
        self._position: dict[int, int] = {}
        self._failures: dict[int, Exception] = {}
        self._tell = tell

    def written(self, partition: int, offset: int) -> None:
        """One of the entries is durable."""
        self._position[partition] = offset + 1
        self._heard(partition)

    def failed(self, partition: int, error: Exception) -> None:
        """One of them may not be."""
        self._failures[partition] = error
        self._heard(partition)

    def _heard(self, partition: int) -> None:
        self._awaited &= ~(1 << partition)
        ready = [one for one in self._waiting if not one[1] & self._awaited] if self._awaited else self._waiting
        if ready:  # before anybody is told, who may append again
            self._waiting = [one for one in self._waiting if one[1] & self._awaited] if self._awaited else []
        for partition, error in list(self._failures.items()):
            self._say([number for number, mask in ready if mask >> partition & 1], error)
            ready = [one for one in ready if not one[1] >> partition & 1]
        self._say([number for number, _ in ready], self._position)

    def _say(self, numbers: Sequence[int], outcome: Outcome) -> None:
        try:
            if numbers:
                self._tell(numbers, outcome)
        except Exception:  # the others of its group are to be told all the same
            logger.exception("a request could not be told")


_Group = list[tuple[Entry, _Requests]]


class _Lane:
    """What waits for one partition."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: _Group = []
        self._waiting_bytes = 0
        self._under_way = 0

    def put(self, entry: Entry, requests: _Requests) -> None:
        """Wait in line."""
        if not self._waiting and not self._under_way:
            asyncio.get_running_loop().call_soon(self._begin)  # with whatever else this round of the loop brings
        self._waiting.append((entry, requests))
        self._waiting_bytes += len(entry.value)
        if self._waiting_bytes >= GROUP_BYTES_MAX:
            self._begin()

    def _begin(self) -> None:
        if self._waiting:
            group, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._write(group)

    def _write(self, group: _Group) -> None:
        self._under_way += 1
        try:
            entries, places = together([entry for entry, _ in group])
            told = functools.partial(self._told, group, places, time.perf_counter())
            asyncio.ensure_future(self._log.submit(USAGE_EVENTS, entries)).add_done_callback(told)
        except Exception as error:
            self._under_way -= 1
            self._fail(group, error)

    def _told(self, group: _Group, places: Sequence[int], began_s: float, offsets: "asyncio.Future[list[int]]") -> None:
        self._under_way -= 1
        try:
            found = offsets.result()
        except Exception as error:
            self._fail(group, error)
        else:
            metrics.APPEND_SECONDS.observe(time.perf_counter() - began_s)
            for (entry, requests), place in zip(group, places, strict=True):
                requests.written(entry.partition, found[place])
        if not self._under_way:
            self._begin()

    def _fail(self, group: _Group, error: Exception) -> None:
        if isinstance(error, Refused) and len(group) > 1:
            for one in group:
                self._write([one])
        else:
            for entry, requests in group:
                requests.failed(entry.partition, error)


def together(waiting: Sequence[Entry]) -> tuple[list[Entry], list[int]]:
    """A partition's entries as few entries, each kind in the same order; for each, which of them has its lines."""
    if len(waiting) == 1:
        return list(waiting), [0]
    made: list[list[Entry]] = []
    newest: dict[tuple[str | None, bool, bool], tuple[int, int]] = {}  # by kind: which one, and its bytes
    places: list[int] = []
    for entry in waiting:
        kind = entry.organization_id, entry.admitted, entry.distinct_keys
        place, held = newest.get(kind, (-1, RECORD_BYTES_MAX))
        if held + len(entry.value) > RECORD_BYTES_MAX:
            place, held = len(made), 0
            made.append([])
        made[place].append(entry)
        newest[kind] = place, held + len(entry.value)
        places.append(place)
    return [_one(entries) for entries in made], places


def _one(entries: list[Entry]) -> Entry:
    first = entries[0]
    if len(entries) == 1:
        return first
    value = b"\n".join([entry.value for entry in entries])
    return Entry(value, first.partition, first.organization_id, first.admitted, first.distinct_keys)


def _resolve(told: "asyncio.Future[Mapping[int, int]]", outcome: Outcome) -> None:
    if told.done():  # whoever waited is gone
        return
    if isinstance(outcome, Exception):
        told.set_exception(outcome)
    else:
        told.set_result(outcome)


# Ordinary bodies that came in the same round of the event loop are read, written and answered as one.
#
# What Python does for a request of one event costs more than its event, and it is the same for all of them: the call
# of the loops that read it, a record, a look at what is known, the words of the answer. Under load the sockets have
# bodies of many requests each time they are looked at, so all of that is done for an organization's bodies together;
# what is left for each is its head and one write. A request that comes alone is read alone, and nobody waits for
# company.
#
# Nothing of one request shows in another's answer. A body that is odd to the compiled loops is taken alone, between
# those before and those behind it; one whose partition is away keeps nobody who has no lines for it
# (``ingest.admission.batching``); and where a log refuses the common record as too large, each is written by itself.

if TYPE_CHECKING:
    from ingest.admission.kernels import Found

TURN_BYTES_MAX = 128 * 1024
"""Of bodies that are read in one turn: two tenths of a millisecond, in which nobody else is served."""

BODIES_MAX = 1024
"""Bodies that are read as one. Behind an odd one it is one, and twice as many each time that all are ordinary: a client
whose bodies are all odd has each of them looked at twice, and not once more for every other."""

ODD_TIMES = 16
"""How many times longer it takes to read a body that is odd to compiled loops, about."""

logger = logging.getLogger("ingest.batching")

Written = Mapping[int, int]  # by partition, the position behind


class Taker(Protocol):
    """What requests share, and what is done for one that is not ordinary: ``ingest.intake.Intake``."""

    gather: Gather
    recent: RecentIdentities

    @property
    def partitions(self) -> int:
        """How many the log has, as far as this process knows."""

    def tenant(self, token: Token) -> Tenant:
        """What is known of whose token a request has."""

    def written(self, outcome: Outcome) -> Written | Answer:
        """Where the log stands after an append, or what to say. Raises what nobody expects."""

    def take_alone(self, asked: Asked, body: bytes) -> None:
        """Read the body by all readers, write its events, and tell the answer."""


class _Batch(NamedTuple):
    """Requests of one organization that were read as one."""

    found: "Found"
    asked: Sequence[Asked]
    masks: Sequence[int]  # the sum of ``1 << partition`` of each one's lines

    def rows(self, number: int) -> slice:
        """Which events are those of a request."""
        return slice(self.found.rows[number - 1] if number else 0, self.found.rows[number])


class Batching:
    """Takes bodies of requests without preferences. For one event loop."""

    def __init__(self, turns: Turns, taker: Taker) -> None:
        self._turns, self._taker = turns, taker
        self._waiting: dict[str, list[tuple[Asked, bytes]]] = {}  # by organization
        self._bodies_max = BODIES_MAX

    def put(self, asked: Asked, body: bytes) -> None:
        """Take the body when the sockets have given what they have."""
        organization_id = asked.opened.token.organization_id
        waiting = self._waiting.get(organization_id)
        if waiting is None:
            waiting = self._waiting[organization_id] = []
            self._turns.do(functools.partial(self._turn, organization_id))
        waiting.append((asked, body))

    def _turn(self, organization_id: str) -> None:
        """Take an organization's bodies for as long as a turn may last; the others wait for another one."""
        waiting = self._waiting.pop(organization_id)
        taken = taken_bytes = 0
        while taken < len(waiting) and taken_bytes < TURN_BYTES_MAX:
            some = _begin(waiting, taken, TURN_BYTES_MAX - taken_bytes, self._bodies_max)
            count = self._take([asked for asked, _ in some], [body for _, body in some])
            taken, taken_bytes = taken + count, taken_bytes + sum([len(body) for _, body in some[:count]])
            if count == len(some) < self._bodies_max:
                break  # there are no more, or no room for the next one
            self._bodies_max = min(2 * self._bodies_max, BODIES_MAX) if count == len(some) else 1
            if count < len(some):
                self._take_alone(*some[count])
                taken, taken_bytes = taken + 1, taken_bytes + ODD_TIMES * len(some[count][1])
        if taken < len(waiting):
            later = self._waiting.get(organization_id)
            self._waiting[organization_id] = waiting[taken:] + (later or [])
            if later is None:
                self._turns.do(functools.partial(self._turn, organization_id))

    def _take_alone(self, asked: Asked, body: bytes) -> None:
        try:
            self._taker.take_alone(asked, body)
        except Exception:  # those behind it are to be taken all the same
            logger.exception("a request could not be taken")

    def _take(self, asked: Sequence[Asked], bodies: Sequence[bytes]) -> int:
        """Take as many bodies as are ordinary, from the first on; how many that are."""
        token, taker = asked[0].opened.token, self._taker
        if not 0 < taker.partitions <= PARTITIONS_TOGETHER_MAX:
            return 0
        try:
            found = read_together(bodies, taker.tenant(token), datetime.now(UTC))
            if found is None:
                return 0
            batch = self._put(found, asked[: len(found.rows)])
        except Exception:
            logger.exception("ingest requests failed")
            _tell_all(asked, [failed()] * len(asked))
            return len(asked)
        return len(batch.asked)

    def _put(self, found: "Found", asked: Sequence[Asked]) -> _Batch:
        """Hand what was found in these requests to the log, as one."""
        entries, masks = entries_of(found, asked[0].opened.token.organization_id, self._taker.partitions)
        batch = _Batch(found, asked, masks)
        self._taker.gather.put_together(entries, masks, functools.partial(self._written, batch))
        return batch

    def _written(self, batch: _Batch, numbers: Sequence[int], outcome: Outcome) -> None:
        """The lines of some requests are durable, or may not be."""
        if isinstance(outcome, Refused) and len(batch.asked) > 1:
            for number in numbers:
                self._write_alone(batch, number)
            return
        try:
            found = self._answers(batch, numbers, self._taker.written(outcome))
        except Exception:
            logger.exception("ingest requests failed")
            found = [failed()] * len(numbers)
        _tell_all([batch.asked[number] for number in numbers], found)

    def _answers(self, batch: _Batch, numbers: Sequence[int], position: Written | Answer) -> list[Answer]:
        """What each of some requests hears; who hears the same gets the same."""
        if isinstance(position, Answer):
            return [position] * len(numbers)
        fingerprints, recent = Fingerprints(batch.found.keys, batch.found.contents), self._taker.recent
        rows = [batch.rows(number) for number in numbers]
        if len(numbers) == len(batch.asked):
            verdicts = recent.take(fingerprints)
            of_each = [verdicts[some] if verdicts is not None else None for some in rows]
        else:
            of_each = [recent.take(fingerprints.some(some)) for some in rows]
        counts = [some.stop - some.start for some in rows]
        masks = [batch.masks[number] for number in numbers]
        kinds = list(zip(inserted_of(counts, of_each), counts, masks, strict=True))
        by_kind = {
            (inserted, count, mask): counted(inserted, count, {at: position[at] for at in position if mask >> at & 1})
            for inserted, count, mask in set(kinds)
        }
        return [by_kind[kind] for kind in kinds]

    def _write_alone(self, batch: _Batch, number: int) -> None:
        """Write the lines of one request into records of its own."""
        try:
            self._put(batch.found.of_body(number), [batch.asked[number]])
        except Exception:
            logger.exception("an ingest request failed")
            _tell_all([batch.asked[number]], [failed()])


def _begin(
    waiting: Sequence[tuple[Asked, bytes]], begin: int, bytes_max: int, count_max: int
) -> Sequence[tuple[Asked, bytes]]:
    """Those from a place on, up to a number of them, that have so many bytes together; one at least."""
    end, last = begin + 1, min(len(waiting), begin + count_max)
    left = bytes_max - len(waiting[begin][1])
    while end < last and (left := left - len(waiting[end][1])) >= 0:
        end += 1
    return waiting[begin:end]


def _tell_all(asked: Sequence[Asked], found: Sequence[Answer]) -> None:
    for (_, tell), answer in zip(asked, found, strict=True):
        try:
            tell(answer)
        except Exception:  # the others are to be told all the same
            logger.exception("a request could not be told")
