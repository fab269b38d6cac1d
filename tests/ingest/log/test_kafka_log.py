"""What only a log on Kafka meets: transactions, partitions that are added, records of nobody, a queue that fills."""

import asyncio
import contextlib
import gc
import itertools
import os
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from aggregator.reconcile.log_check import Stretches
from ingest.log import kafka_admin, open_log
from ingest.log.kafka_admin import Address, Topics, Wanted, make_topics, parse_address
from ingest.log.partitions import Limits
from meters.log import USAGE_EVENTS, Entry, Log, OpenAgain, PositionLost, Refused, TryAgain
from tests.support.kafka.cluster import Cluster
from tests.support.ports import take_port
from tests.support.records import ORGANIZATION, Running, line, rows
from tests.support.waiting import PATIENCE_S, eventually

PLENTY = 1 << 30
QUESTIONS = 5
_numbers = itertools.count()


@pytest.fixture
def address(kafka: Cluster) -> Address:
    """Topics of the test's own, one partition."""
    made = parse_address(f"kafka://{kafka.bootstrap}/kafka-log-{next(_numbers)}", {})
    make_topics(made, Wanted(partitions=1))
    return made


@contextlib.contextmanager
def opened(address: Address, options: str = "", limits: Limits | None = None) -> Iterator[Log]:
    """The log there."""
    log = open_log(f"kafka://{address.servers}/{address.prefix}{options}", limits=limits)
    try:
        yield log
    finally:
        log.close()


def append(log: Log, *values: bytes, partition: int = 0) -> list[int]:
    """In one call."""
    return asyncio.run(log.append(USAGE_EVENTS, [Entry(value, partition) for value in values]))


def append_soon(log: Log, value: bytes, partition: int) -> None:
    """As a client does: when it is told to try again, it does."""
    def is_appended() -> bool:
        with contextlib.suppress(TryAgain):
            return bool(append(log, value, partition=partition))
        return False

    eventually(is_appended, look_again_s=0.05)


def test_holes_stop_a_reader_unless_they_are_expected(address: Address, kafka: Cluster) -> None:
    """A transaction's marker is a missing record to whoever does not expect one; what was aborted is never read."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": address.prefix, "log_level": 0})
    producer.init_transactions(30)
    topic = address.topic(USAGE_EVENTS)
    for value, commit in ((b"first", True), (b"aborted", False), (b"second", True)):
        producer.begin_transaction()
        producer.produce(topic, value, partition=0)
        producer.flush(30)
        if commit:
            producer.commit_transaction(30)
        else:
            producer.abort_transaction(30)

    with opened(address) as strict, pytest.raises(PositionLost, match="transactions"):
        strict.read(USAGE_EVENTS, {0: 0}, bytes_max=PLENTY)
    with opened(address, "?holes=allowed") as tolerant:
        found = tolerant.read(USAGE_EVENTS, {0: 0}, bytes_max=PLENTY)
        assert [record.value for record in found if record.value] == [b"first", b"second"]
        assert {0: found[-1].offset + 1} == tolerant.ends(USAGE_EVENTS)  # the last marker is nothing that is awaited
        assert tolerant.read(USAGE_EVENTS, {0: found[-1].offset + 1}, bytes_max=PLENTY) == []
        [offset] = append(tolerant, b"third")
        assert [r.value for r in tolerant.read(USAGE_EVENTS, {0: offset}, bytes_max=PLENTY)] == [b"third"]


def test_a_part_that_ends_with_a_marker_is_read_to_its_end(address: Address, kafka: Cluster) -> None:
    """By reconciliation, after more was written behind it: the marker is nothing that could still come."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": address.prefix, "log_level": 0})
    producer.init_transactions(30)
    for value in (b"first", b"second"):
        producer.begin_transaction()
        producer.produce(address.topic(USAGE_EVENTS), value, partition=0)
        producer.commit_transaction(30)

    with opened(address, "?holes=allowed") as log, contextlib.closing(Stretches(log)) as stretches:
        found = [record.value for records, _ in stretches.read(0, 0, 2, lambda _: True) for record in records]
    assert [value for value in found if value] == [b"first"]


def ends_soon(log: Log) -> dict[int, int]:
    """The ends of a topic whose new partitions may not have a leader yet."""
    while True:
        with contextlib.suppress(TryAgain):
            return log.ends(USAGE_EVENTS)


