"""The brokers of the tests: they start, die, pause and come back on the same data."""

from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]

from tests.support.kafka.cluster import Cluster, running
from tests.support.kafka.jars import VERSIONS, Missing
from tests.support.kafka.shared import need_kafka

pytestmark = pytest.mark.kafka


def make_topic(cluster: Cluster, name: str, **settings: str) -> None:
    """A topic of one partition."""
    admin = cluster.admin()  # its futures end with it
    admin.create_topics([NewTopic(name, 1, len(cluster.nodes), config=settings)])[name].result(30)


def send(cluster: Cluster, topic: str, value: bytes) -> None:
    """Write one record and wait until it is acknowledged."""
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all", "log_level": 0})
    producer.produce(topic, value, partition=0)
    assert producer.flush(60) == 0


def values(cluster: Cluster, topic: str) -> list[bytes | None]:
    """Every value of the topic."""
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "none", "log_level": 0})
    try:
        end = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=30)[1]
        consumer.assign([TopicPartition(topic, 0, 0)])
        return [message.value() for _ in range(end) for message in consumer.consume(1, timeout=30)]
    finally:
        consumer.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_broker_comes_back_with_its_records(version: str, tmp_path: Path) -> None:
    """After kill -9, after a pause and after a stop in order, a broker serves what it acknowledged before."""
    try:
        with running(tmp_path / "cluster", version) as cluster:
            [node] = cluster.nodes
            make_topic(cluster, "t")
            send(cluster, "t", b"before")
            node.kill()
            node.start()
            cluster.wait_ready()
            send(cluster, "t", b"after the kill")
            node.pause()
            node.resume()
            node.stop()
            node.start()
            cluster.wait_ready()
            assert values(cluster, "t") == [b"before", b"after the kill"]
    except Missing as reason:
        need_kafka(reason)


def test_one_of_three_may_go(tmp_path: Path) -> None:
    """Three brokers with two in-sync replicas go on while one of them is dead."""
    try:
        with running(tmp_path / "cluster", nodes=3) as cluster:
            make_topic(cluster, "t", **{"min.insync.replicas": "2"})
            send(cluster, "t", b"three")
            cluster.nodes[0].kill()
            send(cluster, "t", b"two")
            assert values(cluster, "t") == [b"three", b"two"]
    except Missing as reason:
        need_kafka(reason)
