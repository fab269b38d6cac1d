"""librdkafka's mock brokers: a cluster inside this process, for machines without Java.

It shows how a producer writes, and a consumer reads it back. Meterstream's own log cannot run on it: the log asks
for a topic's id, a question that goes to the controller, and a mock has none (librdkafka 2.16: "Failed while waiting
for controller"). What a broker promises about durability, a mock cannot show at all.
"""

import contextlib
from collections.abc import Iterator

from confluent_kafka import Producer


@contextlib.contextmanager
def mock_brokers(brokers: int = 3) -> Iterator[str]:
    """Their addresses, while the block lasts. Topics make themselves, with four partitions."""
    owner = Producer({"bootstrap.servers": "", "test.mock.num.brokers": brokers, "log_level": 0})
    found = owner.list_topics(timeout=10).brokers.values()
    yield ",".join(f"{broker.host}:{broker.port}" for broker in found)
    owner.flush(0)  # the cluster lives as long as its owner
