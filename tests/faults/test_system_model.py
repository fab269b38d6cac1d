"""Any story of deliveries, repetitions, garbage and restarts ends with the reference's numbers, on either log."""

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings

from ingest.log import open_log
from ingest.log.kafka_admin import Wanted, make_topics, parse_address
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from tests.support.faults.store_checks import CUSTOMERS
from tests.support.faults.system_model import Step, World, stories
from tests.support.kafka.cluster import Cluster

PARTITIONS = {USAGE_EVENTS: 2, USAGE_CONTROL: 1}
Opener = Callable[[], Log]


def place(customer: str) -> int:
    """A customer's partition: any fixed one will do."""
    return CUSTOMERS.index(customer) % PARTITIONS[USAGE_EVENTS]


def tell(story: list[Step], opener: Opener, store: Path) -> None:
    """Tell a story to a fresh world, and compare at its end."""
    world = World(opener, store, place)
    with contextlib.ExitStack() as undo:
        undo.callback(world.close)
        for step in story:
            world.tell(step)
        world.end()


STORIES = 8  # ten times as many with --long


def tell_all(long: bool, world: Callable[[], tuple[Opener, Path]]) -> None:
    """Tell many stories, each to a world of its own."""

    @settings(max_examples=STORIES * (10 if long else 1), deadline=None)
    @given(story=stories)
    def told(story: list[Step]) -> None:
        tell(story, *world())

    told()


def test_stories_on_the_embedded_log(tmp_path_factory: pytest.TempPathFactory, long: bool) -> None:
    """Duplicate delivery, other records, garbage and restarts: each event counts once, to the last decimal."""

    def world() -> tuple[Opener, Path]:
        directory = tmp_path_factory.mktemp("story")
        return lambda: open_log(str(directory), partitions=PARTITIONS), directory / "store.duckdb"

    tell_all(long, world)


@pytest.mark.timeout(600)
def test_stories_on_kafka(kafka: Cluster, tmp_path_factory: pytest.TempPathFactory, long: bool) -> None:
    """The same on a real broker, where the reader of the next life is another client, too."""

    def world() -> tuple[Opener, Path]:
        url = f"kafka://{kafka.bootstrap}/story-{uuid.uuid4().hex}"
        make_topics(parse_address(url, {}), Wanted(partitions=PARTITIONS[USAGE_EVENTS]))
        return lambda: open_log(url), tmp_path_factory.mktemp("story") / "store.duckdb"

    tell_all(long, world)
