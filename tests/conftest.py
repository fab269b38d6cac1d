"""What every test may ask for, and what a run says at its end."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.faults.small_disk import SmallDisk
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.shared import shared_broker, stop_brokers

# What somebody's shell says about a server of theirs is not for the tests' servers.
for name in [name for name in os.environ if name.startswith("METERSTREAM_")]:
    del os.environ[name]

# Nothing asserts a duration, of an example neither: two processes that share a core take turns of any length.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk of the test's own."""
    small = SmallDisk(tmp_path / "small")
    yield small
    small.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests recorded, and say plainly when the broker tests did not run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    for report in reports:
        for name, text in getattr(report, "user_properties", []):
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(str(text))
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for reason in sorted(text for text in skipped if "Kafka" in text)[:1]:
        terminalreporter.write_line(
            f"The tests on a real Kafka broker did not run, only those on librdkafka's mock: {reason}", yellow=True
        )


def pytest_sessionfinish() -> None:
    """Each process of a run that is spread over several stops the brokers that it started."""
    stop_brokers()
