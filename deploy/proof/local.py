"""Log, store and ledger of one installation, compared.

Who owns the store decides how it is asked. On a stopped server the file is opened here, for reading only. The log is
read here in any case, so a server that runs does little more than answer questions about its rows.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec

from aggregator.reconcile.ledger_check import SIDES as LEDGER_SIDES
from aggregator.reconcile.ledger_check import Books, Outbox, check_ledger
from aggregator.reconcile.log_check import LogCheck, Range
from aggregator.reconcile.questions import Foreign, StoppedStore, StoreSide
from aggregator.reconcile.report import Check, Report
from aggregator.reconcile.stopped import StoppedTotals
from aggregator.reconcile.store_check import TotalsSide, check_store
from aggregator.reconcile.stretches import PATIENCE_S
from aggregator.reconcile.worth import Worth
from deploy.control import Control
from deploy.data import DataDirectory
from deploy.forwarding.file import open_state
from deploy.giving_up import GiveUp
from deploy.proof.own_server import own_server
from deploy.proof.running_store import RunningStore
from deploy.session import Session
from meters.catalogue import Catalogue
from meters.log import USAGE_CONTROL, Log, TryAgain, format_position

CHECKS = ("log", "store", "ledger", "upstream")
READ_BYTES = 4 * 1024 * 1024
ATTEMPTS_MAX = 20  # while operators decide, balances and decisions of one moment need some luck
AGAIN_S = 0.2


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
    outbox = partial(_outbox, here.data)
    with contextlib.closing(_log(here.data)) as log, _explained():
        if here.data.store.exists() and not _is_held(here.data):
            with _stopped(here.data) as stopped:
                totals = partial(StoppedTotals, stopped)
                return _compare(log, stopped, task, outbox, lambda known: contextlib.closing(totals(known)))
        with own_server(here) as api:
            running = RunningStore(api)
            return _compare(log, running, task, outbox, lambda _: contextlib.nullcontext(running))


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
    log: Log, store: StoreSide, task: Task, outbox: Callable[[], Outbox | None],
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
    if "ledger" in task.checks:
        report.checks.append(timed(lambda: _ledger(log, store, outbox, worth)))
    return report


def _ledger(log: Log, store: StoreSide, outbox: Callable[[], Outbox | None], worth: Worth) -> Check:
    try:
        return check_ledger(_books(log, store, outbox()), worth)
    except GiveUp as reason:  # what was compared besides is worth a report all the same
        return Check(name="ledger", sides=LEDGER_SIDES, skipped=str(reason), has_failed=True)


def _books(log: Log, store: StoreSide, outbox: Outbox | None) -> Books:
    """Decisions and, of a running server, its balances, read while nobody decides. Raises GiveUp."""
    looks = set()
    for _ in range(ATTEMPTS_MAX):
        ends = log.ends(USAGE_CONTROL)
        decisions, catalogue = _decisions(log), Control(log).catalogue
        (read,) = store.ask("decided").to_pylist()
        stored = {row["log_offset"]: row["value"].encode() for row in store.ask("control").to_pylist()}
        if not isinstance(store, RunningStore):
            return Books(decisions, stored, read["next_offset"], catalogue, None, outbox)
        shown = {meter.id: store.balances(meter) for meter in catalogue.meters.values()}
        books = Books(decisions, stored, read["next_offset"], catalogue, shown, outbox)
        after = log.ends(USAGE_CONTROL)
        if len(stored) == len(decisions) and ends == after:
            return books
        looks.add((len(stored), *after.values()))
        time.sleep(AGAIN_S)
    if len(looks) > 1:
        raise GiveUp("decisions are taken too fast to read balances between two of them; try again when it is quieter")
    return books  # nobody decides, and the store lacks what it has read, or shows balances without what it has not


def _decisions(log: Log) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    positions, ends = log.starts(USAGE_CONTROL), log.ends(USAGE_CONTROL)
    while any(positions[partition] < end for partition, end in ends.items()):
        for record in log.read(USAGE_CONTROL, positions, bytes_max=READ_BYTES, wait_s=PATIENCE_S):
            positions[record.partition] = record.offset + 1
            if record.value:  # what is empty is the marker of a transaction
                found.append((record.offset, record.value))
    return found


def _outbox(data: DataDirectory) -> Outbox | None:
    """The forwarder's books, where anything was ever forwarded. Raises GiveUp."""
    if not data.forwarding.exists():
        return None
    with open_state(data) as state, state.at_once():
        lanes = [tallies for lane, tallies in state.tallies().items() if lane]
        waiting, _ = state.waiting()
    taken, accepted, dead = (sum(lane.get(name, 0) for lane in lanes) for name in ("taken", "accepted", "dead"))
    return Outbox(taken, accepted, waiting, dead)


def timed(check: Callable[[], Check]) -> Check:
    """Run a check and note how long it took."""
    began = time.monotonic()
    found = check()
    found.seconds = round(time.monotonic() - began, 3)
    return found
