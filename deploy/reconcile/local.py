"""Reconcile one installation: compare its log, its store and its ledger.

``reconcile`` runs a ``Task``. Who owns the store decides how it is read: a running server is asked over its API
(``RunningStore``, found by ``own_server``), a stopped server's file is opened read-only. The log is always read here,
so a running server only answers questions about its rows. The comparisons themselves are in ``aggregator.reconcile``.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pyarrow as pa

from aggregator.reconcile.ledger_check import SIDES as LEDGER_SIDES
from aggregator.reconcile.ledger_check import Balance, Books, Outbox, check_ledger
from aggregator.reconcile.lines import Foreign, StoppedStore, StoreSide
from aggregator.reconcile.log_check import PATIENCE_S, LogCheck, Range
from aggregator.reconcile.report import Check, Report, Worth
from aggregator.reconcile.store_check import Both, StoppedTotals, TotalsSide, both_of, check_store, customers_of
from aggregator.store.meter_sql import Measured
from aggregator.store.queries.audit import BLOCK, Part, Which
from aggregator.view import Total
from deploy.client import Api, Session
from deploy.errors import USAGE, GiveUp
from deploy.forwarding import open_state
from deploy.server.control import Control, new_secret, new_token, open_control
from deploy.server.data import DataDirectory
from deploy.server.private_files import private_files
from deploy.settings import fits_header
from meters.catalogue.access import AUDIT
from meters.catalogue.catalogue import Catalogue, TokenCreated
from meters.log import USAGE_CONTROL, Log, TryAgain, format_position
from meters.meter import Meter

# The store of a running server, asked over its socket or address. Answers to ``ask`` are Arrow tables; all others are
# JSON with decimals as text.

_PATH = "/v1/audit"


class _Blocks(msgspec.Struct):
    blocks: list[Total]
    hours: list[Total] | None
    parts: list[Part]


class RunningStore:
    """See the module. Raises GiveUp when the server refuses, or goes away."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """The answer to one of the closed list of questions."""
        body = b""
        if asked is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, asked.schema) as writer:
                writer.write_table(asked)
            body = sink.getvalue().to_pybytes()
        answer = self._api.answer("POST", f"{_PATH}/ask/{question}", params=parameters, content=body)
        return pa.ipc.open_stream(answer.content).read_all()

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """The running total of some customers together; None while it is being counted."""
        found: Total | None = self._put("total", Total | None, meter, subjects=subjects)
        return found

    def both(self, meters: Sequence[Meter]) -> Iterator[Both]:
        """What is kept of each meter, and the raw events up to the position that it is true for. Raises GiveUp."""
        blocks = -(-customers_of(self) // BLOCK)
        hours = [row["hour"].replace(tzinfo=UTC) for row in self.ask("hours").to_pylist()]
        for meter in meters:
            found: _Blocks | None = self._put("blocks", _Blocks | None, meter, blocks=blocks, hours=hours)
            if found is None:
                raise GiveUp("events flow too fast to read totals between two rounds; try again when it is quieter")
            yield both_of(found.parts, 0, found.blocks, dict(zip(hours, found.hours or [], strict=False)))

    def by_customer(self, meter: Meter, block: int) -> list[tuple[int, Measured]]:
        """The customers of a block."""
        found: list[tuple[int, Measured]] = self._put("by-customer", list[tuple[int, Measured]], meter, block=block)
        return found

    def by_hour(self, meter: Meter, subject: int) -> list[tuple[datetime, Measured]]:
        """The hours of a customer."""
        kind = list[tuple[datetime, Measured]]
        found: list[tuple[datetime, Measured]] = self._put("by-hour", kind, meter, subjects=[subject])
        return found

    def same_moment(self, meter: Meter, which: Which) -> tuple[Total, Measured] | None:
        """Total and recount of one customer or hour, true for one position; None while events flow too fast."""
        kind = tuple[Total, Measured] | None
        found: tuple[Total, Measured] | None = self._put("moment", kind, meter, which=which)
        return found

    def balances(self, meter: Meter) -> list[Balance]:
        """What is shown for every account of the meter."""
        found: list[Balance] = self._put("balances", list[Balance], meter)
        return found

    def _put(self, path: str, kind: Any, meter: Meter, **asked: object) -> Any:
        body = msgspec.json.encode({"meter_id": meter.id, **asked})
        return msgspec.json.decode(self._api.answer("POST", f"{_PATH}/{path}", content=body).content, type=kind)


# Finding the running server. With the data directory, the aggregator is reached on its socket, with a token created
# for this purpose only. Otherwise the caller gives an address and a token, which needs the scope ``audit:read``.

SERVER_PATIENCE_S = 10.0  # a decision is applied within a round
LOOK_S = 0.05
UNAUTHORIZED = 401
SCOPES = ("events:read", "meters:read", "customer_meters:read", AUDIT)


@contextlib.contextmanager
def own_server(here: Session) -> Iterator[Api]:
    """A connection to it, for the organization that is forwarded. Raises GiveUp when there is no way to it."""
    if here.data.socket.exists():
        with contextlib.ExitStack() as hung_up:
            api = hung_up.enter_context(_connected(here))
            if not _is_known_soon(api):  # it was revoked, or the log is a copy from before it was made
                api = hung_up.enter_context(_connected(here, anew=True))
                _is_known_soon(api)
            yield api
    elif here.settings.token:
        with Api(here.settings.url, here.settings.token) as api:
            yield api
    else:
        raise GiveUp(
            f"no server runs on {here.data.path}: start it, or give --url and a --token with the scope {AUDIT}", USAGE
        )


def _connected(here: Session, *, anew: bool = False) -> Api:
    return Api("http://meterstream", _token(here.data, here.settings.polar_organization, anew), here.data.socket)


def _token(data: DataDirectory, organization: str | None, anew: bool) -> str:
    """The organization's token for reconciliation alone, made by whoever may write the data directory, and kept.

    Without an organization it is the first one's: the store's rows are everybody's.
    """
    with open_control(data) as control:
        owner = control.organization(organization or next(iter(control.catalogue.organizations), None))
        path = data.path / "reconcile" / f"token-{owner.id}"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            kept = path.read_text("ascii", "replace").strip() if path.exists() and not anew else ""
            if kept and fits_header(kept):
                return kept
            secret = new_secret()
            control.decide([TokenCreated(new_token(owner, "reconcile", secret, SCOPES))])
            _keep(secret, path)
        except OSError as error:
            raise GiveUp(f"{path} cannot be written: {error.strerror}; give --url and a --token instead") from None
    return secret


def _keep(secret: str, path: Path) -> None:
    """Write it whole or not at all: half a token would be refused every night."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with private_files(), unfinished.open("w") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _is_known_soon(api: Api) -> bool:
    """Whether the token is good; one that was just made is when the server has read the decision. Raises GiveUp."""
    deadline = time.monotonic() + SERVER_PATIENCE_S
    while True:
        try:
            is_known = api.send("GET", "/v1/meters/", params={"limit": 1}).status_code != UNAUTHORIZED
        except httpx.TransportError as error:
            raise api.unreachable(error) from None
        if is_known or time.monotonic() > deadline:
            return is_known
        time.sleep(LOOK_S)


# The comparison.

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
        compared = timed(lambda: LogCheck(log, store, worth, Range(task.since, task.until)).run())
        compared.notes = [*compared.notes, *(given_up.words for given_up in catalogue.given_up.values())]
        report.checks.append(compared)
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
