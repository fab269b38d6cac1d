"""The quick way into the long-lived processes means what the command line means, and leaves the rest to it."""

from pathlib import Path
from typing import Any

import pytest

from deploy import app, cli
from deploy.commands import operations as commands
from deploy.server import start
from deploy.server.options import plain_options
from deploy.settings import Settings
from tests.support.servers.installation import meterstream

PLAIN = [
    "serve",
    "serve --data scratch/d --port 0",
    "--data=scratch/d serve --host 0.0.0.0 --port=9000 --lifeline 7",
    "--token polar_oat_x serve --log kafka://h:9092/p",
    "gateway --upstream http://a:8000 --port 1 --host ::1",
    "--data d --log kafka://h:9092 gateway --lifeline 3 --socket 4",
    "aggregate --data d --host 0.0.0.0 --port 8001",
]
NOT_PLAIN = [
    "", "version", "serve --help", "serve --port x", "serve --port -1", "serve --port", "serve --data",
    "serve --data -d", "serve --url http://x", "serve --output json", "serve --upstream http://a", "serve -- --port 1",
    "serve extra", "serve serve", "serve gateway", "aggregate --socket 3", "serve --port 1 --port 2", "usage serve",
    "events send --data serve", "tokens create serve --token t",
]  # fmt: skip


class Begun(Exception):
    """What would have begun."""


@pytest.fixture(autouse=True)
def _nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(name: str, settings: Settings, lifeline: int | None, listener: int | None = None) -> None:
        raise Begun(name, settings, lifeline, listener)

    monkeypatch.setattr(start, "begin", begin)
    monkeypatch.setattr(commands, "begin", begin)


def begun(run: Any, line: str) -> tuple[Any, ...]:
    """Process, settings, lifeline and socket of what the line begins."""
    with pytest.raises(Begun) as found:
        run(line.split(), Settings(port=1234, data=Path("elsewhere")))
    return found.value.args


@pytest.mark.parametrize("line", PLAIN)
def test_plain_options_mean_what_the_command_line_means(line: str) -> None:
    """The same process with the same settings, whichever way it begins."""
    assert plain_options(line.split()) is not None
    assert begun(cli._run, line) == begun(app.run, line)


@pytest.mark.parametrize("line", NOT_PLAIN)
def test_what_is_not_plain_is_the_command_lines(line: str) -> None:
    """Help, mistakes and other commands are not guessed at."""
    assert plain_options(line.split()) is None


@pytest.mark.parametrize("line", ["serve --data", "serve --port x", "gateway --nonsense"])
def test_a_mistake_is_explained_as_ever(line: str) -> None:
    """Exit code 2 and one line."""
    ended = meterstream(*line.split())

    assert ended.returncode == 2
    assert ended.stderr.startswith("meterstream: ")
    assert "Traceback" not in ended.stderr
