"""Whatever fails, and wherever: the aggregator starts again by itself and the store is what it would have been.

One run strikes at every point of ``points``, one after the other: each life of the aggregator gets as far as the
first point that was not struck yet. After each death the file is looked at as it lies there: it must be exactly what
the log says up to the stored position, or not be opened yet. At the end it must be equal to the store of a run
without faults, row by row.
"""

import errno
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aggregator.engine.supervisor import Aggregator
from aggregator.view import Unavailable
from ingest.log import open_log
from meters.catalogue.catalogue import Names
from meters.log import Log
from tests.support.faults.aggregator_process import FirstNew, start_life
from tests.support.faults.crash_points import Point, disk_error, watch
from tests.support.faults.store_checks import (
    SEED,
    Tables,
    assert_store_tells,
    assert_totals_agree,
    caught_up,
    count,
    ends,
    export,
    metered,
    positions,
    write_sample,
)
from tests.support.records import ORGANIZATION, SMALL
from tests.support.waiting import eventually

RANDOM_ERRORS = 60
RANDOM_SHARE = 0.02  # of the points that come by: a round has about a hundred
# Whatever else is found by watching, these must be among it.
INDISPENSABLE = {
    f"{side} {name}"
    for side in ("before", "after")
    for name in (
        "connect", "execute BEGIN", "execute COMMIT", "execute CHECKPOINT", "execute EXECUTE with_moves",
        "execute EXECUTE with_arriving", "execute INSERT INTO hierarchy", "execute EXECUTE with_numbered",
        "execute EXECUTE with_buried", "execute EXECUTE with_decided",
        "pipeline.decode", "Seen.find", "Seen.add", "Store.commit", "RunningTotals.add", "Store.seen", "database._make",
        "database._check",
    )
}
OPENING = {
    f"{side} {name}"
    for side in ("before", "after")
    for name in ("connect", "database._make", "database._check", "Store.directory", "Store.seen")
}
Strike = Callable[[Point], bool]


class World:
    """A log with one of everything, and what a store must say of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log: Log = open_log(str(directory))
        write_sample(self.log)
        self.ends = ends(self.log)
        self.counted = count(self.log)
        self._counted_until = [count(self.log, {0: offset}) for offset in range(self.ends.events[0] + 1)]
        self.offense: Exception | None = None
        self.expected = self.run("clean.duckdb", lambda point: None)
        assert_store_tells(self.expected, self.counted)

    def run(self, name: str, strike: Callable[[Point], None]) -> Tables:
        """One aggregator over the whole log into a new store; what the store says at the end."""
        path = self.directory / name
        with watch(strike) as points:
            aggregator = Aggregator(self.log, path, SMALL)
            aggregator.start()
            try:
                eventually(
                    lambda: caught_up(aggregator, self.ends) or aggregator.ended.is_set() or self.offense,
                    patience_s=220,  # 184 restarts in a row
                )
                points.silent = True
                if self.offense:
                    raise self.offense
                assert not aggregator.ended.is_set(), aggregator.failure
                assert_totals_agree(aggregator, self.counted)
            finally:
                points.silent = True
                aggregator.stop()
        return export(path)

    def assert_file_is_a_prefix(self, path: Path) -> None:
        """The store as it lies on the disk, opened in another place, is what the log says up to its position."""
        copy = self.directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in (path, path.with_name(path.name + ".wal")):
            if file.exists():
                shutil.copy(file, copy)
        if not path.exists():
            return
        tables = export(copy / path.name)
        until = positions(tables)
        if not until:  # not made yet, or made and not given its partitions
            assert not any(tables.get(name) for name in ("events", "dead_letters"))
            return
        assert_store_tells(tables, self._counted_until[until[0]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Made once: a run without faults takes as long as one with a few."""
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.log.close()


def failing(world: World, path: Path, due: Strike, number: int = errno.ENOSPC) -> Callable[[Point], None]:
    """A strike that raises where it is due, and looks at the file before each life."""

    def strike(point: Point) -> None:
        if point[0] == "before connect":
            try:
                world.assert_file_is_a_prefix(path)
            except Exception as error:  # the aggregator would take it for a fault; it is the test's
                world.offense = error
        counting = threading.current_thread().name == "history"  # may fail without consequence: see the test below
        if not counting and due(point):
            raise disk_error(point, number)

    return strike