def test_added_partitions_are_noticed(address: Address, kafka: Cluster) -> None:
    """A reader is told to begin anew; then it, and whoever appends, has the new ones too."""
    topic = address.topic(USAGE_EVENTS)
    with opened(address) as log:
        append(log, b"a")
        assert len(log.read(USAGE_EVENTS, {0: 0}, bytes_max=PLENTY)) == 1
        with pytest.raises(Refused):
            append(log, b"b", partition=1)
        admin = kafka.admin()
        admin.create_partitions([NewPartitions(topic, 3)])[topic].result(30)
        while len(admin.list_topics(topic, timeout=30).topics[topic].partitions) < 3:
            pass
        append(log, b"c")

        with pytest.raises(OpenAgain):
            log.read(USAGE_EVENTS, {0: 1}, bytes_max=PLENTY)
        assert ends_soon(log) == {0: 2, 1: 0, 2: 0}
        append_soon(log, b"d", partition=2)
        found = log.read(USAGE_EVENTS, {0: 1, 1: 0, 2: 0}, bytes_max=PLENTY)
        assert {(record.partition, record.value) for record in found} == {(0, b"c"), (2, b"d")}


def test_records_of_nobody_belong_to_whom_the_url_names(address: Address) -> None:
    """The option is for records without the header; those with one keep theirs."""
    with opened(address, f"?organization={ORGANIZATION}") as log:
        entries = [Entry(b"nobody's"), Entry(b"another's", organization_id="another")]
        asyncio.run(log.append(USAGE_EVENTS, entries))

        found = log.read(USAGE_EVENTS, {0: 0}, bytes_max=PLENTY)
        assert [record.organization_id for record in found] == [ORGANIZATION, "another"]


def test_a_record_that_the_topic_does_not_take_is_refused(address: Address, kafka: Cluster) -> None:
    """Its limit may be below the gateway's. To try again is of no use, and what is smaller goes on being taken."""
    configure(kafka, address.topic(USAGE_EVENTS), "max.message.bytes", "2000")
    with opened(address) as log:
        eventually(lambda: refuses(log, os.urandom(3000)))  # the broker hears of the setting a moment later
        assert append(log, b"small")


