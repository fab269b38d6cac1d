"""Several organizations in one installation, as the command line tells them apart."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from deploy.server.data import DataDirectory
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.records import OTHER_ORGANIZATION, decisions, entry, line, organization
from tests.support.servers.installation import Installation, meterstream
from tests.support.waiting import eventually


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """The data of two organizations, with nobody running."""
    with contextlib.closing(DataDirectory(tmp_path).open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), organization(OTHER_ORGANIZATION)])))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("tokens create", "--organization"),
        ("forward plan", "METERSTREAM_POLAR_ORGANIZATION"),
    ],
)
def test_what_says_which_organization_is_named(two: Path, line: str, names: str) -> None:
    """The option, or the variable where there is no option."""
    done = meterstream(*line.split(), "--data", str(two))

    assert done.returncode == 2
    assert f"say which organization with {names} (an id or a name); there are: " in done.stderr
    assert OTHER_ORGANIZATION in done.stderr


@pytest.mark.parametrize("named", [None, "acme", OTHER_ORGANIZATION])
def test_a_letter_that_is_not_the_tokens_own_is_never_counted_as_its(
    running: Installation, tmp_path: Path, named: str | None
) -> None:
    """With a file or without, it stays on the list, and it is said what to do; --drop takes it off."""
    (event := tmp_path / "event.json").write_bytes(line("stray"))
    value = b"{broken" if named == OTHER_ORGANIZATION else event.read_bytes()
    with contextlib.closing(DataDirectory(running.data).open_log()) as log:
        asyncio.run(log.append(USAGE_EVENTS, [entry(value, organization_id=named, admitted=False)]))
    (letter,) = eventually(lambda: running.answer("events", "dead"))
    assert letter["organization_id"] == named

    for more in ([], ["--file", str(event)]):
        done = running.run("events", "replay", letter["id"], *more)
        assert done.returncode == 1, done.stdout
        assert f"names {'no organization' if named is None else f'the organization {named!r}'}, and" in done.stderr
        assert "`meterstream events send` with a token of the organization that it belongs to" in done.stderr
    assert running.answer("events", "dead") == [letter]
    assert running.answer("events", "replay", letter["id"], "--drop")["replayed_at"]
    assert running.answer("events", "dead") == running.answer("events", "list") == []


def test_a_letter_of_the_tokens_own_organization_is_sent_again(running: Installation, tmp_path: Path) -> None:
    """Mended, it counts and leaves the list."""
    (own,) = running.answer("orgs", "list")
    with contextlib.closing(DataDirectory(running.data).open_log()) as log:
        asyncio.run(log.append(USAGE_EVENTS, [entry(b"{broken", organization_id=own["id"], admitted=False)]))
    (letter,) = eventually(lambda: running.answer("events", "dead"))
    assert (letter["organization_id"], letter["is_own"]) == (own["id"], True)
    (mended := tmp_path / "mended.json").write_bytes(line("mended", name="mended"))

    assert running.answer("events", "replay", letter["id"], "--file", str(mended))["replayed_at"]
    assert not running.answer("events", "dead")
    eventually(lambda: len(running.answer("events", "list", "--name", "mended")) == 1)


def test_two_of_one_name_are_made_where_it_is_meant(two: Path) -> None:
    """Commands take an organization's name, which says nothing of which from then on."""
    create = ("orgs", "create", "acme", "--data", str(two), "--output", "json")
    first, second, meant = meterstream(*create), meterstream(*create), meterstream(*create, "--same-name")

    assert (first.returncode, second.returncode, meant.returncode) == (0, 2, 0), second.stderr + meant.stderr
    known = json.loads(first.stdout)["id"]
    assert f"an organization called 'acme' is there already ({known}); with --same-name" in second.stderr
