"""Identities that share a high half: chance makes none, but a sender can make any number of external ids that do."""

import asyncio
from pathlib import Path
from unittest.mock import patch

import xxhash

from aggregator.store.store import Store
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from tests.support.records import ORGANIZATION, OTHER_ORGANIZATION, Running, decisions, entry, line, organization

CROWD = [f"crowd-{number}" for number in range(200)]
_digest = xxhash.xxh3_128_digest


def crowded(content: bytes) -> bytes:
    """An identity with the high half that all of them have."""
    return bytes(8) + _digest(content)[:8]


def append(log: Log, *lines: bytes, organization_id: str) -> None:
    """One record, and so one round."""
    asyncio.run(log.append(USAGE_EVENTS, [entry(*lines, organization_id=organization_id)]))


def test_they_are_counted_once_and_hold_up_nobody(tmp_path: Path) -> None:
    """In one record or in many, repeated in this life or the next: each is stored, no other one is taken for it."""
    log = open_log("memory:")
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), organization(OTHER_ORGANIZATION)])))
    with patch.object(xxhash, "xxh3_128_digest", crowded):
        with Running(log, tmp_path / "store.duckdb") as running:
            append(log, *map(line, CROWD[:100]), organization_id=ORGANIZATION)
            running.catch_up()
            for id in CROWD[50:]:
                append(log, line(id), organization_id=ORGANIZATION)
            append(log, line("innocent"), organization_id=OTHER_ORGANIZATION)
            assert_stored(running.catch_up().store, duplicates=50)
        with Running(log, tmp_path / "store.duckdb") as running:
            append(log, *map(line, CROWD), organization_id=ORGANIZATION)
            assert_stored(running.catch_up().store, duplicates=50 + len(CROWD))
    log.close()


def assert_stored(store: Store, duplicates: int) -> None:
    """Everyone of the crowd and the one besides, once."""
    assert store.tallies() == {"stored": len(CROWD) + 1, "duplicates": duplicates, "conflicts": 0, "dead": 0}
