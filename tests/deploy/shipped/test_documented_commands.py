"""The commands of the README, and of every other page, are commands."""

import re
import shlex
from typing import Any

import pytest
import typer.main

from deploy.app import app
from tests.test_tidy import REPOSITORY, repository_files

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [page for page in repository_files() if page.suffix == ".md" and page.name != "CHANGELOG.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
LINES = sorted({line.strip() for line in TEXT.splitlines() if line.startswith("    meterstream ")})
MENTIONED = sorted(set(re.findall(r"`meterstream ([a-z-]+(?: [a-z]+)?)", TEXT)))


def command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words behind it."""
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands") and words:
        assert words[0] in found.commands, f"there is no command {words[0]}"
        found, words = found.commands[words[0]], words[1:]
    return found, words


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_of_a_page_is_valid(line: str) -> None:
    """Each line names a command that exists, and only options that it has."""
    found, rest = command(shlex.split(line)[1:])
    known = {option for parameter in found.params for option in parameter.opts}

    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("mention", MENTIONED)
def test_a_command_that_is_mentioned_exists(mention: str) -> None:
    """What the text calls a command is one."""
    command(mention.split())


def test_the_pages_show_commands() -> None:
    """The two tests above are not empty: they read the README, and the rooms' pages that it sends people to."""
    assert "README.md" in {page.name for page in PAGES}
    assert {"balances.md", "kafka.md"} <= {page.name for page in PAGES}
    assert len(LINES) >= 20
    assert len(MENTIONED) >= 10
