"""kill -9 of the whole server at random moments under load: what was acknowledged is stored, once.

A client sends bodies with ids of its own, remembers which were acknowledged, and sends every body that was not
acknowledged again after the next start, as a careful client does. Some acknowledged bodies are sent again on purpose.
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
from pathlib import Path

import duckdb
import httpx
import pytest

ROUNDS = 20
TOKEN = "polar_oat_kill_test_0123456789"
EVENTS_A_BODY = 10
CLIENTS = 8
LOAD_S = (0.05, 0.6)  # the moment of death, after the first acknowledgment
START_TIMEOUT_S = 30.0


class Server:
    """A server process group that can be killed at once."""

    def __init__(self, data: Path) -> None:
        self.data = data
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start; return the seconds until an empty request was accepted."""
        command = [sys.executable, "-m", "deploy.cli", "serve", "--data", str(self.data), "--port", str(self.port)]
        began = time.monotonic()
        with (self.data.parent / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--token", TOKEN], stdout=output, stderr=output, start_new_session=True
            )
        with httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}) as client:
            while time.monotonic() - began < START_TIMEOUT_S:
                with contextlib.suppress(httpx.TransportError):
                    if client.post("/v1/events/ingest", json={"events": []}).status_code == 200:
                        return time.monotonic() - began
                time.sleep(0.01)
        raise AssertionError((self.data.parent / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """SIGKILL to every process of the group, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """A polite end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class Client:
    """Sends bodies, remembers what was sent and what was acknowledged."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._next = 0
        self.sent: set[str] = set()
        self.acknowledged: set[str] = set()
        self.unanswered: list[list[str]] = []
        self.repeated = 0

    def _body(self) -> list[str]:
        if self.unanswered:
            return self.unanswered.pop()
        if self.acknowledged and self._random.random() < 0.05:
            self.repeated += 1
            return self._random.sample(sorted(self.acknowledged), 1)
        first, self._next = self._next, self._next + EVENTS_A_BODY
        return [f"id-{number}" for number in range(first, self._next)]

    async def load(self, server: Server, die_after_s: float) -> None:
        """Send from several connections; kill the server ``die_after_s`` after the first acknowledgment."""
        acknowledged = asyncio.Event()
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers) as http, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._connection(http, acknowledged))
            await acknowledged.wait()
            await asyncio.sleep(die_after_s)  # the random moment that this test is about
            server.kill()

    async def _connection(self, http: httpx.AsyncClient, acknowledged: asyncio.Event) -> None:
        while True:
            ids = self._body()
            self.sent.update(ids)
            event = {"name": "call", "external_customer_id": "ann", "metadata": {"n": 1}}
            events = [event | {"external_id": id} for id in ids]
            try:
                answer = await http.post("/v1/events/ingest", json={"events": events})
            except httpx.TransportError:
                self.unanswered.append(ids)
                return
            assert answer.status_code == 200, answer.text
            self.acknowledged.update(ids)
            acknowledged.set()


@pytest.mark.timeout(300)
def test_every_acknowledged_event_is_stored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty deaths at random moments: nothing acknowledged is lost, nothing is stored twice, nothing is invented."""
    seed = int(os.environ.get("SEED", "20261121"))
    moments = random.Random(seed)
    (tmp_path / "data").mkdir()
    server, client = Server(tmp_path / "data"), Client(seed)
    starts_s = []
    for _ in range(ROUNDS):
        starts_s.append(server.start())
        asyncio.run(client.load(server, moments.uniform(*LOAD_S)))
    starts_s.append(server.start())
    _catch_up(server)
    server.stop()
    stored = _stored(server.data)
    lost = client.acknowledged - set(stored)
    doubled = [id for id, count in stored.items() if count > 1]
    with capsys.disabled():
        print(
            f"\nkill -9: seed {seed}, rounds {ROUNDS}, sent {len(client.sent)}, acked {len(client.acknowledged)}, "
            f"stored {len(stored)}, repeated {client.repeated}, lost {len(lost)}, doubled {len(doubled)}, "
            f"restart median {sorted(starts_s)[ROUNDS // 2]:.2f} s, max {max(starts_s):.2f} s"
        )

    assert set() == lost
    assert [] == doubled
    assert set() == set(stored) - client.sent


def _catch_up(server: Server) -> None:
    """Wait until the view has read everything that is in the log."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        event = {"name": "end", "external_customer_id": "end", "external_id": "end"}
        position = client.post("/v1/events/ingest", json={"events": [event]}).headers["log-position"]
        wait = {"prefer": "wait=30", "log-position": position}
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            answer = client.get("/v1/events/names", headers=wait)
            if answer.status_code == 200 and _offset(answer.headers["as-of"]) >= _offset(position):
                return
    raise AssertionError("the view did not catch up")


def _offset(position: str) -> int:
    return int(position.split(":")[1])


def _stored(data: Path) -> dict[str, int]:
    with duckdb.connect(str(data / "store.duckdb"), read_only=True) as connection:
        counts = connection.execute(
            "SELECT external_id, count(*) FROM events WHERE external_id <> 'end' GROUP BY external_id"
        ).fetchall()
    return dict(counts)
