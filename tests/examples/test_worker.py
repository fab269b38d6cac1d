"""The example of a Celery worker, with a real one: every attempt of every task is metered once."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.environments import environment
from tests.support.servers.installation import Installation, started
from tests.support.waiting import eventually

REPOSITORY = Path(__file__).parent.parent.parent
TASKS = 12
MANY_FRAMES = 6  # such tasks take two attempts
SEND = """
from tests.examples.worker import render
for number in range({tasks}):
    render.delay(f"user-{{number % 3}}", {many} if number % 4 == 0 else 1)
"""


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    """A server."""
    with started(tmp_path) as place:
        yield place


@pytest.mark.timeout(1200)  # the first run installs Celery
def test_every_attempt_of_every_task_is_metered(installation: Installation, tmp_path: Path) -> None:
    """Two forked processes, retries among the tasks: the events that arrive are the attempts that were made."""
    python = environment("examples-worker", Path(__file__).parent / "requirements-worker.txt")
    broker, spool = tmp_path / "broker", tmp_path / "spool"
    broker.mkdir()
    surroundings = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "RENDER_URL": installation.url, "RENDER_SPOOL": str(spool),
        "RENDER_TOKEN": installation.token, "RENDER_BROKER": str(broker),
    }  # fmt: skip
    send = [python, "-c", SEND.format(tasks=TASKS, many=MANY_FRAMES)]
    subprocess.run(send, env=surroundings, cwd=tmp_path, check=True, timeout=60)
    command = [python, "-m", "celery", "-A", "tests.examples.worker", "worker", "--pool", "prefork", "-c", "2"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, env=surroundings, cwd=tmp_path, stdout=log, stderr=log)
    try:
        expected = TASKS + TASKS // 4
        found = eventually(lambda: attempts(installation, expected))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        worker.kill()

    assert len({event["metadata"]["frames"] for event in found}) == 2
    assert all(event["metadata"]["deltaTime"] >= event["metadata"]["frames"] / 1000 for event in found)
    assert {event["metadata"]["strategy"] for event in found} == {"DeltaTime"}
    assert list(spool.glob("*.spool")) == []


def attempts(installation: Installation, expected: int) -> list[dict[str, dict[str, float]]]:
    """The events, once so many are there; never more."""
    answer: httpx.Response = installation.get("/v1/events/", name="render", limit=100)
    found: list[dict[str, dict[str, float]]] = answer.json()["items"] if answer.status_code == 200 else []
    assert len(found) <= expected
    return found if len(found) == expected else []
