"""A real installation for tests: ``meterstream serve`` on a free port, and the command line beside it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.support.waiting import eventually

PATIENCE_S = 60.0  # for what takes a second on a machine that does nothing else


def meterstream(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, run as a person would; no variable of the surroundings reaches it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("METERSTREAM_")}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        input=text, capture_output=True, text=True, env=clean | environment, timeout=PATIENCE_S, check=False,
    )


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
        return False


def children(supervisor: int) -> dict[str, int]:
    """The process ids of the gateway, the aggregator and the forwarder of a server, as far as they run."""
    found = {}
    for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found.update({name: int(pid) for name in ("gateway", "aggregate", "forward") if name.encode() in arguments})
    return found


class Installation:
    """A data directory and the server on it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.url = ""
        self.token = ""
        self.greeting = ""
        self._log = data.with_suffix(".stderr")
        self.server: subprocess.Popen[str] | None = None
        self._http = httpx.Client(timeout=PATIENCE_S)  # a start on a busy machine takes longer than five seconds
        self._lifeline, self._held_end = os.pipe()  # the server ends with the tests, even when they are killed

    def start(self, *options: str) -> None:
        """Serve, and wait until reads are answered."""
        self.launch(*options)
        if not self.token:
            self.await_first_token()
        eventually(lambda: self.get("/v1/meters/").status_code == 200)

    def launch(self, *options: str) -> None:
        """Serve, and wait until it says where it listens."""
        with self._log.open("a") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", "serve", "--data", str(self.data), "--port", "0",
                 "--lifeline", str(self._lifeline), *options],
                stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True, pass_fds=[self._lifeline],
            )
        assert self.server.stdout is not None
        self.greeting = self.server.stdout.readline()
        found = re.search(r"http://\S+?(?=,)", self.greeting)
        assert found, self.greeting + self._log.read_text()
        self.url = found.group()

    def await_first_token(self) -> None:
        """Read the rest of the greeting, which comes when the first organization is made."""
        self.greeting += self._rest_of_greeting()
        self.token = re.findall(r"polar_oat_[\w-]+", self.greeting)[0]

    def _rest_of_greeting(self) -> str:
        assert self.server is not None
        assert self.server.stdout is not None
        lines = []
        while not (lines and lines[-1].strip().startswith("-d ")):
            lines.append(self.server.stdout.readline())
            assert lines[-1], "".join(lines)
        return "".join(lines)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the server and wait for it; its exit code."""
        assert self.server is not None
        self.server.send_signal(number)
        code = self.server.wait(PATIENCE_S)
        assert self.server.stdout is not None
        self.server.stdout.close()
        self.server = None
        return code

    def close(self) -> None:
        """Stop if it runs, and let go of everything."""
        if self.server is not None:
            self.stop()
        self._http.close()
        os.close(self._held_end)
        os.close(self._lifeline)

    def children(self) -> dict[str, int]:
        """The process ids of the gateway, the aggregator and the forwarder, as far as they run."""
        assert self.server is not None
        return children(self.server.pid)

    def run(self, *arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """A command against this installation."""
        where = ("--url", self.url, "--token", self.token, "--data", str(self.data))
        return meterstream(*arguments, *where, text=text, **environment)

    def answer(self, *arguments: str, text: str = "") -> Any:
        """The JSON that a successful command prints."""
        done = self.run(*arguments, "--output", "json", text=text)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token or 'polar_oat_of_nobody_yet'}"}

    def get(self, path: str, **params: str) -> httpx.Response:
        """A plain request with the token."""
        return self._http.get(self.url + path, params=params, headers=self._headers)

    def ingest(self, *events: dict[str, Any]) -> httpx.Response:
        """Events, with the token."""
        return self._http.post(f"{self.url}/v1/events/ingest", json={"events": events}, headers=self._headers)

    def patch(self, path: str, body: object) -> None:
        """A change that no command makes."""
        self._http.patch(self.url + path, json=body, headers=self._headers).raise_for_status()

    @property
    def log(self) -> str:
        """What the server wrote to stderr."""
        return self._log.read_text()


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Installation]:
    """A running server with its data in this folder; it ends with the block."""
    with contextlib.closing(Installation(folder / "data")) as place:
        place.start()
        yield place
