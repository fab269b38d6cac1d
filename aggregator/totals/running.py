"""Running totals of every meter, and their backfill from stored events.

``RunningTotals.evaluate`` applies all meters to a batch while the batch is being written; ``add`` updates the
accumulators after the commit. The View reads totals, windows and quarter hours from here. A new or changed meter is
backfilled in the background over the events stored before its creation, while batches add what comes after; additions
may come in any order. ``Histories`` limits how many backfills run at once. A total whose backfill is unfinished is
reported as None, and the caller queries the store.
"""

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import structlog

from aggregator.decode.directory import Directory
from aggregator.store.store import Store
from aggregator.totals.accumulators import Calendar, Integers, MeterQuarters, MeterWindows, window_begin_us
from aggregator.totals.plan import KEPT, Evaluated, Plan, PreparedPlans, means_the_same, plan
from aggregator.view import EVER, Consumption, Total
from meters.catalogue.catalogue import Catalogue, Change, MeterCreated, MeterUpdated
from meters.meter import Meter
from meters.timestamps import KEPT_FROM

# Background work by organization.
#
# A backfill reads all events of an organization. A thread for each meter would mean as many threads and passes as
# there are meters. So at most HISTORIES_AT_ONCE threads run, and all meters that wait for one organization share a
# pass.

Item = TypeVar("Item")
HISTORIES_AT_ONCE = 2  # organizations whose history is read at a time: each reads all events

logger = structlog.get_logger("aggregator")


class Histories(Generic[Item]):
    """Calls ``work(organization_id, added)`` in a thread, with all that was added for an organization since its last.

    ``work`` must not raise.
    """

    def __init__(self, work: Callable[[str, list[Item]], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Item]] = {}
        self._working = 0
        self._threads: list[threading.Thread] = []

    def add(self, organization_id: str, added: list[Item]) -> None:
        """Have this done, together with what waits for the same organization."""
        with self._lock:
            self._waiting.setdefault(organization_id, []).extend(added)
        self.go_on()

    def go_on(self) -> None:
        """Begin what waits, if there is room. Where no thread can be had it goes on waiting for the next call."""
        with self._lock:
            if not self._waiting or self._working == HISTORIES_AT_ONCE:
                return
            self._working += 1
        thread = threading.Thread(target=self._run, name="history", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads just now
            logger.error("history_waits", reason=str(error))
            with self._lock:
                self._working -= 1
            return
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]

    def wait(self) -> None:
        """Return when all that was begun is done, and all that waits for those who do it."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working -= 1
                    return
                organization_id = next(iter(self._waiting))
                added = self._waiting.pop(organization_id)
            self._work(organization_id, added)


# The running totals.

HISTORY_ROWS = 20_000  # rows of history evaluated at a time; bounds memory and how long a reader waits for the lock
HISTORY_AGAIN_S = 10.0  # until a history is read again that could not be, as where memory was short
_READ = ["subject", "ingested_at", "name", "timestamp", "metadata", "awkward"]  # what a statement of meters may look at
_HISTORY = "SELECT * FROM events WHERE organization = $organization AND seq < $before"
_SINCE = (
    "SELECT * FROM events WHERE organization = $organization AND ingested_at >= make_timestamp($since)"
    " AND subject IN (SELECT UNNEST($subjects))"
)

# The warning is true, but the copy holds only a few thousand narrow rows. Without a copy the relation is planned
# twice, which costs more.
warnings.filterwarnings("ignore", message="Arrow output on a DB-API result makes an extra copy")


class Counting(NamedTuple):
    """A meter's totals, and whether its history is in them yet. ``meter`` is as it was when counting began."""

    meter: Meter
    totals: MeterWindows
    quarters: MeterQuarters | None  # None for distinct values, which cannot be added up
    before_seq: int  # what is stored before it is its history; the rounds add what comes from it on
    complete: threading.Event


class Found(NamedTuple):
    """What the meters of an organization, by its number, find in some rows."""

    organization: int
    plan: Plan
    table: pa.Table


