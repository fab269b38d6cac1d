"""kill -9 at random moments under load: what was acknowledged is stored, once.

A client sends bodies with ids of its own and remembers which were acknowledged. Every body that was not, it sends
again after the next start, as a careful client does, and some of the acknowledged ones too. Killed is the whole server,
or the gateway alone, or the aggregator alone; the supervisor has to start those two again by itself.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx
import pytest

from ingest.log import open_log
from tests.deploy.installation import alive
from tests.faults.evidence import assert_store_tells, count, eventually, export

SEED = int(os.environ.get("SEED", "20261121"))
ROUNDS = 20
TOKEN = "polar_oat_kill_test_0123456789"
EVENTS_A_BODY = 10
CLIENTS = 8
REPEATED_SHARE = 0.05  # of the bodies: one event that was acknowledged before
LOAD_S = (0.05, 0.6)  # the moment of death, after the first acknowledgment
VICTIMS = ("server", "server", "gateway", "aggregate")
SINGLE_DEATHS_MAX = 4  # in a row: at the sixth within a minute the supervisor rightly gives up


class Server:
    """A supervisor with its two children, any of which can be killed."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self._output = directory / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"authorization": f"Bearer {TOKEN}"}, timeout=60
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._killed_s = 0.0

    def start(self, victim: str = "server") -> float:
        """Start what does not run; the seconds from the kill until its part of the requests is answered."""
        if self.process is None:
            command = [sys.executable, "-m", "deploy.cli", "serve", "--data", str(self.data), "--port", str(self.port)]
            with self._output.open("ab") as output:
                self.process = subprocess.Popen([*command, "--token", TOKEN], stdout=output, stderr=output)
        eventually(self._reads if victim == "aggregate" else self._accepts)
        return time.monotonic() - self._killed_s

    def _accepts(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._output.read_text()[-2000:]
        with contextlib.suppress(httpx.TransportError):
            return self.client.post("/v1/events/ingest", json={"events": []}).status_code == 200
        return False

    def _reads(self) -> bool:
        return self.client.get("/v1/events/names").status_code == 200

    def children(self) -> dict[str, int]:
        """The process ids of the gateway and the aggregator."""
        assert self.process is not None
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found.update({name: int(pid) for name in ("gateway", "aggregate") if name.encode() in arguments})
        return found

    def kill(self, victim: str) -> None:
        """SIGKILL to the gateway, the aggregator, or all three processes."""
        children = self.children()
        assert self.process is not None
        pids = [self.process.pid, *children.values()] if victim == "server" else [children[victim]]
        self._killed_s = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if victim == "server":
            self.process.wait()
            self.process = None
        eventually(lambda: not any(alive(pid) for pid in pids))

    def close(self) -> None:
        """A polite end."""
        self.client.close()
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


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
    server, client = Server(tmp_path), Client(SEED)
    restarts_s: dict[str, list[float]] = {name: [] for name in VICTIMS}
    single_deaths = 0
    try:
        server.start()
        for _ in range(ROUNDS):
            victim = choose.choice(VICTIMS) if single_deaths < SINGLE_DEATHS_MAX else "server"
            single_deaths = 0 if victim == "server" else single_deaths + 1
            asyncio.run(client.load(server, victim, choose.uniform(*LOAD_S)))
            restarts_s[victim].append(server.start(victim))
        answered = _calls(server)
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


def _calls(server: Server) -> int:
    """How many events the API counts, once the view has read everything that is in the log."""
    event = {"name": "end", "external_customer_id": "end", "external_id": "end"}
    position = server.client.post("/v1/events/ingest", json={"events": [event]}).headers["log-position"]

    def answer() -> list[dict[str, object]] | None:
        found = server.client.get("/v1/events/names", headers={"prefer": "wait=30", "log-position": position})
        reached = found.status_code == 200 and _offset(found.headers["as-of"]) >= _offset(position)
        return found.json()["items"] if reached else None

    return sum(int(str(item["occurrences"])) for item in eventually(answer) if item["name"] == "call")


def _offset(position: str) -> int:
    return int(position.split(":")[1])
