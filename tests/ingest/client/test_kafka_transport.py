"""Events straight into the log on a real Kafka broker: the same ids, in the partitions where the gateway puts them."""

import asyncio
import uuid
from pathlib import Path

import msgspec
import pytest

from ingest.client import Ingestion, KafkaTransport, Limits
from ingest.log import open_log
from ingest.log.kafka_address import parse_address
from ingest.log.kafka_init import Wanted, make_topics
from meters.log import USAGE_EVENTS, Record
from meters.partition_key import partition_key, partition_of
from tests.kafka.cluster import Cluster

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
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


@pytest.fixture
def prefix() -> str:
    """Of topics that no other test has."""
    return f"client-{uuid.uuid4().hex[:8]}"


def transport(kafka: Cluster, prefix: str, **settings: object) -> KafkaTransport:
    """To that topic, without chatter."""
    return KafkaTransport(
        kafka.bootstrap, ORGANIZATION, topic=f"{prefix}.{USAGE_EVENTS}", settings={"log_level": 0, **settings},
        timeout_s=20,
    )  # fmt: skip


def test_events_reach_the_log(kafka: Cluster, prefix: str, tmp_path: Path) -> None:
    """Each once, in order for each customer, in the partition of its customer, for the organization."""
    url = f"kafka://{kafka.bootstrap}/{prefix}"
    make_topics(parse_address(url, {}), Wanted(partitions=PARTITIONS))
    with Ingestion(
        "", base_url=url, spool=tmp_path, limits=QUICK, transport=transport(kafka, prefix)
    ) as ingestion:
        for number in range(500):
            who = f"user-{number % 7}"
            ingestion.ingest({"name": "call", "external_customer_id": who, "external_id": f"e{number}"})
        assert ingestion.flush(60)
    found = records(url)
    events = [(record, msgspec.json.decode(line)) for record in found for line in record.value.split(b"\n")]

    assert {record.organization_id for record in found} == {ORGANIZATION}
    assert sorted(int(event["external_id"][1:]) for _, event in events) == list(range(500))
    for record, event in events:
        key = partition_key(ORGANIZATION, event["external_customer_id"])
        assert record.partition == partition_of(key, PARTITIONS)
    assert ingestion.stats().acknowledged == 500


def test_a_topic_that_is_not_there_loses_nothing(kafka: Cluster, prefix: str, tmp_path: Path) -> None:
    """The events wait in the spool until it is made."""
    url = f"kafka://{kafka.bootstrap}/{prefix}"
    sent = transport(kafka, prefix, **{"allow.auto.create.topics": False})
    with Ingestion("", base_url=url, spool=tmp_path, limits=QUICK, transport=sent) as ingestion:
        ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": "e"})
        assert not ingestion.flush(0.5)
        make_topics(parse_address(url, {}), Wanted(partitions=1))
        assert ingestion.flush(60)

    assert [msgspec.json.decode(record.value)["external_id"] for record in records(url)] == ["e"]


def test_an_event_that_the_brokers_find_too_large_is_handed_over(kafka: Cluster, prefix: str) -> None:
    """Alone; its batch goes on without it."""
    url = f"kafka://{kafka.bootstrap}/{prefix}"
    make_topics(parse_address(url, {}), Wanted(partitions=1))
    rejected = []
    small = transport(kafka, prefix, **{"message.max.bytes": 20_000})
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


def test_nothing_waits_for_an_event_loop(kafka: Cluster) -> None:
    """Making a transport connects to nobody."""
    async def make() -> KafkaTransport:
        return KafkaTransport(kafka.bootstrap, ORGANIZATION)

    asyncio.run(make()).close()
