"""What the embedded log does when the disk, the machine or the operator misbehave."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingest.log import open_log, sqlite_writer
from ingest.log.partitions import Limits
from ingest.log.sqlite_file import FILE_NAME, create
from ingest.log.sqlite_writer import Batch
from meters.log import USAGE_EVENTS, Entry, Log, PositionLost, Record, Refused, TryAgain
from tests.support.programs import program

SEED = 20261121
KILLS = 10
PLENTY = 1 << 30

# Appends numbered values from eight tasks for ever, and writes a line for each acknowledgment as soon as it has it:
# the offset, the number, and how long the WAL was.
APPENDER = """
import asyncio, os, sys
from ingest.log import open_log
from meters.log import USAGE_EVENTS, Entry

async def main(directory, size, count):
    log = open_log(directory)
    numbers = iter(range(count))
    async def appender():
        for number in numbers:
            value = b"%d." % number + os.urandom(size)
            [offset] = await log.append(USAGE_EVENTS, [Entry(value)])
            wal = os.stat(directory + "/log.sqlite-wal").st_size
            os.write(1, b"%d %s %d\\n" % (offset, value.hex().encode(), wal))
    await asyncio.gather(*[appender() for _ in range(8)])

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
os.kill(os.getpid(), 9)  # without a close, which would empty the WAL
"""


def start_appender(directory: Path, size: int, count: int) -> "subprocess.Popen[bytes]":
    """A process that appends until it has done so many, or is killed."""
    command = [sys.executable, "-c", APPENDER, str(directory), str(size), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def acknowledgments(text: bytes) -> list[tuple[int, bytes, int]]:
    """Offset, value and length of the WAL for each whole line."""
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    return [(int(offset), bytes.fromhex(value.decode()), int(wal)) for offset, value, wal in lines]


@contextlib.contextmanager
def opened(directory: Path, limits: Limits | None = None) -> Iterator[Log]:
    """A log that is closed again."""
    log = open_log(str(directory), limits=limits)
    yield log
    log.close()


def append(log: Log, *values: bytes) -> list[int]:
    """Append the values in one call."""
    return asyncio.run(log.append(USAGE_EVENTS, [Entry(value) for value in values]))


def read(log: Log, position: int = 0) -> list[Record]:
    """Everything from the position on."""
    return log.read(USAGE_EVENTS, {0: position}, bytes_max=PLENTY)


@contextlib.contextmanager
def held(file: Path) -> Iterator[sqlite3.Connection]:
    """Another connection, that holds the write lock."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def check_dense(log: Log) -> dict[int, bytes]:
    """Every value by offset; the offsets have no gap."""
    records = read(log)
    assert list(range(len(records))) == [record.offset for record in records]
    return {record.offset: record.value for record in records}


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A process killed at any moment leaves a dense log with every acknowledged value where it was said to be."""
    moments = random.Random(SEED)
    acknowledged: dict[int, bytes] = {}
    for _ in range(KILLS):
        process = start_appender(tmp_path, size=moments.choice([10, 20_000]), count=1_000_000)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(moments.randint(1, 300))]
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        acknowledged |= {offset: value for offset, value, _ in acknowledgments(b"".join(lines) + rest)}

        with opened(tmp_path) as log:
            found = check_dense(log)
        lost = [offset for offset, value in acknowledged.items() if found.get(offset) != value]
        assert lost == [], f"seed {SEED}"
        assert len(set(found.values())) == len(found)


def cut(wal: bytes, position: int) -> bytes:
    """The end never reached the disk."""
    return wal[:position]


def flip(wal: bytes, position: int) -> bytes:
    """One bit is wrong."""
    return wal[:position] + bytes([wal[position] ^ 0x40]) + wal[position + 1 :]


def zero(wal: bytes, position: int) -> bytes:
    """The file system knew the length, but the bytes never came."""
    return wal[:position] + bytes(len(wal) - position)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, bytes, int]]]:
    """What a killed process left, with its acknowledgments in order."""
    directory = tmp_path_factory.mktemp("crashed")
    process = start_appender(directory, size=500, count=150)
    return directory, acknowledgments(process.communicate()[0])


@pytest.mark.parametrize("damage", [cut, flip, zero])
def test_a_torn_wal_gives_the_prefix(
    tmp_path: Path, crashed: tuple[Path, list[tuple[int, bytes, int]]], damage: Callable[[bytes, int], bytes]
) -> None:
    """Wherever the WAL is damaged, what was acknowledged before that point is there, the log is dense, and goes on."""
    source, acknowledged = crashed
    wal = (source / f"{FILE_NAME}-wal").read_bytes()
    positions = random.Random(SEED).sample(range(len(wal)), 40)
    for number, position in enumerate(positions):
        directory = tmp_path / str(number)
        directory.mkdir()
        shutil.copy(source / FILE_NAME, directory)
        (directory / f"{FILE_NAME}-wal").write_bytes(damage(wal, position))
        with opened(directory) as log:
            found = check_dense(log)
            assert [len(found)] == append(log, b"goes on")
        promised = {offset: value for offset, value, length in acknowledged if length <= position}
        assert promised.items() <= found.items(), f"{damage.__name__} at {position}, seed {SEED}"
        written = {offset: value for offset, value, _ in acknowledged}
        assert found.items() <= written.items()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)  # noqa: S607 (found above)


def test_a_full_disk_is_try_again_until_there_is_space(small_disk: Path) -> None:
    """Without space appends are TryAgain and reads go on; with space they go on; nothing acknowledged is lost."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(10 << 20))
    acknowledged: dict[int, bytes] = {}
    with opened(small_disk) as log:
        def fill() -> None:
            while True:
                value = os.urandom(100_000)
                [offset] = append(log, value)
                acknowledged[offset] = value

        with pytest.raises(TryAgain):
            fill()
        assert acknowledged.items() <= check_dense(log).items()
        full = len(acknowledged)
        with pytest.raises(TryAgain):
            fill()
        ballast.unlink()
        with pytest.raises(TryAgain):
            fill()

        assert len(acknowledged) > full > 0
        assert acknowledged.items() <= check_dense(log).items()
    with opened(small_disk) as log:
        assert acknowledged.items() <= check_dense(log).items()


