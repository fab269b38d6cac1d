"""The example of a FastAPI application, served by a real server: requests and bytes are metered."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.ports import take_port
from tests.support.servers.installation import Installation, started
from tests.support.waiting import eventually

CHUNK_BYTES = 1000
REPORTS = (("ann", 3), ("bob", 0), ("ann", 200), ("eve", 1))


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    """A Meterstream."""
    with started(tmp_path) as place:
        yield place


def named(installation: Installation, name: str, expected: int) -> list[dict[str, Any]]:
    """The events of this name, once so many are there."""
    def found() -> list[dict[str, Any]]:
        answer = installation.get("/v1/events/", name=name, limit="100")
        events: list[dict[str, Any]] = answer.json()["items"] if answer.status_code == 200 else []
        return events if len(events) >= expected else []

    events: list[dict[str, Any]] = eventually(found)
    return events


def test_reports_and_their_bytes_are_metered(installation: Installation, tmp_path: Path) -> None:
    """One event a report, one a response with its bytes, and nothing for who is not signed in."""
    port = take_port()
    surroundings = {**os.environ, "DOWNLOADS_URL": installation.url, "DOWNLOADS_TOKEN": installation.token,
                    "DOWNLOADS_SPOOL": str(tmp_path / "spool")}  # fmt: skip
    command = [sys.executable, "-m", "uvicorn", "tests.examples.downloads:app", "--port", str(port)]
    with (tmp_path / "application.log").open("wb") as log:
        application = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            eventually(lambda: answers(http))
            for user, chunks in REPORTS:
                answer = http.get("/reports/monthly", params={"chunks": chunks}, headers={"x-user": user})
                assert len(answer.content) == chunks * CHUNK_BYTES
        downloads, reports = (named(installation, name, len(REPORTS)) for name in ("download", "report"))
        application.send_signal(signal.SIGTERM)
        assert application.wait(30) == 128 + signal.SIGTERM
    finally:
        application.kill()

    told = sorted((event["external_customer_id"], event["metadata"]["bytes"]) for event in downloads)
    assert told == sorted((user, chunks * CHUNK_BYTES) for user, chunks in REPORTS)
    assert sorted(event["external_customer_id"] for event in reports) == sorted(user for user, _ in REPORTS)
    assert list((tmp_path / "spool").glob("*.spool")) == []


def answers(http: httpx.Client) -> bool:
    """Whether the application listens; nobody is signed in."""
    try:
        return http.get("/reports/monthly", params={"chunks": 1}).status_code == 422
    except httpx.TransportError:
        return False
