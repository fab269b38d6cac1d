"""A real ``meterstream serve`` in a scratch directory, for a benchmark to measure and then stop.

CPU time and peak memory are read from /proc for the whole process group, so that the supervisor, the gateway and the
aggregator each have their own line.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import httpx

from meters.log import parse_position

TOKEN = "polar_oat_benchmark_0123456789abcdef"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 180.0  # with tens of millions of events in the store and a busy machine


class Server:
    """Context manager around one server."""

    def __init__(self, *arguments: str) -> None:
        self.data = Path(tempfile.mkdtemp(prefix="meterstream-bench-"))
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.aggregator = self.data / "api.sock"  # where a proxy sends reads that pass no gateway
        self._arguments = arguments
        self.http = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)

    def start(self) -> None:
        """Start and wait until reads are answered."""
        self.begin()
        self._wait_ready()

    def begin(self) -> None:
        """Start and wait for nothing."""
        command = [sys.executable, "-m", "deploy.cli", "serve", "--data", str(self.data), "--port", str(self.port)]
        output = (self.data / "server.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--token", TOKEN, *self._arguments], stdout=output, stderr=output, start_new_session=True
        )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.http.get("/v1/meters/").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        self.stop()
        raise RuntimeError((self.data / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        """SIGTERM, then wait."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def kill(self) -> None:
        """SIGKILL for every process, as a machine that loses power would."""
        pids = [pid for name, pid in self.pids().items() if name != "supervisor"]
        self.process.kill()
        self.process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def create_meters(self, definitions: list[dict[str, object]]) -> list[str]:
        """Make meters; return their ids."""
        ids = []
        for definition in definitions:
            answer = self.http.post("/v1/meters/", json=definition)
            answer.raise_for_status()
            ids.append(answer.json()["id"])
        return ids

    def wait_for(self, position: str, timeout_s: float = 120) -> None:
        """Wait until the view has reached a ``Log-Position``. Asks a meter's total, which comes from memory."""
        meter_id = self.http.get("/v1/meters/", params={"limit": 1}).json()["items"][0]["id"]
        headers = {"prefer": "wait=5", "log-position": position}
        wanted = parse_position(position)
        assert wanted is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answer = self.http.get(
                f"/v1/meters/{meter_id}/usage", params={"external_customer_id": "end"}, headers=headers
            )
            reached = parse_position(answer.headers.get("as-of", "")) or {}
            if answer.is_success and all(reached.get(partition, 0) >= end for partition, end in wanted.items()):
                return
        raise TimeoutError(position)

    def processes(self) -> dict[str, "Usage"]:
        """CPU seconds and peak memory of each process of the server."""
        return {name: usage(pid) for name, pid in self.pids().items()}

    def pids(self) -> dict[str, int]:
        """The process ids of the supervisor, the gateway and the aggregate."""
        pids = {"supervisor": self.process.pid}
        for child in _children(self.process.pid):
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            name = next((n for n in ("gateway", "aggregate") if n.encode() in command), str(child))
            pids[name] = child
        return pids


class Reader:
    """One connection that only writes and reads bytes, because its own time is part of every latency it measures."""

    def __init__(self, address: int | Path) -> None:
        """``address`` is a port of this machine or the path of a unix socket."""
        if isinstance(address, Path):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(60)
            self._socket.connect(str(address))
        else:
            self._socket = socket.create_connection(("127.0.0.1", address), timeout=60)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, path: str) -> bytes:
        """The body of an answer, which has to be 200."""
        request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
        self._socket.sendall(request.encode())
        answer = bytearray()
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self._received()
        head = bytes(answer[:end]).lower()
        assert head.startswith(b"http/1.1 200 "), head
        length = end + 4 + int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(answer) < length:
            answer += self._received()
        return bytes(answer[end + 4 :])

    def _received(self) -> bytes:
        data = self._socket.recv(65536)
        assert data, "the server closed the connection"
        return data


class Usage(dict[str, float]):
    """``cpu_s``, ``peak_mb`` and ``resident_mb`` of a process."""


def usage(pid: int) -> Usage:
    """Read a process's CPU seconds and peak resident memory."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    status = Path(f"/proc/{pid}/status").read_text()
    peak_mb, resident_mb = (int(status.split(f"{name}:")[1].split()[0]) / 1024 for name in ("VmHWM", "VmRSS"))
    return Usage(
        cpu_s=(int(fields[11]) + int(fields[12])) * _TICK_S, peak_mb=peak_mb, resident_mb=resident_mb
    )


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
