"""Ingest one request body: unpack, validate, append, answer.

``Intake`` receives a request (``Asked``) with its whole body. It unpacks the body, validates it
(``ingest.admission.validate``), makes an entry for each partition (``ingest.admission.partitioner``), appends through
``ingest.admission.batching`` and answers after the append returned. ``Quick`` loads the compiled loops
(``ingest.admission.kernels``) in a thread once there is enough traffic to pay for them.

Small bodies are handled in the event-loop turn in which they are complete, without a task. Tasks are for large and
packed bodies, which are validated in a thread, and for customers that the catalogue does not know yet.
"""

import asyncio
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ingest import metrics, responses
from ingest.admission.batching import (
    NO_PREFERENCES,
    TURN_BYTES_MIN,
    Asked,
    Batching,
    Gather,
    Opened,
    Respond,
    Turns,
    accepted,
    unprocessable,
)
from ingest.admission.duplicates import Fingerprints, RecentIdentities, Verdict, seed_of
from ingest.admission.partitioner import Spread
from ingest.admission.validate import Admitted, RefusedBody, Tenant, admit, admit_quickly
from ingest.catalogue_follower import CatalogueTail
from ingest.limits import INLINE_BODY_BYTES_MAX, InFlight
from ingest.responses import Answer, unpack
from meters.catalogue.catalogue import Token
from meters.errors import Reason
from meters.loader import Loader
from meters.log import Entry, Log, NoSuchPartition, Refused, TryAgain

# Ordinary bodies, read by compiled loops once there are many: a third of the work of the ways without them.
#
# A gateway starts without the loops. Some thousand events make it load them, in a thread; meanwhile everything is
# read without them.

if TYPE_CHECKING:
    from ingest.admission.kernels import BodyReader, Found, Table

LOAD_AFTER_BYTES = 2 * 1024 * 1024
"""Of bodies, before loops are loaded: some ten thousand events. A server with few events has no use for it."""


class Quick:
    """For one event loop and its thread."""

    def __init__(self, reader: "BodyReader | None" = None) -> None:
        """With a ``reader`` it is used from the first body on."""
        self.loader = Loader(_load, _failed, LOAD_AFTER_BYTES, threading.Thread, reader)

    @property
    def ready(self) -> bool:
        """Whether there are loops."""
        return self.loader.loops is not None

    def table(self, generation_max: int) -> "Table | None":
        """A table of identities, if loops are ready; None otherwise."""
        reader = self.loader.loops
        return None if reader is None else reader.table(generation_max)

    def read(
        self, bodies: Sequence[bytes], earliest_us: int, latest_us: int, organization_id: str
    ) -> "Found | None":
        """The events of bodies, up to the first that is odd to loops; None if that is the first, or without loops."""
        reader = self.loader.loops
        if reader is not None:
            return reader.read(bodies, earliest_us, latest_us, seed_of(organization_id))
        self.loader.add_work(sum(map(len, bodies)))
        return None


def _load() -> "BodyReader":
    from ingest.admission.kernels import BodyReader

    logger.info("bodies are read by compiled loops from now on")
    return BodyReader()


def _failed(error: Exception) -> None:
    logger.warning("bodies are read without compiled loops, at half the speed: %s", error)


# From a whole body to durable lines and an answer.
#
# A 2xx leaves after the append returned, never before; a log that cannot write is a 503 with Retry-After. What is in
# the body is judged in Polar's order: the body as JSON, its events, the names in them.
#
# Nearly every body is small, and does all of this in the turn in which it came whole, without a task; then it waits
# for the log. A task is only for what waits for others before that: large and packed bodies, which are for the
# thread, and names that are not known here yet.
#
# ``duplicates`` in an answer is what this process can know: repetitions within the request, and of events that it
# acknowledged lately. All of them are written; the store alone decides what counts, and may know more.

