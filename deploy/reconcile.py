"""The nightly proof: what was taken, what is counted and what Polar has are the same, or a report says where not.

Who owns the store decides how it is asked. On a stopped server the file is opened here, for reading only. The log is
read here in any case, so a server that runs does little more than answer questions about its rows.
"""

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from aggregator.reconcile.log_check import LogCheck, Range
from aggregator.reconcile.questions import Foreign, StoppedStore
from aggregator.reconcile.report import Check, Report
from aggregator.reconcile.stopped import StoppedTotals
from aggregator.reconcile.store_check import check_store
from aggregator.reconcile.worth import Worth
from deploy.control import Control
from deploy.data import DataDirectory
from deploy.giving_up import FAILED, GiveUp
from meters.log import Log, format_position

CHECKS = ("log", "store", "ledger", "upstream")
REPORTS = "reconcile"  # a folder of the data directory: progress, and what repairs did


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to compare. Times are UTC, half-open."""

    checks: tuple[str, ...] = CHECKS
    since: datetime | None = None
    until: datetime | None = None


def reconcile(data: DataDirectory, task: Task) -> Report:
    """Compare what a stopped server left. Raises GiveUp when it runs, or when log or store cannot be opened."""
    data.require()
    with data.hold("reconcile the store's file"), contextlib.closing(data.open_log()) as log:
        if not data.store.exists():
            raise GiveUp(f"there is no store in {data.path} yet; start a server, or run `meterstream rebuild`")
        try:
            store = StoppedStore(data.store)
        except Foreign as error:
            raise GiveUp(str(error), FAILED) from error
        with contextlib.closing(store):
            return _compare(log, store, task)


def _compare(log: Log, store: StoppedStore, task: Task) -> Report:
    catalogue = Control(log).catalogue  # the log's own: a damaged store must not choose what is compared
    worth = Worth(catalogue)
    tallies = store.ask("tallies").to_pylist()
    as_of = format_position({row["log_partition"]: row["next_offset"] for row in tallies})
    report = Report(made_at=datetime.now(UTC), as_of=as_of, since=task.since, until=task.until, checks=[])

    def store_check() -> Check:
        with contextlib.closing(StoppedTotals(store, catalogue)) as totals:
            return check_store(store, totals, catalogue, worth)

    if "log" in task.checks:
        report.checks.append(_timed(lambda: LogCheck(log, store, worth, Range(task.since, task.until)).run()))
    if "store" in task.checks:
        report.checks.append(_timed(store_check))
    return report


def _timed(check: Callable[[], Check]) -> Check:
    began = time.monotonic()
    found = check()
    found.seconds = round(time.monotonic() - began, 3)
    return found
