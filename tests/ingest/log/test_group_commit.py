"""Group commit: who waits with whom, what is refused at once, and what an error does to a group."""

import asyncio
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from ingest.log import open_log
from ingest.log.partitions import Limits
from ingest.log.sqlite_file import create
from ingest.log.sqlite_writer import Batch, FileAppender, GroupWriter, PartitionName
from meters.log import USAGE_EVENTS, Entry, TryAgain

PARTITIONS = {USAGE_EVENTS: 2}


class Gate:
    """An appender that remembers its groups and lets one through for each ``opened``."""

    def __init__(self) -> None:
        self.groups: list[int] = []
        self.entered = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)
        self.end = 0

    def commit(self, batches: Mapping[PartitionName, Batch]) -> dict[PartitionName, int]:
        """Count the entries."""
        count = sum(len(batch.heads) for batch in batches.values())
        self.groups.append(count)
        self.entered.release()
        self.opened.acquire()
        first, self.end = self.end, self.end + count
        return dict.fromkeys(batches, first)

    def tidy(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Broken(FileAppender):
    """A real file whose commits fail as often as told, after or before they reached the disk."""

    failures = 0
    reaches_disk = False

    def commit(self, batches: Mapping[PartitionName, Batch]) -> dict[PartitionName, int]:
        """Fail, or do what a FileAppender does."""
        if not self.failures:
            return super().commit(batches)
        self.failures -= 1
        if self.reaches_disk:
            super().commit(batches)
        raise sqlite3.OperationalError("disk I/O error")


def entry(text: str) -> list[Entry]:
    """One entry."""
    return [Entry(text.encode())]


def test_what_queues_during_a_commit_is_the_next_group() -> None:
    """The first entry goes alone and at once; all that came meanwhile go together."""
    gate = Gate()

    async def run() -> list[list[int]]:
        writer = GroupWriter(gate, Limits(), "test")
        first = writer.submit(USAGE_EVENTS, entry("first"))
        await asyncio.to_thread(gate.entered.acquire)
        rest = [writer.submit(USAGE_EVENTS, entry(f"{number}")) for number in range(99)]
        gate.opened.release(2)
        offsets = await asyncio.gather(first, *rest)
        await asyncio.to_thread(writer.close)
        return offsets

    assert [[number] for number in range(100)] == asyncio.run(run())
    assert gate.groups == [1, 99]


def test_a_group_is_bounded() -> None:
    """A group is closed by the entry that fills it, so that its first does not wait for a hundred others."""
    gate = Gate()

    async def run() -> None:
        writer = GroupWriter(gate, Limits(group_bytes_max=10), "test")
        first = writer.submit(USAGE_EVENTS, entry("x" * 10))
        await asyncio.to_thread(gate.entered.acquire)
        rest = [writer.submit(USAGE_EVENTS, entry("four")) for _ in range(7)]
        gate.opened.release(9)
        await asyncio.gather(first, *rest)
        await asyncio.to_thread(writer.close)

    asyncio.run(run())

    assert gate.groups == [1, 3, 3, 1]


@pytest.mark.parametrize("limits", [Limits(queue_entries_max=10), Limits(queue_bytes_max=50)])
def test_a_full_queue_says_so_at_once(limits: Limits) -> None:
    """Ten entries of five bytes fit, the eleventh is TryAgain without waiting; when they are written there is room."""
    gate = Gate()

    async def run() -> None:
        writer = GroupWriter(gate, limits, "test")
        waiting = [writer.submit(USAGE_EVENTS, entry("12345")) for _ in range(10)]
        with pytest.raises(TryAgain, match="full"):
            writer.submit(USAGE_EVENTS, entry("12345"))
        gate.opened.release(20)
        await asyncio.gather(*waiting)
        while len(waiting) < 11:  # the room is given back just after the answers
            try:
                waiting.append(writer.submit(USAGE_EVENTS, entry("12345")))
            except TryAgain:
                await asyncio.sleep(0)
        assert await waiting[-1] == [10]
        await asyncio.to_thread(writer.close)

    asyncio.run(run())


def test_an_empty_queue_takes_what_is_larger_than_itself() -> None:
    """Or it would never be taken."""
    gate = Gate()
    gate.opened.release()

    async def run() -> list[int]:
        writer = GroupWriter(gate, Limits(queue_bytes_max=10), "test")
        offsets = await writer.submit(USAGE_EVENTS, entry("x" * 100))
        await asyncio.to_thread(writer.close)
        return offsets

    assert asyncio.run(run()) == [0]


@pytest.mark.parametrize("reaches_disk", [False, True])
@pytest.mark.parametrize("failures", [1, 3])
def test_a_failed_commit_is_never_acknowledged(tmp_path: Path, failures: int, reaches_disk: bool) -> None:
    """Everyone in a failed group is told TryAgain, whether or not it reached the disk; the next group goes through."""
    create(tmp_path / "log.sqlite", PARTITIONS, 1.0)
    broken = Broken(tmp_path / "log.sqlite", lambda: 0, Limits())
    broken.failures, broken.reaches_disk = failures, reaches_disk

    async def run() -> tuple[list[object], list[int]]:
        writer = GroupWriter(broken, Limits(), "test")
        refused: list[object] = []
        for _ in range(failures):
            refused += await asyncio.gather(writer.submit(USAGE_EVENTS, entry("maybe")), return_exceptions=True)
        offsets = await writer.submit(USAGE_EVENTS, entry("sure"))
        await asyncio.to_thread(writer.close)
        return refused, offsets

    refused, [offset] = asyncio.run(run())
    log = open_log(str(tmp_path))
    found = log.read(USAGE_EVENTS, {0: 0}, bytes_max=1000)
    log.close()

    assert [TryAgain] * failures == [type(outcome) for outcome in refused]
    assert offset == (failures if reaches_disk else 0)
    assert (offset, b"sure") == (found[-1].offset, found[-1].value)
    assert list(range(offset + 1)) == [record.offset for record in found]


def test_nothing_is_left_of_a_group_that_fails_half_way(tmp_path: Path) -> None:
    """Its first partition was written and its second could not be: the next group begins without either."""
    path = tmp_path / "log.sqlite"
    create(path, {USAGE_EVENTS: 1}, 1.0)

    async def run() -> tuple[list[object], list[int]]:
        writer = GroupWriter(FileAppender(path, lambda: 0, Limits()), Limits(), "test")
        halves = [Entry(b"first half"), Entry(b"second half", partition=1)]  # for which there is no table
        refused = await asyncio.gather(writer.submit(USAGE_EVENTS, halves), return_exceptions=True)
        offsets = await writer.submit(USAGE_EVENTS, entry("sure"))
        log = open_log(str(tmp_path))  # beside the writer, whose end would undo what it left open
        found.extend(record.value for record in log.read(USAGE_EVENTS, {0: 0}, bytes_max=1000))
        log.close()
        await asyncio.to_thread(writer.close)
        return list(refused), offsets

    found: list[bytes] = []
    [refused], [offset] = asyncio.run(run())

    assert isinstance(refused, TryAgain)
    assert "no such table" in str(refused)
    assert offset == 0
    assert found == [b"sure"]


def test_a_waiter_whose_loop_is_gone_is_no_error(tmp_path: Path) -> None:
    """A loop that was closed before its answer came leaves the writer at work for the others."""
    gate = Gate()
    writer = GroupWriter(gate, Limits(), "test")

    async def leave() -> None:
        writer.submit(USAGE_EVENTS, entry("gone"))

    async def stay() -> list[int]:
        return await writer.submit(USAGE_EVENTS, entry("here"))

    asyncio.run(leave())
    gate.opened.release(2)
    assert asyncio.run(stay()) == [1]
    writer.close()
