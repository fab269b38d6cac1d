"""What every test may ask for, and what a run says at its end."""

import pytest

from tests.kafka.cluster import Cluster
from tests.kafka.shared import shared_broker, unavailable


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: fault tests with more rounds and longer faults, as `make faults` runs them."""
    parser.addoption("--long", action="store_true", help="fault tests with more rounds and longer faults")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether a fault test may take its time."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def kafka() -> Cluster:
    """The run's real Kafka broker, current release. Use topics of your own, and never stop it."""
    return shared_broker()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say plainly that the broker tests did not run."""
    if unavailable:
        terminalreporter.write_line(f"The tests on a real Kafka broker did not run: {unavailable[0]}", yellow=True)
