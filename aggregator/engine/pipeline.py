"""One engine: the threads that read the log, write the store and checkpoint it, from one start to the first failure.

``Engine`` runs a reader thread and a writer thread, because DuckDB works outside the interpreter's lock. During a
backlog the reader decodes the next batch while the writer commits the previous one. When the engine has caught up,
the reader waits for the writer, so that no decoded batch is queued. A third thread checkpoints (``Checkpointer``); a
fourth evaluates the meters over a batch while it is being written.

The writer handles a batch as follows: deduplicate it, decide what it changes, commit one transaction, then update
memory (identities, catalogue, ledger, totals) and publish the new position. When anything fails in or around a commit
or a checkpoint, the engine ends; the supervisor starts another one from what the store says.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from aggregator.decode.columns import Batch
from aggregator.decode.decode import Quick, decode
from aggregator.decode.dedup import Effects, join, judge, nothing, step
from aggregator.decode.directory import CUSTOMER, EXTERNAL, Directory
from aggregator.decode.identities import Seen
from aggregator.engine.change_events import causes
from aggregator.store.maintenance import Strangers
from aggregator.store.store import Doubt, Round, Store
from aggregator.totals.accumulators import window_begin_us
from aggregator.totals.running import RunningTotals
from aggregator.view import EVER
from meters.catalogue.catalogue import (
    Catalogue,
    Change,
    Customer,
    CustomerCreated,
    CustomerDeleted,
    CustomerUpdated,
    decode_changes,
)
from meters.ledger.joined import CustomersJoined
from meters.ledger.ledger import Account, Ledger, MeterReset, MovementWithdrawn
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, Record, TryAgain, newest_stamp_us
from meters.meter import Meter

# ``Readable`` logs once that the log cannot be read, and once that it can be read again. Alerts are built on these
# two messages, so a long outage must not repeat them.

logger = structlog.get_logger("aggregator")


class Readable:
    """For one thread, which asks again whatever it hears."""

    def __init__(self) -> None:
        self._waiting: set[str] = set()

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Around a question to the log. What it raises goes on."""
        try:
            yield
        except TryAgain as later:
            if what not in self._waiting:
                logger.warning("log_cannot_be_read", what=what, reason=str(later))
            self._waiting.add(what)
            raise
        if what in self._waiting:
            self._waiting.remove(what)
            logger.info("log_can_be_read_again", what=what)


# ``Boundaries`` tells the running totals where customers' windows begin, as the ledger has it.
#
# The ledger speaks of customers, the totals of the numbers that events carry. A customer may have several numbers, one
# for each of its names, and may get a number long after that number's events arrived (the customer is created later, is
# given another external id, or is joined with another one). So the windows follow the catalogue as well as the resets.

Subject = tuple[int, int, str, str]  # number, organization's number, kind, text
Named = tuple[str, str]  # kind and text: how events name a customer


class Boundaries:
    """For the writer's thread alone: note what a round decides and whom it numbers, then ``begin_windows``."""

    def __init__(self, catalogue: Catalogue, ledger: Ledger, directory: Directory) -> None:
        self._catalogue, self._ledger, self._directory = catalogue, ledger, directory
        self._touched: dict[str, dict[int, Named]] = {}  # by organization and number

    def begins(self, meter: Meter) -> Mapping[int, int]:
        """Where the windows of a meter begin, by customer number; those that are left out begin at EVER."""
        found: dict[int, int] = {}
        for customer_id, account in self._ledger.of_meter(meter.id).items():
            customer = self._catalogue.customer(meter.organization_id, customer_id)
            if account.since is not None and customer is not None:
                found.update(dict.fromkeys(self._numbers(customer), window_begin_us(account.since)))
        return found

    def note(self, change: Change) -> None:
        """Note whom a change concerns. Called before and after it is applied: names change hands."""
        match change:
            case MeterReset(customer_id=id) | MovementWithdrawn(customer_id=id) | CustomerDeleted(id=id):
                self._touch(self._catalogue.customers.get(id))
            case CustomersJoined(organization_id=organization_id, id=id, into=into):
                for one in (id, into):
                    self._touch(self._catalogue.customer(organization_id, one))
            case CustomerCreated(customer) | CustomerUpdated(customer):
                self._touch(self._catalogue.customers.get(customer.id))

    def number(self, fresh: Sequence[Subject]) -> None:
        """Note who is named by an event for the first time. Called before the event is added."""
        for number, organization, kind, text in fresh:
            organization_id = self._directory.organization_ids[organization]
            if self._owner(organization_id, (kind, text)) is not None:
                self._touched.setdefault(organization_id, {})[number] = kind, text

    def begin_windows(self, totals: RunningTotals) -> None:
        """Bring the windows of everyone noted to where they begin now."""
        touched, self._touched = self._touched, {}
        for organization_id, names in touched.items():
            owners = {number: self._owner(organization_id, name) for number, name in names.items()}
            for meter in self._catalogue.meters_of(organization_id):
                if self._ledger.has_resets(meter.id) or totals.is_windowed(meter.id):
                    accounts = self._ledger.of_meter(meter.id)
                    totals.begin_windows(meter, {number: _since(accounts, owner) for number, owner in owners.items()})

    def _touch(self, customer: Customer | None) -> None:
        if customer is not None:
            self._touched.setdefault(customer.organization_id, {}).update(self._numbers(customer))

    def _numbers(self, customer: Customer) -> dict[int, Named]:
        known = self._directory.organizations.get(customer.organization_id)
        if known is None:
            return {}
        names = self._catalogue.names_of(customer)
        found = {known.customer.get(id): (CUSTOMER, id) for id in names.ids}
        found |= {known.external.get(name): (EXTERNAL, name) for name in names.external_ids}
        return {number: name for number, name in found.items() if number is not None}

    def _owner(self, organization_id: str, name: Named) -> str | None:
        kind, text = name
        if kind == EXTERNAL:
            customer = self._catalogue.customer_by_external_id(organization_id, text)
        else:
            customer = self._catalogue.customer(organization_id, text)
        return customer.id if customer else None


