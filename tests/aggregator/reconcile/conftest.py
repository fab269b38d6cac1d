"""What the tests of reconciliation start from."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults.store_checks import write_sample
from tests.support.polar.two_servers import TwoSides
from tests.support.servers.installation import Installation, started
from tests.support.servers.stopped_installation import Left


@pytest.fixture(scope="session")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of everything in its log, counted by a real engine. Nobody may change it."""
    place = Left(tmp_path_factory.mktemp("counted"))
    with place.log() as log:
        write_sample(log)
    place.count()
    return place.data.path


@pytest.fixture
def left(counted: Path, tmp_path: Path) -> Left:
    """A copy of it, to be spoiled."""
    shutil.copytree(counted, tmp_path / "data")
    return Left(tmp_path / "data")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, Installation]]:
    """Two running servers that many tests share."""
    with started(tmp_path_factory.mktemp("ours")) as ours, started(tmp_path_factory.mktemp("theirs")) as theirs:
        yield ours, theirs


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    """A place for a server of the test's own; whatever runs at the end is stopped."""
    place = Installation(tmp_path / "data")
    yield place
    place.close()


@pytest.fixture
def sides(servers: tuple[Installation, Installation]) -> Iterator[TwoSides]:
    """A fresh organization on each of them."""
    both = TwoSides(*servers)
    yield both
    both.close()
