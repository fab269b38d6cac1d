"""The feed over several partitions: each one's order is kept, and a position speaks of all of them."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from aggregator.store.queries import feed
from aggregator.store.queries.feed import FeedEvent, Wanted, backlog, page
from aggregator.store.queries.scope import Scope, organization_number
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, FeedPlace
from tests.support.records import (
    NOW,
    NOW_US,
    ORGANIZATION,
    OTHER_ORGANIZATION,
    Running,
    decisions,
    line,
    organization,
)

PARTITIONS = 3
RECORDS = 40


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_pages_cover_every_partition_once_and_in_order(tmp_path: Path, limit: int) -> None:
    """Whatever the page size: nothing twice, nothing missing, order within a partition, a backlog that shrinks to 0."""
    log = open_log("memory:", partitions={USAGE_EVENTS: PARTITIONS, USAGE_CONTROL: 1}, clock_us=lambda: NOW_US)
    sent = [
        Entry(b"\n".join(line(f"{n}-{part}") for part in range(1 + n % 3)), n % PARTITIONS, _owner(n), admitted=True)
        for n in range(RECORDS)
    ]
    asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
    asyncio.run(log.append(USAGE_EVENTS, sent))
    expected = sum(1 + n % 3 for n in range(RECORDS) if _owner(n) == ORGANIZATION)
    with Running(log, tmp_path / "store.duckdb") as running, running.catch_up().store.read() as snapshot:
        here = snapshot.connection
        wanted = Wanted(scope=Scope(organization=organization_number(here, ORGANIZATION)))
        found: list[FeedEvent] = []
        position: dict[int, FeedPlace] = {}
        while backlog(here, wanted, position).events:
            events, position = page(here, wanted, position, limit)
            found += events
            assert len(events) <= max(limit, PARTITIONS)
            assert backlog(here, wanted, position).events == expected - len(found)
        groups, end = feed.rollup(here, [wanted], {}, NOW + timedelta(seconds=1), 60)
    log.close()
    places = [(event.partition, event.offset, event.line) for event in found]
    assert len(set(places)) == len(places) == expected
    for partition in range(PARTITIONS):
        mine = [place for place in places if place[0] == partition]
        assert mine == sorted(mine)
    assert sum(group.count for group in groups) == expected
    assert end == {n: (len([e for e in sent if e.partition == n]), 0) for n in range(PARTITIONS)}


def _owner(record: int) -> str:
    return OTHER_ORGANIZATION if record % 7 == 0 else ORGANIZATION
