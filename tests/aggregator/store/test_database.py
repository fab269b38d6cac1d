"""What the store's file is read for at a start, and which versions of DuckDB can open it."""

import asyncio
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest

from aggregator.store import database
from aggregator.store.store import Store
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.records import Running, entry, line, rows

_FORMAT = "SELECT tags['storage_version'] FROM duckdb_databases() WHERE database_name = current_database()"


def test_every_duckdb_that_is_allowed_can_open_the_file(tmp_path: Path) -> None:
    """Going back to an older one needs no rebuild."""
    log = open_log("memory:")
    with Running(log, tmp_path / "store.duckdb") as running:
        assert rows(running.engine.store, _FORMAT) == [("v1.5.0+",)]
    log.close()


def test_a_file_of_another_format_is_followed_on(tmp_path: Path) -> None:
    """One that was made in the newest format keeps it, and is read and written."""
    log, path = open_log("memory:"), tmp_path / "store.duckdb"
    with patch.object(database, "_READABLE_FROM", "latest"), Running(log, path) as running:
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"))]))
        made = rows(running.catch_up().store, _FORMAT)
    with Running(log, path) as running:
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"), line("b"))]))
        store = running.catch_up().store
        assert store.tallies() == {"stored": 2, "duplicates": 1, "conflicts": 0, "dead": 0}
        assert rows(store, _FORMAT) == made
    log.close()


def test_a_file_with_larger_groups_is_followed_on(tmp_path: Path) -> None:
    """As all were that were made before a round had a group of its own."""
    log, path = open_log("memory:"), tmp_path / "store.duckdb"
    for made, attach in enumerate(["ATTACH ? AS store", database._ATTACH]):
        lines = [line(f"{made} {number}") for number in range(database.ROW_GROUP_ROWS + 5)]
        asyncio.run(log.append(USAGE_EVENTS, [entry(*lines)]))
        with patch.object(database, "_ATTACH", attach), Running(log, path) as running:
            store = running.catch_up().store
            assert store.checkpoint()
            assert store.tallies()["stored"] == (made + 1) * len(lines)
    log.close()


def test_a_file_that_is_open_here_is_opened_later(tmp_path: Path) -> None:
    """Whoever had it is about to let go: nobody is told to make the store again."""
    where = tmp_path / "store.duckdb", {USAGE_EVENTS: "a", USAGE_CONTROL: "b"}
    with closing(Store.open(*where)) as store:
        epoch = store.epoch
        with pytest.raises(database.NotNow):
            Store.open(*where)
    with closing(Store.open(*where)) as store:
        assert store.epoch == epoch + 1


def test_decisions_are_read_in_parts_and_in_order(tmp_path: Path) -> None:
    """More than are held at once, or those alone that hold a text."""
    with closing(Store.open(tmp_path / "store.duckdb", {USAGE_EVENTS: "a", USAGE_CONTROL: "b"})) as store:
        with closing(store.cursor()) as connection:
            backwards = "SELECT 24_999 - n AS log_offset, 'decision ' || log_offset FROM range(25_000) t(n)"
            connection.execute(f"INSERT INTO control {backwards}")
        assert list(store.control()) == [b"decision %d" % n for n in range(25_000)]
        assert list(store.control(b" 2499")) == [b"decision 2499", *(b"decision %d" % n for n in range(24_990, 25_000))]
