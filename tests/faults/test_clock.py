"""The server's clock may jump: order and totals do not depend on it, and ingestion time never runs backwards."""

import asyncio
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregator.engine.supervisor import Aggregator
from ingest.admission import intake
from ingest.gateway import app
from ingest.log import open_log
from meters.event import CLOCK_SKEW
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from tests.support.faults.store_checks import (
    SEED,
    assert_store_tells,
    assert_totals_agree,
    caught_up,
    count,
    ends,
    export,
    metered,
    usage,
)
from tests.support.records import NOW, SMALL, created, decisions, entry, organization
from tests.support.servers.gateway import RunningGateway, event
from tests.support.waiting import eventually

HOUR, YEAR = timedelta(hours=1), timedelta(days=365)
SEQ, TIMESTAMP, INGESTED_AT, EXTERNAL_ID = 0, 11, 12, 13  # columns of ``events``


class Clock:
    """A clock that is set by the test."""

    def __init__(self) -> None:
        self.now = NOW

    def us(self) -> int:
        """Microseconds since 1970."""
        return (self.now - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@pytest.fixture
def clock() -> Clock:
    """Starts at noon."""
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Iterator[Log]:
    """A log that asks this clock."""
    opened = open_log(str(tmp_path), clock_us=clock.us)
    yield opened
    opened.close()


def append(log: Log, *lines: bytes, admitted: bool = False) -> None:
    """One record."""
    asyncio.run(log.append(USAGE_EVENTS, [entry(*lines, admitted=admitted)]))


def test_steps_of_the_clock_change_neither_order_nor_totals(log: Log, clock: Clock, tmp_path: Path) -> None:
    """Back an hour, on a second, back a year, to the seventies and past 2038: order and own times stay."""
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(*metered())])))
    choose = random.Random(SEED)
    own = "2026-02-28T23:59:59.999999Z"
    steps = [timedelta(0), -HOUR, timedelta(seconds=1), -YEAR, -50 * YEAR, 70 * YEAR, -HOUR]
    steps += [timedelta(seconds=choose.randrange(-10_000, 10_000)) for _ in range(20)]
    times = []
    for number, step in enumerate(steps):
        clock.now += step
        times.append(clock.now)
        lines = usage(f"bare-{number}"), usage(f"own-{number}", "bob", number, timestamp=own)
        append(log, *lines, admitted=number % 2 == 0)
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    eventually(lambda: caught_up(aggregator, ends(log)))
    assert_totals_agree(aggregator, count(log))
    aggregator.stop()
    tables = export(tmp_path / "store.duckdb")
    assert_store_tells(tables, count(log))
    ingested = [row[INGESTED_AT] for row in tables["events"]]
    bare = [row for row in tables["events"] if row[EXTERNAL_ID].startswith("bare")]

    assert sorted(ingested) == ingested
    assert max(times).replace(tzinfo=None) == ingested[-1]
    assert [f"bare-{number}" for number in range(len(steps))] == [row[EXTERNAL_ID] for row in bare]
    assert all(row[TIMESTAMP] == row[INGESTED_AT] for row in bare)
    owned = {row[TIMESTAMP] for row in tables["events"] if row[EXTERNAL_ID].startswith("own")}
    assert {datetime(2026, 2, 28, 23, 59, 59, 999999)} == owned  # noqa: DTZ001 (stored without a zone)


def test_the_future_begins_after_the_tolerance(log: Log, clock: Clock, tmp_path: Path) -> None:
    """A line may be ahead of its ingestion by the tolerance to the microsecond; beyond, it is kept as a dead letter."""
    edge = clock.now + CLOCK_SKEW
    inside, outside = edge.isoformat(), (edge + timedelta(microseconds=1)).isoformat()
    append(log, usage("inside", timestamp=inside), usage("outside", timestamp=outside))
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    eventually(lambda: caught_up(aggregator, ends(log)))
    aggregator.stop()
    tables = export(tmp_path / "store.duckdb")

    assert ["inside"] == [row[EXTERNAL_ID] for row in tables["events"]]
    (letter,) = tables["dead_letters"]
    assert b'"outside"' in letter[7]
    assert "past" in letter[6]


def test_a_gateway_whose_clock_was_set_back_takes_what_has_no_time(
    log: Log, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events without a time are taken in order; one that is stamped by a right clock is refused until ours is right."""

    class Now(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return clock.now

    for module in (app, intake):
        monkeypatch.setattr(module, "datetime", Now)
    right = clock.now + timedelta(seconds=1)
    stamped = {"events": [event(external_id="stamped", timestamp=right.isoformat())]}
    with RunningGateway(log) as gateway:
        before = gateway.ingest({"events": [event(external_id="before")]})
        clock.now -= 2 * HOUR
        bare = gateway.ingest({"events": [event(external_id="bare")]})
        refused = gateway.ingest(stamped)
        clock.now += 2 * HOUR
        taken = gateway.ingest(stamped)
        records = gateway.records()

    assert [200, 200, 422, 200] == [answer.status_code for answer in (before, bare, refused, taken)]
    assert refused.json()["detail"][0]["loc"][-1] == "timestamp"
    times = [record.timestamp_us for record in records]
    assert sorted(times) == times
    assert [b"before", b"bare", b"stamped"] == [
        record.value.split(b'"external_id":"')[1].split(b'"')[0] for record in records
    ]