def _since(accounts: Mapping[str, Account], customer_id: str | None) -> int:
    account = accounts.get(customer_id) if customer_id is not None else None
    return window_begin_us(account.since) if account is not None else EVER


# ``Checkpointer`` decides when DuckDB's write-ahead log is folded into the file.
#
# The writer waits while a checkpoint runs, and the cost of a checkpoint grows with the rows written since the last
# one. Frequent checkpoints are short, and make the file open quickly after a crash. When the engine has caught up,
# each event is waited for, so a checkpoint takes only what fits between two batches. During a backlog nobody waits
# for a single event, and larger checkpoints leave a smaller file.
#
# A checkpoint writes its rows as new row groups of at most 122,880 rows. By default DuckDB also merges small row
# groups with their neighbors, which rewrites a table and blocks the writer for up to half a second. So under load a
# checkpoint merges nothing; the first checkpoints of an idle period merge some of the small row groups. A checkpoint
# without new rows merges none.
#
# Each checkpoint also visits every row group of the table, changed or not, so the interval between two checkpoints
# grows with the number of stored rows.

ROWS_BETWEEN = 25_000  # 55 ms on busy cores, which mostly fit between two rounds; 100,000 kept every 20th event 0.2 s
ROWS_BETWEEN_BACKLOG = 100_000  # and what comes while it is noticed: nearly a row group
STORED_ROWS_PER_ROW = 320  # in the store for one row more between two: a row's part in looking at them is 1 us at most,
ROWS_MORE_MAX = 200_000  # up to 64 million stored: what waits is in memory, and read again after a crash, in 0.2 s
BACKLOG_ROUND_ROWS = 15_000  # a round of more has been waited for already
AGAIN_S = 0.05  # DuckDB does not checkpoint while a transaction writes; a round takes about this long
MERGES_MAX = 4  # in a quiet time; making five row groups of fifteen took 0.6 s, which a next round may have to wait
IDLE_S = 5.0  # what is left over is folded in when nothing else happens
EVERY_S = 600.0  # at least this often: rows that webhooks write are not reported to ``wrote``


class Checkpointer:
    """Checkpoints when enough rows came, or some came and then none. ``run`` is for a thread of the caller's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._enough = ROWS_BETWEEN
        self._rows = 1  # as if: what a crash left in the write-ahead log is folded in when nothing else happens
        self._wake = threading.Condition()
        self._stopping = False

    def wrote(self, rows: int) -> None:
        """Tell of rows committed."""
        with self._wake:
            self._rows += rows
            more = min(self._store.next_seq // STORED_ROWS_PER_ROW, ROWS_MORE_MAX)
            self._enough = more + (ROWS_BETWEEN_BACKLOG if rows >= BACKLOG_ROUND_ROWS else ROWS_BETWEEN)
            if self._rows >= self._enough:
                self._wake.notify()

    def stop(self) -> None:
        """Have ``run`` return, after a checkpoint under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        """Until ``stop``. Raises Doubt when a checkpoint failed: the instance is not to be used any more."""
        before, newest_s = 0, time.monotonic()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._rows >= self._enough, timeout=IDLE_S)
                if self._stopping:
                    return
                under_load = self._rows >= self._enough
                is_quiet = not under_load and 0 < self._rows == before
                due = under_load or is_quiet or time.monotonic() - newest_s >= EVERY_S
                before = rows = self._rows
                merges_max = MERGES_MAX if is_quiet else 0
            if not due:
                continue
            done = self._store.checkpoint(merges_max)
            with self._wake:
                if done:
                    self._rows, newest_s = self._rows - rows, time.monotonic()
                else:  # a round is being committed
                    self._wake.wait_for(lambda: self._stopping, timeout=AGAIN_S)


# The engine. Memory changes only after the commit, so whatever a failed engine held in memory is discarded with it.

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
    """One engine, from start to failure. ``failure`` holds the error that ended it, once ``ended`` is set."""

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
        self.newest_stamp_us = newest_stamp_us(log)  # of our own processes
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
            ours = (record.timestamp_us for part in (records, decisions) for record in part if record.is_ours)
            self.newest_stamp_us = max(self.newest_stamp_us, max(ours, default=0))
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
