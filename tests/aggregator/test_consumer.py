"""Engines that end and are followed by others: nothing that is healthy is refused, and nothing of them stays."""

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref
from pathlib import Path
from unittest.mock import patch

import duckdb
import pytest

from aggregator.consumer import Aggregator
from aggregator.store.store import Store
from aggregator.view import Unavailable
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from tests.aggregator.records import ORGANIZATION, SMALL, entry, line
from tests.waiting import eventually


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


def test_an_engine_that_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its index of identities may be gigabytes, and the collector looks at old things once in a blue moon."""
    log = open_log("memory:")
    append(log, "a")
    aggregator, commit = Aggregator(log, tmp_path / "store.duckdb", SMALL), Store.commit
    aggregator.start()
    eventually(lambda: is_present(aggregator, log))
    ended = weakref.ref(aggregator._engine)
    gc.collect()
    gc.disable()
    try:
        with patch.object(Store, "commit", side_effect=[OSError("no"), OSError("no")]):
            append(log, "b")
            eventually(lambda: aggregator.failure is not None)
        eventually(lambda: ended() is None)
    finally:
        gc.enable()
    eventually(lambda: is_present(aggregator, log))
    aggregator.stop()
    log.close()
    assert Store.commit is commit


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
