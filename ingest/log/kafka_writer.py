"""The writing end of the log on Kafka: librdkafka's producer, and a thread that carries its answers to the callers.

``submit`` hands every entry to librdkafka, which queues, batches, compresses and repeats; one future stands for the
whole call, however many entries it has, and a counter says when the last of them was answered. The thread polls, and
answers all the calls that one poll finished with a single step into each event loop.

The producer is not an idempotent one. That would spare the log some repetitions, but not all of them (leaders change,
processes restart), and what counts an event once is its identity in any case. In exchange it would need an id from
the brokers before its first record, half a second or more after each start, and a stale sequence number would be
fatal for it. What is given up is the order of two records that were under way at the same time.
"""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from ingest.log.kafka_address import Address
from ingest.log.kafka_topics import quiet
from ingest.log.limits import Limits
from ingest.log.writer import Outcome, answer
from meters.log import Entry, Refused, TryAgain

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
        self._settings = _settings(address, limits)
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
        headers = _headers(entry.organization_id, entry.admitted, entry.distinct_keys)
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
def _headers(organization_id: str | None, admitted: bool, distinct_keys: bool) -> list[tuple[str, str | bytes | None]]:
    """The headers of a record; made once for each organization, and read only."""
    headers: list[tuple[str, str | bytes | None]] = []
    if organization_id is not None:
        headers.append((ORGANIZATION, organization_id.encode()))
    if admitted:
        headers.append((ADMITTED, b"2" if distinct_keys else b"1"))
    return headers


def _settings(address: Address, limits: Limits) -> dict[str, Any]:
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
