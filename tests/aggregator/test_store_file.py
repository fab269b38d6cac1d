"""Which versions of DuckDB can open the store's file."""

import asyncio
from pathlib import Path
from unittest.mock import patch

from aggregator.store import opening
from ingest.log import open_log
from meters.log import USAGE_EVENTS
from tests.aggregator.records import Running, entry, line, rows

_FORMAT = "SELECT tags['storage_version'] FROM duckdb_databases() WHERE NOT internal"


def test_every_duckdb_that_is_allowed_can_open_the_file(tmp_path: Path) -> None:
    """Going back to an older one needs no rebuild."""
    log = open_log("memory:")
    with Running(log, tmp_path / "store.duckdb") as running:
        assert rows(running.engine.store, _FORMAT) == [("v1.5.0+",)]
    log.close()


def test_a_file_of_another_format_is_followed_on(tmp_path: Path) -> None:
    """One that was made in the newest format keeps it, and is read and written."""
    log, path = open_log("memory:"), tmp_path / "store.duckdb"
    with patch.object(opening, "_READABLE_FROM", "latest"), Running(log, path) as running:
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"))]))
        made = rows(running.catch_up().store, _FORMAT)
    with Running(log, path) as running:
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"), line("b"))]))
        store = running.catch_up().store
        assert store.tallies() == {"stored": 2, "duplicates": 1, "conflicts": 0, "dead": 0}
        assert rows(store, _FORMAT) == made
    log.close()
