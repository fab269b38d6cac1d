"""kill -9 at random moments under load: what was acknowledged is stored, once.

A client sends bodies with ids of its own and remembers which were acknowledged. Every body that was not, it sends
again after the next start, as a careful client does, and some of the acknowledged ones too. Killed is the whole server,
or the gateway alone, or the aggregator alone; the supervisor has to start those two again by itself.
"""

import asyncio
import random
from collections import Counter
from pathlib import Path
from statistics import median

import httpx
import pytest

from ingest.log import open_log
from tests.faults.evidence import SEED, assert_store_tells, count, export
from tests.faults.server import TOKEN, Server

ROUNDS = 20
EVENTS_A_BODY = 10
CLIENTS = 8
REPEATED_SHARE = 0.05  # of the bodies: one event that was acknowledged before
LOAD_S = (0.05, 0.6)  # the moment of death, after the first acknowledgment
VICTIMS = ("server", "server", "gateway", "aggregate")
SINGLE_DEATHS_MAX = 4  # in a row: at the sixth within a minute the supervisor rightly gives up


class Client:
    """Sends bodies, remembers what was sent and what was acknowledged."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._next = 0
        self.sent: set[str] = set()
        self.acknowledged: list[str] = []
        self.unanswered: list[list[str]] = []
        self.repeated = 0

    def _body(self) -> list[str]:
        if self.unanswered:
            return self.unanswered.pop()
        if self.acknowledged and self._random.random() < REPEATED_SHARE:
            self.repeated += 1
            return [self._random.choice(self.acknowledged)]
        first, self._next = self._next, self._next + EVENTS_A_BODY
        return [f"id-{number}" for number in range(first, self._next)]

    async def load(self, server: Server, victim: str, die_after_s: float) -> None:
        """Send from several connections; kill the victim ``die_after_s`` after the first acknowledgment."""
        acknowledged, over = asyncio.Event(), asyncio.Event()
        headers = {"authorization": f"Bearer {TOKEN}"}
        http = httpx.AsyncClient(base_url=server.client.base_url, headers=headers, timeout=60)
        async with http, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._connection(http, acknowledged, over))
            await acknowledged.wait()
            await asyncio.sleep(die_after_s)  # the random moment that this test is about
            await asyncio.to_thread(server.kill, victim)
            over.set()

    async def _connection(self, http: httpx.AsyncClient, acknowledged: asyncio.Event, over: asyncio.Event) -> None:
        while not over.is_set():
            ids = self._body()
            self.sent.update(ids)
            events = [
                {"name": "call", "external_customer_id": "ann", "external_id": id, "metadata": {"n": 1}} for id in ids
            ]
            try:
                answer = await http.post("/v1/events/ingest", json={"events": events})
            except httpx.TransportError:
                self.unanswered.append(ids)
                return
            assert answer.status_code == 200, answer.text
            self.acknowledged += ids
            acknowledged.set()


@pytest.mark.timeout(300)
def test_every_acknowledged_event_is_stored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty deaths at random moments: nothing acknowledged is lost, nothing is stored twice, nothing is invented."""
    choose = random.Random(SEED)
    server, client = Server(tmp_path / "data", tmp_path / "server.log"), Client(SEED)
    restarts_s: dict[str, list[float]] = {name: [] for name in VICTIMS}
    single_deaths = 0
    try:
        server.start()
        for _ in range(ROUNDS):
            victim = choose.choice(VICTIMS) if single_deaths < SINGLE_DEATHS_MAX else "server"
            single_deaths = 0 if victim == "server" else single_deaths + 1
            asyncio.run(client.load(server, victim, choose.uniform(*LOAD_S)))
            restarts_s[victim].append(server.start(victim))
        answered = server.calls()
    finally:
        server.close()

    log = open_log(str(server.data))
    tables = export(server.data / "store.duckdb")
    ids = Counter(row[_EXTERNAL_ID] for row in tables["events"] if row[_NAME] == "call")
    lost = set(client.acknowledged) - set(ids)
    doubled = [id for id, times in ids.items() if times > 1]
    restarts = (f"{name} {median(s):.2f} s (max {max(s):.2f}, n={len(s)})" for name, s in restarts_s.items() if s)
    with capsys.disabled():
        print(
            f"\nkill -9: seed {SEED}, rounds {ROUNDS}, sent {len(client.sent)}, acked {len(set(client.acknowledged))}, "
            f"stored {len(ids)}, repeated {client.repeated}, lost {len(lost)}, doubled {len(doubled)}; "
            f"answering again after the death of the {', '.join(restarts)}"
        )
    assert_store_tells(tables, count(log))
    log.close()

    assert set() == lost
    assert [] == doubled
    assert set() == set(ids) - client.sent
    assert len(ids) == answered


_EXTERNAL_ID, _NAME = 13, 9  # columns of ``events``