# Appends one value after another and says of each what it was told.
LONELY_APPENDER = """
import asyncio, os, sys
from ingest.log import open_log
from meters.log import USAGE_EVENTS, Entry, TryAgain

async def main(log):
    for number in range(30):
        try:
            [offset] = await log.append(USAGE_EVENTS, [Entry(b"%d" % number)])
            os.write(1, b"%d %d\\n" % (offset, number))
        except TryAgain:
            os.write(1, b"refused %d\\n" % number)

asyncio.run(main(open_log(sys.argv[1])))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("failing", ["20", "20+", "20..26"], ids=["once", "for ever", "for a while"])
def test_a_failed_sync_is_never_acknowledged(tmp_path: Path, failing: str) -> None:
    """When the disk says that it could not keep what was written, the answer is TryAgain until it can again."""
    strace = program("strace", "strace")
    inject = [strace, "-f", "-qq", "-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={failing}"]
    command = [*inject, "-o", os.devnull, sys.executable, "-c", LONELY_APPENDER, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True)
    if "ptrace" in output.stderr:
        pytest.skip("tracing a process is not allowed here")
    told = [line.split() for line in output.stdout.splitlines()]
    acknowledged = {int(offset): number.encode() for offset, number in told if offset != "refused"}

    assert 30 > len(acknowledged) > 0 if failing != "20" else len(acknowledged) == 29
    with opened(tmp_path) as log:
        assert acknowledged.items() <= check_dense(log).items()


def test_the_wal_starts_over(tmp_path: Path) -> None:
    """However much is written, and whoever reads meanwhile, the WAL stays within a few checkpoints."""
    with opened(tmp_path) as log, opened(tmp_path) as other:
        for number in range(60):
            append(log, *[random.Random(1).randbytes(100_000)] * 8)
            assert len(read(other, 8 * number)) == 8

    with opened(tmp_path) as log:
        append(log, b"makes a WAL")
        assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size < 2 * sqlite_writer.CHECKPOINT_BYTES


def test_what_a_dead_process_left_is_in_the_file_before_more_is_written(tmp_path: Path) -> None:
    """Behind a sync that failed nothing is safe in the WAL; so the file alone has all that was there at the start."""
    start_appender(tmp_path, 10, 5).communicate()
    assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size > 0
    with opened(tmp_path) as log:
        append(log, b"next")
        before = check_dense(log)
        del before[5]
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copy(tmp_path / FILE_NAME, alone)
    with opened(alone) as log:
        assert check_dense(log) == before


def test_nobody_checkpoints_while_another_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the write lock in other hands a checkpoint is left for later, and the file stays as it is."""
    monkeypatch.setattr(sqlite_writer, "CHECKPOINT_BYTES", 1)
    file = tmp_path / FILE_NAME
    create(file, {USAGE_EVENTS: 1}, 1.0)
    batch = Batch()
    batch.add(Entry(random.Random(1).randbytes(100_000)))  # what packing cannot make smaller
    subject = sqlite_writer.FileAppender(file, lambda: 0, Limits(lock_wait_s_max=0.01))
    subject.commit({(USAGE_EVENTS, 0): batch})
    before = file.stat().st_size

    with held(file):
        subject.tidy()
        assert file.stat().st_size == before
    subject.commit({(USAGE_EVENTS, 0): batch})
    subject.tidy()
    assert file.stat().st_size > before
    subject.close()