NOT_WRITABLE_S = 5.0
"""How long a failed append keeps ``/readyz`` at no: long enough to be seen, short enough for traffic to try again."""

_UNKNOWN, _ = Reason.CUSTOMER_UNKNOWN.value

Written = Mapping[int, int]  # by partition, the position behind
Made = TypeVar("Made")

logger = logging.getLogger("ingest.intake")


class RandomIds:
    """Makes external ids of 128 random bits: in a million million of them the chance of a pair is 10^-15."""

    def make_ids(self, count: int) -> list[str]:
        """So many."""
        digits = os.urandom(16 * count).hex()
        return [digits[start : start + 32] for start in range(0, 32 * count, 32)]


class Intake:
    """The one door for bodies, whichever way their requests came. For one event loop."""

    def __init__(self, log: Log, tail: CatalogueTail, in_flight: InFlight, body_bytes_max: int) -> None:
        self.position: dict[int, int] = {}  # of every partition of usage.events, as far as this process knows
        self.gather = Gather(log)
        self._tail = tail
        self._in_flight = in_flight
        self._body_bytes_max = body_bytes_max
        self._spread = Spread()
        self._large_spread = Spread()  # for the thread alone, as the other one is for the event loop alone
        self._quick = Quick()
        self._ids = RandomIds()
        self.recent = RecentIdentities(loops=self._quick)
        self._turns = Turns()
        self._batching = Batching(self._turns, self)
        self._tasks: set[asyncio.Task[Answer]] = set()
        # One thread: parsing holds the interpreter, so a second would only take memory.
        self._large_bodies = ThreadPoolExecutor(1, "admission")
        self._not_writable_until_s = 0.0
        self._refusal = ""  # of the log, when it last did not take an append

    @property
    def writable(self) -> bool:
        """False until the log's partitions are known, and for a while after it refused to write."""
        return bool(self.position) and time.monotonic() >= self._not_writable_until_s

    @property
    def partitions(self) -> int:
        """How many the log has, as far as this process knows."""
        return len(self.position)

    @property
    def trouble(self) -> str:
        """Why the log cannot be written, as far as it said so."""
        return "" if self.writable else self._refusal

    def learn(self, ends: Mapping[int, int]) -> None:
        """Hear which partitions the log has, and how far they reach; others are forgotten."""
        self.position = dict(ends)

    def close(self) -> None:
        """End the thread."""
        self._large_bodies.shutdown(wait=False, cancel_futures=True)

    def take(self, opened: Opened, body: bytes, tell: Respond) -> None:
        """Judge the body, whose bytes are counted into ``in_flight``, write its events, and tell the answer, once.

        ``tell`` is called now or later, by the event loop. A packed body is unpacked first, in the thread. A large one
        is read there, too (``_take_with_care``). Any other is read here: with those that came beside it once compiled
        loops are loaded (``batching``), or alone (``take_alone``), at once or in its turn. The readers are always those
        of ``admission``, in the same order.
        """
        if opened.encoding not in ("", "identity"):
            self._do_in_task(self._take_packed(opened, body), tell)
        else:
            self._take_plain(opened, body, tell)

    async def taken(self, opened: Opened, body: bytes) -> Answer:
        """The same, for a task."""
        return await _told(functools.partial(self.take, opened, body))

    async def _take_packed(self, opened: Opened, body: bytes) -> Answer:
        unpacked = await self._in_thread(unpack, body, opened.encoding, self._body_bytes_max)
        if isinstance(unpacked, Answer):
            return unpacked
        if not self._in_flight.take(len(unpacked)):
            return responses.busy()
        try:
            return await _told(functools.partial(self._take_plain, opened, unpacked))
        finally:
            self._in_flight.give_back(len(unpacked))

    def _take_plain(self, opened: Opened, body: bytes, tell: Respond) -> None:
        metrics.TALLY.body_bytes += len(body)
        if len(body) > INLINE_BODY_BYTES_MAX:
            self._do_in_task(self._take_with_care(opened, body, None, self._tail.position), tell)
            return
        asked = Asked(opened, tell)
        if self._quick.ready and opened.preferences == NO_PREFERENCES:
            self._batching.put(asked, body)
        elif len(body) < TURN_BYTES_MIN:
            self.take_alone(asked, body)
        else:
            self._turns.do(functools.partial(self.take_alone, asked, body))

    def take_alone(self, asked: Asked, body: bytes) -> None:
        """Do everything at once, except for what has to wait for others, or takes long."""
        opened, tell = asked
        position_before = self._tail.position  # read first: a customer made while the body is judged changes it
        try:
            now = datetime.now(UTC)
            admitted = admit_quickly(body, self.tenant(opened.token), now, lenient=opened.preferences.lenient)
            if isinstance(admitted, Admitted) and self._is_ready_for(admitted):
                prepared = self._prepare(opened.token, admitted, self._spread)
                self.gather.put(prepared.entries, functools.partial(self._appended, opened, prepared, tell))
                return
        except Exception:
            logger.exception("an ingest request failed")
            tell(responses.failed())
            return
        self._do_in_task(self._take_with_care(opened, body, admitted, position_before), tell)

    def _is_ready_for(self, admitted: Admitted) -> bool:
        return bool(admitted.lines and self.position) and not _names_unknown(admitted)

    def _appended(self, opened: Opened, prepared: "_Prepared", tell: Respond, outcome: Written | Exception) -> None:
        try:
            found = self._answer(opened, prepared, outcome)
        except Exception:
            logger.exception("an ingest request failed")
            found = responses.failed()
        tell(found)

    def _answer(self, opened: Opened, prepared: "_Prepared", outcome: Written | Exception) -> Answer:
        position = self.written(outcome)
        if isinstance(position, Answer):
            return position
        return accepted(prepared.admitted, self._verdicts(prepared), opened.preferences, position)

    async def _take_with_care(
        self, opened: Opened, body: bytes, admitted: Admitted | RefusedBody | None, position_before: Written
    ) -> Answer:
        """The same for a body that was judged already, or (None) is for the thread, with all that is done to it.

        ``position_before`` is where the decisions stood before the body was judged. A body that names a customer who
        is not known is judged again where they stand elsewhere, so it is refused only by decisions that are complete.
        """
        in_thread = admitted is None
        judge = functools.partial(self._do, in_thread, _admit, body, opened)
        if admitted is None:
            admitted = await judge(self.tenant(opened.token))
        if _names_unknown(admitted):  # or made a moment ago, and not yet known here
            if not await self._tail.catch_up():
                return responses.unavailable("CatalogueUnavailable", "The newest customers are not known yet.", 1)
            if self._tail.position != position_before:  # a look at the log that found nothing changes nothing
                admitted = await judge(self.tenant(opened.token))
        if isinstance(admitted, RefusedBody):
            return await self._do(in_thread, unprocessable, admitted)
        return await self._append(opened, admitted, in_thread)

    async def _append(self, opened: Opened, admitted: Admitted, in_thread: bool) -> Answer:
        preferences = opened.preferences
        is_long = in_thread and bool(preferences.applied)  # else the answer is two numbers
        if not admitted.lines:
            return await self._do(is_long, accepted, admitted, None, preferences, dict(self.position))
        if not self.position:
            return responses.unavailable("LogUnavailable", "The log cannot write just now.", 1)
        spread = self._large_spread if in_thread else self._spread
        prepared = await self._do(in_thread, self._prepare, opened.token, admitted, spread)
        try:
            position = self.written(await self.gather.append(prepared.entries))
        except Exception as error:
            position = self.written(error)
        if isinstance(position, Answer):
            return position
        return await self._do(is_long, accepted, admitted, self._verdicts(prepared), preferences, position)

    def tenant(self, token: Token) -> Tenant:
        """What is known of whose token a request has."""
        return Tenant(token.organization_id, self._tail.catalogue, self._ids, self._quick)

    def _prepare(self, token: Token, admitted: Admitted, spread: Spread) -> "_Prepared":
        where = token.organization_id, self._tail.catalogue, self.partitions
        return _Prepared(admitted, _fingerprints(token, admitted), spread.entries(admitted, *where))

    def _verdicts(self, prepared: "_Prepared") -> Sequence[Verdict] | None:
        """What was acknowledged is known to the event loop alone, which needs no lock for it."""
        return self.recent.take(prepared.events) if prepared.events is not None else None

    def written(self, outcome: Written | Exception) -> Written | Answer:
        """What came of an append: where the log stands after it, or what to say. Raises what nobody expects."""
        match outcome:
            case TryAgain():
                return self._not_writable(outcome, outcome.retry_after_s)
            case NoSuchPartition():  # made again with fewer; the next look at the log will tell
                return self._not_writable(outcome, NOT_WRITABLE_S)
            case Refused():
                return responses.problem(413, "RequestBodyTooLarge", str(outcome))
            case Exception():
                raise outcome
        self._not_writable_until_s = 0.0
        for partition in outcome.keys() & self.position.keys():  # one may be gone since
            self.position[partition] = max(self.position[partition], outcome[partition])
        return outcome

    def _not_writable(self, refusal: Exception, retry_after_s: float) -> Answer:
        self._refusal = str(refusal)
        self._not_writable_until_s = time.monotonic() + NOT_WRITABLE_S
        return responses.unavailable("LogUnavailable", "The log cannot write just now.", retry_after_s)

    def _do_in_task(self, work: Coroutine[None, None, Answer], tell: Respond) -> None:
        """Do what has to wait for others, and tell what it answers."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._done, tell))

    def _done(self, tell: Respond, task: "asyncio.Task[Answer]") -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return  # with the process
        if task.exception() is not None:
            logger.error("an ingest request failed", exc_info=task.exception())
        tell(responses.failed() if task.exception() is not None else task.result())

    async def _do(self, in_thread: bool, work: Callable[..., Made], *arguments: Any) -> Made:
        """Do what may take long: in the thread, or here and at once."""
        return await self._in_thread(work, *arguments) if in_thread else work(*arguments)

    async def _in_thread(self, work: Callable[..., Made], *arguments: Any) -> Made:
        """Do what takes long in the thread for large bodies, while the event loop serves everybody else."""
        return await asyncio.get_running_loop().run_in_executor(self._large_bodies, work, *arguments)


def _admit(body: bytes, opened: Opened, tenant: Tenant) -> Admitted | RefusedBody:
    return admit(body, tenant, datetime.now(UTC), lenient=opened.preferences.lenient)


class _Prepared(NamedTuple):
    """What is made of admitted events before they are written: what tells a repetition, and the records."""

    admitted: Admitted
    events: Fingerprints | None  # None where no event has a name of its own
    entries: list[Entry]


def _fingerprints(token: Token, admitted: Admitted) -> Fingerprints | None:
    if admitted.compiled is not None:
        return Fingerprints(admitted.compiled.keys, admitted.compiled.contents)
    if not admitted.named:
        return None
    return Fingerprints.of(token.organization_id, admitted.external_ids, admitted.lines)


async def _told(take: Callable[[Respond], None]) -> Answer:
    """The answer that is told."""
    told: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    take(lambda found: None if told.done() else told.set_result(found))  # or whoever waited is gone
    return await told


def _names_unknown(admitted: Admitted | RefusedBody) -> bool:
    """Whether an event was refused because there is no such customer."""
    if isinstance(admitted, RefusedBody):
        return any(entry["type"] == _UNKNOWN for entry in admitted.detail)
    return any(refusal.type == _UNKNOWN for refusal in admitted.refusals)