class RunningTotals:
    """The totals of all meters. The writer calls ``add`` and ``changed``, and starts ``evaluate`` in another thread.

    ``total`` is for any thread.
    """

    def __init__(
        self, store: Store, directory: Directory, catalogue: Catalogue,
        begins: Callable[[Meter], Mapping[int, int]] = lambda _: {},
    ) -> None:  # fmt: skip
        """``begins`` says where the windows of a meter begin, by customer number, in us; the others begin at EVER."""
        self._store, self._directory, self._catalogue, self._begins = store, directory, catalogue, begins
        self._connection = store.cursor()
        self._meters: dict[str, Counting] = {}
        self._calendars: dict[str, Calendar] = {}  # by organization: times long ago cost nobody else memory
        self._histories = Histories(self._history)
        self._plans = PreparedPlans(store.cursor)
        self._waiting: dict[str, dict[int, int]] = {}  # by meter: windows that begin in history under way
        self._failed: deque[tuple[float, dict[str, Counting]]] = deque()  # when to count again
        self._stopping = threading.Event()

    def start(self) -> None:
        """Count the stored history of every meter, in the background."""
        for organization_id in self._catalogue.organizations:
            self._count_history(self._catalogue.meters_of(organization_id), self._store.next_seq)

    def wait(self) -> None:
        """Return when all history that was begun is counted, or cannot be."""
        self._histories.wait()

    def stop(self) -> None:
        """Give up counting history and let go of the store."""
        self._stopping.set()
        self.wait()
        self._plans.close()
        self._connection.close()
        del self._histories  # it holds this in turn, and in what is frozen the collector finds no cycle

    def changed(self, change: Change, before_seq: int) -> None:
        """Follow a change of the catalogue: a meter that is new, or means something else now, is counted anew."""
        if not isinstance(change, MeterCreated | MeterUpdated):
            return
        meter, counting = change.meter, self._meters.get(change.meter.id)
        if counting is not None and means_the_same(counting.meter, meter):
            return
        if meter.organization_id in self._directory.organizations:
            self._plans.forget(self._directory.organizations[meter.organization_id].number)
        self._meters.pop(meter.id, None)
        self._count_history([meter], before_seq)

    def evaluate(self, rows: pa.Table) -> list[Found]:
        """What the meters find in the rows of a round, which is on its way into the store; changes nothing."""
        if rows.num_rows == 0:
            return []
        organizations, arriving = rows.column("organization").to_numpy(), rows.select(_READ)
        found = list[Found]()
        for number in np.unique(organizations).tolist():
            plans = self._plans.of(number, self._counted_meters, arriving.schema)
            if plans:
                here = organizations == number
                ours = arriving if here.all() else arriving.filter(pa.array(here))
                found += [Found(number, prepared.plan, prepared.run(ours)) for prepared in plans]
        return found

    def add(self, found: list[Found]) -> None:
        """Move the totals on by what the meters found in a committed round."""
        for number, compiled, table in found:
            _scatter(self._meters, compiled, table, self._calendar(self._directory.organization_ids[number]))

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """The meter's total over the customer numbers; None while its history is being counted."""
        counting = self._complete(meter)
        return counting.totals.total(subjects) if counting is not None else None

    def by_quarters(self, meter: Meter, bounds: Sequence[tuple[datetime, datetime]]) -> list[Total] | None:
        """Everyone's total in each span of quarter hours.

        None while it is counted, for distinct values, and where a span begins before KEPT_FROM.
        """
        counting = self._complete(meter)
        if counting is None or counting.quarters is None or any(begins < KEPT_FROM for begins, _ in bounds):
            return None
        return [counting.quarters.total(begins, ends) for begins, ends in bounds]

    def consumed(self, meter: Meter, subjects: list[int], since: datetime | None) -> Consumption | None:
        """What arrived from these numbers since a time.

        None while it is counted, for another time than the customer's newest reset, and for more distinct values than
        are kept.
        """
        counting = self._complete(meter)
        return counting.totals.consumed(subjects, window_begin_us(since)) if counting is not None else None

    def arrivals(self, meter: Meter) -> Integers | None:
        """When the newest counted event of each number arrived, in us (EVER: none did); None while it is counted."""
        counting = self._complete(meter)
        return counting.totals.arrivals() if counting is not None else None

    def amounts(self, meter: Meter) -> npt.NDArray[np.float64] | None:
        """What each customer number used in its window, as the nearest double, to put long lists in order by.

        None while it is counted, and for distinct values.
        """
        counting = self._complete(meter)
        return counting.totals.amounts() if counting is not None else None

    def _complete(self, meter: Meter) -> Counting | None:
        """What is counted by this definition of the meter, once its history is in it."""
        counting = self._meters.get(meter.id)
        if counting is None or not counting.complete.is_set() or not means_the_same(counting.meter, meter):
            return None
        return counting

    def is_windowed(self, meter_id: str) -> bool:
        """Whether any customer's window of the meter begins elsewhere than at EVER, or did."""
        counting = self._meters.get(meter_id)
        return counting is not None and counting.totals.is_windowed

    def begin_windows(self, meter: Meter, begins: Mapping[int, int]) -> None:
        """Begin the windows of customers at other times (us, or EVER), when every stored row is in the totals.

        What arrived since is asked of the store, where anything did. While history is still being counted nobody knows
        which of those rows it has; such a window waits for ``catch_up``, and until then the store is asked instead.
        """
        counting = self._meters.get(meter.id)
        if counting is None:
            return
        begins = self._waiting.get(meter.id, {}) | dict(begins)
        begins = {subject: since for subject, since in begins.items() if counting.totals.is_elsewhere(subject, since)}
        is_complete = counting.complete.is_set()  # looked at first: what history adds after this is looked for below
        late = {subject: since for subject, since in begins.items() if counting.totals.has_rows(subject, since)}
        inside = self._inside(meter, late) if late and is_complete else None
        if (late and inside is None) or not counting.totals.begin_windows(begins, inside):
            self._waiting[meter.id] = begins
        else:
            self._waiting.pop(meter.id, None)

    def catch_up(self) -> None:
        """Do what had to wait: windows of meters whose history is counted by now, histories that could not be read."""
        for meter in [self._meters[id].meter for id in self._waiting if id in self._meters]:
            if self._complete(meter) is not None:
                self.begin_windows(meter, {})
        self._histories.go_on()
        while self._failed and self._failed[0][0] <= time.monotonic():
            _, counted = self._failed.popleft()
            current = [one.meter for id, one in counted.items() if self._meters.get(id) is one]
            self._count_history(current, self._store.next_seq)

    def _inside(self, meter: Meter, late: Mapping[int, int]) -> MeterWindows:
        number = self._directory.organizations[meter.organization_id].number
        compiled = plan([meter], _SINCE)
        asked = {"organization": number, "subjects": list(late), "since": min(late.values())}
        begins = np.full(max(late) + 1, EVER, np.int64)
        begins[list(late)] = list(late.values())
        inside = Counting(meter, MeterWindows(meter.aggregation.func), None, 0, threading.Event())
        relation = self._connection.sql(compiled.statement.sql, params=compiled.statement.parameters | asked)
        for batch in relation.to_arrow_reader(HISTORY_ROWS):  # together they may be more than memory, or a sum, holds
            rows = pa.Table.from_batches([batch])
            since = begins[rows.column("subject").to_numpy()]
            rows = rows.filter(pa.array(_column_us(rows, "ingested_at") >= since))
            _scatter({meter.id: inside}, compiled, rows, self._calendar(meter.organization_id))
        return inside.totals

    def _calendar(self, organization_id: str) -> Calendar:
        return self._calendars.setdefault(organization_id, Calendar())

    def _counted_meters(self, organization: int) -> list[Meter]:
        meters = self._catalogue.meters_of(self._directory.organization_ids[organization])
        return [meter for meter in meters if meter.id in self._meters]

    def _count_history(self, meters: list[Meter], before_seq: int) -> None:
        for meter in meters:
            windows = MeterWindows(meter.aggregation.func)
            windows.begin_windows(self._begins(meter))
            self._waiting.pop(meter.id, None)
            func = meter.aggregation.func
            quarters = None if func == "unique" else MeterQuarters(func, self._calendar(meter.organization_id))
            self._meters[meter.id] = Counting(meter, windows, quarters, before_seq, threading.Event())
        counted = [self._meters[meter.id] for meter in meters]
        if before_seq == 0 or not meters or meters[0].organization_id not in self._directory.organizations:
            for counting in counted:
                counting.complete.set()
            return
        self._histories.add(meters[0].organization_id, counted)

    def _history(self, organization_id: str, waited: list[Counting]) -> None:
        """A thread: evaluate meters over the events stored before their ``before_seq``, all in one pass."""
        counted = {one.meter.id: one for one in waited if self._meters.get(one.meter.id) is one}
        if not counted or self._stopping.is_set():
            return
        try:
            number, calendar = self._directory.organizations[organization_id].number, self._calendar(organization_id)
            before_seq = max(one.before_seq for one in counted.values())
            with contextlib.closing(self._store.cursor()) as connection:
                compiled = plan([one.meter for one in counted.values()], _HISTORY, keep=(*KEPT, "seq"))
                parameters = compiled.statement.parameters | {"organization": number, "before": before_seq}
                relation = connection.sql(compiled.statement.sql, params=parameters)
                for batch in relation.to_arrow_reader(HISTORY_ROWS):
                    if self._stopping.is_set() or not any(self._meters.get(id) is one for id, one in counted.items()):
                        return  # or they are counted anew by another thread
                    _scatter(counted, compiled, pa.Table.from_batches([batch]), calendar)
            for counting in counted.values():
                counting.complete.set()
        except Exception as error:  # without its total a meter is answered by a query: slower, never wrong
            logger.error("history_not_counted", reason=str(error), again_s=HISTORY_AGAIN_S)
            self._failed.append((time.monotonic() + HISTORY_AGAIN_S, counted))


