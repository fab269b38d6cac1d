"""The places where the kinds of log live, for the contract suite.

An implementation joins the suite by adding a subclass of ``World`` to ``WORLDS`` and nothing else: every test of
``test_log.py`` then runs against it. A world says how to open its log, how to break it and how to mend it; the
suite says what must be true. What a world cannot do it leaves as it is here, and the tests that need it skip.

* ``open`` may be called many times: all logs of a world share their data, as processes on one installation do.
* ``replace`` deletes the streams and makes them again, empty; the suite has closed its logs before.
* ``full`` makes every append fail with TryAgain inside the ``with`` block, and lets them pass after it.
* ``url`` is what other processes pass to ``open_log``; None when they could not see the same data.
* ``trim`` removes what is older than an instant, where retention is the log's own affair.

A world that needs a server starts it in ``__init__`` on a free port, and calls ``pytest.skip`` with the reason when
it cannot. ``close`` must leave no thread, process or socket behind.
"""

import contextlib
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from ingest.log import open_log
from ingest.log.embedded import EmbeddedLog
from ingest.log.limits import Limits
from ingest.log.memory import Disk, MemoryLog
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log

# Three partitions, so that mixing them up shows.
PARTITIONS = {USAGE_EVENTS: 3, USAGE_CONTROL: 1}
# Small enough to reach in a test.
LIMITS = Limits(value_bytes_max=8 << 20, lock_wait_s_max=30.0)


class Clock:
    """Microseconds since 1970 that pass when the test says so; starts at the present."""

    def __init__(self) -> None:
        self.now_us = time.time_ns() // 1000

    def __call__(self) -> int:
        """The time."""
        return self.now_us


class World(ABC):
    """One installation of one kind of log, fresh for each test."""

    url: str | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.logs: list[Log] = []

    def open(self) -> Log:
        """Another opener of the same data; closed with the world at the latest."""
        log = self.make(self.clock)
        self.logs.append(log)
        return log

    @abstractmethod
    def make(self, clock_us: Callable[[], int]) -> Log:
        """A log with ``PARTITIONS``, ``LIMITS`` and the clock."""

    @abstractmethod
    def replace(self) -> None:
        """Delete the streams and make them again."""

    @abstractmethod
    def full(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, nothing can be written."""

    @abstractmethod
    def trim(self, log: Log, stream: str, older_than_us: int) -> int:
        """Retention: remove what is older; how many records."""

    def close(self) -> None:
        """Close every log."""
        for log in self.logs:
            log.close()


class MemoryWorld(World):
    """Logs of one process on one disk made of lists."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk = Disk(PARTITIONS)

    def make(self, clock_us: Callable[[], int]) -> Log:
        """See World."""
        return MemoryLog(self.disk, clock_us, LIMITS)

    def replace(self) -> None:
        """See World."""
        self.disk = Disk(PARTITIONS)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """See World."""
        self.disk.full = True
        yield
        self.disk.full = False

    def trim(self, log: Log, stream: str, older_than_us: int) -> int:
        """See World."""
        assert isinstance(log, MemoryLog)
        return log.trim(stream, older_than_us)


class EmbeddedWorld(World):
    """A SQLite file in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.url = f"embedded:{directory}"

    def make(self, clock_us: Callable[[], int]) -> Log:
        """See World."""
        return open_log(f"embedded:{self.directory}", partitions=PARTITIONS, clock_us=clock_us, limits=LIMITS)

    def replace(self) -> None:
        """See World."""
        for path in self.directory.glob("log.sqlite*"):
            path.unlink()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """The operating system refuses every write of this process to a file, as a full quota would."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def trim(self, log: Log, stream: str, older_than_us: int) -> int:
        """See World."""
        assert isinstance(log, EmbeddedLog)
        return log.trim(stream, older_than_us)


WORLDS: list[type[World]] = [MemoryWorld, EmbeddedWorld]
