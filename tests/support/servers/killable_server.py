"""The whole server under a fault: a supervisor with its two children, any of which can be killed or stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from tests.support.ports import take_port
from tests.support.servers.installation import alive, children
from tests.support.waiting import eventually

TOKEN = "polar_oat_fault_test_0123456789"


class Server:
    """A supervisor with its two children, any of which can be killed."""

    def __init__(
        self, data: Path, output: Path, *, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.data, self._output = data, output
        self._options, self._environment = options, environment
        self.port = take_port()
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
                self.process = subprocess.Popen(
                    [*command, "--token", TOKEN, *self._options], stdout=output, stderr=output, env=self._environment
                )
        eventually(self.reads if victim == "aggregate" else self._accepts)
        return time.monotonic() - self._killed_s

    def _accepts(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._output.read_text()[-2000:]
        with contextlib.suppress(httpx.TransportError):
            return self.client.post("/v1/events/ingest", json={"events": []}).status_code == 200
        return False

    def reads(self) -> bool:
        """Whether a question is answered."""
        with contextlib.suppress(httpx.TransportError):  # a kept connection may have ended with its gateway
            return self.client.get("/v1/events/names").status_code == 200
        return False

    def children(self) -> dict[str, int]:
        """The process ids of the gateway, the aggregator and the forwarder, as far as they run."""
        assert self.process is not None
        return children(self.process.pid)

    def kill(self, victim: str) -> None:
        """SIGKILL to one of them, or to all processes."""
        children = self.children()
        assert self.process is not None
        pids = [self.process.pid, *children.values()] if victim == "server" else [children[victim]]
        self._killed_s = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # children end with their parent
                os.kill(pid, signal.SIGKILL)
        if victim == "server":
            self.process.wait()
            self.process = None
        eventually(lambda: not any(alive(pid) for pid in pids))

    def calls(self) -> int:
        """How many events called "call" the API counts, once the view has read everything that is in the log."""
        event = {"name": "end", "external_customer_id": "end", "external_id": "end"}
        position = self.client.post("/v1/events/ingest", json={"events": [event]}).headers["log-position"]

        def answer() -> list[dict[str, object]] | None:
            try:
                found = self.client.get("/v1/events/names", headers={"prefer": "wait=30", "log-position": position})
            except httpx.TransportError:  # a kept connection may end between two requests; asking again is harmless
                return None
            reached = found.status_code == 200 and _offset(found.headers["as-of"]) >= _offset(position)
            return found.json()["items"] if reached else None

        return sum(int(str(item["occurrences"])) for item in eventually(answer) if item["name"] == "call")

    def stop(self) -> int:
        """A polite end; the exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        self._killed_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        return process.wait(60)

    def close(self) -> None:
        """A polite end, if it runs."""
        self.client.close()
        if self.process is not None:
            self.stop()


def _offset(position: str) -> int:
    return int(position.split(":")[1])
