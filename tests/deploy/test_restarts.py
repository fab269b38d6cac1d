"""How often a child is started again, and when that ends."""

import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.errors import BUG, GiveUp
from deploy.server import supervisor
from deploy.server.supervisor import CRASHES_MAX, Child
from ingest.log import open_log
from ingest.log.sqlite_file import FILE_NAME, PAGE_BYTES
from tests.support.servers.installation import meterstream

COUNTING = "import sys; open(sys.argv[1], 'a').write('started '); raise SystemExit(int(sys.argv[2]))"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSES_S", (0.0,) * CRASHES_MAX)


def keep(tmp_path: Path, exit_code: int) -> tuple[GiveUp | None, int]:
    """Keep a child that ends with this code; how that ended, and how often it was started."""
    starts = tmp_path / "starts"
    child = Child("gateway", [sys.executable, "-c", COUNTING, str(starts), str(exit_code)])

    async def kept() -> GiveUp | None:
        return await child.keep()

    return asyncio.run(kept()), starts.read_text().count("started")


def test_a_child_that_always_crashes_is_given_up(tmp_path: Path) -> None:
    """After so many crashes in a short time another start would not help, and the last words say so."""
    failure, starts = keep(tmp_path, 70)

    assert starts == CRASHES_MAX + 1
    assert failure is not None
    assert "the gateway ended 6 times within 60 s" in str(failure)


@pytest.mark.parametrize("exit_code", [1, 2])
def test_a_child_that_explains_itself_is_not_started_again(tmp_path: Path, exit_code: int) -> None:
    """Exit codes 1 and 2 come with a line that says why; a second try would only say it again."""
    failure, starts = keep(tmp_path, exit_code)

    assert starts == 1
    assert failure is not None
    assert failure.exit_code == exit_code


def damage(data: Path) -> None:
    """Make a log of which everything can be read but how far the events reach."""
    open_log(f"embedded:{data}").close()
    with contextlib.closing(sqlite3.connect(data / FILE_NAME)) as connection:
        [(page,)] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name LIKE 'usage_events%'")
    with (data / FILE_NAME).open("r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(b"\xff" * PAGE_BYTES)


def test_a_gateway_that_cannot_go_on_ends_as_a_crash(tmp_path: Path) -> None:
    """Its process does not linger: one line says why, and the exit code lets whoever supervises start another."""
    damage(tmp_path)

    ended = meterstream("gateway", "--data", str(tmp_path), "--port", "0")

    listening, crashed = map(json.loads, ended.stderr.splitlines())
    assert (listening["event"], crashed["event"]) == ("listening", "crashed")
    assert "the log is damaged" in crashed["exception"]
    assert ended.returncode == BUG


def test_a_stopped_child_stays_stopped() -> None:
    """A child that is asked to end is waited for, and is no failure."""

    async def scenario() -> GiveUp | None:
        child = Child("gateway", [sys.executable, "-c", "import signal; signal.pause()"])
        kept = asyncio.create_task(child.keep())
        await asyncio.sleep(0)
        await child.stop()
        return await kept

    assert asyncio.run(scenario()) is None


@pytest.mark.parametrize("process", ["gateway", "supervisor"])
def test_what_has_to_be_back_soon_loads_nothing_heavy(process: str) -> None:
    """What is loaded before a gateway listens has no store, no framework, no HTTP client and no command line in it."""
    heavy = {"duckdb", "pyarrow", "numpy", "sqlglot", "fastapi", "starlette", "pydantic", "httpx", "aggregator"}
    program = (
        "import deploy.cli, sys\nfrom deploy.server.start import without_rich\nwith without_rich():\n"
        f"    import deploy.server.{process}\nprint(*sys.modules)"
    )

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert (heavy | {"typer", "rich"}) & set(loaded.split()) == set()


def test_tables_are_drawn_after_logs_were_loaded_alone() -> None:
    """Rich is hidden from the libraries of a start and from nobody else."""
    program = (
        "from deploy.server.start import without_rich\nwith without_rich():\n"
        "    import deploy.server.runtime\nimport rich.table"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
