"""What Kafka can do to a log that a file cannot: records from strangers, retention ahead of the reader, other topics.

A record that is no event is a dead letter, and holds up nothing. A record that is gone, or a topic that is another one,
ends the aggregator with one line that says which; the gateway goes on, because what it takes is durable all the same.
"""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Producer, TopicPartition

from ingest.log.kafka_admin import Wanted, make_topics, parse_address
from meters.log import USAGE_EVENTS, Record, partition_key
from tests.support.faults.sender import Sender, told
from tests.support.faults.store_checks import SEED, assert_store_tells, count, every, export, usage
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.installation import PARTITIONS, TOKEN, KafkaInstallation, recovery_s, stored_ids
from tests.support.programs import program
from tests.support.records import ORGANIZATION
from tests.support.servers.installation import meterstream
from tests.support.waiting import eventually

GOOD = 60
CUSTOMERS = 20
LARGE_BYTES = 5_000_000
HEAD = b'{"name":"call","external_customer_id":"ann","metadata":'
POISON = {  # what a record holds, and lines of it that are no events
    "no JSON": (b"{broken", 1),
    "no UTF-8": (b"\xff\xfe\x00", 1),
    "not an object": (b"[1,2]", 1),
    "nothing": (b"", 0),
    "a tombstone": (None, 0),
    "not a number": (usage("nan").replace(b'"tokens":1', b'"tokens":NaN'), 1),
    "a number without bounds": (usage("huge", tokens="1e999"), 1),
    "too many digits": (usage("digits", tokens="9" * 40), 1),
    "a NUL": (usage("nul", customer="a\u0000b"), 1),
    "no name": (b'{"external_customer_id":"ann","external_id":"nameless"}', 1),
    "5 MB of text": (HEAD + b'{"text":"' + b"x" * LARGE_BYTES + b'"}}', 1),
    "deep": (HEAD + b"[" * 50_000, 1),
    "good and bad lines": (usage("mixed-1") + b"\n{broken\n" + usage("mixed-2"), 1),
    "a binary header": (usage("headed"), 0),
}
MISNAMED = usage("misnamed", organization_id=ORGANIZATION)
"""A line that would count, beside a header whose name is no UTF-8: whose it is may stand in what cannot be read."""

IN_BAD_COMPANY = {"mixed-1", "mixed-2", "headed"}
"""Ids of good lines among these."""


def produce(installation: KafkaInstallation, records: list[tuple[bytes | None, int | None]]) -> None:
    """Send like a producer that knows nothing of Meterstream but the key; a number names a partition instead."""
    servers = installation.cluster.bootstrap
    producer = Producer({"bootstrap.servers": servers, "message.max.bytes": 1 << 24, "partitioner": "murmur2_random"})
    topic = f"{installation.prefix}.{USAGE_EVENTS}"
    for value, partition in records:
        where = {"key": partition_key(ORGANIZATION, "ann")} if partition is None else {"partition": partition}
        producer.produce(topic, value, headers=[("trace", b"\xff\x00")], **where)
    assert producer.flush(30) == 0


def produce_misnamed(installation: KafkaInstallation, line: bytes) -> None:
    """Send a line with a header named in Latin-1, which Python's client has no way to say."""
    topic = f"{installation.prefix}.{USAGE_EVENTS}"
    to = ("-P", "-b", installation.cluster.bootstrap, "-t", topic, "-p", "0")
    subprocess.run([program("kcat", "kcat"), *to, "-H", b"caf\xe9=1"], input=line, check=True, capture_output=True)


