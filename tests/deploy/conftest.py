"""Installations for the tests of this room."""

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.kafka.cluster import Cluster
from tests.support.servers.installation import Installation, started

_numbers = itertools.count()


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    """A place for a server that is not yet started; whatever runs at the end is stopped."""
    place = Installation(tmp_path / "data")
    yield place
    place.close()


@pytest.fixture
def log_url(kafka: Cluster) -> str:
    """A place on the run's broker where no topics are yet."""
    return f"kafka://{kafka.bootstrap}/deploy-{next(_numbers)}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A running server that the tests of a file share. They must not stop it."""
    with started(tmp_path_factory.mktemp("running")) as place:
        yield place


@pytest.fixture(scope="session", autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Whoever runs the tests in the background, or under nohup, has signals ignored, and so has every child."""
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    gone = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGHUP, gone)
