"""What the doctor advises where a log or a store cannot be opened: only what is damaged is to be replaced."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.doctor import Finding, examine
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from ingest.log.sqlite_file import PAGE_BYTES
from meters.log import USAGE_EVENTS, Entry
from tests.support.faults.small_disk import SmallDisk
from tests.support.servers.installation import meterstream

pytestmark = pytest.mark.crash

NOBODY_USER = 65534
KAFKA = "kafka://127.0.0.1:1/nobody"


def made(path: Path) -> DataDirectory:
    """A log with nothing in it, and its store."""
    data = DataDirectory(path)
    data.open_log().close()
    rebuild(data)
    return data


def ill(data: DataDirectory) -> list[Finding]:
    """What is wrong, apart from there being no organization."""
    return [finding for finding in examine(data) if finding.heal and finding.part != "decisions"]


@pytest.fixture
def data() -> Iterator[DataDirectory]:
    """One that other users can see: a directory of pytest's own is closed to them."""
    if os.geteuid() != 0:
        pytest.skip("being two users needs root")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield made(folder)
    shutil.rmtree(folder)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """What is done inside is not done by root."""
    os.seteuid(NOBODY_USER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("part", "close", "for_root"), [
    ("data", lambda data: data.path.chmod(0o700), []),
    ("log", lambda data: data.log.chmod(0o600), []),
    ("log", lambda data: data.log.chmod(0o644), []),
    ("store", lambda data: open_but_for(data, "serve.lock"), []),
    ("store", lambda data: open_but_for(data, "store.duckdb"), ["owner"]),
])
def test_another_user_is_told_to_be_the_owner(
    data: DataDirectory, part: str, close: Callable[[DataDirectory], None], for_root: list[str]
) -> None:
    """Neither a backup nor a rebuild is the way on. Root, who may open everything, is told whom a file keeps out."""
    assert ill(data) == []
    close(data)
    with as_another_user():
        (finding,) = ill(data)

    assert finding.part == part
    assert "the user that the server runs as" in finding.heal
    assert "backup" not in finding.heal
    assert "rebuild" not in finding.found + finding.heal
    assert [finding.part for finding in ill(data)] == for_root


def open_but_for(data: DataDirectory, name: str) -> None:
    """Only one of the files is not the other user's."""
    for path in (data.path, *data.path.iterdir()):
        os.chown(path, NOBODY_USER, NOBODY_USER)
    os.chown(data.path / name, 0, 0)
    (data.path / name).chmod(0o600)


def test_a_full_disk_needs_room_and_no_backup(disk: SmallDisk) -> None:
    """With room again nothing is wrong; with the log elsewhere it is the lock that finds no room."""
    data = made(disk.path)
    on_brokers = DataDirectory(disk.path / "other", log_url="memory:")
    on_brokers.make()
    on_brokers.store.touch()
    disk.fill(leave_kib=0)
    found = [*ill(data), *ill(on_brokers)]
    disk.empty()

    assert [finding.part for finding in found] == ["log", "disk", "store"]
    assert all("make room on its disk" in finding.heal and "backup" not in finding.heal for finding in found)
    assert ill(data) == []


def test_a_disk_that_is_nearly_full_is_said(disk: SmallDisk) -> None:
    """Everything can still be read, beside a server that answers 503 to what comes in."""
    data = made(disk.path)
    disk.fill(leave_kib=1024)
    (finding,) = (finding for finding in examine(data) if finding.part == "disk")
    assert finding.found.endswith("has no room for 4 MiB: No space left on device; events are answered 503")
    assert "make room on its disk" in finding.heal


@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_a_damaged_log_is_replaced_without_what_a_crash_left(tmp_path: Path, content: bytes) -> None:
    """The advice names all three files, because an old write-ahead log would be copied into the backup."""
    data = made(tmp_path)
    data.log.write_bytes(content)
    (finding,) = ill(data)

    assert "move log.sqlite* away (mv log.sqlite* elsewhere/), then put the copy in place" in finding.heal
    assert "restore log.sqlite from a backup" in finding.heal


def test_a_lost_log_is_restored_and_not_begun_anew(tmp_path: Path) -> None:
    """Beside a store the doctor never recommends a start, which would make another log."""
    data = made(tmp_path)
    data.log.unlink()
    (finding,) = ill(data)

    assert finding.found == f"there is no log.sqlite in {tmp_path}, but store.duckdb of one that was"
    assert "restore log.sqlite from a backup (stop everything, move" in finding.heal
    assert "start `meterstream serve`" not in finding.heal


def damage(data: DataDirectory, table: str) -> None:
    """Zero the first page of a table."""
    with contextlib.closing(sqlite3.connect(data.log)) as connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table])
    with data.log.open("r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(bytes(PAGE_BYTES))


@pytest.mark.parametrize("table", ["streams", "usage_events_0", "usage_control_0"])
def test_a_log_whose_tables_are_damaged_is_restored(tmp_path: Path, table: str) -> None:
    """It is a finding, and for every other command one line that leads to it; a bug it is for none."""
    data = made(tmp_path)
    damage(data, table)
    (finding,) = ill(data)

    assert "restore log.sqlite from a backup" in finding.heal
    for command in (("doctor",), ("rebuild",), ("skip-lost",), ("reconcile", "--check", "log")):
        done = meterstream(*command, "--data", str(tmp_path))
        assert done.returncode == 1, (command, done.stderr)
        assert "bug" not in done.stderr


def test_a_record_that_cannot_be_read_is_found(tmp_path: Path) -> None:
    """The bounds of the log are what they were: only who reads all of it knows."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        for number in range(3):
            asyncio.run(log.append(USAGE_EVENTS, [Entry(b"%d" % number * 100)]))
    rebuild(data)
    assert ill(data) == []
    with contextlib.closing(sqlite3.connect(data.log)) as connection:
        connection.execute("UPDATE usage_events_0 SET value = x'00' WHERE \"offset\" = 1")
        connection.commit()
    steps: list[int] = []
    (finding,) = (finding for finding in examine(data, steps.append) if finding.part == "log")

    assert "usage.events partition 0 is damaged" in finding.found
    assert "restore log.sqlite from a backup" in finding.heal


@pytest.mark.parametrize(("options", "reason"), [
    ("security_protocol=SASL_SSL", "SASL_SSL needs sasl_username, and the password"),
    ("security_protocol=SSL&ssl_ca=/nowhere/ca.pem", "mend its ssl_ca"),
])
def test_a_kafka_url_that_makes_no_client_is_to_be_mended(tmp_path: Path, options: str, reason: str) -> None:
    """It is said by the doctor as by a gateway; there is no file to restore."""
    where = ("--data", str(tmp_path), "--log", f"{KAFKA}?{options}")
    examined = meterstream("doctor", *where, "--output", "json")
    refused = meterstream("gateway", *where, "--port", "0")

    assert (examined.returncode, refused.returncode) == (1, 2)
    assert reason in examined.stdout
    assert reason in refused.stderr
    assert "mend --log" in examined.stdout
    assert "log.sqlite" not in examined.stdout
    assert [len(done.stderr.splitlines()) for done in (examined, refused)] == [1, 1]
