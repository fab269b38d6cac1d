"""``KafkaTransport``: send events straight into the log, where the log is Kafka.

    Ingestion("", base_url="kafka://broker:9092", transport=KafkaTransport("broker:9092", ORGANIZATION_ID))

For trusted producers inside the network: no gateway checks a token, so a producer that may write to the topic may
write for every organization. A record holds the events of one partition, a line each, and names the organization in
its header. The partition follows from the customer as in the gateway; name customers by your own ids, because the
server's id of such a customer leads to another partition. The aggregator validates every line: a refused line becomes
a dead letter there and is not reported to the client.

A spool belongs to the address, the organization and the topic together. Needs confluent-kafka.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from ingest.client.lifecycle import abandon
from ingest.client.transport import Outcome, Refused, Taken, Unavailable
from meters.log import partition_key, partition_of

ORGANIZATION = "organization"
"""The header that names whose events a record holds."""

RECORD_BYTES_MAX = 24 * 1024 * 1024 + 64 * 1024
"""Of a record with what belongs to it: as gateways write them, and as the topic takes them."""

_POLL_S = 0.05
_CUSTOMERS_MAX = 100_000  # whose partitions are remembered: some ten megabytes

_logger = logging.getLogger(__name__)


class _Whose(msgspec.Struct):
    """What decides the partition of an event."""

    external_customer_id: str | None = None
    customer_id: str | None = None


class KafkaTransport:
    """Batches as records of ``usage.events``. ``settings`` are librdkafka's, for what brokers ask of their clients."""

    def __init__(
        self, brokers: str, organization_id: str, *, topic: str = "usage.events",
        settings: Mapping[str, Any] | None = None, timeout_s: float = 30.0,
    ) -> None:  # fmt: skip
        import confluent_kafka  # noqa: F401 - here, because no thread of a client may import anything

        self._settings = {
            "bootstrap.servers": brokers, "acks": "all", "compression.type": "lz4", "linger.ms": 1,
            "delivery.timeout.ms": int(timeout_s * 1000), "request.timeout.ms": int(timeout_s * 1000),
            "message.max.bytes": RECORD_BYTES_MAX, "logger": _logger,
            "allow.auto.create.topics": False,  # what brokers make when asked in passing keeps records for a week
            **(settings or {}),
        }  # fmt: skip
        self._topic, self._organization_id, self._timeout_s = topic, organization_id, timeout_s
        self.destination = f"{organization_id}\n{topic}"
        self._lock = threading.Lock()
        self._producer: Any = None
        self._partitions = 0
        self._partition = self._cached()

    def send(self, lines: Sequence[bytes]) -> Outcome:
        """Write the events and wait until every broker that must have them has them."""
        from confluent_kafka import KafkaError, KafkaException

        try:
            producer = self._connected()
            call = _Call(producer)
            for partition, group in self._by_partition(lines).items():
                call.produce(self._topic, partition, b"\n".join(group), self._organization_id)
            error = call.wait()
        except KafkaException as failure:
            error = failure.args[0]
        except BufferError:
            return Unavailable("the producer's queue is full")
        if error is None:
            return Taken()
        if error.code() in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE):
            return Refused(error.name())
        if error.code() == KafkaError._UNKNOWN_PARTITION:
            self.close()  # or what it still holds would keep it
            self._producer = None  # the topic was made again with fewer: the next batch learns how many
        return Unavailable(error.name())

    def after_fork(self) -> None:
        """A new producer; the old one's threads did not come along."""
        if self._producer is not None:
            abandon(self._producer)
        self._producer, self._lock = None, threading.Lock()

    def close(self) -> None:
        """Give up what nobody waits for any more."""
        producer = self._producer
        if producer is not None:
            producer.purge()
            producer.flush(_POLL_S)

    def _connected(self) -> Any:
        from confluent_kafka import KafkaException, Producer

        with self._lock:
            producer = self._producer or Producer(self._settings)
            if self._producer is None:
                topic = producer.list_topics(self._topic, self._timeout_s).topics[self._topic]
                if topic.error is not None:
                    raise KafkaException(topic.error)
                self._partitions, self._partition = len(topic.partitions), self._cached()
                self._producer = producer
            return producer

    def _by_partition(self, lines: Sequence[bytes]) -> dict[int, list[bytes]]:
        groups: dict[int, list[bytes]] = defaultdict(list)
        for line in lines:
            whose = msgspec.json.decode(line, type=_Whose)
            groups[self._partition(whose.external_customer_id or whose.customer_id or "")].append(line)
        return groups

    def _cached(self) -> Callable[[str], int]:
        return lru_cache(_CUSTOMERS_MAX)(self._partition_of)

    def _partition_of(self, customer: str) -> int:
        return partition_of(partition_key(self._organization_id, customer), self._partitions)


class _Call:
    """The records of one batch, and whether all of them are written."""

    def __init__(self, producer: Any) -> None:
        self._producer, self._left, self._error = producer, 0, None
        self._lock = threading.Lock()  # any thread that polls may hear of a delivery

    def produce(self, topic: str, partition: int, value: bytes, organization_id: str) -> None:
        """Hand one record over. Raises BufferError, KafkaException."""
        with self._lock:
            self._left += 1
        self._producer.produce(
            topic, value, partition=partition, headers=[(ORGANIZATION, organization_id.encode())],
            on_delivery=self._delivered,
        )  # fmt: skip

    def wait(self) -> Any:
        """Wait for the answers: the delivery time-out bounds it. The first error, or None."""
        while self._left:
            self._producer.poll(_POLL_S)
        return self._error

    def _delivered(self, error: Any, message: Any) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
