"""The topics as ``meterstream kafka init`` makes and repairs them, on three brokers of which one may be away."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from ingest.log.kafka_admin import Address, Finding, Unreachable, Wanted, make_topics, parse_address
from meters.log import USAGE_EVENTS
from tests.support.kafka.cluster import Cluster, running
from tests.support.kafka.jars import Missing
from tests.support.kafka.shared import need_kafka
from tests.support.kafka.test_cluster import send
from tests.support.waiting import eventually

pytestmark = pytest.mark.kafka

CONFIRMING = "min.insync.replicas"


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the test's own."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(running(tmp_path / "cluster", nodes=3))
        except Missing as reason:
            need_kafka(reason)
        yield cluster


def place(cluster: Cluster, prefix: str) -> Address:
    """Topics with that prefix."""
    return parse_address(f"kafka://{cluster.bootstrap}/{prefix}", {})


def confirming(cluster: Cluster, address: Address) -> str:
    """How many replicas of the events have to confirm a record."""
    resource = ConfigResource(ResourceType.TOPIC, address.topic(USAGE_EVENTS))
    admin = cluster.admin()  # its futures end with it
    return admin.describe_configs([resource])[resource].result(30)[CONFIRMING].value


def let_confirm(cluster: Cluster, address: Address, count: int) -> None:
    """Set that number."""
    entry = ConfigEntry(CONFIRMING, str(count), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, address.topic(USAGE_EVENTS), incremental_configs=[entry])
    admin = cluster.admin()
    admin.incremental_alter_configs([resource])[resource].result(30)
    eventually(lambda: confirming(cluster, address) == str(count))


def wrong(found: list[Finding]) -> list[tuple[str, str]]:
    """What is not as it should be with the events."""
    return [(each.subject, each.wrong) for each in found if each.wrong and each.topic.endswith(USAGE_EVENTS)]


def test_what_has_to_confirm_is_measured_by_the_topics_own_replicas(three: Cluster) -> None:
    """By those of brokers that are away too, and not by brokers that came later; a repair never lowers it."""
    lone, full = place(three, "lone"), place(three, "full")
    make_topics(lone, Wanted(partitions=1, replicas=1))
    made = make_topics(full, Wanted(partitions=1))
    assert [each.done for each in made] == ["made with 1 partitions, 3 replicas"] * 2
    assert (confirming(three, lone), confirming(three, full)) == ("1", "2")

    assert wrong(make_topics(lone, Wanted(replicas=1))) == []
    [(subject, reason)] = wrong(make_topics(lone, Wanted(repair=True)))
    assert (subject, reason.partition(":")[0]) == ("topic", "has 1 replicas and not 3")
    send(three, lone.topic(USAGE_EVENTS), b"one replica is enough for it")

    three.nodes[2].kill()
    eventually(lambda: len(three.admin().list_topics(timeout=30).brokers) == 2)
    for repair in (False, True):
        assert wrong(make_topics(full, Wanted(repair=repair))) == []
    assert confirming(three, full) == "2"
    with pytest.raises(Unreachable, match="2 brokers answer, too few for 3 replicas"):
        make_topics(place(three, "late"), Wanted(replicas=3))

    let_confirm(three, full, 3)
    assert wrong(make_topics(full, Wanted(repair=True))) == []
    let_confirm(three, lone, 2)
    [_, (subject, reason)] = wrong(make_topics(lone, Wanted(repair=True)))
    assert (subject, "nothing can be appended" in reason) == (CONFIRMING, True)
    assert (confirming(three, full), confirming(three, lone)) == ("3", "2")
    let_confirm(three, full, 1)
    make_topics(full, Wanted(repair=True))
    eventually(lambda: confirming(three, full) == "2")
