"""Maintenance of the store: rebuild it from the log, skip lost records, check running totals.

``rebuild`` makes a new store from the log with the code that a server runs, and puts it in place of the old one.
``skip_lost`` accepts that records which left the log before they were counted will never be counted.
``compare_totals`` compares a meter's running totals with a recount of its stored events.
"""

import contextlib
import itertools
import os
import pwd
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from aggregator.engine.supervisor import Aggregator
from aggregator.store.database import NotNow, Unopenable, explaining, identities_in
from aggregator.store.maintenance import Lost, find_lost, skip
from aggregator.store.store import Store, prepare_partitions
from aggregator.view import Unavailable
from deploy.client import Api
from deploy.console import as_json
from deploy.errors import GiveUp
from deploy.server.control import Control
from deploy.server.data import DataDirectory
from deploy.server.private_files import private_files
from meters import exact
from meters.catalogue.catalogue import RecordsGivenUp
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, TryAgain

# Checking totals. Running totals live in the aggregator's memory; a preview of the same definition counts the stored
# events. Both answers name the log position that they reflect, and only answers for one position are compared.

ATTEMPTS_MAX = 20  # while events flow, two answers for one position need some luck


def compare_totals(api: Api, meter: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """A row for each of the meter's largest customers, and how many customers it has.

    Raises GiveUp when events arrive faster than one can compare.
    """
    for _ in range(ATTEMPTS_MAX):
        recounted, as_of = _recount(api, meter)
        rows, positions = [], {as_of}
        for customer in recounted["top_customers"]:
            running, position = _running(api, meter, customer)
            positions.add(position)
            recount = Decimal(customer["quantity"])
            name = customer["external_customer_id"] or customer["customer_id"]
            rows.append({"customer": name, "running": running, "recounted": recount, "equal": running == recount})
        if len(positions) == 1:
            return rows, recounted["customers"]
    raise GiveUp("events arrive too quickly to compare two answers; try again when it is quieter")


def _recount(api: Api, meter: dict[str, Any]) -> tuple[dict[str, Any], str]:
    definition = as_json({"filter": meter["filter"], "aggregation": meter["aggregation"]}).encode()
    response = api.answer("POST", "/v1/meters/preview", content=definition)
    return exact.decode(response.content), response.headers["As-Of"]


def _running(api: Api, meter: dict[str, Any], customer: dict[str, Any]) -> tuple[Decimal, str]:
    who = {name: customer[name] for name in ("customer_id", "external_customer_id") if customer[name] is not None}
    response = api.answer("GET", f"/v1/meters/{meter['id']}/usage", params=who)
    return Decimal(response.json()["value"]), response.headers["As-Of"]


# Skipping lost records.

def skip_lost(data: DataDirectory, *, sure: bool) -> list[Lost]:
    """What is lost; skipped if ``sure``.

    Raises GiveUp while a server runs, where there is no store that could lack anything, and for decisions, which are
    needed.
    """
    data.require()
    data.require_store()
    with data.hold("skip records"), private_files(), contextlib.closing(data.open_log()) as log:
        try:
            streams = (USAGE_EVENTS, USAGE_CONTROL)
            identities = {stream: log.identity(stream) for stream in streams}
            with contextlib.closing(Store.open(data.store, identities)) as store, explaining(data.store):
                for stream in streams:
                    prepare_partitions(store, stream, list(log.ends(stream)))
                if find_lost(store, USAGE_CONTROL, log.starts(USAGE_CONTROL)):
                    raise GiveUp(
                        "decisions left the log (tokens, customers, meters); restore it from a backup, as "
                        "ingest/log/README.md says"
                    )
                lost = find_lost(store, USAGE_EVENTS, log.starts(USAGE_EVENTS))
                if sure and lost:
                    Control(log).decide(_given_up(lost))  # first, so that nothing is ever skipped without a word
                    skip(store, lost)
                return lost
        except (Unopenable, NotNow, TryAgain) as error:
            raise GiveUp(f"{error}") from error


def _given_up(lost: list[Lost]) -> list[RecordsGivenUp]:
    """The decision, which the log keeps for reconcile and doctor to show."""
    now, by = datetime.now(UTC), f"{_user()} on {socket.gethostname()}"
    return [RecordsGivenUp(each.partition, each.position, each.start, now, by) for each in lost]


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user has no name
        return f"user {os.getuid()}"


# Rebuilding. The new file grows beside the old one and replaces it in one rename when it has caught up. A failure
# before the rename leaves the old store unchanged, and removes the new file unless the process was killed. The old
# write-ahead log is removed just before the rename: without it the old file is a consistent store of an earlier
# position, so a crash at that moment is safe.
#
# A store of another log is kept, because its counts may exist nowhere else: it is renamed, together with its
# write-ahead log. A file whose origin cannot be read is renamed, too.

WAIT_S = 0.2  # between two looks at how far it is
IDENTITY_CHARACTERS = 8  # of a stream's identity, in the name of a kept store
WITHOUT_NAME = "unreadable"  # in the name of a kept store, in place of its identity


def rebuild(
    data: DataDirectory, progress: Callable[[int], None] = lambda _: None, kept: Callable[[Path], None] = lambda _: None
) -> dict[str, int]:
    """Make the store again; ``progress`` hears how many more records were read. Returns lines by what became of them.

    ``kept`` hears where an old store is that was not made from this log. Raises GiveUp while a server runs, and when
    the log cannot be read to its end.
    """
    data.require()
    data.require_directory()
    fresh = fresh_store(data)
    with data.hold("rebuild the store"), private_files(), _nothing_left(fresh):
        log = data.open_log()
        try:
            _require_beginning(log)
            _follow(log, fresh, progress)
            tallies = _finish(log, fresh)
            aside = _aside(data.store, _identities(log))
            data.give_to_owner(fresh)
            _swap(fresh, data.store, aside)
            if aside:
                kept(aside)
        finally:
            log.close()
    return tallies


def _require_beginning(log: Log) -> None:
    """Raises GiveUp for a log whose first records are gone: what they counted is in the old store alone."""
    missing = sum(sum(log.starts(stream).values()) for stream in (USAGE_EVENTS, USAGE_CONTROL))
    if missing:
        raise GiveUp(
            f"the store cannot be rebuilt: the first {missing} records left the log (retention), and only the store "
            "has what they counted. The old store is untouched: keep it, or restore the whole directory from a backup; "
            "a new version that needs another layout cannot use it"
        )


def fresh_store(data: DataDirectory) -> Path:
    """Where the new store grows."""
    return _beside(data.store, ".new")


@contextlib.contextmanager
def _nothing_left(fresh: Path) -> Iterator[None]:
    """Take away what a rebuild left that was killed, and what this one leaves if it comes to no end."""
    _remove(fresh)
    try:
        yield
    except BaseException:
        _remove(fresh)
        raise


def _follow(log: Log, fresh: Path, progress: Callable[[int], None]) -> None:
    starts, ends = log.starts(USAGE_EVENTS), log.ends(USAGE_EVENTS)
    aggregator = Aggregator(log, fresh)
    aggregator.start()
    done = sum(starts.values())
    try:
        while any((as_of := _as_of(aggregator)).get(partition, 0) < end for partition, end in ends.items()):
            reached = max(done, sum(as_of.values()))  # before the engine is there nothing is known
            progress(reached - done)
            done = reached
            aggregator.ended.wait(WAIT_S)
            if aggregator.failure:
                raise GiveUp(
                    f"the log cannot be followed to its end: {aggregator.failure}; the old store is untouched; "
                    "`meterstream doctor` looks closer"
                )
    finally:
        aggregator.stop()


def _as_of(aggregator: Aggregator) -> Mapping[int, int]:
    try:
        return aggregator.as_of
    except Unavailable:
        return {}


def _finish(log: Log, fresh: Path) -> dict[str, int]:
    """Fold the new store into one file, and read what it counted."""
    store = Store.open(fresh, _identities(log))
    try:
        tallies = store.tallies()
        if not store.checkpoint():
            raise GiveUp("the new store could not be written out; the old one is untouched, try again")
    finally:
        store.close()
    return tallies


def _identities(log: Log) -> dict[str, str]:
    return {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}


def _aside(store: Path, identities: Mapping[str, str]) -> Path | None:
    """Where to keep the old store, if it is not known to be one of this log; a name that is free."""
    if not store.exists():
        return None
    ending = WITHOUT_NAME
    with contextlib.suppress(Unopenable, NotNow):
        stored = identities_in(store)
        others = [stored.get(stream, "") for stream, identity in identities.items() if stored.get(stream) != identity]
        if not others:
            return None
        plain = "".join(character for character in others[0] if character.isalnum())  # a topic's id may have slashes
        ending = plain[:IDENTITY_CHARACTERS] or WITHOUT_NAME
    names = itertools.chain([ending], (f"{ending}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := _beside(store, f".{name}")).exists())


def _swap(fresh: Path, store: Path, aside: Path | None) -> None:
    if _beside(fresh, ".wal").exists():
        raise GiveUp(f"{fresh} still has a write-ahead log; the old store is untouched, try again")
    if aside:
        _keep(store, aside)
    _beside(store, ".wal").unlink(missing_ok=True)
    fresh.replace(store)
    directory = os.open(store.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself should survive a loss of power
    finally:
        os.close(directory)


def _keep(store: Path, aside: Path) -> None:
    """Give the old store another name. Its write-ahead log goes first: whoever makes a store next would remove it."""
    with contextlib.suppress(FileNotFoundError):
        _beside(store, ".wal").rename(_beside(aside, ".wal"))
    store.rename(aside)


def _remove(store: Path) -> None:
    for path in (store, _beside(store, ".wal")):
        path.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