def _scatter(counted: Mapping[str, Counting], compiled: Plan, table: pa.Table, calendar: Calendar) -> None:
    """Add the result of a plan to the totals of its meters."""
    subjects = table.column("subject").to_numpy().astype(np.intp)
    arrived, quarters = _column_us(table, "ingested_at"), calendar.numbers(_column_us(table, "timestamp"))
    seqs = table.column("seq").to_numpy() if "seq" in table.column_names else np.zeros(0, np.int64)
    last_seq = int(seqs.max(initial=-1))
    evaluated = Evaluated(compiled, table)
    for choice in compiled.choices:
        counting, rows = counted.get(choice.meter.id), evaluated.rows(choice)
        if counting is not None and last_seq >= counting.before_seq:  # of a history that is longer for another meter
            rows = rows[seqs[rows] < counting.before_seq]
        if counting is not None and len(rows):
            contributions = evaluated.contributions(choice)
            counting.totals.add(subjects, contributions, rows, arrived)
            if counting.quarters is not None:
                counting.quarters.add(quarters, contributions, rows)


def _column_us(table: pa.Table, column: str) -> Integers:
    """A column of times in microseconds since 1970."""
    times: Integers = table.column(column).to_numpy().astype("datetime64[us]").astype(np.int64)
    return times
