"""The reading end of the log on Kafka: librdkafka's consumer, told exactly where to begin, and watched.

It joins no group and has no position of its own: partitions are assigned from the positions asked for, and a position
that is not there is an error, never a jump. So a consumer is nothing to hold on to: one that brings nothing of what
the brokers have is given up for another. Records are handed on only when each follows the one before, and only after
the topic was seen to be still the same one: a topic that was deleted and made again may be long enough to answer the
same offsets with other records.

A read without waiting gives whatever was acknowledged before it, as the port promises; a consumer alone cannot, since
it fetches in the background. So the brokers are asked for the ends first, unless enough is at hand.
"""

import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from ingest.log.kafka_address import Address
from ingest.log.kafka_topics import Topics, end_apart, quiet
from ingest.log.kafka_writer import ADMITTED, ORGANIZATION
from ingest.log.limits import MEBIBYTE, Limits
from ingest.log.places import take_in_order
from meters.log import LATEST_US, USAGE_EVENTS, OpenAgain, PositionLost, Record, TryAgain

FETCHED_BYTES_MAX = 16 * MEBIBYTE
"""Bytes fetched ahead of the reader: about two rounds of the aggregator. A larger record comes alone."""

EVENTS_FETCH = {"fetch.min.bytes": MEBIBYTE, "fetch.wait.max.ms": 30}
"""Usage gathers at the brokers for so long: a fetch for every few records would keep them, and the reader, busier than
the records do. A change of positions may have to wait as long."""

CONTROL_FETCH = {"fetch.wait.max.ms": 200}
"""Decisions are rare, and each is handed on at once; between two of them brokers are asked five times a second."""

UNPACKED_BYTES_MAX = 1_000_000_000
"""librdkafka's bound of an answer, and of what zstd unpacks from it, for which it tries ever larger buffers. A batch
beyond it could never be read. It takes no memory of its own: how much brokers send at once the fetch's bounds say."""

FETCH_S_MAX = 5.0
"""Seconds until records that the brokers have should have arrived. A consumer whose brokers were restarted may never
bring them (librdkafka's issue 5153), nor hear for a minute that its connection leads nowhere; a new one does."""

HELD_BYTES_MAX = 32 * MEBIBYTE
"""Bytes held for a partition that does not answer, before the others are read without it: the aggregator reads 8 MiB at
once, and a partition of a slower broker may be some such rounds behind."""

_headers_of = operator.methodcaller("headers")
"""Asks a message for its headers. A header's name that is no UTF-8 makes confluent-kafka 2.x return a result and set an
error at once, which a call that CPython has specialised does not look for: it is SIGSEGV there. A call from C is never
specialised, and raises SystemError each time."""

TURN_RECORDS = 512  # taken from the client at once
CHECK_S = 5.0  # an idle reader looks this often whether the topic is the same and has as many partitions
LOOK_S = 0.25  # how soon a close is heard


