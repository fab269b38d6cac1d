"""Sending that ends early says what is safe, and what to send again."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.errors import INTERRUPTED
from tests.support.servers.installation import PATIENCE_S, Installation
from tests.support.waiting import eventually

EVENT = '{"name":"sent","external_customer_id":"ada"}\n'


@contextmanager
def sending(place: Installation, source: str) -> Iterator["subprocess.Popen[str]"]:
    """``events send`` in pairs, its input and its words to be read as they come."""
    command = [sys.executable, "-m", "deploy.cli", "events", "send", source, "--batch", "2", "--url", place.url]
    with subprocess.Popen(
        [*command, "--token", place.token], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def stored(place: Installation) -> int:
    """How many of the events arrived."""
    return len(place.answer("events", "list", "--name", "sent"))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_ends_it_hears_up_to_which_line_it_is_safe(running: Installation, ending: signal.Signals) -> None:
    """What comes from standard input is new each time, so only what follows may be sent again.

    A line that fills no batch is not held back for others, though the pipe stays open.
    """
    before = stored(running)
    with sending(running, "-") as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("{\n" + EVENT * 5)
        process.stdin.flush()
        eventually(lambda: stored(running) == before + 5)
        process.send_signal(ending)
        said = process.stderr.read()

        assert process.wait(PATIENCE_S) == INTERRUPTED
    assert "line 1: not an event" in said
    assert re.search("interrupted; [45] events are safe, up to line [56].*; send only what follows", said)
    assert said.count("\n") == 2


def test_a_server_that_goes_away_is_told_once_and_waited_for(installation: Installation, tmp_path: Path) -> None:
    """A file may be sent again as a whole, since its lines keep their ids."""
    installation.start()
    path = tmp_path / "usage.ndjson"
    path.write_text("".join(EVENT.replace("ada", str(number)) for number in range(40_000)))
    with sending(installation, str(path)) as process:
        assert process.stderr is not None
        eventually(lambda: stored(installation) > 0)
        installation.stop()
        told = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()

        assert process.wait(PATIENCE_S) == INTERRUPTED
    assert "trying again for 120 s" in told
    assert "events are safe; send the file again, what is there already counts once" in said
