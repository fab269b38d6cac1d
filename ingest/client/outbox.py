"""The client's outbox: a bounded queue of events, their batches, and the pace of sending.

``Outbox.put`` adds an event to memory and spool. The sender takes a ``Batch``, and ``settle`` removes events that
were acknowledged, rejected or dropped. Until then an event is in exactly one place: waiting in memory, waiting in the
spool alone (when memory is full), held back for a later try, or in flight. ``Pace`` is the backoff after failures.
"""

import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from threading import get_ident
from typing import Literal

import msgspec

from ingest.client.event import EVENT_BYTES_MAX, MEMORY_EVENTS_MAX, Limits, SpoolFull
from ingest.client.lifecycle import Turns
from ingest.client.spool import Row, Spool, SpoolBroken

# Backoff with jitter, for the whole client. The pause doubles with every failure, is randomized so that many clients
# do not return at one time, and is never shorter than the server's ``Retry-After``. After a failure one request at a
# time probes the server.
#
# The server's packages have the same rule in ``meters/backoff.py``, which the client does not import;
# ``tests/contracts/test_senders.py`` compares the two.

_DOUBLINGS_MAX = 16  # beyond any longest pause; keeps the power small


class Pace:
    """Not for several threads at once: the outbox's lock guards it. Times are seconds of a monotonic clock."""

    def __init__(self, limits: Limits, draw: Callable[[], float] = random.random) -> None:
        """``draw`` gives random numbers of [0, 1)."""
        self._limits, self._draw = limits, draw
        self.failures = 0
        self.until_s = 0.0

    def worked(self) -> None:
        """The server took something."""
        self.failures, self.until_s = 0, 0.0

    def failed(self, now_s: float, retry_after_s: float | None = None) -> None:
        """The server could not be reached, or asked to wait. Requests that failed together count once."""
        if now_s >= self.until_s:
            self.failures += 1
        wished_s = min(retry_after_s or 0.0, self._limits.retry_after_s_max)
        pause_s = max(self.backoff_s(self.failures), wished_s * (1.0 + self._draw() / 10))
        self.until_s = max(self.until_s, now_s + pause_s)

    def backoff_s(self, failures: int) -> float:
        """A pause after so many failures."""
        longest_s = min(self._limits.backoff_s_max, self._limits.backoff_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX))
        return longest_s * (0.5 + self._draw() / 2)

    def allows(self, now_s: float, in_flight: int) -> bool:
        """Whether a request may start."""
        return now_s >= self.until_s and (self.failures == 0 or in_flight == 0)


# The queue. All changes happen under the lock of ``ingest.client.lifecycle.Turns``; the only slow thing within it is
# writing the spool's file.

WhenFull = Literal["block", "drop_oldest", "raise"]

_FULL = "as many bytes as allowed wait for the server"
_SPOOL_RETRY_S = 1.0
"""How long events stay in memory only after the disk failed, before it is tried again."""


class Batch(msgspec.Struct):
    """Events that travel together. ``tries`` counts what went wrong with these very events, ``waits`` how often nothing
    could be learned but to wait. ``acknowledged_before`` and ``waits_before`` are how many batches had been
    acknowledged, and how many had to wait, when either happened last, or when this one left first."""

    rows: list[Row]
    tries: int = 0
    acknowledged_before: int = 0
    waits: int = 0
    waits_before: int = 0
    passes_missed: float = 0.0
    """How often a single event would have passed by now, had it had the chance that others had."""


Again = tuple[Batch, float]
"""What is to be sent again, and after how many seconds."""


