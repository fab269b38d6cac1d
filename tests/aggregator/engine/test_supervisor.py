"""Engines that end and are followed by others: nothing that is healthy is refused, and nothing of them stays."""

import asyncio
import contextlib
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duckdb
import msgspec
import pytest

from aggregator.engine.supervisor import QUESTIONS_AT_ONCE, Aggregator
from aggregator.process import START_AGAIN
from aggregator.store import store as store_module
from aggregator.store.store import Doubt, StillRead, Store
from aggregator.view import Unavailable
from deploy.errors import FAILED, USAGE
from ingest.log import open_log
from ingest.log.memory import Disk, MemoryLog
from ingest.log.partitions import Limits
from meters.catalogue.catalogue import Change, DeadLetterReplayed
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, Record
from tests.support.records import (
    NOW,
    ORGANIZATION,
    SMALL,
    Running,
    created,
    decisions,
    entry,
    line,
    meter,
    organization,
    rows,
)
from tests.support.waiting import PATIENCE_S, eventually


def append(log: Log, *ids: str) -> None:
    """A record for each event."""
    asyncio.run(log.append(USAGE_EVENTS, [entry(line(id)) for id in ids]))


def is_present(aggregator: Aggregator, log: Log) -> bool:
    """Whether everything in the log is counted."""
    with contextlib.suppress(Unavailable):
        return dict(aggregator.as_of) == log.ends(USAGE_EVENTS)
    return False


def test_two_clocks_make_no_other_log(tmp_path: Path) -> None:
    """Where gateways stamp records by clocks of their own, the newest record is not the latest one."""
    log, path = open_log("memory:"), tmp_path / "store.duckdb"
    append(log, "a", "b")
    for _ in range(2):
        aggregator = Aggregator(log, path, SMALL)
        aggregator.start()
        eventually(lambda aggregator=aggregator: is_present(aggregator, log))
        aggregator.stop()
        with duckdb.connect(str(path)) as store:  # as if the first one came from a gateway ahead of the other
            store.execute("UPDATE events SET ingested_at = ingested_at + INTERVAL 5 MILLISECONDS WHERE log_offset = 0")
    log.close()


def test_whoever_waits_does_not_wait_for_a_quiet_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far apart rounds with few events are: a position that somebody waits for is the next round's."""
    monkeypatch.setattr("aggregator.engine.pipeline.QUIET_ROUND_PERIOD_S", 3600.0)
    log = open_log("memory:")
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    for id in "abc":
        append(log, id)
        assert asyncio.run(aggregator.wait_for(log.ends(USAGE_EVENTS), PATIENCE_S))
    asyncio.run(aggregator.decide(organization()))
    aggregator.stop()
    log.close()


