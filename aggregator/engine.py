"""One life of the aggregator: open the store, follow the log, end at the first doubt.

Two threads in a pipeline, because DuckDB works outside the interpreter's lock: in a backlog the reader turns the next
records into columns while the writer commits the ones before; otherwise it waits for the writer, so that nothing lies
between the two. A third checkpoints; a fourth works out what the meters find in a round while it is being written.

A round is: decode, look up, decide, write once, then move what is kept in memory (identities, catalogue, totals) and
publish the new position. Memory moves only after the commit, and only this engine's: when anything fails in or around
the commit, or a checkpoint does, the engine ends, and the next one starts from what the store says.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aggregator.apply import decode
from aggregator.batch import Batch
from aggregator.boundaries import Boundaries
from aggregator.checkpoint import Checkpointer
from aggregator.quick import Quick
from aggregator.readable import Readable
from aggregator.running import RunningTotals
from aggregator.seen import Seen
from aggregator.step import Effects, join, judge, nothing, step
from aggregator.store.store import Doubt, Round, Store
from aggregator.store.strangers import Strangers
from aggregator.webhooks.causes import causes
from meters.catalogue import Catalogue, Change, decode_changes
from meters.ledger import Ledger
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, Record, TryAgain

ROUND_BYTES_MAX = 6_000_000  # about 20,000 events: enough to share DuckDB's fixed cost, few enough to stay fresh
ROUNDS_AHEAD = 1  # decoded rounds waiting for the writer; bounds memory to about three rounds
ROUND_PERIOD_S = 0.06  # a small round costs nearly as much as one of thousands of events, so these come no faster
BACKLOG_ROUND_BYTES = 4_500_000  # a larger round was waited for; smaller ones are read when they can be written
QUIET_ROUND_LINES = 2_000  # below some 12,000 events a second rounds come half as often: a third less work, and reads
QUIET_ROUND_PERIOD_S = 0.16  # are answered sooner beside it; whoever waits for a position has the shorter period
IDLE_WAIT_S = 0.05  # how long to wait for events before looking at the control stream again
TRY_AGAIN_MAX_S = 1.0  # a log that is away is asked at least this often
ROUND_ROWS = 10  # positions, causes and the like, counted as so many rows towards the next checkpoint
_STOP_POLL_S = 0.1  # how often a blocked thread looks whether it should end


class Reading(NamedTuple):
    """What the reader hands to the writer: events as columns, and control records, with where they begin."""

    batch: Batch
    control: list[Record]
    events_from: Mapping[int, int]
    control_from: int


class Committed(NamedTuple):
    """What observers learn of a round. ``ingested`` are the ingestion times of the new rows, in UTC."""

    lines: int
    stored: int
    dead: int
    commit_s: float
    ingested: npt.NDArray[np.datetime64] | None
    as_of: Mapping[int, int]
    control_position: int
    strangers: int  # events so far whose organization no decision made


class Engine:
    """See the module. ``failure`` holds what ended it, once ``ended`` is set."""

    def __init__(self, log: Log, store: Store, observe: Callable[[Committed], None]) -> None:
        self._log, self.store, self._observe = log, store, observe
        self._readable = Readable()
        self.directory = store.directory()
        self._quick = Quick()
        self._seen: Seen = store.seen()
        self.catalogue, self.ledger = Catalogue(), Ledger()
        self._load_decisions()
        with contextlib.closing(store.cursor()) as connection:
            self.strangers = Strangers(connection, self.catalogue.organizations)
        self._boundaries = Boundaries(self.catalogue, self.ledger, self.directory)
        self.totals = RunningTotals(store, self.directory, self.catalogue, self._boundaries.begins)
        self.control_position = store.positions(USAGE_CONTROL).get(0, 0)
        self._control_goal = log.ends(USAGE_CONTROL).get(0, 0)
        self.as_of: Mapping[int, int] = store.positions(USAGE_EVENTS)
        self._rounds: queue.Queue[Reading] = queue.Queue(ROUNDS_AHEAD)
        self._checkpointer = Checkpointer(store)
        self._evaluating = ThreadPoolExecutor(1, "evaluate")
        self.rounds = 0
        self.awaited = threading.Event()  # set by whoever waits for something to be counted
        self._written = threading.Event()  # the round that was handed over last, or one before it
        self.ended = threading.Event()
        self.failure: Exception | None = None
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._read_log, self._write_rounds, self._checkpointer.run)
        ]

    def _load_decisions(self) -> None:
        """Those that the store has."""
        with self.ledger.loading():
            for value in self.store.control():
                for change in decode_changes(value):
                    self.catalogue.apply(change)
                    self.ledger.apply(change)

    @property
    def informed(self) -> bool:
        """Whether every decision made before this life is applied. Until then a good token may look unknown."""
        return self.control_position >= self._control_goal

    def start(self) -> None:
        """Begin to follow the log."""
        self.totals.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every thread between rounds and close the store. What was not committed is read again next time."""
        self.ended.set()
        self.awaited.set()
        self._checkpointer.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._evaluating.shutdown()
        try:
            self.totals.stop()
        finally:
            self.store.close()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it was: this life is over, and the owner decides about the next one
            self.failure = self.failure or error
        finally:
            self.ended.set()

    def _read_log(self) -> None:
        events, control = dict(self.as_of), self.control_position
        while not self.ended.is_set():
            began_s = time.monotonic()
            self.awaited.clear()  # what was there before this is in the round
            decisions = self._read(USAGE_CONTROL, {0: control}, 0)
            records = self._read(USAGE_EVENTS, events, 0 if decisions else IDLE_WAIT_S)
            if not records and not decisions:
                continue
            reading = Reading(decode(records, self.directory, self._quick), decisions, dict(events), control)
            events.update(reading.batch.positions)
            control = _after(decisions, control)
            self._written.clear()
            self._hand_over(reading)
            if sum(len(record.value) for record in records) < BACKLOG_ROUND_BYTES and not decisions:
                self.ended.wait(max(0.0, began_s + ROUND_PERIOD_S - time.monotonic()))
                self._await_writer()
            if reading.batch.lines < QUIET_ROUND_LINES and not decisions:
                self.awaited.wait(max(0.0, began_s + QUIET_ROUND_PERIOD_S - time.monotonic()))

    def _read(self, stream: str, positions: Mapping[int, int], wait_s: float) -> list[Record]:
        """Read once; a log that asks to try again is asked again after as long as it said."""
        try:
            with self._readable.asking(stream):
                return self._log.read(stream, positions, bytes_max=ROUND_BYTES_MAX, wait_s=wait_s)
        except TryAgain as later:
            self.ended.wait(min(later.retry_after_s, TRY_AGAIN_MAX_S))
            return []

    def _hand_over(self, reading: Reading) -> None:
        while not self.ended.is_set():
            try:
                return self._rounds.put(reading, timeout=_STOP_POLL_S)
            except queue.Full:
                continue

    def _await_writer(self) -> None:
        """Read as late as possible: what is read while a round is being written would be a round behind ever after."""
        while not self.ended.is_set() and not self._written.wait(_STOP_POLL_S):
            pass

    def _write_rounds(self) -> None:
        while not self.ended.is_set():
            try:
                reading = self._rounds.get(timeout=_STOP_POLL_S)
            except queue.Empty:
                self._catch_up()
                continue
            self._round(reading)
            self._written.set()
            self._catch_up()

    def _catch_up(self) -> None:
        if self.store.is_dead:
            raise Doubt("the store's instance died outside of a round")
        self.totals.catch_up()

    def _round(self, reading: Reading) -> None:
        batch = reading.batch
        effects = self._decide(batch) if batch.chunks else nothing(batch)
        decided = [(record, change) for record in reading.control for change in decode_changes(record.value)]
        caused = causes(effects.rows, decided, self.catalogue, self.directory)
        first_seq = self.store.next_seq
        began = time.perf_counter()
        # Decisions change which meters there are, and the rows of their round are counted after them.
        ahead = None if decided else self._evaluating.submit(self.totals.evaluate, effects.rows)
        round_ = Round(batch, effects, reading.control, reading.events_from, reading.control_from, caused)
        rows = self.store.commit(round_, self._seen, self.directory.organization_ids)
        commit_s = time.perf_counter() - began
        self._checkpointer.wrote(rows.num_rows + len(effects.dead) + ROUND_ROWS)
        self._seen.add(effects.keys)
        for _, change in decided:
            self._apply(change, first_seq)
        self.strangers.note(batch.organizations, rows)
        self._boundaries.number(batch.subjects)
        self.totals.add(self.totals.evaluate(rows) if ahead is None else ahead.result())
        self._boundaries.begin_windows(self.totals)
        self.control_position = _after(reading.control, self.control_position)
        self.as_of = {**self.as_of, **batch.positions}
        self.rounds += 1
        ingested = rows.column("ingested_at").to_numpy() if rows.num_rows else None
        self._observe(
            Committed(
                batch.lines, rows.num_rows, effects.dead.num_rows, commit_s, ingested, self.as_of,
                self.control_position, self.strangers.events,
            )
        )

    def _apply(self, change: Change, first_seq: int) -> None:
        self._boundaries.note(change)
        self.catalogue.apply(change)
        self.ledger.apply(change)
        self._boundaries.note(change)
        self.totals.changed(change, first_seq)  # the rows of the round are added after its decisions

    def _decide(self, batch: Batch) -> Effects:
        table, keys = join(batch)
        found, content = self._seen.find(keys.hi, keys.lo, self._quick.search)
        judged = judge(table, keys, found, content)
        return step(batch, judged, self.store.stored(judged.stored_firsts))


def _after(decisions: list[Record], position: int) -> int:
    """The position behind the decisions; a log that may have holes has fewer of them than offsets."""
    return decisions[-1].offset + 1 if decisions else position