class Outbox:
    """The waiting events of one process."""

    def __init__(self, limits: Limits, when_full: WhenFull, spool: Spool | None) -> None:
        self.limits, self.pace = limits, Pace(limits)
        self.turns = Turns(self._add_late)
        self.turn, self.changed = self.turns.turn, self.turns.changed
        self.taken = self.adopted = self.acknowledged = self.rejected = self.dropped = self.unspooled = 0
        self.pending = self.held_bytes = self.in_flight = self.acknowledged_batches = self.waits = 0
        self.is_closing = False
        self._when_full, self._spool = when_full, spool
        self._memory: deque[Row] = deque()
        self._held_back: list[tuple[float, int, Batch]] = []  # heap by the time of the next try
        self._flying: set[int] = set()  # the first number of each batch in flight
        self._number = 0  # of the newest event
        self._loaded = 0  # of the newest event that is, or was, in memory
        self._is_behind = False  # the spool has events that memory has not
        self._unspooled: set[int] = set()
        self._unerased: list[int] = []  # settled, but the disk would not forget them yet
        self._spool_again_s = 0.0
        self._first_since_s = 0.0  # since when the head of the line waits
        self._hurry = 0  # events up to this number do not linger
        self._waiting = 0  # threads in ``take``
        self._is_stuck = False  # somebody waited for room in vain, and none has appeared since

    def put(self, line: bytes) -> bool:
        """Take one event; False when there is no room, or when it closes. Raises SpoolFull if that was chosen."""
        turns = self.turns
        with turns.lock:
            outer, me = turns.owner, get_ident()
            if outer == me:
                return self._put_late(line)
            try:  # as ``with self.turn()``, which takes as long as all the rest
                turns.owner = me
                is_taken = self._put(line)
            finally:
                turns.owner = outer
                if turns.late:
                    turns.catch_up()
        if turns.complaints:
            turns.tell()
        return is_taken

    def _put(self, line: bytes) -> bool:
        if not self._has_room(len(line)) and not self._make_room(len(line)):
            return False
        if self.is_closing:
            return False
        self._add(line)
        return True

    def _put_late(self, line: bytes) -> bool:
        """In the middle of a turn of this very thread: at its end. There is no waiting for room here."""
        if self.is_closing:
            return False
        if self._when_full != "drop_oldest" and not self._has_room(len(line) + self.turns.late_bytes):
            if self._when_full == "raise":
                raise SpoolFull(_FULL)
            return False
        self.turns.defer(line)
        return True

    def _add_late(self, line: bytes) -> None:
        if self._when_full == "drop_oldest" and not self._has_room(len(line)):
            self._make_room(len(line))
        self._add(line)

    def _add(self, line: bytes) -> None:
        self._number += 1
        row = (self._number, line)
        if self._write(row) and (self._is_behind or len(self._memory) >= MEMORY_EVENTS_MAX):
            self._is_behind = True
        else:
            self._remember(row)
        self.taken += 1
        self.pending += 1
        self.held_bytes += len(line)

    def is_nearly_full(self) -> bool:
        """Whether the largest event would find no room."""
        return self.held_bytes + EVENT_BYTES_MAX > self.limits.held_bytes_max

    def adopt(self, lines: Sequence[bytes]) -> None:
        """Take over events that another process has left, whatever the bound says. Raises SpoolBroken."""
        assert self._spool is not None
        with self.turn():
            if self.is_closing:
                raise SpoolBroken("the client closes")
            first, self._number = self._number + 1, self._number + len(lines)
            rows = list(enumerate(lines, first))
            self._spool.append_all(rows)
            self._is_behind = True
            self.adopted += len(rows)
            self.pending += len(rows)
            self.held_bytes += sum(map(len, lines))
            self.changed.notify()

    def take(self) -> Batch | None:
        """The next batch, once there is one and the pace allows it; None when the outbox closes."""
        while True:
            with self.turn():
                if self.is_closing:
                    return None
                now_s = time.monotonic()
                wait_s = self._seconds_until_ready(now_s)
                if wait_s is None or wait_s > 0:
                    self._waiting += 1
                    self.turns.wait(wait_s)
                    self._waiting -= 1
                elif batch := self._form(now_s):
                    return self._leaving(batch)

    def _leaving(self, batch: Batch) -> Batch:
        if not batch.tries and not batch.waits:
            batch.acknowledged_before, batch.waits_before = self.acknowledged_batches, self.waits
        self._flying.add(batch.rows[0][0])
        self.in_flight += 1
        if self._memory or self._held_back:
            self.changed.notify()
        return batch

    def settle(self, rows: Sequence[Row], *, is_acknowledged: bool) -> None:
        """These events of a batch in flight need nothing any more."""
        with self.turn():
            if is_acknowledged:
                self.acknowledged_batches += 1
                self.acknowledged += len(rows)
                self.pace.worked()
            else:
                self.rejected += len(rows)
            self.pending -= len(rows)
            self.held_bytes -= sum(len(line) for _, line in rows)
            self._is_stuck = False
            self._erase([number for number, _ in rows])

    def land(self, batch: Batch, again: Sequence[Again] = ()) -> None:
        """A batch is not in flight any more; what is left of it is tried again."""
        with self.turn():
            self.in_flight -= 1
            self._flying.remove(batch.rows[0][0])
            for part, delay_s in again:
                heapq.heappush(self._held_back, (time.monotonic() + delay_s, part.rows[0][0], part))
            self.changed.notify_all()

    def hurry(self) -> int:
        """Let nothing that is here now linger; the number for ``wait_settled``."""
        with self.turn():
            self.turns.catch_up()
            self._hurry = self._number
            self.changed.notify_all()
            return self._number

    def wait_settled(self, number: int, timeout_s: float | None) -> bool | None:
        """Wait until every event up to this number is settled; False when the outbox closes before, None when the time
        is up."""
        with self.turn():
            is_over = self.turns.wait_for(lambda: self.is_closing or self._is_settled(number), timeout_s)
            return self._is_settled(number) if is_over else None

    def _is_settled(self, number: int) -> bool:
        if self._is_behind and self._loaded < number:
            return False
        heads = [*self._flying, *(batch.rows[0][0] for _, _, batch in self._held_back)]
        heads += [row[0] for row in self._memory] if self._unspooled else [row[0] for row in islice(self._memory, 1)]
        return all(first > number for first in heads)

    def stop(self) -> None:
        """Take nothing more, and give out no more batches."""
        with self.turn():
            self.is_closing = True
            self.changed.notify_all()

    def close(self) -> int:
        """Give the spool up; how many events are lost because nothing else has them."""
        with self.turn():
            self.turns.catch_up()
            spool, self._spool = self._spool, None  # what is settled from now on will be sent again, and counts once
            if spool is None:
                return self.pending
            if self._unerased:
                with suppress(SpoolBroken):
                    spool.delete(self._unerased)
            self._give_up(spool)
            return len(self._unspooled)

    def leave(self, line: bytes, spool: Spool) -> bool:
        """After ``close``: keep an event for the next process alone, in a file of its own."""
        with self.turn():
            try:
                spool.append(1, line)
            except SpoolBroken as error:
                self.turns.complain("the spool cannot be written", error)
                return False
            self._give_up(spool)
            self.taken += 1
            self.pending += 1
            self.held_bytes += len(line)
            return True

    def _give_up(self, spool: Spool) -> None:
        try:
            spool.close()
        except SpoolBroken as error:
            self.turns.complain("the spool could not be closed in order", error)

    def forget(self) -> None:
        """After a fork, in the child: everything here is the parent's."""
        self.turns.late.clear()
        if self._spool:
            self._spool.forget()

    def _write(self, row: Row) -> bool:
        """Into the spool, if there is one and it works."""
        if self._spool is None:
            return False
        try:
            if self._spool_again_s and time.monotonic() < self._spool_again_s:
                raise SpoolBroken
            self._spool.append(row[0], row[1])
            self._spool_again_s = 0.0
            return True
        except SpoolBroken as error:
            if not self._spool_again_s:
                self.turns.complain("the spool cannot be written; events are held in memory", error)
            if time.monotonic() >= self._spool_again_s:
                self._spool_again_s = time.monotonic() + _SPOOL_RETRY_S
            self._unspooled.add(row[0])
            self.unspooled += 1
            return False

    def _remember(self, row: Row) -> None:
        if not self._memory:
            self._first_since_s = time.monotonic()
        self._memory.append(row)
        if not self._is_behind:
            self._loaded = row[0]
        if self._waiting and len(self._memory) in (1, self.limits.batch_events_max):
            self.changed.notify()

    def _has_room(self, needed_bytes: int) -> bool:
        return self.held_bytes + needed_bytes <= self.limits.held_bytes_max

    def _make_room(self, needed_bytes: int) -> bool:
        """Room for an event, made as the user chose."""
        if self._when_full == "raise":
            raise SpoolFull(_FULL)
        if self._when_full == "block":
            if not self._is_stuck:  # or else each event would wait as long, one after the other
                self._is_stuck = not self.turns.wait_for(lambda: self._has_room(needed_bytes), self.limits.block_s_max)
            return self._has_room(needed_bytes)
        while not self._has_room(needed_bytes) and (row := self._oldest()):
            self.dropped += 1
            self.pending -= 1
            self.held_bytes -= len(row[1])
            self._erase([row[0]])
        return True  # or else all is in flight, which is bounded by itself

    def _oldest(self) -> Row | None:
        """Take the first event that is not in flight out of its place."""
        if self._held_back:
            place = min(range(len(self._held_back)), key=lambda place: self._held_back[place][1])
            rows = self._held_back[place][2].rows
            if len(rows) == 1:
                del self._held_back[place]
                heapq.heapify(self._held_back)
            return rows.pop(0)
        return self._memory.popleft() if self._memory or (self._is_behind and self._refill()) else None

    def _seconds_until_ready(self, now_s: float) -> float | None:
        """0 when a batch may leave now, None when nothing waits."""
        if not self.pace.allows(now_s, self.in_flight):
            return max(self.pace.until_s - now_s, 0.0) or None  # or until the request that asks comes back
        waits = []
        if self._held_back:
            waits.append(self._held_back[0][0] - now_s)
        if self._memory or self._is_behind:
            ready = self._is_behind or len(self._memory) >= self.limits.batch_events_max
            ready = ready or (bool(self._memory) and self._memory[0][0] <= self._hurry)
            waits.append(0.0 if ready else self._first_since_s + self.limits.linger_s - now_s)
        return min(waits) if waits else None

    def _form(self, now_s: float) -> Batch | None:
        """A batch that was held back and is due, or the head of the line.

        While the server does not answer, a batch that may be the reason is not the one to ask with. A single event
        asks, a new one, or one of that batch where nothing else waits.
        """
        is_asking = self.pace.failures > 0
        due = self._held_back[0][2] if self._held_back and self._held_back[0][0] <= now_s else None
        if due and not (is_asking and (due.tries or due.waits)):
            return heapq.heappop(self._held_back)[2]
        if self._memory or (self._is_behind and self._refill()):
            return self._head(1 if is_asking else self.limits.batch_events_max, now_s)
        if due and len(due.rows) > 1:
            return Batch([due.rows.pop()], due.tries, due.acknowledged_before, due.waits, due.waits_before)
        return heapq.heappop(self._held_back)[2] if due else None

    def _head(self, events_max: int, now_s: float) -> Batch:
        """The first events in memory."""
        rows: list[Row] = []
        size = 0
        for row in islice(self._memory, events_max):
            size += len(row[1]) + 1
            if rows and size > self.limits.batch_bytes_max:
                break
            rows.append(row)
        for _ in rows:
            self._memory.popleft()
        self._first_since_s = now_s
        return Batch(rows)

    def _refill(self) -> bool:
        """Read on in the spool; False when there was nothing, or the disk fails just now."""
        assert self._spool is not None
        try:
            rows = self._spool.read(self._loaded, MEMORY_EVENTS_MAX // 4)
        except SpoolBroken as error:
            self.pace.failed(time.monotonic())
            self.turns.complain("the spool cannot be read", error)
            return False
        if not rows:
            self._is_behind, self._loaded = False, self._number
            return False
        self._loaded = rows[-1][0]
        self._memory.extend(rows)
        return True

    def _erase(self, numbers: Sequence[int]) -> None:
        """Settled events leave the spool; where the disk fails, at the next opportunity."""
        if self._spool is None:
            return
        if nowhere := self._unspooled.intersection(numbers):
            self._unspooled -= nowhere
            numbers = [number for number in numbers if number not in nowhere]
        self._unerased.extend(numbers)
        if self._unerased:
            try:
                self._spool.delete(self._unerased)
                self._unerased = []
            except SpoolBroken as error:
                self.turns.complain("the spool keeps what was sent until its disk works", error)
