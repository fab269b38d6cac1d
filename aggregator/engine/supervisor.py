"""The engine's supervisor: runs one engine after another over one store file, and is the ``View`` that others read.

``Aggregator`` opens the store, checks that the log is still the one that the store was counted from (``break_in``),
and starts an ``Engine``. An engine that failed is not repaired: the supervisor closes it, opens the store again and
starts a new engine at the committed positions. Between two engines reads raise ``Unavailable``, and nothing is lost,
because the log keeps every acknowledged event. A full disk is such an interval, as long as the disk is full.

Some failures are final (``FINAL``): another writer took over, the log lost a position, or the store cannot be opened.
The process then ends with a message, because continuing could produce wrong invoices. The process also ends when a
query does not release the store of a failed engine; a new process then continues.
"""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import structlog

from aggregator.decode.directory import Directory
from aggregator.engine.metrics import Telemetry
from aggregator.engine.pipeline import Committed, Engine
from aggregator.store.database import MODEST, Settings, Unopenable, explaining
from aggregator.store.store import Replaced, StillRead, Store, prepare_partitions
from aggregator.totals.running import RunningTotals
from aggregator.view import Snapshot, Unavailable
from meters.catalogue.catalogue import Catalogue, Change, encode_changes
from meters.ledger.ledger import Ledger
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, PositionLost, seconds_ahead

# Continuity of the log.
#
# A log has an identity, and a position past its end is refused. Neither detects a log that was restored from an older
# copy and then written to: it has the same identity, but other records at offsets that the store has counted already.
# Those records would never be counted. So ``break_in`` reads the last record of each partition that the store counted
# again, and requires that the log still gives it the same time.

READ_BYTES_MAX = 1 << 20  # of one look at all partitions: to seek costs brokers more than what came since


def break_in(log: Log, store: Store) -> str | None:
    """What is wrong, or None. Raises PositionLost when the log ends before what was counted, TryAgain."""
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        starts = log.starts(stream)
        left = {
            partition: known
            for partition, known in store.last_read(stream).items()
            if known[0] >= starts.get(partition, 0)  # or retention removed it
        }
        while left:
            before = dict(left)
            asked = {partition: offset for partition, (offset, _) in left.items()}
            for record in log.read(stream, asked, bytes_max=READ_BYTES_MAX):
                known = left.pop(record.partition, None)  # of each partition the first one
                if known is not None and known != (record.offset, record.timestamp_us):
                    return _other(stream, record.partition, known[0])
            if left == before:
                partition, (offset, _) = next(iter(left.items()))
                return _other(stream, partition, offset)
    return None


def _other(stream: str, partition: int, offset: int) -> str:
    where = f"{stream} partition {partition} has another record {offset} than the one that was counted"
    return f"{where}: the log was restored from an older copy and written on"


# The aggregator.

RESTART_DELAY_S = 0.5  # between two engines; a full disk is not asked more often than this
RESTART_DELAY_MAX_S = 10.0
OPENING_DELAY_MAX_S = 3.0  # between two tries to open what is away: brokers, topics, room on a disk
_LOOK_S = 0.1  # how soon a stop is heard
QUESTIONS_AT_ONCE = 4  # to the log about its ends; one that is away takes seconds to say so
DECISION_TIMEOUT_S = 30.0  # a decision is durable at once; this long we wait for it to be applied
_NUMBER = re.compile(r"\d+")
FINAL = (Replaced, PositionLost, Unopenable)

logger = structlog.get_logger("aggregator")


