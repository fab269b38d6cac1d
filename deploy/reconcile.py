"""The nightly proof: what was taken, what is counted and what Polar has are the same, or a report says where not.

Who owns the store decides how it is asked. On a stopped server the file is opened here, for reading only. The log is
read here in any case, so a server that runs does little more than answer questions about its rows.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import httpx
import msgspec

from aggregator.reconcile.log_check import LogCheck, Range
from aggregator.reconcile.questions import Foreign, StoppedStore, StoreSide
from aggregator.reconcile.report import Check, Report
from aggregator.reconcile.stopped import StoppedTotals
from aggregator.reconcile.store_check import TotalsSide, check_store
from aggregator.reconcile.worth import Worth
from deploy.control import Control
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from deploy.own_server import own_server
from deploy.running_store import RunningStore
from deploy.session import Session
from meters.catalogue import Catalogue
from meters.log import Log, TryAgain, format_position

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


def reconcile(here: Session, task: Task) -> Report:
    """Compare the log with the store of one installation. Raises GiveUp when one of them cannot be read."""
    with contextlib.closing(_log(here.data)) as log, _explained():
        if here.data.store.exists() and not _is_held(here.data):
            with _stopped(here.data) as stopped:
                return _compare(log, stopped, task, lambda known: contextlib.closing(StoppedTotals(stopped, known)))
        with own_server(here) as api:
            running = RunningStore(api)
            try:
                return _compare(log, running, task, lambda _: contextlib.nullcontext(running))
            except httpx.TransportError as error:
                raise api.unreachable(error) from None


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except TryAgain as error:
        raise GiveUp(f"the log cannot be read now: {error}; nothing was compared") from error


def _log(data: DataDirectory) -> Log:
    data.require()
    return data.open_log()


def _is_held(data: DataDirectory) -> bool:
    try:
        with data.hold("look"):
            return False
    except GiveUp:
        return True


@contextlib.contextmanager
def _stopped(data: DataDirectory) -> Iterator[StoppedStore]:
    with data.hold("reconcile the store's file"):
        try:
            store = StoppedStore(data.store)
        except Foreign as error:
            raise GiveUp(str(error)) from error
        with contextlib.closing(store):
            yield store


def _compare(
    log: Log, store: StoreSide, task: Task,
    totals_of: Callable[[Catalogue], contextlib.AbstractContextManager[TotalsSide]],
) -> Report:  # fmt: skip
    catalogue = Control(log).catalogue  # the log's own: a damaged store must not choose what is compared
    worth = Worth(catalogue)
    tallies = store.ask("tallies").to_pylist()
    as_of = format_position({row["log_partition"]: row["next_offset"] for row in tallies})
    report = Report(made_at=datetime.now(UTC), as_of=as_of, since=task.since, until=task.until, checks=[])

    def check_totals() -> Check:
        with totals_of(catalogue) as totals:
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
