"""The README's commands are commands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from deploy.command_line import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LINES = [line.strip() for line in README.splitlines() if line.startswith("    meterstream ")]
MENTIONED = sorted(set(re.findall(r"`meterstream ([a-z]+(?: [a-z]+)?)", README)))


def command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words behind it."""
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands") and words:
        assert words[0] in found.commands, f"there is no command {words[0]}"
        found, words = found.commands[words[0]], words[1:]
    return found, words


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_of_the_readme_is_valid(line: str) -> None:
    """Each line names a command that exists, and only options that it has."""
    found, rest = command(shlex.split(line)[1:])
    known = {option for parameter in found.params for option in parameter.opts}

    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("mention", MENTIONED)
def test_a_command_that_is_mentioned_exists(mention: str) -> None:
    """What the text calls a command is one."""
    command(mention.split())


def test_the_readme_shows_commands() -> None:
    """The two tests above are not empty."""
    assert len(LINES) >= 5
    assert MENTIONED