def test_nothing_is_read_while_a_round_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in a backlog: what is read later is fresher, and what came meanwhile is one round, not two in line."""
    for period in ("ROUND_PERIOD_S", "QUIET_ROUND_PERIOD_S"):
        monkeypatch.setattr(f"aggregator.engine.pipeline.{period}", 0.0)
    log, commit, writing, read_meanwhile = open_log("memory:"), Store.commit, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        writing.set()
        read_meanwhile.wait(0.2)  # long enough for a reader that does not wait; one that does is not held up for long
        try:
            return commit(*arguments)
        finally:
            writing.clear()

    def read(stream: str, *arguments: Any, **options: Any) -> list[Record]:
        if stream == USAGE_EVENTS and writing.is_set():
            read_meanwhile.set()
        return unwatched(stream, *arguments, **options)

    unwatched = log.read
    monkeypatch.setattr(log, "read", read)
    monkeypatch.setattr(Store, "commit", slow)
    with contextlib.closing(log):
        aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
        aggregator.start()
        for id in "abc":
            append(log, id)
            eventually(lambda: is_present(aggregator, log))
        aggregator.stop()
    assert not read_meanwhile.is_set()


@pytest.mark.parametrize("first", [0, 1])
def test_a_store_made_again_counts_the_same_of_two_that_contradict(tmp_path: Path, first: int) -> None:
    """One id for two customers lies in two partitions: the first by time counts, whenever they are read."""
    passing_us = itertools.count(1)
    log = open_log("memory:", partitions={USAGE_EVENTS: 2, USAGE_CONTROL: 1}, clock_us=lambda: next(passing_us))

    def counted(store: str) -> list[tuple[str, int]]:
        aggregator = Aggregator(log, tmp_path / store, SMALL)
        aggregator.start()
        for partition in (first, 1 - first) if store == "live" else ():
            said = line("x", external_customer_id=f"customer {partition}")
            asyncio.run(log.append(USAGE_EVENTS, [Entry(said, partition, ORGANIZATION, admitted=True)]))
            eventually(lambda: is_present(aggregator, log))
        eventually(lambda: is_present(aggregator, log))
        aggregator.stop()
        with duckdb.connect(str(tmp_path / store)) as opened:
            return opened.execute("SELECT external_id, log_partition FROM events").fetchall()

    assert counted("live") == [("x", first)] == counted("again")
    log.close()


class Holed(MemoryLog):
    """A log whose control stream has the marker of a transaction behind each decision, as Kafka's may.

    Markers are passed over, and only the one at the end is an empty record.
    """

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """See the port."""
        if stream != USAGE_CONTROL:
            return super().read(stream, positions, bytes_max=bytes_max, wait_s=wait_s)
        found = super().read(stream, {0: (positions[0] + 1) // 2}, bytes_max=1)
        if not found and positions[0] % 2:
            return [Record(0, positions[0], 0, b"")]
        return [msgspec.structs.replace(record, offset=2 * record.offset) for record in found]

    def ends(self, stream: str) -> dict[int, int]:
        """See the port."""
        return {partition: end * (1 + (stream == USAGE_CONTROL)) for partition, end in super().ends(stream).items()}


def test_decisions_with_holes_between_them_are_followed(tmp_path: Path) -> None:
    """Memory and store go on behind the last one, in this life and the next, and markers decide nothing."""
    log = Holed(Disk(), lambda: 0, Limits())

    def decide(*changes: Change) -> None:
        asyncio.run(log.append(USAGE_CONTROL, decisions(changes)))

    decide(organization(), *created(meter("m1")))
    for life in range(2):
        with Running(log, tmp_path / "store.duckdb") as running:
            running.catch_up()
            decide(*created(meter(f"a{life}"), meter(f"b{life}")))
            store = running.catch_up().store
            assert set(running.engine.catalogue.meters) == {"m1", "a0", "b0", *(["a1", "b1"] * life)}
            offsets = [offset for (offset,) in rows(store, "SELECT log_offset FROM control ORDER BY ALL")]
            assert offsets == [0, 2, 4, 6, 8, 10][: 4 + 2 * life]
    log.close()


def test_what_is_decided_together_is_one_record(tmp_path: Path) -> None:
    """All of it or nothing is durable; memory, the store, its next life and a new store have every part of it."""
    log = open_log("memory:")
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    asyncio.run(aggregator.decide(organization(), *created(meter("m1")), DeadLetterReplayed(0, 0, 0, NOW)))
    assert set(aggregator.catalogue.meters) == {"m1"}
    assert log.ends(USAGE_CONTROL) == {0: 1}
    aggregator.stop()
    asyncio.run(log.append(USAGE_EVENTS, [entry(b"no event", admitted=False)]))
    for name in ("store.duckdb", "again.duckdb"):
        with Running(log, tmp_path / name) as running:
            engine = running.catch_up()
            assert (set(engine.catalogue.organizations), set(engine.catalogue.meters)) == ({ORGANIZATION}, {"m1"})
            assert rows(engine.store, "SELECT log_offset FROM control") == [(0,)]
            assert rows(engine.store, "SELECT count(*) FROM dead_letters WHERE replayed_at IS NOT NULL") == [(1,)]
    log.close()


class Silent(MemoryLog):
    """A log that stops to say where it ends once it is ``away``, as Kafka does for seconds, until it is ``back``."""

    def __init__(self) -> None:
        super().__init__(Disk(), lambda: 0, Limits())
        self.away, self.back = threading.Event(), threading.Event()

    def ends(self, stream: str) -> dict[int, int]:
        """See the port."""
        if self.away.is_set():
            self.back.wait()
        return super().ends(stream)


def test_a_log_that_does_not_answer_keeps_nobody_beyond_the_time(tmp_path: Path) -> None:
    """Whoever waits for what is in it is told in time, and other work in threads goes on beside the question."""
    log = Silent()
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    append(log, "a")

    async def wait() -> list[bool]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        assert await aggregator.present(PATIENCE_S)
        log.away.set()
        try:
            async with asyncio.timeout(PATIENCE_S):
                waits = (aggregator.present, aggregator.informed)
                found = await asyncio.gather(*(wait(0.01) for wait in waits for _ in range(QUESTIONS_AT_ONCE)))
                await asyncio.to_thread(len, found)
        finally:
            log.back.set()
        assert await aggregator.informed(PATIENCE_S)
        return found

    assert not any(asyncio.run(wait()))
    aggregator.stop()
    log.close()


def parts_of(aggregator: Aggregator) -> dict[str, weakref.ref[Any]]:
    """The engine that runs, and what it keeps in memory, without keeping it."""
    engine = aggregator._now
    kept = {name: getattr(engine, name) for name in ("totals", "catalogue", "ledger", "directory", "store")}
    return {name: weakref.ref(part) for name, part in {"engine": engine, **kept}.items()}


def test_an_engine_that_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its index of identities may be gigabytes, and the collector looks at old things once in a blue moon."""
    log = open_log("memory:")
    append(log, "a")
    aggregator, commit = Aggregator(log, tmp_path / "store.duckdb", SMALL), Store.commit
    aggregator.start()
    eventually(lambda: is_present(aggregator, log))
    left = parts_of(aggregator)
    gc.collect()
    gc.disable()
    gc.freeze()  # as a server does once it has started
    try:
        with patch.object(Store, "commit", side_effect=[OSError("no"), OSError("no")]):
            append(log, "b")
            eventually(lambda: aggregator.failure is not None)
        eventually(lambda: not [name for name, part in left.items() if part() is not None])
    finally:
        gc.unfreeze()
        gc.enable()
    eventually(lambda: is_present(aggregator, log))
    aggregator.stop()
    log.close()
    assert Store.commit is commit


