"""The commands over a real Kafka: topics made and compared, gateways and an aggregator apart, records of strangers."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, partition_key
from tests.deploy.shipped.test_documented_commands import README
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.installation import Process, own_brokers
from tests.support.kafka.jars import jars
from tests.support.kafka.separate_processes import PARTITIONS, Apart, answer, usage
from tests.support.kafka.shared import shared_broker
from tests.support.ports import take_port
from tests.support.programs import program
from tests.support.servers.installation import PATIENCE_S, Installation, meterstream
from tests.support.waiting import eventually

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Two gateways and an aggregator that run; the tests of this module share them, and add to what is there."""
    place = Apart(f"kafka://{shared_broker().bootstrap}", tmp_path_factory.mktemp("apart"))
    try:
        place.prepare()
        place.start()
        yield place
    finally:
        place.close()


def test_topics_are_made_once_and_compared_after(kafka: Cluster, log_url: str) -> None:
    """Made with settings that lose nothing; a setting that would lose something is named, and repaired when asked."""
    made = answer("kafka", "init", "--log", log_url)
    few = "1 replicas; 3 need as many brokers to answer"
    assert [f"made with 12 partitions, {few}", f"made with 1 partitions, {few}"] == [r["done"] for r in made]

    topic = made[0]["topic"]
    forgetful = ConfigEntry("retention.ms", "3600000", incremental_operation=AlterConfigOpType.SET)
    change = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[forgetful])
    admin = kafka.admin()  # its futures end with it
    admin.incremental_alter_configs([change])[change].result(30)

    def wrong() -> list[dict[str, str]]:
        found = meterstream("kafka", "init", "--log", log_url, "--output", "json")
        return [row for row in json.loads(found.stdout) if row["wrong"]]

    [row] = eventually(wrong)
    assert (row["topic"], row["subject"], row["done"], row["wrong"]) == (
        topic, "retention.ms", "left at 3600000", "should be -1"
    )  # fmt: skip
    left = meterstream("kafka", "init", "--log", log_url)
    assert (left.returncode, "--repair changes what can be changed" in left.stderr) == (1, True)
    assert meterstream("kafka", "init", "--log", log_url, "--repair").returncode == 0
    eventually(lambda: not wrong())


def test_a_number_of_partitions_is_not_changed_behind_anyones_back(log_url: str) -> None:
    """Another number than asked for is said, since it decides which partition a customer belongs to."""
    answer("kafka", "init", "--log", log_url, "--partitions", "3")

    rows = answer("kafka", "init", "--log", log_url, "--partitions", "5", code=1)
    assert "has 3 partitions and not 5: kafka-topics.sh --alter adds some" in rows[0]["wrong"]
    again = meterstream("kafka", "init", "--log", log_url, "--partitions", "5")
    assert "; no --repair helps" in again.stderr
    assert answer("kafka", "init", "--log", log_url)[0]["wrong"] == ""


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("kafka://127.0.0.1", "names no brokers"),
        ("kafka://127.0.0.1:1/x?acks=0", "unknown field `acks`"),
        ("kafka://me:secret@127.0.0.1:1/x", "has no user"),
        ("kafka://127.0.0.1:1/?security_protocol=SASL_SSL&sasl_username=me", "the password from the environment"),
        ("kafka://127.0.0.1:1/?sasl_username=me", "needs security_protocol"),
        ("kafka://127.0.0.1:1/?compression=best", "compression is one of"),
        ("kafka://127.0.0.1:1/?organization=acme", "a UUID"),
        ("postgres://127.0.0.1:1/", "kafka://"),
    ],
)
def test_a_wrong_url_is_one_line(url: str, complaint: str) -> None:
    """What cannot be understood is refused before anything is tried, and no password is repeated."""
    done = meterstream("kafka", "init", "--log", url)

    assert done.returncode == 2
    assert complaint in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_gateway_waits_for_its_topics_and_says_so(apart: Apart, log_url: str) -> None:
    """Started before its topics exist, it lives, says in /readyz what it waits for, and serves when they are there."""
    port = take_port()
    gateway = Process("early", ["gateway", "--log", log_url, "--port", str(port)], apart.folder)
    url = f"http://127.0.0.1:{port}"
    gateway.start()
    try:
        eventually(lambda: apart.status(f"{url}/livez") == 200)
        found = eventually(lambda: apart.http.get(f"{url}/readyz").json().get("waiting_for"))
        assert "there is no topic" in found
        assert "meterstream kafka init" in found
        refused = apart.ingest(url, usage("early"))
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)

        answer("kafka", "init", "--log", log_url)
        eventually(lambda: apart.status(f"{url}/readyz") == 200)
    finally:
        gateway.stop()