class Reader:
    """Reads one stream."""

    def __init__(self, stream: str, address: Address, topics: Topics, limits: Limits) -> None:
        self._stream, self._topic, self._topics = stream, address.topic(stream), topics
        self._retry_after_s = limits.retry_after_s
        self._organization = address.options.organization or None
        self._holes = address.options.holes == "allowed"
        self._settings = _settings(stream, address, limits)
        self._consumer: Consumer | None = None
        self._known: tuple[str, int] | None = None  # topic id and number of partitions
        self._checked_s = 0.0
        self._next: dict[int, int] = {}  # what the caller will ask for, by partition
        self._fetched: dict[int, int] = {}  # up to where records have arrived
        self._ends: dict[int, int] = {}  # up to where there are records, when last asked
        self._buffers: dict[int, deque[Record]] = {}
        self._buffered_bytes = 0
        self._lock = threading.Lock()
        self._closed = False

    def read(self, positions: Mapping[int, int], bytes_max: int, wait_s: float) -> list[Record]:
        """See the port."""
        deadline_s = time.monotonic() + wait_s
        with self._lock:
            try:
                return self._read(positions, bytes_max, deadline_s)
            except BaseException:
                self._next = {}  # whatever was under way: the next read begins at its positions
                raise

    def close(self) -> None:
        """End a read under way, and let go of the connections."""
        self._closed = True
        with self._lock:
            self._give_up_consumer()

    def _read(self, positions: Mapping[int, int], bytes_max: int, deadline_s: float) -> list[Record]:
        if not positions:
            return []
        if self._next != positions or self._consumer is None:
            self._seek(positions)
        if not (self._buffered() and self._buffered_bytes >= bytes_max and self._enough(bytes_max)):
            self._ends = self._topics.ends(self._stream, positions)
            before = self._fetched.copy()
            self._fetch(lambda: self._enough(bytes_max), time.monotonic() + FETCH_S_MAX)
            if not self._enough(bytes_max) and self._nothing_came(before):
                self._give_up_consumer()
                if not self._buffered():
                    raise TryAgain(f"the brokers hold back records of {self._topic}", self._retry_after_s)
        self._fetch(self._buffered, deadline_s)
        found = self._take(bytes_max)
        if found or time.monotonic() - self._checked_s > CHECK_S:
            self._check()
        return found

    def _seek(self, positions: Mapping[int, int]) -> None:
        """Begin at the positions. Raises PositionLost where the topic does not reach."""
        self._next = {}
        self._check()
        starts, ends = self._topics.starts(self._stream, positions), self._topics.ends(self._stream, positions)
        for partition, position in positions.items():
            if not starts[partition] <= position <= ends[partition]:
                raise self._lost(partition, position, f"it holds {starts[partition]} to {ends[partition]}")
        if self._consumer is None:
            if self._closed:
                raise TryAgain("the log is closed", self._retry_after_s)
            self._consumer = self._connect()
        self._consumer.assign([TopicPartition(self._topic, *place) for place in positions.items()])
        self._next, self._fetched, self._ends = dict(positions), dict(positions), ends
        self._buffers = {partition: deque() for partition in positions}
        self._buffered_bytes = 0

    def _connect(self) -> Consumer:
        try:
            return Consumer(self._settings)
        except KafkaException as error:  # a file of certificates that is just being replaced
            raise TryAgain(f"the log has no consumer: {error.args[0].str()}", self._retry_after_s) from error

    def _give_up_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            end_apart(consumer.close)

    def _check(self) -> None:
        """Raises PositionLost if the topic is another one, OpenAgain if it has more partitions."""
        found = self._topics.describe([self._stream])[self._stream]
        known = self._known = self._known or found
        if found[0] != known[0]:
            raise PositionLost(f"the topic {self._topic} was deleted and made again")
        if found[1] != known[1]:
            self._known = None
            raise OpenAgain(f"the topic {self._topic} has {found[1]} partitions, and had {known[1]}")
        self._checked_s = time.monotonic()

    def _buffered(self) -> bool:
        return any(self._buffers.values())

    def _complete(self) -> bool:
        return not any(map(self._has_more, self._ends))

    def _has_more(self, partition: int) -> bool:
        return self._fetched[partition] < self._ends[partition]

    def _nothing_came(self, before: Mapping[int, int]) -> bool:
        """Of any partition that lacks records, since so much was fetched; a slow network brings a little of one."""
        return all(self._fetched[lacking] == before[lacking] for lacking in self._ends if self._has_more(lacking))

    def _enough(self, bytes_max: int) -> bool:
        """Whether it is known what comes next, and that is a round's worth or all. A laggard is not waited for long."""
        if self._buffered_bytes < bytes_max:
            return self._complete()
        known = all(records or not self._has_more(partition) for partition, records in self._buffers.items())
        return known or self._buffered_bytes > HELD_BYTES_MAX

    def _fetch(self, enough: Callable[[], bool], deadline_s: float) -> None:
        """Take what arrives, until it is enough or the time is over."""
        while not enough() and (left_s := deadline_s - time.monotonic()) > 0:
            if self._closed:
                raise TryAgain("the log is closed", self._retry_after_s)
            consumer = self._consumer
            assert consumer is not None
            message = consumer.poll(min(left_s, LOOK_S))
            if message is not None:
                for each in (message, *consumer.consume(TURN_RECORDS, 0)):
                    self._accept(each)

    def _accept(self, message: Message) -> None:
        """Put a record where it belongs. Raises PositionLost, TryAgain."""
        partition, offset, error = message.partition(), message.offset(), message.error()
        if partition is None or message.topic() is None:
            return  # about brokers, or about the group that nobody joined; the client sees to it
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            raise self._failed(error, partition)
        if partition not in self._fetched or offset is None or offset < self._fetched[partition]:
            return
        is_hole = offset > self._fetched[partition]
        if is_hole and not self._holes:
            why = f"the next one is {offset}; compaction and transactions leave such holes"
            raise self._lost(partition, self._fetched[partition], why)
        self._fetched[partition] = offset
        if error is None:
            record = self._record(message, partition, offset)
            self._buffers[partition].append(record)
            self._buffered_bytes += len(record.value)
            self._fetched[partition] = offset + 1
        elif is_hole:  # markers at the end: positions have to get past them, or they look like usage to come
            self._buffers[partition].append(Record(partition, offset - 1, time.time_ns() // 1000, b""))

    def _record(self, message: Message, partition: int, offset: int) -> Record:
        timestamp_us = min(max(message.timestamp()[1], 0) * 1000, LATEST_US)
        organization, admitted, distinct_keys = self._organization, False, False
        for name, value in _headers(message):
            content = value or b""
            if name == ORGANIZATION:
                organization = content.decode("utf-8", "replace")
            elif name == ADMITTED:
                admitted, distinct_keys = content in (b"1", b"2"), content == b"2"
        value = message.value() or b""
        assert isinstance(value, bytes)
        return Record(partition, offset, timestamp_us, value, organization, admitted, distinct_keys)

    def _take(self, bytes_max: int) -> list[Record]:
        found = take_in_order(self._buffers, self._has_more, bytes_max)
        for record in found:
            self._buffered_bytes -= len(record.value)
            self._next[record.partition] = record.offset + 1
        return found

    def _failed(self, error: KafkaError, partition: int) -> Exception:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            return self._lost(partition, self._fetched.get(partition, -1), "retention removed it")
        return TryAgain(f"{self._topic} cannot be read: {error.str()}", self._retry_after_s)

    def _lost(self, partition: int, position: int, why: str) -> PositionLost:
        return PositionLost(f"{self._topic} has no record {position} in partition {partition}: {why}")


def _headers(message: Message) -> list[tuple[str, bytes | None]]:
    """Of a record; where one's name cannot be read, an organization that nobody is, which makes its lines dead letters.

    Whose they are may stand in what cannot be read, so they are not taken for the default's either.
    """
    try:
        return _headers_of(message) or []
    except SystemError:
        return [(ORGANIZATION, b"")]


def _settings(stream: str, address: Address, limits: Limits) -> dict[str, Any]:
    fetch_bytes = max(MEBIBYTE, min(FETCHED_BYTES_MAX // 4, limits.value_bytes_max))
    return {
        **quiet(address.client()),
        "group.id": "meterstream",  # asked for, and not joined
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        "allow.auto.create.topics": False,
        "isolation.level": "read_committed",
        **(EVENTS_FETCH if stream == USAGE_EVENTS else CONTROL_FETCH),
        "fetch.queue.backoff.ms": 5,
        "fetch.error.backoff.ms": 100,
        "fetch.message.max.bytes": fetch_bytes,
        "fetch.max.bytes": FETCHED_BYTES_MAX,
        "receive.message.max.bytes": UNPACKED_BYTES_MAX,
        "queued.max.messages.kbytes": FETCHED_BYTES_MAX // 1024,
    }
