"""With the log on a real Kafka: events go on to Polar from every partition, and the nightly proof compares them."""

import json
import os
from collections.abc import Iterator
from typing import Any

import duckdb
import pytest
from confluent_kafka import Producer

from deploy.errors import GiveUp
from deploy.forwarding import status
from deploy.server.data import DataDirectory
from tests.aggregator.forward.test_forwarder import ids
from tests.support.kafka.shared import shared_broker
from tests.support.polar.proxy import send, stored
from tests.support.servers.installation import Installation, meterstream
from tests.support.waiting import eventually

pytestmark = pytest.mark.kafka

PARTITIONS = 3
CUSTOMERS = 30  # of twelve none may fall into one of three partitions, once in forty runs


class Site:
    """Our server on the brokers, and the one that stands for Polar."""

    def __init__(self, ours: Installation, polar: Installation, log_url: str) -> None:
        self.ours, self.polar, self.log_url = ours, polar, log_url

    def up(self) -> int:
        """Serve, if another test stopped it; how many events it has."""
        if self.ours.server is None:
            self.ours.start("--log", self.log_url)
        return len(stored(self.ours, "call"))

    def settled(self, sent: int) -> None:
        """Wait until so many events were sent and nothing is left."""
        eventually(lambda: self.is_settled(sent))

    def is_settled(self, sent: int) -> bool:
        """Whether so many events were sent, nothing is left, and Polar has counted them."""
        try:
            found = self.status()
        except GiveUp:  # the forwarder has only just begun
            return False
        return (found["sent"], found["pending"]) == (sent, 0) and len(stored(self.polar, "call")) == sent

    def lag(self) -> list[dict[str, Any]]:
        """By partition; empty before the server has looked."""
        done = self.ours.run("lag", "--output", "json")
        return list(json.loads(done.stdout)) if done.returncode == 0 else []

    def status(self) -> dict[str, Any]:
        """Of the forwarder."""
        return status(DataDirectory(self.ours.data))

    def reconcile(self, *options: str, code: int = 0) -> dict[str, Any]:
        """The report."""
        where = ("--log", self.log_url, "--data", str(self.ours.data), "--settle", "0", "--output", "json")
        polar = {"METERSTREAM_POLAR_TOKEN": self.polar.token, "METERSTREAM_POLAR_SERVER": self.polar.url}
        done = meterstream("reconcile", *where, *options, **polar)
        assert done.returncode == code, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def usage(first: int, count: int) -> list[dict[str, Any]]:
    """Events of customers enough to be in every partition."""
    return [
        {"name": "call", "external_customer_id": f"c{number % CUSTOMERS}", "external_id": f"e{number}",
         "metadata": {"tokens": number}}
        for number in range(first, first + count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Both of them; ours is told by its environment where to forward to."""
    log_url = f"kafka://{shared_broker().bootstrap}/onward-{os.getpid()}"
    made = meterstream("kafka", "init", "--log", log_url, "--partitions", str(PARTITIONS))
    assert made.returncode == 0, made.stderr
    folder = tmp_path_factory.mktemp("over-kafka")
    polar, ours = Installation(folder / "polar"), Installation(folder / "ours")
    try:
        polar.start()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("METERSTREAM_POLAR_TOKEN", polar.token)
            environment.setenv("METERSTREAM_POLAR_SERVER", polar.url)
            ours.start("--log", log_url)
            yield Site(ours, polar, log_url)
    finally:
        ours.close()
        polar.close()


def test_every_partition_is_forwarded_once(site: Site) -> None:
    """Events of all partitions arrive in each customer's order; after a restart only what came since is sent."""
    before = site.up()
    send(site.ours, usage(0, 60))
    site.settled(before + 60)
    # Looked at once a second.
    assert eventually(lambda: len({row["partition"] for row in site.lag() if row["end"]}) == PARTITIONS)
    assert site.ours.stop() == 0
    site.up()
    send(site.ours, [*usage(60, 20), *usage(0, 5)])
    site.settled(before + 80)

    arrived = [event for event in stored(site.polar, "call") if event["metadata"]["tokens"] < 80]
    assert sorted(ids(arrived)) == sorted(event["external_id"] for event in usage(0, 80))
    of_one = [event["metadata"]["tokens"] for event in arrived if event["external_customer_id"] == "c1"]
    assert of_one == sorted(of_one)


def test_the_proof_reads_the_brokers(site: Site) -> None:
    """Lines of every partition, repeated and broken ones too, against store and Polar; what is spoiled is mended."""
    before = site.up()
    send(site.ours, [*usage(1000, 30), *usage(1000, 10)])
    producer = Producer({"bootstrap.servers": site.log_url.removeprefix("kafka://").partition("/")[0]})
    producer.produce(f"{site.log_url.rpartition('/')[2]}.usage.events", b'{"name": ')
    assert producer.flush(30) == 0
    site.settled(before + 30)
    eventually(lambda: {row["lag"] for row in site.lag()} == {0})

    running = site.reconcile()
    assert site.ours.stop() == 0
    with duckdb.connect(str(site.ours.data / "store.duckdb")) as store:
        store.execute("DELETE FROM events WHERE external_id = 'e1007'")
    spoiled = site.reconcile("--check", "log", code=3)
    mended = site.reconcile("--check", "log", "--check", "store", "--repair", "apply")

    assert [(check["name"], check["differences"]) for check in running["checks"]] == [
        (name, []) for name in ("log", "store", "ledger", "upstream")
    ]
    buckets = running["checks"][0]["buckets"]
    assert {bucket["partition"] for bucket in buckets} == set(range(PARTITIONS))
    assert sum(bucket["duplicates"] for bucket in buckets) >= 10
    assert sum(bucket["dead"] for bucket in buckets) == 1
    (difference,) = spoiled["checks"][0]["differences"]
    assert (difference["cause"], difference["repair"]) == ("lost", "rebuild the store")
    assert difference["where"].startswith("event e1007 ")
    assert mended["equal"]
