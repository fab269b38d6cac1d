"""Events straight into the log on a real Kafka broker: the same ids, in the partitions where the gateway puts them."""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from confluent_kafka import Consumer, TopicPartition

from ingest.client import Ingestion, KafkaTransport, Limits
from ingest.client.event import EVENT_BYTES_MAX
from ingest.client.kafka import RECORD_BYTES_MAX
from ingest.client.spool import SPOOL_SUFFIX, Spool, fingerprint
from ingest.client.transport import Taken, Unavailable
from ingest.log import kafka_admin, open_log
from ingest.log.kafka_admin import Wanted, make_topics, parse_address
from ingest.log.kafka_log import RECORD_OVERHEAD_BYTES, Writer
from ingest.log.partitions import Limits as LogLimits
from meters.log import USAGE_EVENTS, Entry, Record, TryAgain, partition_key, partition_of
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.mock import mock_brokers
from tests.support.waiting import eventually

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
ADDRESS = "kafka://anywhere"
PARTITIONS = 3
QUICK = Limits(linger_s=0.01, backoff_s=0.05, backoff_s_max=0.5)


def records(url: str) -> list[Record]:
    """Everything in the events' stream."""
    log = open_log(url)
    try:
        positions, found = log.starts(USAGE_EVENTS), []
        while positions != log.ends(USAGE_EVENTS):
            for record in log.read(USAGE_EVENTS, positions, bytes_max=1 << 20, wait_s=1):
                positions[record.partition] = record.offset + 1
                found.append(record)
        return found
    finally:
        log.close()


class Written(NamedTuple):
    """A record as any Kafka consumer sees it."""

    partition: int
    headers: list[tuple[str, bytes]]
    value: bytes


