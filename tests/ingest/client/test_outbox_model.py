"""The line of waiting events, driven at random: an event is in exactly one place until it is settled, whatever happens.

Batches are acknowledged, refused in part, halved, put off and given back; the disk fails and recovers; memory overflows
into the spool, and its journal into its file; a signal handler or a finalizer captures in the middle of it; the process
is killed and another one takes over.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ingest.client import outbox as outbox_module
from ingest.client import sender as sending_module
from ingest.client import spool as journal_module
from ingest.client.event import Limits, Rejection
from ingest.client.ingestion import _move
from ingest.client.outbox import Batch, Outbox
from ingest.client.sender import Sender
from ingest.client.spool import Row, Spool, SpoolBroken, spools
from ingest.client.transport import Outcome, Unavailable

OWNER = "owner"
LIMITS = Limits(batch_events_max=3, linger_s=0, held_bytes_max=800, backoff_s=0, backoff_s_max=0)
MEMORY_EVENTS = 5
JOURNAL_EVENTS = 4
QUICK_DISK = Path("/dev/shm")  # where syncing costs nothing: hundreds of files are closed here


class Told:
    """A transport that nothing is sent with: the test says what came of it."""

    def send(self, lines: Sequence[bytes]) -> Outcome:
        """Never called."""
        raise NotImplementedError

    def after_fork(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Disk(Spool):
    """A spool whose disk can fail, and in the middle of which the same thread can do something else."""

    is_broken = False
    interruption: Callable[[], object] | None = None

    def _check(self) -> None:
        interrupt, Disk.interruption = Disk.interruption, None
        if interrupt:
            interrupt()
        if Disk.is_broken:
            raise SpoolBroken("broken")

    def append(self, number: int, line: bytes) -> None:
        """Fails with the disk."""
        self._check()
        super().append(number, line)

    def delete(self, numbers: Any) -> None:
        """Fails with the disk."""
        self._check()
        super().delete(numbers)

    def _fold(self, more: Sequence[Row] = ()) -> None:
        self._check()
        super()._fold(more)


class Waiting(RuleBasedStateMachine):
    """One application's life, and its successors'."""

    @initialize()
    def begin(self) -> None:
        """An empty directory."""
        place = QUICK_DISK if QUICK_DISK.exists() else None
        self.directory = TemporaryDirectory(prefix="meterstream-outbox-", dir=place)
        self.sizes = [
            patch.object(outbox_module, "MEMORY_EVENTS_MAX", MEMORY_EVENTS),
            patch.object(journal_module, "_EVENTS_MAX", JOURNAL_EVENTS),
            patch.object(sending_module, "_PASSES_MISSED_MAX", 1.0),
        ]
        for size in self.sizes:
            size.start()
        Disk.is_broken, Disk.interruption = False, None
        self.captured, self.settled, self.number, self.dropped = set[bytes](), set[bytes](), 0, 0
        self.may_come_again = set[bytes]()  # settled while the disk could not forget them
        self.live()

    def live(self) -> None:
        """A process."""
        self.flying: list[Batch] = []
        self.spool = Disk(Path(self.directory.name), OWNER)
        self.outbox = Outbox(LIMITS, "drop_oldest", self.spool)
        self.rejected: list[Rejection] = []
        self.sender = Sender(self.outbox, Told(), self.rejected.append)

    @rule(size=st.integers(0, 60))
    def capture(self, size: int) -> None:
        """An event."""
        self.take(size)

    @rule(size=st.integers(0, 60))
    def capture_in_the_middle(self, size: int) -> None:
        """The next thing that touches the disk is interrupted by an event."""
        Disk.interruption = lambda: self.take(size)

    def take(self, size: int) -> None:
        """Hand one over; it is captured, or there is no room."""
        self.number += 1
        line = msgspec.json.encode({"external_id": f"{self.number}-{'x' * size}"})
        self.outbox._spool_again_s = 0.0  # the second in which a failed disk is left alone has passed
        if self.outbox.put(line):
            self.captured.add(line)

    @rule()
    def leave(self) -> None:
        """A batch leaves, if one may."""
        wait_s = self.outbox._seconds_until_ready(time.monotonic())
        if not Disk.is_broken and wait_s is not None and wait_s <= 0 and self.outbox.pending:
            waiting = len(self.rows()) - sum(len(batch.rows) for batch in self.flying)
            batch = self.outbox.take() if waiting else None
            if batch:
                assert 0 < len(batch.rows) <= LIMITS.batch_events_max
                self.flying.append(batch)

    def settle(self, rows: list[Row], *, is_acknowledged: bool) -> None:
        """These are through."""
        self.outbox.settle(rows, is_acknowledged=is_acknowledged)
        self.are_settled(rows)

    def are_settled(self, rows: list[Row]) -> None:
        """None of them was before, unless the disk could not forget it."""
        lines = {line for _, line in rows}
        assert not lines & self.settled - self.may_come_again
        self.settled |= lines
        if Disk.is_broken:
            self.may_come_again |= lines

    @precondition(lambda self: self.flying)
    @rule(place=st.integers(0, 3))
    def acknowledge(self, place: int) -> None:
        """The server has them."""
        batch = self.flying.pop(place % len(self.flying))
        self.settle(batch.rows, is_acknowledged=True)
        self.outbox.land(batch)

    @precondition(lambda self: self.flying)
    @rule(place=st.integers(0, 2))
    def refuse_one(self, place: int) -> None:
        """One is refused, the others go again."""
        batch = self.flying.pop()
        row = batch.rows[place % len(batch.rows)]
        self.settle([row], is_acknowledged=False)
        rest = [other for other in batch.rows if other is not row]
        self.outbox.land(batch, [(Batch(rest), 0.0)] if rest else [])

    @precondition(lambda self: self.flying)
    @rule(halved=st.booleans())
    def give_back(self, halved: bool) -> None:
        """The server was away."""
        batch = self.flying.pop()
        middle = len(batch.rows) // 2 if halved else 0
        parts = [rows for rows in (batch.rows[:middle], batch.rows[middle:]) if rows]
        self.outbox.land(batch, [(Batch(rows), 0.0) for rows in parts])

    @precondition(lambda self: self.flying)
    @rule(place=st.integers(0, 3), outcome=st.sampled_from([Unavailable("away"), Unavailable("cut off", None, True)]))
    def put_off(self, place: int, outcome: Unavailable) -> None:
        """Nobody answered, or the answer was to wait: nothing is given up but a single event that was put off again
        while others passed, and of that somebody hears."""
        batch = self.flying.pop(place % len(self.flying))
        others_passed, told = self.outbox.acknowledged_batches - batch.acknowledged_before, len(self.rejected)
        again = self.sender._settled(batch, outcome)
        left = [row for part, _ in again for row in part.rows]
        if len(self.rejected) > told:
            assert outcome.may_be_events
            assert others_passed
            assert len(batch.rows) == 1
            assert left == []
            self.are_settled(batch.rows)
        else:
            assert left == batch.rows
        self.outbox.land(batch, again)

    @rule()
    def disk(self) -> None:
        """Breaks, or works again."""
        Disk.is_broken = not Disk.is_broken

    @rule()
    def is_killed(self) -> None:
        """The process ends on the spot; the next one takes over what is on the disk."""
        only_in_memory = {line for number, line in self.rows() if number in self.outbox._unspooled}
        self.dropped += self.outbox.dropped
        self.captured -= only_in_memory
        waiting = {line for _, line in self.rows()}
        expected, dropped = waiting - only_in_memory, self.captured - self.settled - waiting
        self.outbox._spool = Disk.interruption = None
        if self.spool._opened:
            connection, journal = self.spool._opened
            connection.close()  # without a word to anybody
            journal.drop()
        Disk.is_broken = False
        self.live()
        for other in filter(Spool.claim, spools(Path(self.directory.name), [OWNER])):
            while _move(other, self.outbox):
                pass
            other.close()
        found = {line for _, line in self.rows()}
        assert expected <= found
        assert found - expected <= self.may_come_again | dropped  # which a failing disk did not forget
        self.dropped -= len(found & dropped)
        self.settled -= found
        self.may_come_again.clear()

    def rows(self) -> list[Row]:
        """Every event that waits, wherever it is."""
        outbox = self.outbox
        rows = [*outbox._memory]
        for batch in [*(batch for _, _, batch in outbox._held_back), *self.flying]:
            rows += batch.rows
        return rows + (self.spool.read(outbox._loaded, 1000) if outbox._is_behind else [])

    @invariant()
    def each_is_in_one_place(self) -> None:
        """Nothing is lost, nothing is there twice, and the counters agree."""
        rows = self.rows()
        lines = {line for _, line in rows}
        assert len(lines) == len(rows) == self.outbox.pending
        assert sum(len(line) for line in lines) == self.outbox.held_bytes
        assert lines <= self.captured
        assert not lines & self.settled
        assert len(self.captured - self.settled - lines) == self.dropped + self.outbox.dropped

    @invariant()
    def memory_is_bounded(self) -> None:
        """What the spool holds need not be in memory."""
        spooled = [number for number, _ in self.outbox._memory if number not in self.outbox._unspooled]
        assert len(spooled) <= MEMORY_EVENTS + 1

    @invariant()
    def the_spool_is_in_order(self) -> None:
        """What is in the file is older than what is in the journal: whoever takes over a killed process' files knows so
        what is in both."""
        if self.spool._opened:
            connection, journal = self.spool._opened
            in_file = [number for (number,) in connection.execute("SELECT number FROM events ORDER BY number")]
            assert [*in_file, *journal.needed] == sorted({*in_file, *journal.needed})

    def teardown(self) -> None:
        """The end of this life."""
        Disk.interruption = None
        for size in self.sizes:
            size.stop()
        self.outbox.close()
        self.directory.cleanup()


Waiting.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWaiting = Waiting.TestCase
