"""What every test may ask for, and what a run says at its end."""

import pytest

from tests.kafka.cluster import Cluster
from tests.kafka.shared import shared_broker, unavailable


@pytest.fixture
def kafka() -> Cluster:
    """The run's real Kafka broker, current release. Use topics of your own, and never stop it."""
    return shared_broker()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say plainly that the broker tests did not run."""
    if unavailable:
        terminalreporter.write_line(f"The tests on a real Kafka broker did not run: {unavailable[0]}", yellow=True)