def test_brokers_may_come_after_all_others(tmp_path: Path) -> None:
    """Gateways and an aggregator that were started first say whom they wait for, refuse for now, and serve then."""
    with own_brokers(tmp_path, start=False) as cluster:
        place = Apart(f"kafka://{cluster.bootstrap}", tmp_path)
        with contextlib.closing(place):
            place.launch()
            url = place.urls[0]
            eventually(lambda: all(place.status(f"{each}/livez") == 200 for each in place.urls))
            waiting = eventually(lambda: "waiting_for" in (found := place.http.get(f"{url}/readyz")).json() and found)
            assert (waiting.status_code, waiting.json()["ready"]) == (503, False)
            assert f"the brokers at {cluster.bootstrap} do not answer" in waiting.json()["waiting_for"]
            refused = place.ingest(url, usage("too early"))
            assert (refused.status_code, refused.json()["error"]) == (503, "CatalogueUnavailable")
            assert int(refused.headers["retry-after"]) > 0
            assert place.gateways[1].stop() == 0
            eventually(lambda: f"the brokers at {cluster.bootstrap} do not answer" in place.aggregator.output)

            cluster.start()
            place.prepare()
            place.gateways[1].start()
            place.await_service()
            taken = place.ingest(url, usage("in time"))
            assert taken.status_code == 200, taken.text
            assert place.names(taken.headers["log-position"]) == {"in time"}


def test_gateways_and_aggregator_apart_are_one_service(apart: Apart) -> None:
    """Events through either gateway are one usage; every URL answers reads; a decision reaches every gateway."""
    first, second = apart.urls
    sent = [apart.ingest(url, usage(f"{number}-{port}", f"customer-{number}"))
            for number in range(12) for port, url in enumerate(apart.urls)]  # fmt: skip
    assert {response.status_code for response in sent} == {200}
    partitions = {int(response.headers["log-position"].partition(":")[0]) for response in sent}
    assert partitions == {apart.partition(f"customer-{number}") for number in range(12)}
    position = apart.ingest(first, *(usage(f"last-{number}", f"customer-{number}") for number in range(12)))
    names = apart.names(position.headers["log-position"])
    expected = {f"{number}-{port}" for number in range(12) for port in range(2)}
    assert expected | {f"last-{number}" for number in range(12)} <= names

    token = apart.new_token()
    eventually(lambda: all(apart.ingest(url, usage("again"), token=token).status_code == 200 for url in apart.urls))

    records = 12 * 2 + len(partitions) + 2

    def lags() -> list[dict[str, int]]:
        """What is known of every partition, once it was looked at after the last event."""
        done = meterstream("lag", "--url", second, "--output", "json")
        rows = json.loads(done.stdout or "[]")
        return rows if sum(row["end"] for row in rows) >= records else []

    rows = eventually(lambda: (rows := lags()) and {row["lag"] for row in rows} == {0} and rows)
    assert [row["partition"] for row in rows] == list(range(PARTITIONS))
    assert len(answer("lag", "--url", apart.api_url)) == PARTITIONS
    eventually(lambda: "meterstream_lag_records" in apart.http.get(f"{first}/metrics").text)
    metrics = apart.http.get(f"{first}/metrics").text
    assert 'meterstream_gateway_requests_total{status="200"}' in metrics


