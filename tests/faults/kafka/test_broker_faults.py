"""A real Kafka that is stopped, loses a broker, or loses its answers on the way; and records that nobody should send.

Kills are in ``test_kafka_kill.py``. Each test prints what its sender was told and what the store says.
"""

import asyncio
import contextlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faults.cutting_proxy import CuttingProxy
from tests.support.faults.sender import Sender, told
from tests.support.faults.store_checks import SEED, export
from tests.support.kafka.cluster import Cluster, Node
from tests.support.kafka.installation import TOKEN, KafkaInstallation, own_brokers, recovery_s
from tests.support.ports import take_port
from tests.support.waiting import eventually, until

PAUSE_S = 0.05  # of a sender's connection
CUSTOMERS = 20  # over all partitions
STOPPED_S = 30.0
PATIENCE_S = 1  # of a gateway for the brokers, so that a short stop is longer
CUTS = 12
CUT_EVERY_S = 0.15
UNSEEN_S = 0.3  # that a sender goes on after a fault
BROKERS_LOST = 6  # with --long: one, then another, and both come back; otherwise one


def sender(seed: int = SEED) -> Sender:
    """A careful client, not in a hurry."""
    return Sender(seed, TOKEN, CUSTOMERS, PAUSE_S)


@pytest.mark.timeout(180)
def test_a_stopped_broker_is_a_503_and_no_loss(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGSTOP: nobody is told yes meanwhile; the gateway says 503 and is not ready; afterwards all goes on."""
    with own_brokers(tmp_path) as cluster:
        options = f"?delivery_timeout_s={PATIENCE_S}"
        installation, client, (node,) = KafkaInstallation(cluster, tmp_path, options=options), sender(), cluster.nodes
        seen: list[tuple[int, int]] = []
        away: list[float] = []

        async def strike() -> None:
            await asyncio.sleep(UNSEEN_S)
            node.pause()
            begun = set(client.under_way)
            await until(lambda: not begun & client.under_way)  # with the yes that they had already, or no
            acknowledged, refused = len(client.acknowledged), client.refused
            await asyncio.sleep(STOPPED_S)
            await until(lambda: client.refused > refused)
            seen.append((len(client.acknowledged) - acknowledged, client.refused - refused))
            away.append(await asyncio.to_thread(recovery_s, node.resume, installation.writes))

        with contextlib.closing(installation):
            installation.start()
            asyncio.run(client.load(installation.address, strike, refused=True))
            outcome, counted, _ = installation.end(client)
    ((told_yes, told_no),) = seen
    more = f"again in the log {counted.tallies['duplicates']}, 503 {told_no} times, recovery is writing after SIGCONT"
    record_property("figures", told(f"SIGSTOP for {STOPPED_S:.0f} s", outcome, away[0], more))

    assert told_yes == 0
    assert told_no > 0
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


@pytest.mark.timeout(180)
def test_answers_that_get_lost_cost_nothing(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """What was done and not answered is done again, by the sender or by the gateway's client: it counts once."""
    front, behind = take_port(), take_port()
    away: list[float] = []
    address = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{behind}"}
    choose = random.Random(SEED)
    with (
        own_brokers(tmp_path, settings=address, start=False) as cluster,
        CuttingProxy(cluster.nodes[0].port, behind) as to_broker,
    ):
        cluster.start()
        installation, client = KafkaInstallation(cluster, tmp_path), sender()
        with contextlib.closing(installation), CuttingProxy(installation.port, front) as to_gateway:
            installation.start()

            async def strike() -> None:
                for _ in range(CUTS):
                    await asyncio.sleep(choose.uniform(0, CUT_EVERY_S))
                    to_broker.cut_next += 1
                    to_gateway.cut_next += 1
                waiting, since_s = client.sent - set(client.acknowledged), time.monotonic()
                await until(lambda: waiting <= set(client.acknowledged))
                away.append(time.monotonic() - since_s)
                await asyncio.sleep(UNSEEN_S)

            asyncio.run(client.load(f"http://127.0.0.1:{front}", strike, refused=True))
            to_broker.cut_next = to_gateway.cut_next = 0
            outcome, counted, _ = installation.end(client)
    more = (
        f"cut {to_gateway.cut} of {to_gateway.answers} to the sender, {to_broker.cut} of {to_broker.answers} of the "
        f"broker, again in the log {counted.tallies['duplicates']}, recovery is the yes to all that waited after them"
    )
    record_property("figures", told("answers lost", outcome, away[0], more))

    assert to_gateway.cut > 0
    assert to_broker.cut > 0
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


@pytest.mark.timeout(900)
def test_one_of_three_brokers_may_be_lost(
    tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """The other two lead on. With --long a second one is lost, nobody is told yes, and both return: nothing is lost."""
    choose = random.Random(SEED)
    with own_brokers(tmp_path, nodes=3) as cluster:
        options = f"?delivery_timeout_s={PATIENCE_S}"
        installation, client = KafkaInstallation(cluster, tmp_path, options=options), sender()
        away: list[float] = []
        told_yes: list[int] = []

        async def lose_a_second(node: Node) -> None:
            await asyncio.to_thread(node.kill)
            begun = set(client.under_way)
            await until(lambda: not begun & client.under_way)  # with the yes that they had already, or no
            acknowledged = len(client.acknowledged)
            await asyncio.sleep(PATIENCE_S)
            told_yes.append(len(client.acknowledged) - acknowledged)

        async def strike() -> None:
            for _ in range(BROKERS_LOST if long else 1):
                first, second, _ = choose.sample(cluster.nodes, 3)
                away.append(await asyncio.to_thread(recovery_s, first.kill, installation.writes))
                await asyncio.sleep(UNSEEN_S)
                if long:
                    await lose_a_second(second)
                    first.start()
                    second.start()
                    await asyncio.to_thread(eventually, installation.writes)

        with contextlib.closing(installation):
            installation.start()
            asyncio.run(client.load(installation.address, strike, refused=True))
            outcome, counted, _ = installation.end(client)
    more = (
        f"one of three {len(away)} times, a second one {len(told_yes)} times, again in the log "
        f"{counted.tallies['duplicates']}, recovery is writing after the loss, at most"
    )
    record_property("figures", told("brokers lost", outcome, max(away), more))

    assert sum(told_yes) == 0
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


def test_a_stopped_aggregator_cannot_be_joined(
    kafka: Cluster, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Beside one that is only stopped, a second one on the same data refuses; the first goes on where it was."""
    installation, client = KafkaInstallation(kafka, tmp_path), sender()
    second = installation.another_aggregator("second", take_port(), installation.store.parent)
    with contextlib.closing(installation):
        installation.start()
        installation.aggregator.pause()
        asyncio.run(client.load(installation.address, lambda: asyncio.sleep(UNSEEN_S)))
        second.start()
        code = second.wait()
        away = recovery_s(lambda: installation.aggregator.signal(signal.SIGCONT), installation.reads)
        outcome, _, _ = installation.end(client)
    complaint = second.output.strip()
    more = f"recovery is reading after SIGCONT; it says: {complaint}"
    record_property("figures", told("a second aggregator", outcome, away, more))

    assert code == 1
    assert "stop it first" in complaint
    assert len(complaint.splitlines()) == 1
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


def test_a_zombie_is_fenced(kafka: Cluster, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A successor took over the data on another disk; whoever was stopped wakes up, commits nothing, and leaves."""
    installation, client = KafkaInstallation(kafka, tmp_path), sender()
    zombie, data = installation.aggregator, installation.store.parent
    with contextlib.closing(installation):
        installation.start()
        asyncio.run(client.load(installation.address, lambda: asyncio.sleep(UNSEEN_S)))
        installation.catch_up()
        zombie.pause()
        try:
            data.rename(tmp_path / "unplugged")  # the disk that only the zombie still has
            shutil.copytree(tmp_path / "unplugged", data, ignore=shutil.ignore_patterns("*.lock", "*.sock"))
            stale = export_copy(tmp_path / "unplugged", tmp_path / "copy")
            installation.api_port = take_port()
            installation.aggregator = installation.another_aggregator("successor", installation.api_port, data)
            away = recovery_s(installation.aggregator.start, installation.reads)
            asyncio.run(client.load(installation.address, lambda: asyncio.sleep(UNSEEN_S)))
            installation.catch_up()
        finally:
            zombie.signal(signal.SIGCONT)
        code = zombie.wait()
        outcome, _, _ = installation.end(client)
    complaint = zombie.output.strip().splitlines()[-1]
    more = f"recovery is reading after the successor's start; it says: {complaint}"
    record_property("figures", told("zombie", outcome, away, more))

    assert code == 1
    assert "another writer took over" in complaint
    assert export_copy(tmp_path / "unplugged", tmp_path / "copy-after") == stale
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


def export_copy(data: Path, to: Path) -> dict[str, list[tuple[object, ...]]]:
    """What a store says that somebody else may still hold open."""
    to.mkdir()
    for file in data.glob("store.duckdb*"):
        if file.is_file():
            shutil.copy(file, to)
    return export(to / "store.duckdb")
