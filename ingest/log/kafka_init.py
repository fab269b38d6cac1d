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
from ingest.log.kafka_topics import Complaint, make_admin
from meters.log import USAGE_CONTROL, USAGE_EVENTS

EVENTS_PARTITIONS = 12
"""Enough for gateways and producers to write side by side; the store has one reader however many there are."""

REPLICAS_MAX = 3
RECORD_BYTES_MAX = 28 * 1024 * 1024  # a record of 24 MiB, with its batch around it
FUTURE_MS_MAX = 60 * 60 * 1000  # a producer's clock; without a bound one record could keep retention from ever acting
DAY_MS = 24 * 60 * 60 * 1000
CONFIRMING = "min.insync.replicas"
STUCK = "more than there are replicas, so nothing can be appended: add replicas, or set it to their number"
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
    is_repairable: bool = False  # ``Wanted.repair`` would set it right


class Unreachable(Exception):
    """The brokers did not answer, or did not let us; the message says which."""


def make_topics(address: Address, wanted: Wanted) -> list[Finding]:
    """Make the topics that are not there and look at those that are. Raises Unreachable, ValueError for the address."""
    complaint = Complaint()
    admin = make_admin(address, complaint)
    try:
        return _make_topics(admin, address, wanted)
    except (KafkaException, TimeoutError) as error:
        admin.poll(0)
        said = error.args[0].str() if isinstance(error, KafkaException) else "no answer in time"
        reason = f"{said}; {complaint.last}" if complaint.last else said
        raise Unreachable(f"the brokers at {address.servers}: {reason}") from error


def _make_topics(admin: AdminClient, address: Address, wanted: Wanted) -> list[Finding]:
    cluster = admin.list_topics(timeout=CONNECT_S_MAX)
    brokers = len(cluster.brokers)  # that answer now; others may be away for a while
    replicas = wanted.replicas or min(REPLICAS_MAX, brokers)
    few = "" if wanted.replicas or replicas == REPLICAS_MAX else f"; {REPLICAS_MAX} need as many brokers to answer"
    partitions = {USAGE_EVENTS: wanted.partitions or EVENTS_PARTITIONS, USAGE_CONTROL: 1}
    new = {stream for stream in partitions if address.topic(stream) not in cluster.topics}
    if new and replicas > brokers:
        what = f"{brokers} brokers answer, too few for {replicas} replicas"
        raise Unreachable(f"{what}: start the others, or ask for fewer with --replicas")
    found: list[Finding] = []
    for stream, count in partitions.items():
        topic = address.topic(stream)
        if stream in new:
            _make(admin, NewTopic(topic, count, replicas, config=_settings(stream, replicas, wanted)))
            found.append(Finding(topic, "topic", f"made with {count} partitions, {replicas} replicas{few}"))
        else:
            has = _shape(admin, topic)
            asked = count if stream == USAGE_CONTROL or wanted.partitions else has[0]
            found.append(_compare_shape(topic, has, (asked, replicas)))
            found += _compare(admin, topic, has[1], _settings(stream, has[1], wanted), wanted.repair)
    return found


def _make(admin: AdminClient, topic: NewTopic) -> None:
    admin.create_topics([topic])[topic.topic].result(REQUEST_S_MAX)
    _await_topic(admin, topic.topic)


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
        CONFIRMING: str(max(1, replicas - 1)),
        "unclean.leader.election.enable": "false",
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(FUTURE_MS_MAX),
        "max.message.bytes": str(RECORD_BYTES_MAX),
    }
    return settings | ({"flush.messages": "1"} if wanted.flush else {})


def _shape(admin: AdminClient, topic: str) -> tuple[int, int]:
    """How many partitions it has, and how many replicas each of them, on brokers that are away too."""
    described: Any = admin.describe_topics(TopicCollection([topic]))[topic].result(REQUEST_S_MAX)
    return len(described.partitions), min(len(partition.replicas) for partition in described.partitions)


def _compare_shape(topic: str, has: tuple[int, int], wanted: tuple[int, int]) -> Finding:
    """Partitions and replicas. Neither is ever changed here."""
    wrong = []
    if has[0] != wanted[0]:
        way = "kafka-topics.sh --alter adds some" if has[0] < wanted[0] else "Kafka cannot take any away"
        wrong.append(f"has {has[0]} partitions and not {wanted[0]}: {way}")
    if has[1] < wanted[1]:
        wrong.append(f"has {has[1]} replicas and not {wanted[1]}: kafka-reassign-partitions.sh adds some")
    return Finding(topic, "topic", f"was there, with {has[0]} partitions, {has[1]} replicas", "; ".join(wrong))


def _compare(admin: AdminClient, topic: str, replicas: int, settings: dict[str, str], repair: bool) -> list[Finding]:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found: Any = admin.describe_configs([resource])[resource].result(REQUEST_S_MAX)
    held = {name: found[name].value if name in found else "unknown to this Kafka" for name in settings}
    differing = {name: (held[name], value) for name, value in settings.items() if not _fits(name, held[name], value)}
    stuck = _count(held[CONFIRMING]) > replicas
    left = [Finding(topic, CONFIRMING, f"left at {held[CONFIRMING]}", STUCK)] if stuck else []
    if repair and differing:
        changes = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
            for name, (_, value) in differing.items()
        ]
        changed = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=changes)
        admin.incremental_alter_configs([changed])[changed].result(REQUEST_S_MAX)
        return left + [Finding(topic, name, f"changed from {was} to {new}") for name, (was, new) in differing.items()]
    return left + [
        Finding(topic, name, f"left at {was}", f"should be {new}", is_repairable=True)
        for name, (was, new) in differing.items()
    ]


def _fits(name: str, held: str, value: str) -> bool:
    """More replicas that have to confirm are somebody's decision for safety; a repair never makes them fewer."""
    return held == value or (name == CONFIRMING and _count(held) > int(value))


def _count(held: str) -> int:
    return int(held) if held.isdigit() else 0
