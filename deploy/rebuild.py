"""The store again, from the log alone.

A new file grows beside the old one by the same code that a server runs, and takes its place in one rename when it has
caught up. Whatever stops this before the rename leaves the old store as it was, and all but a kill takes the new file
away. The old write-ahead log goes just before the rename: without it the old file is a consistent store of an earlier
position, so even that moment is safe.

A store of another log is not thrown away: what it counted may be nowhere else. It gets another name, with its
write-ahead log, and so does a file that cannot be asked what it was made from.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from aggregator.owner import Aggregator
from aggregator.store.opening import NotNow, Unopenable, identities_in
from aggregator.store.store import Store
from aggregator.view import Unavailable
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from deploy.private import private_files
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log

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
                    "`meterstream doctor` says what heals it"
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
