"""kill -9 over a real Kafka, under load: gateway, aggregator and broker die at random moments, alone or together."""

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from tests.support.faults.sender import Sender, told
from tests.support.faults.store_checks import SEED
from tests.support.kafka.installation import TOKEN, KafkaInstallation, own_brokers, recovery_s

ROUNDS = 20
MOMENT_S = (0.0, 0.4)  # of a death, within its round
PAUSE_S = 0.05  # of a sender's connection: many rounds and few events make a quick recount
CUSTOMERS = 20  # over all partitions
WORDS = 8000  # characters of what a process wrote last: the frames of some twenty threads


class Victims:
    """What dies in a round, and how long each was away."""

    def __init__(self, installation: KafkaInstallation, choose: random.Random) -> None:
        self._installation, self._choose = installation, choose
        self.away_s: dict[str, list[float]] = {"gateway": [], "aggregator": [], "broker": []}

    async def strike(self) -> None:
        """All three, each at a moment of its own, each started again at once like a supervisor does."""
        here, (node,) = self._installation, self._installation.cluster.nodes
        async with asyncio.TaskGroup() as group:
            group.create_task(self._one("gateway", here.gateway.kill, here.gateway.start, here.accepts))
            group.create_task(self._one("aggregator", here.aggregator.kill, here.aggregator.start, here.reads))
            group.create_task(self._one("broker", node.kill, node.start, here.writes))

    async def _one(
        self, name: str, kill: Callable[[], None], start: Callable[[], None], recovered: Callable[[], bool]
    ) -> None:
        await asyncio.sleep(self._choose.uniform(*MOMENT_S))  # the random moment that this test is about

        def again() -> None:
            kill()
            start()

        try:
            self.away_s[name].append(await asyncio.to_thread(recovery_s, again, recovered))
        except AssertionError as failure:
            raise AssertionError(f"the {name} did not come back; {self._last_words()}") from failure

    def _last_words(self) -> str:
        """What each part wrote, and where its threads were: whoever did not come back may have waited for another."""
        here, (node,) = self._installation, self._installation.cluster.nodes
        said = [f"broker (running: {node.running}): {node.output[-WORDS:]}"]
        for part in (here.gateway, here.aggregator):
            running = part.running
            if running:
                part.signal(signal.SIGABRT)
                part.wait()
            said.append(f"{part.name} (running: {running}): {part.output[-WORDS:]}")
        return "\n".join(said)

    def __str__(self) -> str:
        return ", ".join(f"{name} {median(s):.2f} s (max {max(s):.2f})" for name, s in self.away_s.items())


@pytest.mark.timeout(1800)  # with --long a hundred rounds
def test_whoever_dies_nothing_acknowledged_is_lost_or_doubled(
    tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Twenty rounds; in each the gateway, the aggregator and the broker are killed at moments of their own."""
    rounds = ROUNDS * 5 if long else ROUNDS
    with own_brokers(tmp_path) as cluster:
        installation, sender = KafkaInstallation(cluster, tmp_path), Sender(SEED, TOKEN, CUSTOMERS, PAUSE_S)
        victims = Victims(installation, random.Random(SEED))
        with contextlib.closing(installation):
            installation.start()
            for _ in range(rounds):
                asyncio.run(sender.load(installation.address, victims.strike, refused=True))
            outcome, _, _ = installation.end(sender)
    record_property("figures", told("kill -9 of all", outcome, f"{victims}", f"rounds {rounds}"))

    assert (outcome.lost, outcome.doubled, outcome.dead) == (0, 0, 0)
