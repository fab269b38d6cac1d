"""The doctor: find what is wrong with an installation, and name the command that fixes it.

``examine`` checks from the bottom up: the directory, the log, the decisions in it, the store, how store and log fit,
and the state of forwarding. Files on this machine are read to their end. Each ``Finding`` has its remedy; a finding
that makes the next checks pointless ends the examination.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.console import counted
from deploy.errors import GiveUp
from deploy.server.control import READ_BYTES, Control, NotYet
from deploy.server.data import AS_OWNER, PUT_BACK, DataDirectory
from deploy.server.private_files import private_files
from meters.catalogue.catalogue import Catalogue
from meters.log import (
    USAGE_CONTROL,
    USAGE_EVENTS,
    Log,
    PositionLost,
    Refused,
    TryAgain,
    newest_stamp_us,
    seconds_ahead,
)

if TYPE_CHECKING:
    from aggregator.store.database import Unopenable
    from aggregator.store.store import Store

ROOM_OR_OWNER = f"make room on its disk, or {AS_OWNER}, then look again"
MEND_URL = "mend --log (or METERSTREAM_LOG and what belongs to it), then look again"
NAME_IT = (
    "mend the producer that names them (`meterstream orgs list` has the ids there are); "
    "`meterstream orgs create NAME --id ID` makes such an organization, and its events visible to its tokens"
)
NO_REBUILD = "retention has removed records of the log, so that a rebuild refuses"
GO_BACK = f"start the version that made it; {NO_REBUILD}"
BRING_BACK = f"restore the whole directory from a backup; {NO_REBUILD}"
REMOVE_UNFINISHED = "remove it: a part of a store is of no use, and the next rebuild begins anew"
NO_STORE = "give the right --data; the first start of `meterstream serve` or `meterstream aggregate` makes one there"
CLOCK_AHEAD_S_MAX = 5.0  # what the clocks of several machines may differ by
SET_CLOCK = (
    "check the clocks of this machine and of every gateway; until this machine's clock reaches that time, new events "
    "and decisions get it, too, in their right order"
)
ROOM_BYTES_MIN = 4 << 20  # what a checkpoint of the log writes at once (``ingest.log.sqlite_writer``)
SEND_NUMBERS = (
    "send the value as a JSON number, or have the meter read another property; `GET /v1/meters/ID` shows an "
    "example. This is said until no such event is recent"
)
METERS_LOOKED_MAX = 500  # a query each, of tens of milliseconds
STRANGERS_SHOWN_MAX = 10  # whoever has more of them has one cause


class Remedies(msgspec.Struct, frozen=True):
    """What heals a log of one kind."""

    newest: str  # where it lacks what was counted
    damaged: str  # where it cannot be read, and will not be
    foreign: str  # where it is none, or of another format


OF_FILE = Remedies(
    newest=f"restore the newest log.sqlite ({PUT_BACK}); only if that is the newest, meterstream rebuild counts what "
           "it still has",
    damaged=f"restore log.sqlite from a backup ({PUT_BACK}); nothing else can replace it",
    foreign="give the right --data, or start a Meterstream that knows this format; if something else lies in its "
            f"place, restore log.sqlite from a backup ({PUT_BACK})",
)  # fmt: skip
OF_BROKERS = Remedies(
    newest="bring the records back to the brokers, or name the right topics with --log; only if nobody has them, "
           "meterstream rebuild counts what the brokers still have",
    damaged="bring the topic back from a copy, and let nobody but Meterstream write to usage.control; nothing else can "
            "replace it",
    foreign="name the right topics with --log",
)  # fmt: skip


class Finding(msgspec.Struct, frozen=True):
    """One look. ``heal`` says what to do, and is empty where nothing is wrong; ``is_blind`` where nothing was seen."""

    part: str
    found: str
    heal: str = ""
    is_blind: bool = False


def examine(data: DataDirectory, progress: Callable[[int], None] = lambda _: None) -> Iterator[Finding]:
    """Look at everything; ``progress`` hears how many more records of the log were read.

    Writes nothing but the store's own bookkeeping of who opened it.
    """
    try:
        yield from _examine_owner(data)  # first: as root SQLite makes files beside the log that are like it
        log = data.open_log() if _is_there(data) else None
    except OSError as error:
        yield Finding("data", f"{data.path} cannot be looked into: {error.strerror}", ROOM_OR_OWNER)
        return
    except GiveUp as error:
        found = f"{data.log_url or data.log}: {error.__cause__}" if error.__cause__ else str(error)
        yield Finding("log", found, _heal_log(data, error))
        return
    if log is None and (lost := data.lost_log()):
        yield Finding("log", lost.found, lost.heal)
        return
    if log is None:
        yield Finding("data", f"there is no log in {data.path}", "give the right --data, or start `meterstream serve`")
        return
    yield from _examine_room(data)
    try:
        known = yield from _examine_log(data, log, progress)
        yield from _examine_store(data, log, known)
        yield from _examine_forwarding(data)
    except (PositionLost, Refused) as error:
        yield Finding("log", str(error), _remedies(data).damaged)
    finally:
        log.close()


def _examine_owner(data: DataDirectory) -> Iterator[Finding]:
    """For root, who may write everything: whether the user that owns the directory may write the files in it, too."""
    owner = data.path.stat().st_uid if data.path.is_dir() else 0
    if os.geteuid() != 0 or owner == 0:
        return
    log = [data.log.with_name(f"{data.log.name}{ending}") for ending in ("", "-wal", "-shm")]
    parts = [part for part in (*log, data.store, data.forwarding) if part.exists()]
    strange = [part.name for part in parts if not _may_write(part, owner)]
    if strange:
        found = f"user {owner}, who owns {data.path}, cannot write {' and '.join(strange)}"
        heal = f"chown {owner} {' '.join(strange)} and chmod 600, if the server runs as that user"
        yield Finding("owner", found, heal)


def _may_write(path: Path, user: int) -> bool:
    status = path.stat()
    return bool(status.st_mode & (stat.S_IWUSR if status.st_uid == user else stat.S_IWOTH))


def _is_there(data: DataDirectory) -> bool:
    """Whether there is a log to open. Raises OSError where one may not look, which ``exists`` takes for a no."""
    try:
        return not data.has_log or bool(data.log.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _remedies(data: DataDirectory) -> Remedies:
    return OF_FILE if data.has_log else OF_BROKERS


def _heal_log(data: DataDirectory, error: GiveUp) -> str:
    """Only a log that is known to be damaged is to be replaced: one on a full disk lacks nothing."""
    remedies = _remedies(data)
    match error.__cause__:
        case None | ValueError():  # the URL
            return MEND_URL
        case TryAgain():
            return ROOM_OR_OWNER if data.has_log else MEND_URL
        case Refused():
            return remedies.foreign
    return remedies.damaged


def _examine_log(
    data: DataDirectory, log: Log, progress: Callable[[int], None]
) -> Generator[Finding, None, Catalogue | None]:
    """Returns the catalogue; None where the decisions cannot be read. Raises PositionLost, Refused."""
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        records = sum(log.ends(stream).values()) - sum(log.starts(stream).values())
        extent = f"{records} records, up to position {_text(log.ends(stream))}"
        if data.has_log:
            _read_through(log, stream, progress)
            yield Finding(stream, f"{extent}; every one can be read")
        else:  # a topic may hold more than a visit has time for
            yield Finding(stream, f"{extent}; not read, which `meterstream reconcile --check log` does")
    yield from _clock(log)
    try:
        catalogue = Control(log).catalogue
    except NotYet as error:
        yield Finding("decisions", str(error), "look again when the log answers")
        return None
    except (ValueError, GiveUp) as error:
        found = f"a control record is damaged: {error.__cause__ or error}"
        yield Finding("decisions", found, _remedies(data).damaged)
        return None
    named: dict[str, dict[str, Any]] = {
        "organizations": catalogue.organizations, "tokens": catalogue.tokens, "meters": catalogue.meters,
    }
    counts = ", ".join(counted(len(things), name.removesuffix("s"), name) for name, things in named.items())
    for given_up in catalogue.given_up.values():
        yield Finding("given up", given_up.words)
    heal = "" if catalogue.organizations else "start `meterstream serve`, which makes the first one"
    yield Finding("decisions", counts, heal)
    return catalogue


def _clock(log: Log) -> Iterator[Finding]:
    """Nothing is said of a clock that is right."""
    from ingest.log import clock_us

    try:
        ahead_s = seconds_ahead(newest_stamp_us(log), clock_us())
    except TryAgain as error:
        yield Finding("clock", str(error), "look again when the log answers")
        return
    if ahead_s >= CLOCK_AHEAD_S_MAX:
        found = f"the newest record's time is {ahead_s:,.0f} s ahead of this machine's clock"
        yield Finding("clock", found, SET_CLOCK)


def _read_through(log: Log, stream: str, progress: Callable[[int], None]) -> None:
    """Read what is there now. Raises PositionLost where a record is damaged, Refused where the stream is."""
    positions, ends = log.starts(stream), log.ends(stream)
    while any(positions[partition] < end for partition, end in ends.items()):
        try:
            records = log.read(stream, positions, bytes_max=READ_BYTES)
        except PositionLost:
            starts = log.starts(stream)
            if all(positions[partition] >= start for partition, start in starts.items()):
                raise
            positions = {partition: max(positions[partition], start) for partition, start in starts.items()}
            continue  # a server runs here, and its retention came first
        for record in records:
            positions[record.partition] = record.offset + 1
        progress(len(records))


def _examine_store(data: DataDirectory, log: Log, known: Catalogue | None) -> Iterator[Finding]:
    from deploy.rebuild import fresh_store

    try:
        if not (data.has_log or data.store.exists() or fresh_store(data).exists()):
            yield _no_store(data)  # and nothing is made in what may be the wrong place
            return
        with data.hold("look into the store"), private_files():
            yield from _unfinished(data)
            is_sound = True
            for finding in _open_store(data, log, known):
                is_sound &= finding.part == "organizations" or not finding.heal
                yield finding
            if is_sound and data.store.exists():
                yield _examine_rows(data, log)
    except GiveUp as error:
        if isinstance(error.__context__, OSError):  # the lock's file could not be had, whoever runs
            yield Finding("store", str(error), ROOM_OR_OWNER)
            return
        yield Finding("store", "a server runs here and has the store open; stop it to look inside", is_blind=True)
    except OSError as error:
        yield Finding("store", f"{data.path} cannot be written: {error.strerror}", ROOM_OR_OWNER)


def _examine_rows(data: DataDirectory, log: Log) -> Finding:
    """Whether the store has as many rows as it says. The caller holds the directory, and the store is closed."""
    from aggregator.reconcile.lines import StoppedStore
    from aggregator.reconcile.report import Check
    from aggregator.reconcile.store_check import check_rows
    from aggregator.store.database import REBUILD

    check = Check(name="store", sides="")
    with contextlib.closing(StoppedStore(data.store)) as store:
        check_rows(check, store)
    if not check.differences_count:
        return Finding("rows", "as many as the store says that it has")
    first = check.differences[0]
    found = f"{check.differences_count} things do not fit, such as {first.where}: {first.what}"
    heal = BRING_BACK if any(log.starts(USAGE_EVENTS).values()) else data.healing(REBUILD)
    return Finding("rows", found, f"{heal}; `meterstream reconcile` shows all of them")


def _examine_room(data: DataDirectory) -> Iterator[Finding]:
    """Whether the disk takes as much as a checkpoint of the log writes, where anything is written at all."""
    if not data.path.is_dir():
        return
    try:
        with tempfile.TemporaryFile(dir=data.path) as probe:
            os.posix_fallocate(probe.fileno(), 0, ROOM_BYTES_MIN)
    except OSError as error:
        found = f"{data.path} has no room for {ROOM_BYTES_MIN >> 20} MiB: {error.strerror}; events are answered 503"
        yield Finding("disk", found, ROOM_OR_OWNER)


def _examine_forwarding(data: DataDirectory) -> Iterator[Finding]:
    """Nothing is said where nothing was ever forwarded."""
    from aggregator.forward.sqlite_errors import MEND, Unusable
    from aggregator.forward.state import State

    if not data.forwarding.exists():
        return
    if not data.forwarding.stat().st_size:  # a file that was ever used has a header
        yield Finding("forwarding", f"{data.forwarding.name} is empty, and says nothing of what was sent", MEND)
        return
    try:
        with contextlib.closing(State(data.forwarding)) as state:
            state.read_through()
            stopped = state.flags().get("stopped")
    except Unusable as reason:
        yield Finding("forwarding", reason.found, reason.heal)
        return
    found = f"{data.forwarding.name} can be read, with what was sent to Polar"
    if stopped:
        found, heal = f"forwarding stopped: {stopped}", "do what the line says; `meterstream forward status` shows it"
        yield Finding("forwarding", found, heal)
        return
    yield Finding("forwarding", found)


def _unfinished(data: DataDirectory) -> Iterator[Finding]:
    """What a rebuild left that was killed; nobody else holds the directory, so none is under way."""
    from deploy.rebuild import fresh_store

    fresh = fresh_store(data)
    if fresh.exists():
        found = f"{fresh.name} ({fresh.stat().st_size:,} bytes) is what a rebuild left that did not come to its end"
        yield Finding("rebuild", found, REMOVE_UNFINISHED)


def _heal_store(error: "Unopenable", log: Log) -> str:
    """A store can be made again only from a log that has its beginning."""
    from aggregator.store.database import REBUILD, OlderLayout

    if error.heal != REBUILD or not any(log.starts(USAGE_EVENTS).values()):
        return error.heal
    return GO_BACK if isinstance(error, OlderLayout) else BRING_BACK


def _open_store(data: DataDirectory, log: Log, known: Catalogue | None) -> Iterator[Finding]:
    from aggregator.engine.supervisor import break_in
    from aggregator.store.database import NotNow, Unopenable, explaining
    from aggregator.store.store import Store

    if not data.store.exists():
        yield _no_store(data)
        return
    identities = {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}
    with contextlib.ExitStack() as opened:
        try:
            store = opened.enter_context(contextlib.closing(Store.open(data.store, identities)))
            with explaining(data.store):
                store.read_through()
        except Unopenable as error:
            yield Finding("store", error.found, data.healing(_heal_store(error, log)))
            return
        except NotNow as error:
            yield Finding("store", str(error), "make room for it, then look again")
            return
        tallies = ", ".join(f"{count} {name}" for name, count in store.tallies().items())
        yield Finding("store", f"opens, and every row can be read; {tallies}")
        newest = data.healing(_remedies(data).newest)
        fits = [_fit(stream, store.positions(stream), log, newest) for stream in identities]
        yield from fits
        if not any(fit.heal for fit in fits) and (broken := break_in(log, store)):
            yield Finding("store and log", broken, newest)
        if known is not None:
            yield _strangers(store, known)
            yield _passed_over(store, known)


def _no_store(data: DataDirectory) -> Finding:
    """A log that is a file is beside its store, which is only not made yet; brokers say nothing of where a store is."""
    if data.has_log:
        return Finding("store", "there is none yet; the next start makes it from the log")
    return Finding("store", f"there is none in {data.path}", NO_STORE)


def _strangers(store: "Store", known: Catalogue) -> Finding:
    from aggregator.store.maintenance import stored_under

    with contextlib.closing(store.cursor()) as connection:
        found = stored_under(connection, known.organizations.keys())
    if not found:
        return Finding("organizations", "every event belongs to one that was made")
    named = ", ".join(f"{id} ({events})" for id, events in list(found.items())[:STRANGERS_SHOWN_MAX])
    more = f" and {len(found) - STRANGERS_SHOWN_MAX} more" if len(found) > STRANGERS_SHOWN_MAX else ""
    what = f"{sum(found.values())} events are stored under organizations that nobody made, so that nobody can see them"
    return Finding("organizations", f"{what}: {named}{more}", NAME_IT)


def _passed_over(store: "Store", known: Catalogue) -> Finding:
    """Meters whose matching events of the newest days add nothing, because their value is no number."""
    from aggregator.store.queries.unmatched import RECENT, of_meters

    meters = [meter for meter in known.meters.values() if meter.archived_at is None]
    looked = meters[-METERS_LOOKED_MAX:]
    newest = f" (the newest {len(looked)} of {len(meters)})" if len(looked) < len(meters) else ""
    with contextlib.closing(store.cursor()) as connection:
        found = [(meter, one) for meter, one in of_meters(connection, looked) if one.example]
    if not found:
        return Finding("meters", f"no recent event lacks the number that a meter looks for{newest}")
    shown = "; ".join(
        f"{meter.name!r} ({one.no_number} events, such as {meter.aggregation.property} = {one.example.value})"
        for meter, one in found[:STRANGERS_SHOWN_MAX]
        if one.example
    )
    more = f" and {len(found) - STRANGERS_SHOWN_MAX} more" if len(found) > STRANGERS_SHOWN_MAX else ""
    passing = counted(len(found), "meter passes", "meters pass")
    what = f"{passing} over events of the last {RECENT.days} days that match"
    return Finding("meters", f"{what}{newest}: {shown}{more}", SEND_NUMBERS)


def _fit(stream: str, positions: dict[int, int], log: Log, newest: str) -> Finding:
    starts, ends = log.starts(stream), log.ends(stream)
    name = f"store on {stream}"
    if any(offset > ends.get(partition, 0) for partition, offset in positions.items()):
        return Finding(
            name, f"the store is at {_text(positions)}, past the end of the log at {_text(ends)}: the log lost records",
            newest,
        )
    if any(positions.get(partition, 0) < start for partition, start in starts.items()):
        return Finding(
            name, f"the store is at {_text(positions)}, and the log begins later, at {_text(starts)}",
            "restore a newer store.duckdb from a backup, or say with `meterstream skip-lost` that what lies between is "
            "never to be counted; a rebuild would lack more of it",
        )
    behind = sum(end - positions.get(partition, 0) for partition, end in ends.items())
    return Finding(name, f"{behind} records behind the log" + ("; the next start catches up" if behind else ""))


def _text(positions: dict[int, int]) -> str:
    from meters.log import format_position

    return format_position(positions) or "nothing"
