"""The gateway that most tests of HTTP share."""

from collections.abc import Iterator

import pytest

from tests.support.servers.gateway import RunningGateway


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """One gateway on a log in memory, for tests that do not change it for others."""
    with RunningGateway() as running:
        yield running
