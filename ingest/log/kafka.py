"""The log on Kafka: the port on two topics, for any number of gateways on any number of machines.

Kafka is used narrowly, because its wide parts are where clients lose money: explicit partitions, positions from the
store, no consumer group, no transactions, no idempotent producer; what counts an event once is its identity.
``kafka_writer`` appends, ``kafka_reader`` reads, ``kafka_topics`` asks the brokers, ``kafka_address`` understands the
URL. This module puts them together.

The client is confluent-kafka (librdkafka). aiokafka 0.14 was tried first on Kafka 4.4: it cannot tell a topic's id, so
a topic that was deleted and made again looks like the same one; its idempotent producer let an append wait past every
timeout while the broker was stopped, where this port promises an answer; and it took about 350 us of processor time
for a record of 30 KB. So the classic clients of librdkafka do the work, behind a thread of our own.

Two things differ from the embedded log. A record's time has milliseconds and comes from the clock of whoever
appended, so it can step back between records of different gateways. And an append of several entries to one partition
that fails may have written some of them; repeating it is harmless, as always.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence

from ingest.log.kafka_address import Address
from ingest.log.kafka_reader import Reader
from ingest.log.kafka_topics import OPENING_S_MAX, Topics
from ingest.log.kafka_writer import Writer
from ingest.log.limits import Limits
from ingest.log.places import Places
from meters.log import Entry, Record, Refused, TryAgain


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
        return self._writing().submit(self._address.topic(stream), entries, self._clock_us() // 1000)

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """The next records from the positions. Raises PositionLost, OpenAgain, TryAgain."""
        self._places().check_all(stream, positions)
        return self._reading(stream).read(positions, bytes_max, wait_s)

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
