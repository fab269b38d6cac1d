"""The log on Kafka: for any number of gateways on any number of machines.

``KafkaLog`` implements the port on two topics. ``Writer`` appends through librdkafka's producer, ``Reader`` reads
through its consumer; ``ingest.log.kafka_admin`` has the URL and the questions about topics. Kafka is used narrowly:
explicit partitions, positions from the store, no consumer group, no transactions, no idempotent producer. Events are
deduplicated by their identity in any case.

Two things differ from the embedded log. A record's time has milliseconds and comes from the clock of the appending
gateway, so it can step back between records of different gateways. An append of several entries to one partition that
fails may have written some of them; retrying is harmless.
"""

import asyncio
import contextlib
import functools
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from ingest.log.kafka_admin import OPENING_S_MAX, Address, Topics, end_apart, quiet
from ingest.log.partitions import MEBIBYTE, Limits, Places, next_stamp, take_in_order
from ingest.log.sqlite_writer import Outcome, answer
from meters.log import LATEST_US, USAGE_EVENTS, Entry, OpenAgain, PositionLost, Record, Refused, TryAgain

# The producer. ``submit`` hands every entry to librdkafka, which queues, batches, compresses and retries. One future
# stands for the whole call, and a counter says when its last entry was answered. A thread polls librdkafka and
# answers all calls that one poll finished with a single step into each event loop.
#
# The producer is not idempotent. Idempotence would avoid some duplicates but not all (leaders change, processes
# restart). It would also need an id from the brokers before the first record, half a second or more after each start,
# and a stale sequence number would be fatal. The price is the order of two records that are in flight at one time.

ORGANIZATION, ADMITTED = "organization", "admitted"
"""Names of the headers that carry ``Entry.organization_id``, and ``Entry.admitted``: "1", or "2" with distinct keys."""

LOOK_S_MAX = 1.0  # for the brokers to say which partitions there are; answers wait meanwhile
POLL_S = 0.05  # how soon a close is heard; answers wake the poll
PAUSE_S = 0.003  # after answers, so that those of several partitions wake the event loop once
RECORD_OVERHEAD_BYTES = 64 * 1024  # headers, and what a batch adds to its records
IN_FLIGHT_MAX = 5  # requests under way to one broker, which takes them one by one: enough to hide the way there

_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)


Delivered = Callable[[KafkaError | None, Message], None]


class Call:
    """What was submitted at once: a future, and what is known of its entries so far. Changed by the thread alone."""

    __slots__ = ("error", "future", "left", "offsets")

    def __init__(self, count: int) -> None:
        self.future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.offsets = [-1] * count
        self.left = count
        self.error: KafkaError | None = None


