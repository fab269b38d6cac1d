"""When the store's write-ahead log is folded in: soon while rounds follow what arrives, late behind a backlog."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from aggregator.engine import pipeline
from aggregator.store.store import Store
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.records import Running, decisions, entry, line, organization
from tests.support.waiting import eventually


def waiting_bytes(store: Path) -> int:
    """What lies in the write-ahead log."""
    with contextlib.suppress(FileNotFoundError):  # a checkpoint takes it away
        return store.with_suffix(".duckdb.wal").stat().st_size
    return 0


def test_small_rounds_are_folded_in_sooner_than_a_backlog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of round has its own measure, and what lies in the write-ahead log counts, dead letters, too."""
    for name, value in (("ROWS_BETWEEN", 20), ("ROWS_BETWEEN_BACKLOG", 200), ("BACKLOG_ROUND_ROWS", 100)):
        monkeypatch.setattr(pipeline, name, value)
    monkeypatch.setattr(pipeline, "IDLE_S", 1000.0)
    monkeypatch.setattr(pipeline, "ROUND_ROWS", 0)
    log, store = open_log("memory:"), tmp_path / "store.duckdb"
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
    sent = 0

    with Running(log, store) as running:

        def send(count: int) -> None:
            nonlocal sent
            lines = [line(f"e{number}") for number in range(sent, sent + count)]
            sent += count
            asyncio.run(log.append(USAGE_EVENTS, [entry(*lines)]))
            running.catch_up()

        send(30)
        eventually(lambda: waiting_bytes(store) == 0)
        send(150)
        assert waiting_bytes(store) > 0
        send(100)
        eventually(lambda: waiting_bytes(store) == 0)
        send(10)
        assert waiting_bytes(store) > 0
        asyncio.run(log.append(USAGE_EVENTS, [entry(*[b"{broken"] * 10, admitted=False)]))
        eventually(lambda: waiting_bytes(store) == 0)
    log.close()


def test_the_longer_the_history_the_rarer_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint looks at all that is stored, so half as much again lies between two of them here."""
    for name, value in (("ROWS_BETWEEN", 20), ("STORED_ROWS_PER_ROW", 2), ("IDLE_S", 1000.0)):
        monkeypatch.setattr(pipeline, name, value)
    monkeypatch.setattr(pipeline, "ROUND_ROWS", 0)
    stored, fold = list[int](), Store.checkpoint

    def noted(store: Store, merges_max: int = 0) -> bool:
        stored.append(store.next_seq)
        return fold(store, merges_max)

    monkeypatch.setattr(Store, "checkpoint", noted)
    log, store = open_log("memory:"), tmp_path / "store.duckdb"
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
    with Running(log, store) as running:
        for ids, is_folded in ((range(45), True), (range(45, 75), False), (range(75, 175), True)):
            asyncio.run(log.append(USAGE_EVENTS, [entry(*[line(f"e{number}") for number in ids])]))
            running.catch_up()
            if is_folded:
                eventually(lambda: waiting_bytes(store) == 0)
            assert (waiting_bytes(store) == 0) is is_folded
        assert sorted(set(stored)) == [45, 175]  # again where a round was just being written
    log.close()
