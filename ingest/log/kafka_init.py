"""The two topics, made as they have to be, or compared with it.

Nothing here is made in passing: a topic that a broker makes by itself has one partition, forgets after a week and may
be compacted. What is there already is never changed unless asked to; each setting that would lose records, or let an
acknowledged one be lost, is named with what it should be.
"""

import time
from typing import Any

import msgspec
from confluent_kafka import KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from ingest.log.kafka_address import Address
from ingest.log.kafka_topics import Complaint, quiet
from meters.log import USAGE_CONTROL, USAGE_EVENTS

EVENTS_PARTITIONS = 12
"""Enough for gateways and producers to write side by side; the store has one reader however many there are."""

REPLICAS_MAX = 3
RECORD_BYTES_MAX = 28 * 1024 * 1024  # a record of 24 MiB, with its batch around it
FUTURE_MS_MAX = 60 * 60 * 1000  # a producer's clock; without a bound one record could keep retention from ever acting
DAY_MS = 24 * 60 * 60 * 1000
CONNECT_S_MAX = 5.0
REQUEST_S_MAX = 30.0  # making a topic takes several brokers


class Wanted(msgspec.Struct, frozen=True):
    """What an operator decides. None takes what suits the cluster."""

    partitions: int | None = None  # of usage.events
    replicas: int | None = None
    retention_days: int = 0  # of usage.events; 0 keeps all
    flush: bool = False  # every record on the disk before it is acknowledged: for a single broker
    repair: bool = False  # change settings that differ


class Finding(msgspec.Struct, frozen=True):
    """One thing about one topic. ``wrong`` is empty where all is well."""

    topic: str
    subject: str
    done: str
    wrong: str = ""


class Unreachable(Exception):
    """The brokers did not answer, or did not let us; the message says which."""


def make_topics(address: Address, wanted: Wanted) -> list[Finding]:
    """Make the topics that are not there and look at those that are. Raises Unreachable."""
    complaint = Complaint()
    admin = AdminClient(quiet(address.client()) | {"error_cb": complaint})
    try:
        cluster = admin.list_topics(timeout=CONNECT_S_MAX)
        replicas = wanted.replicas or min(REPLICAS_MAX, len(cluster.brokers))
        found: list[Finding] = []
        for stream, partitions in ((USAGE_EVENTS, wanted.partitions or EVENTS_PARTITIONS), (USAGE_CONTROL, 1)):
            topic = address.topic(stream)
            settings = _settings(stream, replicas, wanted)
            if topic not in cluster.topics:
                new = NewTopic(topic, partitions, replicas, config=settings)
                admin.create_topics([new])[topic].result(REQUEST_S_MAX)
                _await_topic(admin, topic)
                found.append(Finding(topic, "topic", f"made with {partitions} partitions, {replicas} replicas"))
            else:
                asked = partitions if stream == USAGE_CONTROL or wanted.partitions else None
                found += [*_compare_shape(admin, topic, asked), *_compare(admin, topic, settings, wanted.repair)]
        return found
    except (KafkaException, TimeoutError) as error:
        admin.poll(0)
        said = error.args[0].str() if isinstance(error, KafkaException) else "no answer in time"
        reason = f"{said}; {complaint.last}" if complaint.last else said
        raise Unreachable(f"the brokers at {address.servers}: {reason}") from error


def _await_topic(admin: AdminClient, topic: str) -> None:
    """The controller has made it; the brokers hear of it a moment later."""
    deadline_s = time.monotonic() + REQUEST_S_MAX
    while topic not in admin.list_topics(timeout=REQUEST_S_MAX).topics and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _settings(stream: str, replicas: int, wanted: Wanted) -> dict[str, str]:
    days = wanted.retention_days if stream == USAGE_EVENTS else 0  # decisions are kept for ever
    settings = {
        "cleanup.policy": "delete",
        "retention.ms": str(days * DAY_MS) if days else "-1",
        "retention.bytes": "-1",
        "min.insync.replicas": str(max(1, replicas - 1)),
        "unclean.leader.election.enable": "false",
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(FUTURE_MS_MAX),
        "max.message.bytes": str(RECORD_BYTES_MAX),
    }
    return settings | ({"flush.messages": "1"} if wanted.flush else {})


def _compare_shape(admin: AdminClient, topic: str, partitions: int | None) -> list[Finding]:
    described: Any = admin.describe_topics(TopicCollection([topic]))[topic].result(REQUEST_S_MAX)
    count = len(described.partitions)
    replicas = min(len(partition.replicas) for partition in described.partitions)
    done = f"was there, with {count} partitions, {replicas} replicas"
    wrong = ""
    if partitions is not None and count != partitions:
        wrong = f"has {count} partitions and not {partitions}: Kafka can add some, and cannot take any away"
    return [Finding(topic, "topic", done, wrong)]


def _compare(admin: AdminClient, topic: str, settings: dict[str, str], repair: bool) -> list[Finding]:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found: Any = admin.describe_configs([resource])[resource].result(REQUEST_S_MAX)
    differing = {
        name: (found[name].value if name in found else "unknown to this Kafka", value)
        for name, value in settings.items()
        if name not in found or found[name].value != value
    }
    if repair and differing:
        changes = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
            for name, (_, value) in differing.items()
        ]
        changed = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=changes)
        admin.incremental_alter_configs([changed])[changed].result(REQUEST_S_MAX)
        return [Finding(topic, name, f"changed from {was} to {value}") for name, (was, value) in differing.items()]
    return [Finding(topic, name, f"left at {was}", f"should be {value}") for name, (was, value) in differing.items()]
