"""However much is thrown at the gateway, its process stays of one size."""

import asyncio
import contextlib
import gzip
import json
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import zstandard

from ingest.limits import BODY_BYTES_MAX, MEBIBYTE
from ingest.log import open_log
from meters.catalogue.access import TOKEN_PREFIX, digest
from meters.catalogue.catalogue import Token, TokenCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry
from tests.support.servers.gateway import event
from tests.support.waiting import eventually

PROGRAM = """
import socket, sys
import ingest.admission.kernels  # which takes its memory once, when there is much to read
from ingest.log import open_log
from ingest.gateway.server import ServerSettings, run
log = open_log("embedded:" + sys.argv[1])
try:
    run(log, ServerSettings(), [socket.socket(fileno=int(sys.argv[2]))])
finally:
    log.close()
"""

HEAVY = ("duckdb", "pyarrow", "numpy", "numba", "fastapi", "starlette", "pydantic", "httpx", "rich", "typer", "sqlglot")
LOADED = f"import sys, ingest.log, ingest.gateway.server; print([name for name in {HEAVY} if name in sys.modules])"

GROWTH_BYTES_MAX = 160 * MEBIBYTE
"""What one of the largest bodies may cost while it is checked (its objects are some ten times its bytes), and a few
more that wait. Ten times less than what is thrown."""


class GatewayProcess:
    """A gateway in a process of its own, on an embedded log."""

    def __init__(self, directory: Path) -> None:
        self.secret = TOKEN_PREFIX + uuid.uuid4().hex
        self.directory = directory
        token = Token(
            id=str(uuid.uuid4()), organization_id=str(uuid.uuid4()), name="t", sha256=digest(self.secret),
            scopes=["events:write"], created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )  # fmt: skip
        log = open_log(f"embedded:{directory}")
        asyncio.run(log.append(USAGE_CONTROL, [Entry(encode_change(TokenCreated(token)))]))
        log.close()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(directory), str(listener.fileno())],
                pass_fds=[listener.fileno()],
            )  # fmt: skip
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, headers={"authorization": f"Bearer {self.secret}"}
        )

    def resident_bytes(self) -> int:
        """The process's resident memory."""
        found = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self._process.pid)], capture_output=True, check=True  # noqa: S607
        )
        return int(found.stdout) * 1024

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self.client.close()
        self._process.terminate()
        self._process.wait(timeout=30)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway that has answered once."""
    running = GatewayProcess(tmp_path)
    try:
        eventually(lambda: _ready(running))
        yield running
    finally:
        running.stop()


def _ready(gateway: GatewayProcess) -> bool:
    return gateway.client.post("/v1/events/ingest", json={"events": [event()]}).status_code == 200


def attacks() -> Iterator[tuple[str, bytes]]:
    """Encodings and bodies that want a lot of memory."""
    yield "gzip", gzip.compress(b" " * 200_000_000, 1)
    yield "zstd", zstandard.compress(b" " * 200_000_000)
    yield "gzip", gzip.compress(b'{"events":[' + b"0," * 5_000_000, 1)
    yield "identity", b'{"events":[' + b"[" * 5_000_000
    yield "identity", b'{"events":[' + b"{}," * 3_000_000 + b"{}]}"
    yield "identity", b'{"events":[' + b"0," * 5_000_000 + b"0]}"
    yield "identity", b" " * BODY_BYTES_MAX


def test_memory_stays_flat(gateway: GatewayProcess) -> None:
    """Bombs, floods of values, and three hundred megabytes of bodies over the limit leave the process as it was."""
    before = gateway.resident_bytes()
    peak = 0
    for encoding, content in attacks():
        answer = gateway.client.post("/v1/events/ingest", content=content, headers={"content-encoding": encoding})
        assert answer.status_code in (400, 413, 422)
        peak = max(peak, gateway.resident_bytes())
    for _ in range(3):
        with contextlib.suppress(httpx.TransportError):  # an answer before the end of a body may not arrive
            answer = gateway.client.post("/v1/events/ingest", content=b" " * (10 * BODY_BYTES_MAX))
            assert answer.status_code == 413
        peak = max(peak, gateway.resident_bytes())
    assert peak - before < GROWTH_BYTES_MAX
    assert gateway.client.post("/v1/events/ingest", json={"events": [event()]}).status_code == 200


def test_a_gateway_ends_in_order(tmp_path: Path) -> None:
    """SIGTERM lets requests finish, and what was acknowledged is in the log."""
    running = GatewayProcess(tmp_path)
    eventually(lambda: _ready(running))
    running.stop()
    log = open_log(f"embedded:{tmp_path}")
    records = log.read(USAGE_EVENTS, {0: 0}, bytes_max=1 << 20)
    log.close()
    assert [json.loads(record.value)["name"] for record in records] == ["call"]


def test_a_gateway_is_light() -> None:
    """What is slow to load is not loaded, so that a restart accepts events at once."""
    found = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, check=True, text=True)
    assert found.stdout == "[]\n"