def test_a_gateway_that_is_asked_to_stop_loses_nothing(apart: Apart) -> None:
    """What it acknowledged before SIGTERM is counted, and it ends with exit code 0."""
    acknowledged = set()
    position = ""
    for number in range(20):
        taken = apart.ingest(apart.urls[1], usage(f"n-{number}"))
        assert taken.status_code == 200
        acknowledged.add(f"n-{number}")
        position = taken.headers["log-position"]
    assert apart.gateways[1].stop() == 0

    assert acknowledged <= apart.names(position)
    apart.gateways[1].start()
    eventually(lambda: apart.status(f"{apart.urls[1]}/readyz") == 200)


def test_records_of_other_producers_are_counted_or_listed(kafka: Cluster, apart: Apart) -> None:
    """A producer that follows the documented format counts like a gateway; what it gets wrong can be mended."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "partitioner": "murmur2_random"})
    header = [("organization", apart.organization_id.encode())]
    delivered: dict[str, int | None] = {}

    def send(name: str, customer: str, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        producer.produce(
            "usage.events", value, key=partition_key(apart.organization_id, customer), headers=headers,  # type: ignore[arg-type]
            on_delivery=lambda error, message: delivered.update({name: message.partition()}),
        )  # fmt: skip

    customers = [f"customer-{number}" for number in range(10)]
    for customer in customers:
        send(customer, customer, json.dumps(usage(f"direct-{customer}", customer)).encode(), header)
    line = usage("named") | {"organization_id": apart.organization_id}
    send("named", "ada", json.dumps(line).encode(), [])
    send("nobody", "ada", json.dumps(usage("nobody")).encode(), [])
    send("broken", "ada", b'{"name": "call", "external_customer_id": "ada", ', header)
    assert producer.flush(30) == 0

    assert {customer: delivered[customer] for customer in customers} == {
        customer: apart.partition(customer) for customer in customers
    }
    here = ("--url", apart.urls[0], "--token", apart.token)
    letters = eventually(lambda: len(found := answer("events", "dead", *here)) == 2 and found)
    assert {"missing", "json_invalid"} == {letter["reason"] for letter in letters}

    broken = next(letter for letter in letters if letter["reason"] == "json_invalid")
    mended = apart.folder / "mended.json"
    mended.write_text(json.dumps(usage("mended")))
    answer("events", "replay", broken["id"], "--file", str(mended), *here)
    assert [letter["id"] for letter in answer("events", "dead", *here)] == [
        letter["id"] for letter in letters if letter is not broken
    ]
    last = apart.ingest(apart.urls[0], usage("last")).headers["log-position"]
    expected = {*(f"direct-{customer}" for customer in customers), "named", "mended", "last"}
    assert expected <= apart.names(last)
    assert "nobody" not in apart.names(last)


def test_the_producers_of_the_readme_count(apart: Apart, tmp_path: Path) -> None:
    """Python, kcat and Kafka's console producer, as the README shows them, send one event each to one partition."""
    program("kcat", "kcat")
    tool = tmp_path / "kafka-console-producer.sh"  # the release's script finds its jars and starts this class
    tool.write_text(f"#!/bin/sh\nexec java -cp '{jars('3.9')}/*' kafka.tools.ConsoleProducer \"$@\"\n")
    tool.chmod(0o755)
    surroundings = os.environ | {
        "BROKERS": apart.log_url.removeprefix("kafka://"), "ORGANIZATION": apart.organization_id,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    shown = README.partition("### For producers")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(python|sh)\n(.*?)```", shown, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "sh"]
    for kind, text in blocks:
        runner = [sys.executable, "-c"] if kind == "python" else ["sh", "-c"]
        done = subprocess.run([*runner, text], env=surroundings, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr

    def found() -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {apart.token}"}
        params = {"external_customer_id": "ada", "name": "llm.call"}
        items: list[dict[str, Any]] = apart.http.get(
            f"{apart.urls[0]}/v1/events/", params=params, headers=headers
        ).json()["items"]
        return items if len(items) == 3 else []

    assert [event["metadata"]["tokens"] for event in eventually(found)] == [812] * 3
    with contextlib.closing(open_log(apart.log_url)) as log:
        place = apart.partition("ada")
        records = log.read(USAGE_EVENTS, {place: 0}, bytes_max=1 << 30)
    for sender in ("python-1", "kcat-1", "console-1"):
        [record] = [record for record in records if f'"{sender}"'.encode() in record.value]
        assert record.organization_id == apart.organization_id
        assert not record.admitted


def test_a_second_aggregator_on_the_same_data_says_who_is_there(apart: Apart) -> None:
    """It ends with one line and leaves the first one alone."""
    data = str(apart.folder)
    second = meterstream("aggregate", "--log", apart.log_url, "--port", str(take_port()), "--data", data)

    assert second.returncode == 1
    assert "another server" in second.stderr
    assert apart.status(f"{apart.urls[0]}/v1/meters/") == 200


def test_the_store_is_made_again_from_the_brokers(apart: Apart) -> None:
    """Without a server, `rebuild` counts the topics anew, `doctor` finds nothing wrong, and answers are the same."""
    position = apart.ingest(apart.urls[0], usage("before the rebuild")).headers["log-position"]
    before = apart.names(position)
    where = ("--log", apart.log_url, "--data", str(apart.folder))
    assert apart.aggregator.stop() == 0
    tallies = answer("rebuild", *where)
    assert tallies["stored"] >= len(before)
    assert meterstream("doctor", *where).returncode == 0
    assert meterstream("skip-lost", *where).returncode == 0
    assert {(apart.folder / name).stat().st_mode & 0o077 for name in ("store.duckdb", "serve.lock")} == {0}
    apart.aggregator.start()

    eventually(lambda: apart.status(f"{apart.api_url}/v1/meters/") == 200)
    assert apart.names(position) == before


def test_serve_runs_both_on_brokers(log_url: str, installation: Installation) -> None:
    """One command: it makes the first token, counts what it is sent, and finds it again after a restart."""
    meterstream("kafka", "init", "--log", log_url)
    installation.start("--log", log_url)
    event = {"events": [usage("served")]}
    headers = {"Authorization": f"Bearer {installation.token}"}
    taken = httpx.post(f"{installation.url}/v1/events/ingest", json=event, headers=headers, timeout=PATIENCE_S)
    assert taken.status_code == 200
    assert installation.stop() == 0
    assert not (installation.data / "log.sqlite").exists()
    installation.start("--log", log_url)

    eventually(lambda: [e["name"] for e in installation.get("/v1/events/").json()["items"]] == ["served"])


def test_added_partitions_are_counted(kafka: Cluster, apart: Apart) -> None:
    """An aggregator that runs begins to read them by itself, and counts nothing twice."""
    before = apart.names(apart.ingest(apart.urls[0], usage("before more partitions")).headers["log-position"])
    admin = kafka.admin()
    admin.create_partitions([NewPartitions(USAGE_EVENTS, PARTITIONS + 1)])[USAGE_EVENTS].result(30)
    eventually(lambda: len(admin.list_topics(timeout=30).topics[USAGE_EVENTS].partitions) == PARTITIONS + 1)
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    headers = [("organization", apart.organization_id.encode())]
    event = json.dumps(usage("in the new one")).encode()
    producer.produce(USAGE_EVENTS, event, partition=PARTITIONS, headers=headers)
    assert producer.flush(30) == 0

    eventually(lambda: apart.status(f"{apart.api_url}/v1/meters/") == 200)
    assert apart.names(f"{PARTITIONS}:1") == before | {"in the new one"}


def test_a_partition_that_was_added_to_the_decisions_does_no_harm(kafka: Cluster, apart: Apart) -> None:
    """Gateways and aggregator go on; decisions are made and heard of as before."""
    admin = kafka.admin()
    admin.create_partitions([NewPartitions(USAGE_CONTROL, 2)])[USAGE_CONTROL].result(30)
    eventually(lambda: all("usage.control has 2 partitions, and had 1" in each.output for each in apart.gateways))
    token = apart.new_token()

    eventually(lambda: all(apart.ingest(url, usage("after"), token=token).status_code == 200 for url in apart.urls))
    eventually(lambda: apart.status(f"{apart.urls[0]}/v1/meters/", token) == 200)
    rows = answer("kafka", "init", "--log", apart.log_url, code=1)
    assert [row["wrong"] for row in rows if row["wrong"]] == ["has 2 partitions and not 1: Kafka cannot take any away"]
