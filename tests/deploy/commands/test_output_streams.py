"""Where an answer goes: to what has no room for it, what is closed, and what cannot show every letter."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tests.support.servers.installation import PATIENCE_S, Installation, meterstream
from tests.support.waiting import eventually

EVENT = '{"name":"call","external_customer_id":"zo\N{LATIN SMALL LETTER E WITH DIAERESIS}","metadata":{"tokens":5}}'


@pytest.fixture(scope="module")
def counted(running: Installation) -> Installation:
    """A server with a meter over one event, of a customer whose name is not ASCII."""
    running.answer("meters", "create", "--name", "tokens", "--sum", "tokens")
    running.answer("events", "send", "-", text=EVENT)
    eventually(lambda: running.answer("usage", "tokens")["total"] == 5)
    return running


def command(*line: str) -> list[str]:
    """A command as the system starts it."""
    return [sys.executable, "-m", "deploy.cli", *line]


def started(line: list[str], stdout: IO[str] | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose answer goes elsewhere."""
    return subprocess.run(
        line, stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | environment, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("is_unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["table", "json"])
def test_an_answer_that_a_full_disk_does_not_take_is_a_failure(output: str, is_unbuffered: str) -> None:
    """It is said once, in a line, whether Python keeps what is printed for a while or not."""
    with Path("/dev/full").open("w") as full:
        done = started(command("version", "--output", output), full, PYTHONUNBUFFERED=is_unbuffered)

    assert (done.returncode, done.stderr) == (
        1, "meterstream: the answer cannot be written: No space left on device\n",
    )  # fmt: skip


@pytest.mark.parametrize("output", ["table", "json", "csv"])
def test_an_answer_without_anywhere_to_go_is_a_failure(counted: Installation, output: str) -> None:
    """Standard output may have been closed by whoever started the command."""
    where = ["--url", counted.url, "--token", counted.token, "--output", output]
    done = started(["sh", "-c", 'exec "$@" >&-', "sh", *command("usage", "tokens", *where)], None)

    assert (done.returncode, done.stderr) == (
        1, "meterstream: the answer cannot be written: standard output is closed\n",
    )  # fmt: skip


def test_a_reader_that_goes_away_needs_no_words() -> None:
    """As head does."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = started(command("version", "--output", "json"), pipe)

    assert (done.returncode, done.stderr) == (1, "")


def test_what_an_encoding_lacks_is_shown_another_way(counted: Installation) -> None:
    """Bars of plain signs, and escapes for letters."""
    chart = counted.run("usage", "tokens", "--chart", PYTHONIOENCODING="ascii")
    listed = counted.run("events", "list", PYTHONIOENCODING="ascii")

    assert (chart.returncode, listed.returncode) == (0, 0), chart.stderr + listed.stderr
    assert "#####" in chart.stdout
    assert "zo\\xeb" in listed.stdout


def test_bytes_that_are_no_text_are_wrong_usage() -> None:
    """Where a name or an id is expected."""
    done = meterstream("customers", "create", "--email", "\udcff@example.com", "--token", "t")

    assert done.returncode == 2
    assert "is no text (UTF-8)" in done.stderr


def test_an_interruption_while_a_command_loads_is_quiet() -> None:
    """Ctrl-C ends it at once, which shells show as 130, and without a word."""
    with subprocess.Popen(command("version"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: "msgspec" in Path(f"/proc/{process.pid}/maps").read_text())  # its own start is over
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)

    assert process.returncode in (130, -signal.SIGINT)
    assert stderr == ""
