"""Two servers that the tests of this room share: ours, and the one that stands for Polar."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.support.polar.forwarder import Clocks
from tests.support.polar.proxy import Polar
from tests.support.servers.installation import Installation, started

_numbers = count()


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """The server behind the proxy."""
    with started(tmp_path_factory.mktemp("upstream")) as place:
        yield place


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """The server whose events are forwarded."""
    with started(tmp_path_factory.mktemp("ours")) as place:
        yield place


@pytest.fixture
def clocks() -> Clocks:
    """Time for the forwarder and the proxy: a minute a second."""
    return Clocks(60.0)


@pytest.fixture
def polar(upstream: Installation, clocks: Clocks) -> Iterator[Polar]:
    """The proxy, without a fault so far."""
    proxy = Polar(upstream, clocks.now_us)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Where a forwarder keeps its state."""
    return tmp_path / "forward.sqlite"


@pytest.fixture
def name() -> str:
    """An event name of this test alone: the servers are shared."""
    return f"event-{next(_numbers)}"