@pytest.mark.timeout(240)
def test_every_point_may_fail(world: World, record_property: Callable[[str, object], None]) -> None:
    """An error at each point costs a restart and nothing else."""
    struck: set[str] = set()
    lock = threading.Lock()

    def due(point: Point) -> bool:
        with lock:
            new = point[0] not in struck
            struck.add(point[0])
            return new

    tables = world.run("fails.duckdb", failing(world, world.directory / "fails.duckdb", due))
    record_property("figures", f"crash points: an error at each of {len(struck)} points")

    assert world.expected == tables
    assert set() == INDISPENSABLE - struck


@pytest.mark.timeout(240)
def test_errors_may_come_in_any_order(world: World, record_property: Callable[[str, object], None]) -> None:
    """Errors at random, also while recovering from the last one, cost restarts and nothing else."""
    choose = random.Random(SEED)
    struck: list[Point] = []
    lock = threading.Lock()

    def due(point: Point) -> bool:
        with lock:
            strikes = len(struck) < RANDOM_ERRORS and choose.random() < RANDOM_SHARE
            struck.extend([point] * strikes)
            return strikes

    tables = world.run("random.duckdb", failing(world, world.directory / "random.duckdb", due))
    record_property("figures", f"crash points: seed {SEED}, {len(struck)} errors at random")

    assert world.expected == tables
    assert struck


def test_a_disk_that_is_ill_while_the_store_is_opened_is_waited_for(world: World) -> None:
    """An I/O error may pass, like a full disk: only what is wrong with the file itself is final."""
    struck: set[str] = set()
    lock = threading.Lock()

    def due(point: Point) -> bool:
        with lock:
            new = point[0] in OPENING - struck
            struck.add(point[0])
            return new

    tables = world.run("ill.duckdb", failing(world, world.directory / "ill.duckdb", due, errno.EIO))

    assert world.expected == tables
    assert set() == OPENING - struck


@pytest.mark.timeout(240)
def test_every_point_may_be_the_death_of_the_process(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL after each statement and each step of a round costs a restart and nothing else."""
    path, last_words = world.directory / "killed.duckdb", world.directory / "last-words"
    struck: set[str] = set()
    while True:
        life = start_life(world.directory, path, FirstNew(frozenset(struck)), last_words)
        life.join()
        world.assert_file_is_a_prefix(path)
        if life.exitcode != -signal.SIGKILL:
            break
        struck.add(last_words.read_text())
    record_property("figures", f"crash points: SIGKILL at each of {len(struck)} points")

    assert life.exitcode == 0
    assert world.expected == export(path)
    assert world.expected == world.run("killed.duckdb", lambda point: None)
    assert set() == {name for name in INDISPENSABLE if name.startswith("after")} - struck


def test_a_history_that_cannot_be_counted_is_no_total_rather_than_a_wrong_one(world: World) -> None:
    """Where the history of a meter cannot be read its total is not known, until the next start counts it."""

    def strike(point: Point) -> None:
        if threading.current_thread().name == "history":
            raise disk_error(point)

    path = world.directory / "clean.duckdb"
    with watch(strike) as points:
        aggregator = Aggregator(world.log, path, SMALL)
        aggregator.start()
        aggregator._now.totals.wait()
        ann = aggregator.directory.find(ORGANIZATION, Names((), ("ann",)))
        unknown = [aggregator.totals.total(made, ann) for made in metered()]
        points.silent = True
        aggregator.stop()

    assert {None} == set(unknown)
    assert world.expected == world.run("clean.duckdb", lambda point: None)


def test_a_view_that_has_not_read_the_decisions_says_later_instead_of_no(world: World) -> None:
    """Before the tokens and meters of the log are applied nothing is answered: a good token would look unknown."""

    def strike(point: Point) -> None:
        if point[0] == "before Store.commit":
            raise disk_error(point)

    with watch(strike):
        aggregator = Aggregator(world.log, world.directory / "uninformed.duckdb", SMALL)
        aggregator.start()
        with pytest.raises(Unavailable):
            _ = aggregator.catalogue
        with pytest.raises(Unavailable), aggregator.read():
            pass
        aggregator.stop()
