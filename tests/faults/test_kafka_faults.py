"""A real Kafka that is stopped, loses a broker, or loses its answers on the way; and records that nobody should send.

Kills are in ``test_kafka_kill.py``. Each test prints what its sender was told and what the store says.
"""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from tests.faults.cutting import CuttingProxy
from tests.faults.evidence import SEED
from tests.faults.kafka_installation import TOKEN, KafkaInstallation, own_brokers, recovery_s
from tests.faults.sender import Sender
from tests.kafka.cluster import free_port

PAUSE_S = 0.05  # of a sender's connection
CUSTOMERS = 20  # over all partitions
STOPPED_S = 3.0  # and 30 s with --long
PATIENCE_S = 1  # of a gateway for the brokers, so that a short stop is longer
CUTS = 12
CUT_EVERY_S = 0.15
UNSEEN_S = 0.3  # that a sender goes on after a fault


def sender(seed: int = SEED) -> Sender:
    """A careful client, not in a hurry."""
    return Sender(seed, TOKEN, CUSTOMERS, PAUSE_S)


@pytest.mark.timeout(180)
def test_a_stopped_broker_is_a_503_and_no_loss(
    tmp_path: Path, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP: nobody is told yes meanwhile; the gateway says 503 and is not ready; afterwards all goes on."""
    stopped_s = 30.0 if long else STOPPED_S
    with own_brokers(tmp_path) as cluster:
        options = f"?delivery_timeout_s={PATIENCE_S}"
        installation, client, (node,) = KafkaInstallation(cluster, tmp_path, options=options), sender(), cluster.nodes
        seen: list[tuple[int, int]] = []
        away: list[float] = []

        async def strike() -> None:
            await asyncio.sleep(UNSEEN_S)
            node.pause()
            await asyncio.sleep(PATIENCE_S)  # whatever was under way is answered
            acknowledged, refused = len(client.acknowledged), client.refused
            await asyncio.sleep(stopped_s - PATIENCE_S)
            seen.append((len(client.acknowledged) - acknowledged, client.refused - refused))
            away.append(await asyncio.to_thread(recovery_s, node.resume, installation.writes))

        with contextlib.closing(installation):
            installation.start()
            asyncio.run(client.load(installation.address, strike, refused=True))
            outcome, counted, _ = installation.end(client)
    ((told_yes, told_no),) = seen
    with capsys.disabled():
        print(
            f"\nkafka, SIGSTOP for {stopped_s:.0f} s: seed {SEED}, {outcome}, again in the log "
            f"{counted.tallies['duplicates']}; 503 {told_no} times, writing {away[0]:.2f} s after SIGCONT"
        )

    assert told_yes == 0
    assert told_no > 0
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)


@pytest.mark.timeout(180)
def test_answers_that_get_lost_cost_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was done and not answered is done again, by the sender or by the gateway's client: it counts once."""
    front, behind = free_port(), free_port()
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
                await asyncio.sleep(UNSEEN_S)

            asyncio.run(client.load(f"http://127.0.0.1:{front}", strike, refused=True))
            to_broker.cut_next = to_gateway.cut_next = 0
            outcome, counted, _ = installation.end(client)
    with capsys.disabled():
        print(
            f"\nkafka, answers lost: seed {SEED}, {to_gateway.cut} of {to_gateway.answers} to the sender, "
            f"{to_broker.cut} of {to_broker.answers} of the broker, {outcome}, again in the log "
            f"{counted.tallies['duplicates']}"
        )

    assert to_gateway.cut > 0
    assert to_broker.cut > 0
    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)
