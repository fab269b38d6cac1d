"""A full spool: what becomes of the events that find no room, as the application chose it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingest.client import Ingestion, Limits, Rejection, SpoolFull
from tests.ingest.client.test_sender import assert_adds_up, event
from tests.support.servers.faulty_gateway import Bad, FaultServer
from tests.support.waiting import PATIENCE_S, eventually


@pytest.fixture(params=["memory", "disk"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Without and with a spool."""
    return tmp_path / "spool" if request.param == "disk" else None


FULL = Limits(linger_s=0.005, backoff_s=0.005, backoff_s_max=0.02, held_bytes_max=3000, block_s_max=0.05)


def fill(server: FaultServer, spool: Path | None, **options: Any) -> Ingestion:
    """A client whose server is away and that holds as much as it may."""
    ingestion = Ingestion("token", base_url=server.url, spool=spool, limits=FULL, **options)
    while ingestion.stats().pending_bytes < 2900:
        ingestion.ingest(event(ingestion.stats().captured))
    return ingestion


def test_when_full_the_oldest_may_go(spool: Path | None) -> None:
    """By choice: the newest events are kept, the others counted."""
    is_away = True
    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        ingestion = fill(server, spool, when_full="drop_oldest")
        for number in range(100, 200):
            assert ingestion.ingest(event(number)) == f"e{number}"
        is_away = False
        ingestion.close(PATIENCE_S)

    stats = ingestion.stats()
    assert_adds_up(stats)
    assert stats.dropped >= 50
    assert stats.acknowledged == len(server.taken) == stats.captured - stats.dropped
    assert "e199" in server.taken


def test_when_full_capturing_may_raise(spool: Path | None) -> None:
    """By choice: the application hears of it, whether it is strict or not."""
    is_away = True
    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        ingestion = Ingestion("token", base_url=server.url, spool=spool, limits=FULL, when_full="raise")
        numbers = iter(range(100))
        with pytest.raises(SpoolFull):
            all(ingestion.ingest(event(number)) for number in numbers)
        is_away = False
        ingestion.close(PATIENCE_S)

    assert_adds_up(ingestion.stats())


def test_when_full_capturing_may_wait(spool: Path | None) -> None:
    """It waits for room until the stated time, and then rejects; when there is room in time, it takes the event."""
    is_away = True
    rejected: list[Rejection] = []
    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        ingestion = fill(server, spool, on_rejected=rejected.append)
        while ingestion.ingest(event(ingestion.stats().captured)):
            pass
        is_away = False
        assert eventually(lambda: ingestion.ingest(event(5000)))
        ingestion.close(PATIENCE_S)

    assert (rejected[0].by, rejected[0].type) == ("spool", "full")
    assert_adds_up(ingestion.stats())
    assert len(server.taken) == ingestion.stats().captured - len(rejected)


def test_only_the_first_waits_for_room_that_does_not_come(spool: Path | None) -> None:
    """Those after it are refused at once, though the bound on waiting is longer than this test; room lets one wait."""
    is_away, limits = True, msgspec.structs.replace(FULL, block_s_max=0.05)
    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        ingestion = Ingestion("token", base_url=server.url, spool=spool, limits=limits)
        while ingestion.ingest(event(ingestion.stats().captured)):
            pass
        ingestion._outbox.limits = msgspec.structs.replace(limits, block_s_max=1e6)
        assert [ingestion.ingest(event(number)) for number in range(100, 200)] == [None] * 100
        is_away = False
        assert ingestion.flush(PATIENCE_S)
        assert not ingestion._outbox._is_stuck
        assert ingestion.ingest(event(200)) == "e200"
        ingestion.close(PATIENCE_S)

    assert_adds_up(ingestion.stats())
