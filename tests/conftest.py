"""What every test may ask for, and what a run says at its end."""

import functools
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support.faults.small_disk import SmallDisk
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.shared import shared_broker, stop_brokers

# Markers of tests that take minutes: each has a make target, and `make test` leaves all of them out (pyproject.toml).
TARGETS = ("kafka", "crash", "upstream", "vendors")
# The marker of every test in a folder. A file's own marker takes its place.
FOLDERS = {
    "aggregator/forward": "upstream",
    "aggregator/reconcile": "upstream",
    "examples": "vendors",
    "faults/crash": "crash",
    "faults/kafka": "kafka",
    "faults/power": "crash",
    "sdk": "vendors",
    "vendors": "vendors",
}
OWN_MARKER = re.compile(r"^pytestmark = pytest\.mark\.(\w+)$", re.MULTILINE)

# What somebody's shell says about a server of theirs is not for the tests' servers.
for name in [name for name in os.environ if name.startswith("METERSTREAM_")]:
    del os.environ[name]

# Nothing asserts a duration, of an example neither: two processes that share a core take turns of any length.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Whether a test notices an edit is known at the first example that fails; the same examples are drawn for each edit.
PHASES = (Phase.explicit, Phase.generate)
settings.register_profile("mutants", settings.get_profile("suite"), phases=PHASES, derandomize=True, database=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--long``: fault tests with more rounds and longer faults, as `make faults` runs them."""
    parser.addoption("--long", action="store_true", help="fault tests with more rounds and longer faults")


@functools.cache
def target_of(path: Path) -> str | None:
    """Return the target marker of all tests in a file: its own ``pytestmark``, or that of its folder."""
    own = OWN_MARKER.search(path.read_text(encoding="utf-8"))
    if own and own[1] in TARGETS:
        return own[1]
    folders = (str(folder) for folder in path.relative_to(Path(__file__).parent).parents)
    return next((FOLDERS[folder] for folder in folders if folder in FOLDERS), None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files of other targets before they are imported: importing all of them takes seconds in each process."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    asked = config.option.markexpr
    return True if is_test and asked in TARGETS and target_of(collection_path) != asked else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test for the target of its file. Refuse any other target's marker: no test may run twice or never."""
    target = target_of(item.path)
    if target:
        item.add_marker(target)
    if others := {mark.name for mark in item.iter_markers()} & set(TARGETS) - {target}:
        raise pytest.UsageError(f"{item.nodeid}: mark the whole file, with one of {', '.join(TARGETS)}; not {others}")


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


def pytest_unconfigure() -> None:
    """Remove the hook that Hypothesis leaves in the garbage collector, in every process of a run.

    The hook keeps all modules of the tests alive until after Python has ended. DuckDB's binding then takes its types
    for leaked ones and prints a hundred lines about them, behind the run's closing line.
    """
    homes = [str(getattr(hook, "__module__", "")) for hook in gc.callbacks]
    gc.callbacks[:] = [
        hook for hook, home in zip(gc.callbacks, homes, strict=True) if not home.startswith("hypothesis")
    ]