def test_a_lock_held_too_long_is_try_again(tmp_path: Path) -> None:
    """Another process that sits on the write lock makes appends TryAgain, and reads none the worse."""
    with opened(tmp_path, Limits(lock_wait_s_max=0.01)) as log:
        append(log, b"a")
        with held(tmp_path / FILE_NAME):
            with pytest.raises(TryAgain, match="locked"):
                append(log, b"b")
            assert [record.value for record in read(log)] == [b"a"]

        assert append(log, b"c") == [1]


def test_a_gap_stops_the_reader(tmp_path: Path) -> None:
    """A record that was taken out of the middle is not skipped: reading stops before it with PositionLost."""
    with opened(tmp_path) as log:
        append(log, b"a", b"b", b"c", b"d")
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as vandal, vandal:
        vandal.execute('DELETE FROM usage_events_0 WHERE "offset" = 2')

    with opened(tmp_path) as log:
        assert [record.offset for record in read(log)] == [0, 1]
        with pytest.raises(PositionLost, match="damaged"):
            read(log, 2)


def test_a_deleted_file_stops_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who deletes the log under a running process gets no acknowledgment for what would go nowhere."""
    monkeypatch.setattr(sqlite_writer, "SAME_FILE_CHECK_S", 0.0)
    with opened(tmp_path) as log:
        append(log, b"a")
        for path in tmp_path.glob(f"{FILE_NAME}*"):
            path.unlink()

        for _ in range(2):
            with pytest.raises(TryAgain):
                append(log, b"b")
        with pytest.raises(PositionLost):
            read(log)


def test_a_foreign_or_newer_file_is_refused(tmp_path: Path) -> None:
    """A database that is not a log, or of a later format, is not touched."""
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as foreign, foreign:
        foreign.execute("CREATE TABLE mine (value TEXT)")

    with pytest.raises(Refused, match="not a log"):
        open_log(str(tmp_path))


def test_what_is_no_database_is_not_read(tmp_path: Path) -> None:
    """Bytes that are no database stop the reader, who does not write over them."""
    (tmp_path / FILE_NAME).write_bytes(b"these are not the records you are looking for" * 100)

    with pytest.raises(PositionLost, match="damaged"):
        open_log(str(tmp_path))


@pytest.mark.parametrize("command", [".backup '{copy}'", "VACUUM INTO '{copy}'"])
def test_a_backup_of_a_running_log_goes_on(tmp_path: Path, command: str) -> None:
    """A copy made by SQLite's own means while the log is open holds what was acknowledged, and can be opened."""
    (tmp_path / "copy").mkdir()
    with opened(tmp_path) as log:
        append(log, b"a", b"b")
        statement = command.format(copy=tmp_path / "copy" / FILE_NAME)
        subprocess.run([program("sqlite3", "sqlite3"), str(tmp_path / FILE_NAME), statement], check=True)
        append(log, b"c")
        identity = log.identity(USAGE_EVENTS)

    with opened(tmp_path / "copy") as copy:
        assert copy.identity(USAGE_EVENTS) == identity
        assert append(copy, b"other") == [2]
        assert check_dense(copy) == {0: b"a", 1: b"b", 2: b"other"}
        assert (tmp_path / "copy" / f"{FILE_NAME}-wal").exists()


def test_a_backup_is_put_back_after_a_crash(tmp_path: Path) -> None:
    """As ingest/log/README.md says: with what the crash left out of the way, the log is what it was at the backup."""
    copy = tmp_path / "copy.sqlite"
    with opened(tmp_path) as log:
        append(log, *(b"%d" % number for number in range(100)))
        before = check_dense(log)
        copying = [program("sqlite3", "sqlite3"), str(tmp_path / FILE_NAME), f".backup '{copy}'"]
        subprocess.run(copying, check=True)
    start_appender(tmp_path, 5000, 1000).communicate()
    assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size > 0
    for name in (FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"):
        (tmp_path / name).rename(tmp_path / f"away-{name}")
    shutil.copy(copy, tmp_path / FILE_NAME)
    with opened(tmp_path) as log:
        assert check_dense(log) == before
        assert append(log, b"next") == [100]
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_number_of_partitions_is_fixed(tmp_path: Path) -> None:
    """A log is opened with the partitions it was made with, or with none named."""
    open_log(str(tmp_path), partitions={USAGE_EVENTS: 4}).close()

    with opened(tmp_path) as log:
        assert log.ends(USAGE_EVENTS) == {0: 0, 1: 0, 2: 0, 3: 0}
    with pytest.raises(Refused, match="partitions"):
        open_log(str(tmp_path), partitions={USAGE_EVENTS: 5})


def test_an_unfinished_creation_leaves_no_trace(tmp_path: Path) -> None:
    """What a creator that died left behind, even a journal, does not end up in the log."""
    (tmp_path / "log.unfinished").write_bytes(b"half")
    (tmp_path / "log.unfinished-journal").write_bytes(b"hot")

    with opened(tmp_path) as log:
        assert append(log, b"a") == [0]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