class Aggregator:
    """Follows the log into the store and answers for it. Implements ``aggregator.view.View``."""

    def __init__(self, log: Log, path: Path, settings: Settings = MODEST) -> None:
        self._log, self._path, self._settings = log, path, settings
        self._engine: Engine | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="aggregator", daemon=True)
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._lock = threading.Lock()
        self._asking = ThreadPoolExecutor(QUESTIONS_AT_ONCE, "ends")  # of their own, so that nothing waits for them
        self.telemetry = Telemetry()
        self.telemetry.clock_ahead_s.set_function(self._clock_ahead_s)
        self.ended = threading.Event()
        self.failure: Exception | None = None
        self._said: set[str] = set()  # why engines ended since the last commit: each reason is told once

    def start(self) -> None:
        """Open the store and begin to follow the log. Raises Unopenable, with the way on in its message.

        What may pass is waited for in the background, like later on.
        """
        self._try_open()
        if isinstance(self.failure, FINAL):
            raise self.failure
        self._thread.start()

    def stop(self) -> None:
        """Finish the round under way, then close the store."""
        self._stop.set()
        self._asking.shutdown(cancel_futures=True)
        if self._thread.ident is not None:
            self._thread.join()

    def _open(self) -> Engine:
        streams = (USAGE_EVENTS, USAGE_CONTROL)
        store = Store.open(self._path, {stream: self._log.identity(stream) for stream in streams}, self._settings)
        try:
            with explaining(self._path):
                for stream in streams:
                    prepare_partitions(store, stream, list(self._log.ends(stream)))
                broken = break_in(self._log, store)
                if broken:
                    raise PositionLost(broken)
                engine = Engine(self._log, store, self._observed)
        except BaseException:
            store.close()
            raise
        self.telemetry.strangers.set(engine.strangers.events)
        try:
            engine.start()
        except BaseException:
            engine.stop()  # some of its threads may run
            raise
        return engine

    def _live(self) -> None:
        delay_s = RESTART_DELAY_S
        while not self._stop.is_set():
            engine = self._engine or self._try_open()
            if engine is not None:
                self._until_ended(engine)
                delay_s = RESTART_DELAY_S if engine.rounds else min(2 * delay_s, RESTART_DELAY_MAX_S)
            else:
                delay_s = min(2 * delay_s, OPENING_DELAY_MAX_S)
            engine = None  # it holds an index of all identities, and the next one makes its own
            self._stop.wait(delay_s)
        self.ended.set()

    def _try_open(self) -> Engine | None:
        try:
            self._engine = self._open()
        except Exception as error:  # the disk may be full or the log away: say so, and try again after the delay
            self._judge(error)
        self._release()  # the store may be further than anybody here has heard
        return self._engine

    def _until_ended(self, engine: Engine) -> None:
        while not (engine.ended.wait(_LOOK_S) or self._stop.is_set()):
            continue
        self._engine = None
        try:
            engine.stop()
        except Exception as error:
            self._judge(error)
        if engine.failure is not None:
            self._judge(engine.failure)

    def _judge(self, failure: Exception) -> None:
        if isinstance(failure, FINAL) or not self._stop.is_set():  # else it says already why this has to stop
            self.failure = failure
        self.telemetry.restarts.inc()
        final = isinstance(failure, (*FINAL, StillRead))
        what = "aggregator_stopped" if final else "engine_ended"
        known = _NUMBER.sub("", str(failure))  # a client says, too, after how many milliseconds it was
        if final or known not in self._said:
            logger.error(what, reason=str(failure), kind=type(failure).__name__)
        self._said.add(known)
        _forget_frames(failure)
        if final:
            self._stop.set()

    def _observed(self, committed: Committed) -> None:
        self.failure = None
        self._said.clear()
        self.telemetry.observe(committed)
        self._release()

    def _release(self) -> None:
        with self._lock:
            due = [waiter for waiter in self._waiters if waiter[0]()]
            self._waiters = [waiter for waiter in self._waiters if waiter not in due]
        for _, future in due:
            future.get_loop().call_soon_threadsafe(_resolve, future)

    @property
    def _now(self) -> Engine:
        engine = self._engine
        if engine is None or not engine.informed:
            raise Unavailable("the store is being opened", RESTART_DELAY_S)
        return engine

    @property
    def catalogue(self) -> Catalogue:
        """Return the running engine's catalogue."""
        return self._now.catalogue

    @property
    def ledger(self) -> Ledger:
        """Return the running engine's ledger."""
        return self._now.ledger

    @property
    def directory(self) -> Directory:
        """Return the running engine's directory."""
        return self._now.directory

    @property
    def totals(self) -> RunningTotals:
        """Return the running engine's totals."""
        return self._now.totals

    @property
    def as_of(self) -> Mapping[int, int]:
        """Return the running engine's position in ``usage.events``."""
        return self._now.as_of

    @contextlib.contextmanager
    def read(self) -> Iterator[Snapshot]:
        """Open a snapshot of the running engine's store. Raises Unavailable between two engines."""
        with self._now.store.read() as snapshot:
            yield snapshot

    @property
    def control_position(self) -> int:
        """Return the running engine's position in ``usage.control``."""
        return self._now.control_position

    def _clock_ahead_s(self) -> float:
        engine = self._engine
        return seconds_ahead(engine.newest_stamp_us, time.time_ns() // 1000) if engine is not None else 0.0

    @property
    def newest_stamp_us(self) -> int:
        """Return the newest time of our own processes that the running engine read in the log, in us since 1970."""
        return self._now.newest_stamp_us

    @contextlib.contextmanager
    def outbox(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open a transaction on the running engine's webhook tables. Raises Unavailable between two engines."""
        with self._now.store.outbox() as connection:
            yield connection

    async def decide(self, *changes: Change) -> None:
        """Append one record, then wait at most DECISION_TIMEOUT_S until the engine has applied it."""
        entry = Entry(encode_changes(changes), admitted=True)
        (offset,) = await self._log.append(USAGE_CONTROL, [entry])
        if not await self._wait(lambda: self._now.control_position > offset, DECISION_TIMEOUT_S):
            raise Unavailable("the decision is durable but not yet applied", RESTART_DELAY_S)

    async def informed(self, timeout_s: float) -> bool:
        """Ask the log for the end of ``usage.control``, and wait until the engine has applied it."""
        deadline_s = time.monotonic() + timeout_s
        ends = await self._ends(USAGE_CONTROL, timeout_s)
        if ends is None:
            return False
        end = ends.get(0, 0)
        return await self._wait(lambda: self._now.control_position >= end, deadline_s - time.monotonic())

    async def wait_for(self, position: Mapping[int, int], timeout_s: float) -> bool:
        """Wait for the engine to commit the position, over restarts of the engine."""
        return await self._wait(
            lambda: all(self._now.as_of.get(partition, 0) >= offset for partition, offset in position.items()),
            timeout_s,
        )

    async def present(self, timeout_s: float) -> bool:
        """Ask the log for the ends of ``usage.events``, and wait until the engine has committed them."""
        deadline_s = time.monotonic() + timeout_s
        ends = await self._ends(USAGE_EVENTS, timeout_s)
        return ends is not None and await self.wait_for(ends, deadline_s - time.monotonic())

    async def _ends(self, stream: str, timeout_s: float) -> Mapping[int, int] | None:
        """Where a stream ends; None where nobody can say within the time. Raises TryAgain."""
        asked = asyncio.get_running_loop().run_in_executor(self._asking, self._log.ends, stream)
        try:
            async with asyncio.timeout(timeout_s):
                return await asked
        except TimeoutError:
            return None

    async def _wait(self, reached: Callable[[], bool], timeout_s: float) -> bool:
        def safely() -> bool:
            try:
                return reached()
            except Unavailable:
                return False

        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if safely():
                return True
            self._waiters.append((safely, future))
        if (engine := self._engine) is not None:
            engine.awaited.set()
        try:
            async with asyncio.timeout(timeout_s):  # wait_for would lose a cancellation that comes with the result
                await future
        except TimeoutError:
            with self._lock:
                self._waiters = [waiter for waiter in self._waiters if waiter[1] is not future]
            return False
        return True


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _forget_frames(failure: BaseException) -> None:
    """Let go of the frames in which an error was raised: they hold the engine that ended, with all of its memory."""
    each: BaseException | None = failure
    while each is not None:
        each.__traceback__, each = None, each.__cause__ or each.__context__