class Writer:
    """A producer for all streams. ``submit`` is for event loops, ``close`` for anybody."""

    def __init__(self, address: Address, limits: Limits) -> None:
        """Start the thread; nobody is connected to yet. Raises TryAgain where librdkafka makes no producer."""
        self._settings = _producer_settings(address, limits)
        self._retry_after_s = limits.retry_after_s
        self._finished: list[Call] = []
        self._look_again = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()  # between the last submit and close
        try:
            self._producer = Producer(self._settings)
        except KafkaException as error:  # a file of certificates that is just being replaced
            raise TryAgain(f"the log has no producer: {error.args[0].str()}", self._retry_after_s) from error
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def submit(self, topic: str, entries: Sequence[Entry], timestamp_ms: int) -> "asyncio.Future[list[int]]":
        """Queue the entries and return the future of their offsets. Raises TryAgain when full or closed."""
        call = Call(len(entries))
        with self._lock:
            if self._closing.is_set():
                raise TryAgain("the log is closed", self._retry_after_s)
            for index, entry in enumerate(entries):
                self._produce(topic, entry, timestamp_ms, functools.partial(self._delivered, call, index))
        return call.future

    def _produce(self, topic: str, entry: Entry, timestamp_ms: int, delivered: Delivered) -> None:
        headers = _producer_headers(entry.organization_id, entry.admitted, entry.distinct_keys)
        try:
            self._producer.produce(
                topic, entry.value, partition=entry.partition, timestamp=timestamp_ms, headers=headers,
                on_delivery=delivered,
            )  # fmt: skip
        except BufferError:
            raise TryAgain("the log's queue is full", self._retry_after_s) from None
        except KafkaException as error:
            if error.args[0].code() == KafkaError._UNKNOWN_PARTITION:
                self._look_again.set()  # it may be one that the client has not heard of
            raise self._exception(error.args[0]) from error

    def close(self) -> None:
        """Finish what was submitted, as far as the brokers answer within the delivery time, then end the thread."""
        with self._lock:
            self._closing.set()
        self._thread.join()

    def _delivered(self, call: Call, index: int, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            call.error = error
        else:
            call.offsets[index] = message.offset() or 0
        call.left -= 1
        if not call.left:
            self._finished.append(call)

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._producer.poll(POLL_S):
                self._answer()
                time.sleep(PAUSE_S)
            if self._look_again.is_set():
                self._look_again.clear()
                with contextlib.suppress(KafkaException):
                    self._producer.list_topics(timeout=LOOK_S_MAX)
        self._producer.flush(self._settings["delivery.timeout.ms"] / 1000)
        self._producer.purge()  # what is left was not acknowledged, and its callers are told so
        while self._producer.poll(0):
            pass
        self._answer()

    def _answer(self) -> None:
        finished, self._finished = self._finished, []
        answer([(call.future, self._outcome(call)) for call in finished])

    def _outcome(self, call: Call) -> Outcome:
        return call.offsets if call.error is None else self._exception(call.error)

    def _exception(self, error: KafkaError) -> TryAgain | Refused:
        if error.code() in _TOO_LARGE:
            return Refused(f"the brokers take no record of this size: {error.str()}")
        return TryAgain(f"the log could not write: {error.str()}", self._retry_after_s)


@functools.lru_cache(maxsize=1024)
def _producer_headers(
    organization_id: str | None, admitted: bool, distinct_keys: bool
) -> list[tuple[str, str | bytes | None]]:
    """The headers of a record; made once for each organization, and read only."""
    headers: list[tuple[str, str | bytes | None]] = []
    if organization_id is not None:
        headers.append((ORGANIZATION, organization_id.encode()))
    if admitted:
        headers.append((ADMITTED, b"2" if distinct_keys else b"1"))
    return headers


def _producer_settings(address: Address, limits: Limits) -> dict[str, Any]:
    options = address.options
    delivery_ms = int(options.delivery_timeout_s * 1000)
    return {
        **quiet(address.client()),
        "allow.auto.create.topics": False,  # what brokers make when asked in passing keeps records for a week
        "acks": "all",
        "max.in.flight.requests.per.connection": IN_FLIGHT_MAX,
        "delivery.timeout.ms": delivery_ms,
        "request.timeout.ms": delivery_ms,  # how long brokers may wait for their replicas
        "socket.timeout.ms": max(delivery_ms, 1000),
        "linger.ms": options.linger_ms,
        "compression.type": options.compression,
        "message.max.bytes": limits.value_bytes_max + RECORD_OVERHEAD_BYTES,
        "queue.buffering.max.kbytes": (limits.queue_bytes_max + RECORD_OVERHEAD_BYTES) // 1024,
        "queue.buffering.max.messages": limits.queue_entries_max,
        "retry.backoff.ms": 50,
    }


# The consumer. It joins no group and keeps no position: partitions are assigned at the requested positions, and a
# missing position is an error, never a jump. A consumer that does not deliver records that the brokers have is
# replaced by a new one. Records are returned only if each follows the one before, and only after the topic's id was
# checked: a topic that was deleted and created again may be long enough to answer the same offsets with other
# records.
#
# A read without waiting returns everything that was acknowledged before it, as the port promises. A consumer fetches
# in the background and cannot promise that, so the brokers are asked for the ends first, unless enough is buffered.

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
        self._settings = _consumer_settings(stream, address, limits)
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
        for name, value in _header_pairs(message):
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


def _header_pairs(message: Message) -> list[tuple[str, bytes | None]]:
    """Of a record; where one's name cannot be read, an organization that nobody is, which makes its lines dead letters.

    Whose they are may stand in what cannot be read, so they are not taken for the default's either.
    """
    try:
        return _headers_of(message) or []
    except SystemError:
        return [(ORGANIZATION, b"")]


def _consumer_settings(stream: str, address: Address, limits: Limits) -> dict[str, Any]:
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


# The client library is confluent-kafka (librdkafka). aiokafka 0.14 was tried first on Kafka 4.4. It does not expose a
# topic's id, so a topic that was deleted and created again looks unchanged. Its idempotent producer let an append
# wait past every timeout while the broker was stopped, where this port promises an answer. It took about 350 us of
# CPU for a record of 30 KB. So librdkafka does the work, behind a thread of our own.

class KafkaLog:
    """The log at the address. See ``meters.log.Log`` for what the methods promise."""

    def __init__(
        self, address: Address, partitions: Mapping[str, int] | None, clock_us: Callable[[], int], limits: Limits
    ) -> None:
        """Open it; brokers that are away, and topics that are not there yet, are waited for by whoever uses it.

        Raises Refused when the topics have other partitions than ``partitions``, ValueError for the address.
        """
        self._address, self._clock_us, self._limits = address, clock_us, limits
        self._topics = Topics(address, limits)
        self._readers: dict[str, Reader] = {}
        self._writer: Writer | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._newest_ms = 0  # of the records of our own processes that this one wrote or read
        with contextlib.suppress(TryAgain):
            places = self._topics.learn(OPENING_S_MAX)
            if partitions and places.partitions != dict(partitions):
                raise Refused(f"the topics have the partitions {places.partitions}, not {dict(partitions)}")

    async def append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        """Make the entries durable and return their offsets. Raises TryAgain, Refused."""
        if self._topics.places is None:
            await asyncio.to_thread(self._topics.learn)
        return await self.submit(stream, entries) if entries else []

    def submit(self, stream: str, entries: Sequence[Entry]) -> "asyncio.Future[list[int]]":
        """Hand the entries to the client and return the future of their offsets. Raises TryAgain, Refused."""
        if self._topics.places is None:
            raise TryAgain("the brokers have not said yet which partitions there are", self._limits.retry_after_s)
        self._topics.places.check_entries(stream, entries, self._limits)
        return self._writing().submit(self._address.topic(stream), entries, self._stamp_ms(stream))

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """The next records from the positions. Raises PositionLost, OpenAgain, TryAgain."""
        self._places().check_all(stream, positions)
        records = self._reading(stream).read(positions, bytes_max, wait_s)
        newest_us = max((record.timestamp_us for record in records if record.is_ours), default=0)
        with self._lock:
            self._newest_ms = max(self._newest_ms, newest_us // 1000)
        return records

    def starts(self, stream: str) -> dict[int, int]:
        """The offset of the oldest record, by partition."""
        return self._topics.starts(stream, self._fresh_places().of(stream))

    def ends(self, stream: str) -> dict[int, int]:
        """The offset the next record will get, by partition."""
        return self._topics.ends(stream, self._fresh_places().of(stream))

    def identity(self, stream: str) -> str:
        """The topic's id, which Kafka made with it."""
        self._places().of(stream)
        return self._topics.describe([stream])[stream][0]

    def trim(self, stream: str, older_than_us: int) -> int:
        """None: retention is a setting of the topic, and the brokers' affair."""
        return 0

    def close(self) -> None:
        """Finish what was submitted, then let go of every connection."""
        with self._lock:
            self._closed = True
            writer, self._writer = self._writer, None
            readers = list(self._readers.values())
        if writer is not None:
            writer.close()
        for reader in readers:
            reader.close()
        self._topics.close()

    def _places(self) -> Places:
        self._check_open()
        return self._topics.places or self._topics.learn()

    def _fresh_places(self) -> Places:
        self._check_open()
        return self._topics.learn()

    def _stamp_ms(self, stream: str) -> int:
        """The time of a new record: other gateways hear of a later one with the next decision that they read."""
        with self._lock:
            self._newest_ms = next_stamp(stream, self._clock_us() // 1000, self._newest_ms)
            return self._newest_ms

    def _writing(self) -> Writer:
        with self._lock:
            self._check_open()
            if self._writer is None:
                self._writer = Writer(self._address, self._limits)
            return self._writer

    def _reading(self, stream: str) -> Reader:
        with self._lock:
            self._check_open()
            if stream not in self._readers:
                self._readers[stream] = Reader(stream, self._address, self._topics, self._limits)
            return self._readers[stream]

    def _check_open(self) -> None:
        if self._closed:
            raise TryAgain("the log is closed", self._limits.retry_after_s)
