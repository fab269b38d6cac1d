"""Several organizations in one installation, as the command line tells them apart."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from deploy.data import DataDirectory
from meters.log import USAGE_CONTROL
from tests.aggregator.records import OTHER_ORGANIZATION, decisions, organization
from tests.deploy.installation import meterstream


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


def test_two_of_one_name_are_made_where_it_is_meant(two: Path) -> None:
    """Commands take an organization's name, which says nothing of which from then on."""
    create = ("orgs", "create", "acme", "--data", str(two), "--output", "json")
    first, second, meant = meterstream(*create), meterstream(*create), meterstream(*create, "--same-name")

    assert (first.returncode, second.returncode, meant.returncode) == (0, 2, 0), second.stderr + meant.stderr
    known = json.loads(first.stdout)["id"]
    assert f"an organization called 'acme' is there already ({known}); with --same-name" in second.stderr