def written(bootstrap: str, topic: str) -> tuple[int, list[Written]]:
    """How many partitions a topic has, and every record in it."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "test", "log_level": 0})
    try:
        partitions = len(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
        places = [TopicPartition(topic, partition, 0) for partition in range(partitions)]
        records_left = sum(consumer.get_watermark_offsets(place, timeout=20)[1] for place in places)
        consumer.assign(places)
        found = []
        while records_left:
            message = consumer.poll(20)
            assert message is not None
            assert message.error() is None
            found.append(Written(message.partition(), message.headers(), message.value()))
            records_left -= 1
        return partitions, found
    finally:
        consumer.close()


@pytest.fixture
def prefix() -> str:
    """Of topics that no other test has."""
    return f"client-{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["broker", "mock"])
def bootstrap(request: pytest.FixtureRequest, prefix: str) -> Iterator[str]:
    """Brokers with the topic: real ones, and the mock that is everywhere."""
    if request.param == "mock":
        with mock_brokers(f"{prefix}.{USAGE_EVENTS}") as addresses:
            yield addresses
    else:
        real: Cluster = request.getfixturevalue("kafka")
        make_topics(parse_address(f"kafka://{real.bootstrap}/{prefix}", {}), Wanted(partitions=PARTITIONS))
        yield real.bootstrap


def transport(bootstrap: str, prefix: str, **settings: object) -> KafkaTransport:
    """To that topic, without chatter."""
    return KafkaTransport(
        bootstrap, ORGANIZATION, topic=f"{prefix}.{USAGE_EVENTS}", settings={"log_level": 0, **settings}, timeout_s=20,
    )  # fmt: skip


def test_events_reach_the_topic(bootstrap: str, prefix: str, tmp_path: Path) -> None:
    """Each once, in the partition of its customer, for the organization."""
    with Ingestion(
        "", base_url="kafka://anywhere", spool=tmp_path, limits=QUICK, transport=transport(bootstrap, prefix)
    ) as ingestion:
        for number in range(500):
            who = f"user-{number % 7}"
            ingestion.ingest({"name": "call", "external_customer_id": who, "external_id": f"e{number}"})
        assert ingestion.flush(60)
    partitions, found = written(bootstrap, f"{prefix}.{USAGE_EVENTS}")
    events = [(record, msgspec.json.decode(line)) for record in found for line in record.value.split(b"\n")]

    assert {tuple(record.headers) for record in found} == {(("organization", ORGANIZATION.encode()),)}
    assert sorted(int(event["external_id"][1:]) for _, event in events) == list(range(500))
    for record, event in events:
        key = partition_key(ORGANIZATION, event["external_customer_id"])
        assert record.partition == partition_of(key, partitions)
    assert ingestion.stats().acknowledged == 500


def test_the_log_reads_what_was_written(kafka: Cluster, prefix: str) -> None:
    """As records of the organization, each event once."""
    url = f"kafka://{kafka.bootstrap}/{prefix}"
    make_topics(parse_address(url, {}), Wanted(partitions=PARTITIONS))
    with Ingestion("", base_url=url, spool=None, limits=QUICK, transport=transport(kafka.bootstrap, prefix)) as sent:
        ids = [sent.ingest({"name": "call", "external_customer_id": f"user-{number}"}) for number in range(50)]
        assert sent.flush(60)
    found = records(url)
    lines = [line for record in found for line in record.value.split(b"\n")]

    assert {record.organization_id for record in found} == {ORGANIZATION}
    assert sorted(msgspec.json.decode(line)["external_id"] for line in lines) == sorted(ids)


def test_a_topic_that_is_not_there_loses_nothing(kafka: Cluster, prefix: str, tmp_path: Path) -> None:
    """The events wait in the spool until it is made."""
    url = f"kafka://{kafka.bootstrap}/{prefix}"
    sent = transport(kafka.bootstrap, prefix)
    with Ingestion("", base_url=url, spool=tmp_path, limits=QUICK, transport=sent) as ingestion:
        ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": "e"})
        assert not ingestion.flush(0.5)
        make_topics(parse_address(url, {}), Wanted(partitions=1))
        assert ingestion.flush(60)

    assert [msgspec.json.decode(record.value)["external_id"] for record in records(url)] == ["e"]


def test_a_topic_made_again_with_fewer_partitions_is_written_to(kafka: Cluster, prefix: str) -> None:
    """By the same transport: it learns how many there are, and where each customer belongs now."""
    address = parse_address(f"kafka://{kafka.bootstrap}/{prefix}", {})
    topic, admin = address.topic(USAGE_EVENTS), kafka.admin()
    lines = [b'{"external_customer_id":"user-%d"}' % number for number in range(20)]
    sent = transport(kafka.bootstrap, prefix)
    make_topics(address, Wanted(partitions=PARTITIONS))
    eventually(lambda: sent.send(lines) == Taken())
    admin.delete_topics([topic])[topic].result(30)
    eventually(lambda: topic not in admin.list_topics(timeout=20).topics)
    make_topics(address, Wanted(partitions=1))
    eventually(lambda: sent.send(lines) == Taken())
    sent.close()

    [record] = written(kafka.bootstrap, topic)[1][-1:]
    assert record.value.split(b"\n") == lines


@contextlib.contextmanager
def no_topics() -> Iterator[str]:
    """Brokers that make whatever they are asked for, and in the end were asked for nothing."""
    with mock_brokers() as brokers:
        yield brokers
        consumer = Consumer({"bootstrap.servers": brokers, "group.id": "test", "log_level": 0})
        with contextlib.closing(consumer):
            assert consumer.list_topics(timeout=20).topics == {}


def test_a_topic_is_not_made_in_passing(prefix: str) -> None:
    """One that brokers make by themselves has their number of partitions, and keeps records for a week."""
    with no_topics() as brokers:
        assert isinstance(transport(brokers, prefix).send([b'{"external_customer_id":"u"}']), Unavailable)


def test_gateways_make_no_topic_in_passing(prefix: str) -> None:
    """Nor do they where the topic went after they knew it."""
    async def write(writer: Writer) -> list[int]:
        return await writer.submit(f"{prefix}.{USAGE_EVENTS}", [Entry(b"{}")], 1)

    with no_topics() as brokers:
        address = parse_address(f"kafka://{brokers}?delivery_timeout_s=1", {})
        with contextlib.closing(Writer(address, LogLimits())) as gateway, pytest.raises(TryAgain):
            asyncio.run(write(gateway))


def test_an_event_that_the_brokers_find_too_large_is_handed_over(kafka: Cluster, prefix: str) -> None:
    """Alone; its batch goes on without it."""
    url = f"kafka://{kafka.bootstrap}/{prefix}"
    make_topics(parse_address(url, {}), Wanted(partitions=1))
    rejected = []
    small = transport(kafka.bootstrap, prefix, **{"message.max.bytes": 20_000})
    counts = {"vendor": "v", "model": "m", "input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    with Ingestion(
        "", base_url=url, spool=None, limits=QUICK, transport=small, on_rejected=rejected.append
    ) as ingestion:
        for number in range(10):
            prompt = {"prompt": "x" * 30_000} if number == 4 else {}
            ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": f"e{number}",
                              "metadata": {"_llm": {**counts, **prompt}}})  # fmt: skip
        assert ingestion.flush(60)

    assert [rejection.external_id for rejection in rejected] == ["e4"]
    assert sum(record.value.count(b"\n") + 1 for record in records(url)) == 9


LARGEST_TEXT_BYTES = EVENT_BYTES_MAX - 1000


def test_the_largest_event_reaches_the_topic(bootstrap: str, prefix: str) -> None:
    """What may be captured may be written; the bound of a record is the gateways'."""
    counts = {"vendor": "v", "model": "m", "input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    large = {"_llm": {**counts, "prompt": "x" * LARGEST_TEXT_BYTES}}
    with Ingestion(
        "", base_url=ADDRESS, spool=None, limits=QUICK, transport=transport(bootstrap, prefix)
    ) as ingestion:
        ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": "e", "metadata": large})
        assert ingestion.flush(60)
    [record] = written(bootstrap, f"{prefix}.{USAGE_EVENTS}")[1]

    assert len(record.value) > LARGEST_TEXT_BYTES
    assert ingestion.stats().acknowledged == 1
    assert RECORD_BYTES_MAX == LogLimits().value_bytes_max + RECORD_OVERHEAD_BYTES < kafka_admin.RECORD_BYTES_MAX


def test_making_a_transport_connects_to_nobody() -> None:
    """So it may be made anywhere, in an event loop too; the first batch is what looks for brokers."""
    with socket.create_server(("127.0.0.1", 0)) as broker:
        broker.settimeout(0.3)  # a producer connects within milliseconds
        KafkaTransport(f"127.0.0.1:{broker.getsockname()[1]}", ORGANIZATION).close()
        with pytest.raises(TimeoutError):
            broker.accept()


def leave(spool: Path, owner: str, external_id: str) -> None:
    """What a process that is gone has left."""
    abandoned = Spool(spool, owner)
    line = {"name": "call", "external_customer_id": "u", "external_id": external_id}
    abandoned.append(1, msgspec.json.encode(line))
    abandoned.close()


def sent_from(spool: Path, bootstrap: str, prefix: str, events: int, **options: Any) -> list[str]:
    """The ids that a client writes which has captured nothing itself, once so many events are written."""
    to = transport(bootstrap, prefix)
    with Ingestion("", base_url=ADDRESS, spool=spool, limits=QUICK, transport=to, **options) as ingestion:
        eventually(lambda: ingestion.stats().acknowledged >= events)
    lines = [line for record in written(bootstrap, to._topic)[1] for line in record.value.split(b"\n")]
    return sorted(msgspec.json.decode(line)["external_id"] for line in lines)


def test_what_another_organization_left_is_not_ours(prefix: str, tmp_path: Path) -> None:
    """Nor what was left for another topic, though address, token and directory are the same."""
    topic = f"{prefix}.{USAGE_EVENTS}"
    for organization, where in ((ORGANIZATION, topic), ("another", topic), (ORGANIZATION, "another")):
        destination = KafkaTransport("anywhere", organization, topic=where).destination
        leave(tmp_path, fingerprint(ADDRESS, "", destination), f"{organization}-{where}")
    with mock_brokers(topic) as brokers:
        assert sent_from(tmp_path, brokers, prefix, 1) == [f"{ORGANIZATION}-{topic}"]

    assert len(list(tmp_path.glob(f"*{SPOOL_SUFFIX}"))) == 2
