"""The places where the kinds of log live, for the contract suite.

An implementation joins the suite by adding a subclass of ``World`` to ``WORLDS`` and nothing else: every test of
``test_log.py`` then runs against it. A world says how to open its log, how to break it and how to mend it; the
suite says what must be true. What a world cannot do it leaves as it is here, and the tests that need it skip.

* ``open`` may be called many times: all logs of a world share their data, as processes on one installation do.
* ``replace`` deletes the streams and makes them again, empty; the suite has closed its logs before.
* ``full`` makes every append fail with TryAgain inside the ``with`` block, and lets them pass after it.
* ``url`` is what other processes pass to ``open_log``; None when they could not see the same data.
* ``trim`` removes what is older than an instant: the log itself, or whoever does it for that kind.
* ``time_step_us`` is how finely the kind tells the time; ``one_clock`` whether all its records have one clock, or each
  appender brings its own, so that a clock set back shows.

A world that needs a server starts it in ``__init__`` on a free port, and calls ``pytest.skip`` with the reason when
it cannot. ``close`` must leave no thread, process or socket behind.
"""

import contextlib
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from confluent_kafka import TopicPartition

from ingest.log import open_log
from ingest.log.kafka_admin import Wanted, make_topics, parse_address
from ingest.log.memory import Disk, MemoryLog
from ingest.log.partitions import Limits
from ingest.log.sqlite_log import EmbeddedLog
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, TryAgain
from tests.support.faults.small_disk import nothing_written
from tests.support.kafka.shared import shared_broker
from tests.support.waiting import eventually

# Three partitions, so that mixing them up shows.
PARTITIONS = {USAGE_EVENTS: 3, USAGE_CONTROL: 1}
# Small enough to reach in a test.
LIMITS = Limits(value_bytes_max=8 << 20, lock_wait_s_max=30.0)


class Clock:
    """Microseconds since 1970 that pass when the test says so; starts at the present."""

    def __init__(self) -> None:
        self.now_us = time.time_ns() // 1_000_000 * 1000

    def __call__(self) -> int:
        """The time."""
        return self.now_us


class World(ABC):
    """One installation of one kind of log, fresh for each test."""

    url: str | None = None
    time_step_us = 1
    one_clock = True
    examples = 25  # of a property that needs a world for each

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.logs: list[Log] = []

    def open(self) -> Log:
        """Another opener of the same data; closed with the world at the latest."""
        log = self.make(self.clock)
        self.logs.append(log)
        return log

    def open_hasty(self) -> Log:
        """An opener that gives up a write soon, where that is a setting."""
        return self.open()

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
        """See World."""
        with nothing_written():
            yield

    def trim(self, log: Log, stream: str, older_than_us: int) -> int:
        """See World."""
        assert isinstance(log, EmbeddedLog)
        return log.trim(stream, older_than_us)


def _answers(log: Log, stream: str) -> bool:
    with contextlib.suppress(TryAgain):
        return bool(log.ends(stream))
    return False


class KafkaWorld(World):
    """Two topics of their own on the run's real broker of the current release."""

    version = "4"
    time_step_us = 1000
    one_clock = False
    examples = 8  # making topics takes longer than using them
    _numbers = itertools.count()

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.cluster = shared_broker(self.version)
        prefix = f"world-{next(self._numbers)}"
        self.url = f"kafka://{self.cluster.bootstrap}/{prefix}"
        self.address = parse_address(self.url, {})
        self._make_topics()

    def make(self, clock_us: Callable[[], int]) -> Log:
        """See World."""
        assert self.url is not None
        return open_log(self.url, partitions=PARTITIONS, clock_us=clock_us, limits=LIMITS)

    def replace(self) -> None:
        """See World."""
        admin = self.cluster.admin()
        for deleted in admin.delete_topics([self.address.topic(stream) for stream in PARTITIONS]).values():
            deleted.result(30)
        gone = {self.address.topic(stream) for stream in PARTITIONS}
        eventually(lambda: gone.isdisjoint(admin.list_topics(timeout=5).topics))
        self._make_topics()

    def open_hasty(self) -> Log:
        """See World."""
        log = open_log(f"{self.url}?delivery_timeout_s=1", partitions=PARTITIONS, limits=LIMITS)
        self.logs.append(log)
        return log

    def _make_topics(self) -> None:
        """Until both can be asked for: a topic that has just been made is listed before it has a leader."""
        make_topics(self.address, Wanted(partitions=PARTITIONS[USAGE_EVENTS]))
        with contextlib.closing(self.make(self.clock)) as log:
            eventually(lambda: all(map(_answers, (log, log), PARTITIONS)))

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """The broker is there, and answers nothing."""
        [node] = self.cluster.nodes
        node.pause()
        try:
            yield
        finally:
            node.resume()
            self.cluster.wait_ready()

    def trim(self, log: Log, stream: str, older_than_us: int) -> int:
        """What the broker does by the topic's retention, on command: it drops whole files, this drops records."""
        assert log.trim(stream, older_than_us) == 0, "retention is the broker's affair"
        removed, admin, topic = 0, self.cluster.admin(), self.address.topic(stream)
        starts, ends = log.starts(stream), log.ends(stream)
        for partition, start in starts.items():
            records = log.read(stream, {partition: start}, bytes_max=1 << 30)
            old = sum(record.timestamp_us < older_than_us for record in records[:-1])
            below = TopicPartition(topic, partition, min(start + old, ends[partition]))
            if old:
                admin.delete_records([below])[below].result(30)
                removed += old
        return removed


class Kafka39World(KafkaWorld):
    """The same on the oldest release that is tested."""

    version = "3.9"


WORLDS: list[type[World]] = [MemoryWorld, EmbeddedWorld, KafkaWorld, Kafka39World]
