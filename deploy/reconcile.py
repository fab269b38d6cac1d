"""The nightly proof: what was taken, what is counted and what Polar has are the same, or a report says where not.

Who owns the store decides how it is asked. On a stopped server the file is opened here, for reading only. The log is
read here in any case, so a server that runs does little more than answer questions about its rows.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import msgspec

from aggregator.reconcile.log_check import LogCheck, Range
from aggregator.reconcile.questions import Foreign, StoppedStore
from aggregator.reconcile.report import Check, Report
from aggregator.reconcile.stopped import StoppedTotals
from aggregator.reconcile.store_check import check_store
from aggregator.reconcile.worth import Worth
from deploy.control import Control
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from meters.log import Log, format_position

CHECKS = ("log", "store", "ledger", "upstream")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to compare. Times are UTC, half-open; ``repair`` is plan, apply or None.

    ``settle`` is how long an event may be on its way to Polar before it is missed there.
    """

    checks: tuple[str, ...] = CHECKS
    since: datetime | None = None
    until: datetime | None = None
    repair: str | None = None
    settle: timedelta = timedelta(minutes=15)


def reconcile(data: DataDirectory, task: Task) -> Report:
    """Compare log and store of one directory. Raises GiveUp when one of them cannot be opened."""
    data.require()
    with _stopped(data) as store, contextlib.closing(data.open_log()) as log:
        return _compare(log, store, task)


@contextlib.contextmanager
def _stopped(data: DataDirectory) -> Iterator[StoppedStore]:
    with data.hold("reconcile the store's file"):
        if not data.store.exists():
            raise GiveUp(f"there is no store in {data.path} yet; start a server, or run `meterstream rebuild`")
        try:
            store = StoppedStore(data.store)
        except Foreign as error:
            raise GiveUp(str(error)) from error
        with contextlib.closing(store):
            yield store


def _compare(log: Log, store: StoppedStore, task: Task) -> Report:
    catalogue = Control(log).catalogue  # the log's own: a damaged store must not choose what is compared
    worth = Worth(catalogue)
    tallies = store.ask("tallies").to_pylist()
    as_of = format_position({row["log_partition"]: row["next_offset"] for row in tallies})
    report = Report(made_at=datetime.now(UTC), as_of=as_of, since=task.since, until=task.until, checks=[])

    def check_totals() -> Check:
        with contextlib.closing(StoppedTotals(store, catalogue)) as totals:
            return check_store(store, totals, catalogue, worth)

    if "log" in task.checks:
        report.checks.append(timed(lambda: LogCheck(log, store, worth, Range(task.since, task.until)).run()))
    if "store" in task.checks:
        report.checks.append(timed(check_totals))
    return report


def timed(check: Callable[[], Check]) -> Check:
    """Run a check and note how long it took."""
    began = time.monotonic()
    found = check()
    found.seconds = round(time.monotonic() - began, 3)
    return found