def test_an_engine_that_fails_while_it_starts_leaves_no_thread(tmp_path: Path) -> None:
    """Where the system has no more threads for a moment, those that there were end before the next engine begins."""
    log = open_log("memory:")
    append(log, "a")
    before, refused = set(threading.enumerate()), list[str]()

    class Scarce(threading.Thread):
        """The second of an engine's threads cannot be had once."""

        def start(self) -> None:
            if self.name == "write_rounds" and not refused:
                refused.append(self.name)
                raise RuntimeError("can't start new thread")
            super().start()

    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    with patch.object(threading, "Thread", Scarce):
        aggregator.start()
        eventually(lambda: is_present(aggregator, log))
    readers = [thread for thread in set(threading.enumerate()) - before if thread.name == "read_log"]
    aggregator.stop()
    log.close()
    assert refused
    assert len(readers) == 1
    assert set(threading.enumerate()) <= before


def test_a_reader_that_does_not_let_go_ends_the_process_for_another_one(tmp_path: Path) -> None:
    """DuckDB would give the next engine the instance of the last one, so none follows in here, and no final error."""
    log = open_log("memory:")
    append(log, "a")
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    eventually(lambda: is_present(aggregator, log))
    with (
        patch.object(store_module, "_READERS_PATIENCE_S", 0.1),
        patch.object(Store, "commit", side_effect=Doubt("no")),
        aggregator.read(),
    ):
        append(log, "b")
        has_ended = aggregator.ended.wait(60)
    assert has_ended
    assert isinstance(aggregator.failure, StillRead)
    aggregator.stop()
    again = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    again.start()
    eventually(lambda: is_present(again, log))
    again.stop()
    log.close()


def test_such_a_process_leaves_with_a_code_that_starts_it_again(tmp_path: Path) -> None:
    """Though the reader still runs, and a request with it."""
    done = subprocess.run(
        [sys.executable, "-c", _HELD, str(tmp_path)], timeout=60, check=False, capture_output=True, text=True
    )

    assert done.returncode == START_AGAIN, done.stderr
    assert START_AGAIN not in (FAILED, USAGE)  # by which a supervisor knows that a restart is no use


_HELD = """
import sys, threading, time
from pathlib import Path
from aggregator import process
from aggregator.engine.supervisor import Aggregator
from aggregator.store import store
from ingest.log import open_log
from tests.aggregator.engine.test_supervisor import append

store._READERS_PATIENCE_S = 0.1
place, start, log = Path(sys.argv[1]), Aggregator.start, open_log("memory:")

def doubt(*_):
    raise store.Doubt("no")

def hold(aggregator):
    with aggregator.read():
        store.Store.commit = doubt
        append(log, "b")
        time.sleep(600)

def start_and_hold(aggregator):
    start(aggregator)
    while not aggregator._engine.informed:
        time.sleep(0.01)
    threading.Thread(target=hold, args=(aggregator,)).start()

Aggregator.start = start_and_hold
process.run(log, process.Process(place / "store.duckdb", socket=place / "socket"))
"""


def test_a_store_closes_while_readers_come_and_go(tmp_path: Path) -> None:
    """However a reader ends just then."""
    log = open_log("memory:")
    identities = {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}

    def read(store: Store) -> None:
        with contextlib.suppress(Unavailable):
            while True:
                with store.read() as snapshot:
                    snapshot.connection.execute("SELECT 1").fetchall()

    for _ in range(10):
        store = Store.open(tmp_path / "store.duckdb", identities, SMALL)
        readers = [threading.Thread(target=read, args=(store,)) for _ in range(4)]
        for reader in readers:
            reader.start()
        store.close()
        for reader in readers:
            reader.join()
    log.close()


def test_an_instance_that_dies_under_a_reader_is_replaced(tmp_path: Path) -> None:
    """DuckDB gives up on itself where a guest's statement fails for good; the engine ends, for another to begin."""
    log = open_log("memory:")
    with Running(log, tmp_path / "store.duckdb") as running:
        with pytest.raises(Unavailable), running.engine.store.read():
            raise duckdb.FatalException("the instance is invalid")
        eventually(running.engine.ended.is_set)
    log.close()
    assert isinstance(running.engine.failure, Doubt)
