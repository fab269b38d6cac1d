"""What is wrong with an installation, and which command heals it.

Looks from the bottom up: the directory, the log, the decisions in it, the store, and how the two fit. A finding that
makes the next look pointless ends the visit.
"""

import contextlib
from collections.abc import Collection, Generator, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from deploy.control import Control
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log

if TYPE_CHECKING:
    from aggregator.store.store import Store

RESTORE_NEWEST = (
    "restore the newest log.sqlite; only if that is the newest, meterstream rebuild counts what it still has"
)
RESTORE_LOG = "restore log.sqlite from a backup; nothing else can replace it"
NAME_IT = (
    "mend the producer that names them (`meterstream orgs list` has the ids there are); "
    "`meterstream orgs create NAME --id ID` makes such an organization, and its events visible to its tokens"
)
STRANGERS_SHOWN_MAX = 10  # whoever has more of them has one cause


class Finding(msgspec.Struct, frozen=True):
    """One look. ``heal`` says what to do, and is empty where nothing is wrong; ``is_blind`` where nothing was seen."""

    part: str
    found: str
    heal: str = ""
    is_blind: bool = False


def examine(data: DataDirectory) -> Iterator[Finding]:
    """Look at everything. Writes nothing but the store's own bookkeeping of who opened it."""
    if data.has_log and not data.log.exists():
        yield Finding("data", f"there is no log in {data.path}", "give the right --data, or start `meterstream serve`")
        return
    try:
        log = data.open_log()
    except GiveUp as error:
        yield Finding("log", f"{data.log_url or data.log} cannot be opened: {error.__cause__}", RESTORE_LOG)
        return
    try:
        known = yield from _examine_log(log)
        yield from _examine_store(data, log, known)
    finally:
        log.close()


def _examine_log(log: Log) -> Generator[Finding, None, Collection[str] | None]:
    """Returns the ids of the organizations; None where the decisions cannot be read."""
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        records = sum(log.ends(stream).values()) - sum(log.starts(stream).values())
        yield Finding(stream, f"{records} records, up to position {_text(log.ends(stream))}")
    try:
        catalogue = Control(log).catalogue
    except (ValueError, GiveUp) as error:
        yield Finding("decisions", f"a control record is damaged: {error.__cause__ or error}", RESTORE_LOG)
        return None
    named: dict[str, dict[str, Any]] = {
        "organizations": catalogue.organizations, "tokens": catalogue.tokens, "meters": catalogue.meters,
    }
    counts = ", ".join(f"{len(things)} {name}" for name, things in named.items())
    heal = "" if catalogue.organizations else "start `meterstream serve`, which makes the first one"
    yield Finding("decisions", counts, heal)
    return catalogue.organizations.keys()


def _examine_store(data: DataDirectory, log: Log, known: Collection[str] | None) -> Iterator[Finding]:
    try:
        with data.hold("look into the store"):
            yield from _open_store(data, log, known)
    except GiveUp:
        yield Finding("store", "a server runs here and has the store open; stop it to look inside", is_blind=True)


def _open_store(data: DataDirectory, log: Log, known: Collection[str] | None) -> Iterator[Finding]:
    from aggregator.continuity import break_in
    from aggregator.store.opening import NotNow, Unopenable, explaining
    from aggregator.store.store import Store

    if not data.store.exists():
        yield Finding("store", "there is none yet; the next start makes it from the log")
        return
    identities = {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}
    with contextlib.ExitStack() as opened:
        try:
            store = opened.enter_context(contextlib.closing(Store.open(data.store, identities)))
            with explaining(data.store):
                store.read_through()
        except Unopenable as error:
            yield Finding("store", str(error), error.heal)
            return
        except NotNow as error:
            yield Finding("store", str(error), "make room for it, then look again")
            return
        tallies = ", ".join(f"{count} {name}" for name, count in store.tallies().items())
        yield Finding("store", f"opens, and every row can be read; {tallies}")
        fits = [_fit(stream, store.positions(stream), log) for stream in identities]
        yield from fits
        if not any(fit.heal for fit in fits) and (broken := break_in(log, store)):
            yield Finding("store and log", broken, RESTORE_NEWEST)
        if known is not None:
            yield _strangers(store, known)


def _strangers(store: "Store", known: Collection[str]) -> Finding:
    from aggregator.store.strangers import stored_under

    with contextlib.closing(store.cursor()) as connection:
        found = stored_under(connection, known)
    if not found:
        return Finding("organizations", "every event belongs to one that was made")
    named = ", ".join(f"{id} ({events})" for id, events in list(found.items())[:STRANGERS_SHOWN_MAX])
    more = f" and {len(found) - STRANGERS_SHOWN_MAX} more" if len(found) > STRANGERS_SHOWN_MAX else ""
    what = f"{sum(found.values())} events are stored under organizations that nobody made, so that nobody can see them"
    return Finding("organizations", f"{what}: {named}{more}", NAME_IT)


def _fit(stream: str, positions: dict[int, int], log: Log) -> Finding:
    starts, ends = log.starts(stream), log.ends(stream)
    name = f"store on {stream}"
    if any(offset > ends.get(partition, 0) for partition, offset in positions.items()):
        return Finding(
            name, f"the store is at {_text(positions)}, past the end of the log at {_text(ends)}: the log lost records",
            RESTORE_NEWEST,
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