def test_the_largest_record_is_read_however_well_it_was_packed(address: Address) -> None:
    """librdkafka unpacks zstd into three times as much until it is enough: its bound is far above any record's size."""
    ids = random.Random(1)
    largest = b"".join(b"%-128s" % line(ids.randbytes(16).hex()) for _ in range(Limits().value_bytes_max // 128))
    with opened(address, "?compression=zstd") as log:
        append(log, largest, b"after it")

        [found] = log.read(USAGE_EVENTS, {0: 0}, bytes_max=1)
        assert found.value == largest
        assert [record.value for record in log.read(USAGE_EVENTS, {0: 1}, bytes_max=1)] == [b"after it"]


def refuses(log: Log, value: bytes) -> bool:
    """Whether the brokers take no such record; what may pass is raised."""
    try:
        append(log, value)
    except Refused as error:
        return "no record of this size" in str(error)
    return False


def configure(kafka: Cluster, topic: str, name: str, value: str) -> None:
    """As a topic is that ``meterstream kafka init`` did not make."""
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin = kafka.admin()  # which has to live until the answer is there
    admin.incremental_alter_configs([resource])[resource].result(30)


def test_times_that_no_calendar_has_hold_up_nothing(address: Address, kafka: Cluster, tmp_path: Path) -> None:
    """A producer may send microseconds for milliseconds: its events are dead letters, and what follows counts."""
    topic = address.topic(USAGE_EVENTS)
    configure(kafka, topic, "message.timestamp.after.max.ms", str(2**63 - 1))
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    times_ms = [1_772_323_200_000_000, 9_200_000_000_000_000_000, 1_772_323_200_000]
    for number, time_ms in enumerate(times_ms):
        for admitted in (b"0", b"1"):
            id = f"{number}-{admitted.decode()}"
            producer.produce(topic, line(id), partition=0, timestamp=time_ms, headers=[("admitted", admitted)])
    assert producer.flush(30) == 0

    with opened(address, f"?organization={ORGANIZATION}") as log:
        for _ in range(2):  # the next life knows the log again
            with Running(log, tmp_path / "store.duckdb") as running:
                store = running.catch_up().store
                stored = rows(store, "SELECT year(timestamp), count(*) FROM events GROUP BY ALL ORDER BY ALL")
                assert stored == [(2026, 2)]
                assert rows(store, "SELECT reason, count(*) FROM dead_letters GROUP BY ALL") == [("record_time", 4)]


def test_memory_is_bounded_while_brokers_answer_nothing(address: Address, kafka: Cluster) -> None:
    """Beyond the queue's bound an append is TryAgain at once; what waits is answered when its time is over."""
    limits = Limits(value_bytes_max=1 << 20, queue_bytes_max=4 << 20)
    [node] = kafka.nodes

    async def fill(log: Log) -> list[list[int] | BaseException]:
        tasks = [log.append(USAGE_EVENTS, [Entry(b"x" * (1 << 20))]) for _ in range(12)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with opened(address, "?delivery_timeout_s=1", limits) as log:
        append(log, b"first")
        node.pause()
        try:
            outcomes = asyncio.run(fill(log))
        finally:
            node.resume()
            kafka.wait_ready()
        assert {TryAgain} == {type(outcome) for outcome in outcomes}
        full = [outcome for outcome in outcomes if "full" in str(outcome)]
        assert len(outcomes) - len(full) <= 5
        append_soon(log, b"last", partition=0)


class AskedTogether(Topics):
    """Goes on with a question about topics only when all of them are on their way."""

    together = threading.Barrier(QUESTIONS, timeout=PATIENCE_S)

    def describe(self, streams: Iterable[str], wait_s: float = 0.1) -> dict[str, tuple[str, int]]:
        """See there."""
        self.together.wait()
        return super().describe(streams, wait_s)


def test_questions_that_nobody_answers_do_not_wait_for_each_other() -> None:
    """While brokers are away the last of many who ask hears of it as soon as the first one."""
    topics = AskedTogether(parse_address(f"kafka://127.0.0.1:{take_port()}/nobody", {}), Limits())
    with contextlib.closing(topics), ThreadPoolExecutor(QUESTIONS) as threads:
        asked = [threads.submit(topics.learn, 0.1) for _ in range(QUESTIONS)]
        heard = [question.exception() for question in asked]
    assert {type(error) for error in heard} == {TryAgain}


class Overtaken(Topics):
    """A first question that is answered only after a second one, and with what there was when it was asked."""

    def __init__(self) -> None:
        super().__init__(parse_address("kafka://127.0.0.1:1/nobody", {}), Limits())
        self._answers = iter([1, 3])
        self.asked, self.answered = threading.Event(), threading.Event()

    def describe(self, streams: Iterable[str], wait_s: float = 0.0) -> dict[str, tuple[str, int]]:
        """See there."""
        partitions = next(self._answers)
        self.asked.set()
        if partitions == 1:
            assert self.answered.wait(PATIENCE_S)
        return dict.fromkeys(streams, ("id", partitions))


def test_an_answer_that_comes_late_takes_no_partition_away() -> None:
    """What a later question found is newer, and partitions are only ever added."""
    with contextlib.closing(Overtaken()) as topics, ThreadPoolExecutor(1) as threads:
        first = threads.submit(topics.learn)
        assert topics.asked.wait(PATIENCE_S)
        newest = topics.learn()
        topics.answered.set()
        assert first.result() is topics.places is newest
    assert newest.partitions[USAGE_EVENTS] == 3


def test_a_client_that_does_not_end_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker's death may leave a client of librdkafka waiting for itself; whoever gave it up goes on."""
    monkeypatch.setattr(kafka_admin, "CLIENT_END_S_MAX", 0.01)
    over, ended = threading.Event(), threading.Event()

    def end() -> None:
        over.wait()
        ended.set()

    kafka_admin.end_apart(end)  # comes back
    over.set()
    assert ended.wait(PATIENCE_S)


def test_a_long_outage_costs_no_threads() -> None:
    """However often nobody answers: each question's client, and its threads, are gone when the question is.

    Other tests' clients live in this process too and may start or end a thread meanwhile: what is left behind would be
    one thread for each question at least.
    """
    topics = Topics(parse_address(f"kafka://127.0.0.1:{take_port()}/nobody", {}), Limits())

    def ask() -> int:
        with pytest.raises(TryAgain):
            topics.learn(0.1)
        return len(list(Path("/proc/self/task").iterdir()))

    first = ask()
    gc.disable()  # a busy process may not collect for minutes
    try:
        assert max(ask() for _ in range(QUESTIONS)) < first + QUESTIONS
    finally:
        gc.enable()
        topics.close()