def test_poison_becomes_dead_letters_and_holds_up_nothing(
    kafka: Cluster, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Whatever a plain producer sends, every line is counted or is a dead letter with a reason; the rest goes on."""
    installation = KafkaInstallation(kafka, tmp_path, options=f"?organization={ORGANIZATION}")
    books = Sender(SEED, TOKEN)  # of the producer: what can be counted, and what the broker confirmed
    good = [usage(f"good-{number}") for number in range(GOOD)]
    records: list[tuple[bytes | None, int | None]] = []
    for number, (value, _) in enumerate(POISON.values()):
        records += [(value, number % PARTITIONS), (good[number], None)]
    records += [(line, None) for line in good]  # some of them a second time
    with contextlib.closing(installation):
        installation.start()
        books.sent = {f"good-{number}" for number in range(GOOD)} | IN_BAD_COMPANY
        produce(installation, records)
        produce_misnamed(installation, MISNAMED)
        books.acknowledged = [*books.sent]
        installation.catch_up()
        letters = installation.ask("/v1/dead-letters/", limit="100").json()["items"]
        outcome, counted, _ = installation.end(books)
    more = f"{len(records) + 1} records, {len(POISON) + 1} kinds, {counted.tallies}"
    record_property(
        "figures", told("poison", outcome, "none, nothing stops", more, seed="none, nothing is drawn")
    )

    assert (outcome.lost, outcome.doubled) == (0, 0)
    assert outcome.dead == counted.tallies["dead"] == sum(bad for _, bad in POISON.values()) + 1
    assert len(letters) == outcome.dead
    assert all(letter["reason"] for letter in letters)
    assert counted.tallies["stored"] == outcome.stored == outcome.acked == GOOD + len(IN_BAD_COMPANY)
    assert counted.tallies["duplicates"] == len(POISON)
    assert counted.tallies["conflicts"] == 0


def test_retention_ahead_of_the_reader_stops_it_with_a_clear_line(
    kafka: Cluster, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Records that went before they were counted are not skipped: it ends and says so, until somebody accepts it.

    Then the store has what it had, and whatever could still be read, and lacks nothing else.
    """
    installation, sender = KafkaInstallation(kafka, tmp_path), Sender(SEED, TOKEN, CUSTOMERS)
    with contextlib.closing(installation):
        installation.start()
        asyncio.run(sender.load(installation.address, lambda: asyncio.sleep(0.1)))
        installation.catch_up()
        assert installation.aggregator.stop() == 0
        before = export(installation.store)
        gone = [record for record in read_all(installation) if record.partition == 0]
        asyncio.run(sender.load(installation.address, lambda: asyncio.sleep(0.1)))
        unread = [record for record in read_all(installation) if record.partition == 0][len(gone) :]
        topic = f"{installation.prefix}.{USAGE_EVENTS}"
        admin = kafka.admin()
        for deleted in admin.delete_records([TopicPartition(topic, 0, -1)]).values():  # -1: all there is
            deleted.result(30)
        codes = []
        for _ in range(2):
            installation.aggregator.start()
            codes.append(installation.aggregator.wait())
        assert installation.writes()
        complaint = last_line(installation.aggregator.output)
        stopped = export(installation.store)
        where = ("--log", installation.url, "--data", str(installation.store.parent))
        way_on: list[subprocess.CompletedProcess[str]] = []

        def go_on() -> None:
            way_on.append(meterstream("skip-lost", "--yes", *where))
            installation.aggregator.start()

        away = recovery_s(go_on, installation.reads)
        outcome, counted, _ = installation.end(sender, gone)
    more = f"lost are what nobody had read, recovery is reading after `skip-lost` began; before, it says: {complaint}"
    record_property("figures", told("retention overrun", outcome, away, more))

    assert codes == [1, 1]
    assert f"{topic} has no record" in complaint
    assert "meterstream doctor" in complaint
    assert stopped == before
    assert way_on[0].returncode == 0, way_on[0].stderr
    readable = {id for _, id in counted.stored}
    assert outcome.lost == len(ids_of(unread) - readable) > 0
    assert set(sender.acknowledged) - readable == ids_of(unread) - readable
    assert (outcome.stored, outcome.doubled, outcome.dead) == (len(readable & sender.sent), 0, 0)


def test_another_topic_of_the_same_name_is_not_read(
    kafka: Cluster, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A topic deleted and made again under a running aggregator ends it; so does the next start. A rebuild counts the
    new one, and keeps the numbers of the old one.
    """
    installation, sender = KafkaInstallation(kafka, tmp_path), Sender(SEED, TOKEN, CUSTOMERS)
    with contextlib.closing(installation):
        installation.start()
        asyncio.run(sender.load(installation.address, lambda: asyncio.sleep(0.1)))
        installation.catch_up()
        topic = f"{installation.prefix}.{USAGE_EVENTS}"
        with contextlib.closing(installation.open_log()) as log:
            counted = count(log)
        admin = kafka.admin()
        admin.delete_topics([topic])[topic].result(30)
        eventually(lambda: topic not in admin.list_topics(timeout=5).topics)
        make_topics(parse_address(installation.url, {}), Wanted(partitions=PARTITIONS))
        produce(installation, [(usage(f"new-{number}"), number % PARTITIONS) for number in range(500)])
        running = installation.aggregator.wait()
        noticed = last_line(installation.aggregator.output)
        installation.aggregator.start()
        again = installation.aggregator.wait()
    complaint = last_line(installation.aggregator.output)
    tables = export(installation.store)
    outcome = sender.outcome(stored_ids(tables), len(tables["dead_letters"]))
    more = f"while running: {noticed}\n  at the next start: {complaint}"
    where = ("--log", installation.url, "--data", str(installation.store.parent))
    examined, rebuilt = meterstream("doctor", *where), meterstream("rebuild", *where)
    (kept,) = installation.store.parent.glob("store.duckdb.*")
    record_property("figures", told("topic made again", outcome, "none, it ends until somebody rebuilds", more))

    assert (running, again) == (1, 1)
    assert "was deleted and made again" in noticed
    assert "made from another usage.events stream" in complaint
    assert examined.returncode == 1
    assert "log.sqlite" not in examined.stdout
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert f"{kept} is the old store" in rebuilt.stderr
    assert export(kept) == tables
    assert_store_tells(tables, counted)
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


def read_all(installation: KafkaInstallation) -> list[Record]:
    """Every record that the log has now."""
    with contextlib.closing(installation.open_log()) as log:
        return list(every(log))


def ids_of(records: list[Record]) -> set[str]:
    """The ids of the events in records of a gateway."""
    return {json.loads(line)["external_id"] for record in records for line in record.value.split(b"\n") if line}


def last_line(output: str) -> str:
    """What a command says at its end; all before it is JSON."""
    *logs, line = output.strip().splitlines()
    assert all(json.loads(each) for each in logs if not each.startswith("meterstream: "))
    assert line.startswith("meterstream: "), output
    return line
