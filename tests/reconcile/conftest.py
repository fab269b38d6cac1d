"""What the tests of reconciliation start from."""

import shutil
from pathlib import Path

import pytest

from tests.faults.evidence import write_sample
from tests.reconcile.planting import Left


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
