"""librdkafka's mock brokers: a cluster inside this process, for machines without Java.

It shows how a producer writes, and a consumer reads it back. Meterstream's own log cannot run on it: the log asks
for a topic's id, a question that goes to the controller, and a mock has none (librdkafka 2.16: "Failed while waiting
for controller"). What a broker promises about durability, a mock cannot show at all.
"""

import contextlib
from collections.abc import Iterator

from confluent_kafka import Producer

PARTITIONS = 4  # of each topic; a mock has no other number


@contextlib.contextmanager
def mock_brokers(*topics: str, brokers: int = 3) -> Iterator[str]:
    """Their addresses, while the block lasts. They have these topics, and make whatever else a client asks them to."""
    owner = Producer({"bootstrap.servers": "", "test.mock.num.brokers": brokers, "log_level": 0})
    found = owner.list_topics(timeout=10).brokers.values()
    for topic in topics:
        assert len(owner.list_topics(topic, timeout=10).topics[topic].partitions) == PARTITIONS
    yield ",".join(f"{broker.host}:{broker.port}" for broker in found)
    owner.flush(0)  # the cluster lives as long as its owner
