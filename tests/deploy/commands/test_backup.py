"""A backup is whole, private and consistent, and a restore puts all of it back or changes nothing."""

import asyncio
import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.forward.state import State
from deploy.backup import MANIFEST, back_up, restore
from deploy.doctor import examine
from deploy.errors import GiveUp
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.records import decisions, entry, line, organization
from tests.support.servers.installation import Installation, started
from tests.support.waiting import eventually

NOBODY_USER = 65534
FAR = 1 << 62  # microseconds: later than any record


def written(path: Path, *names: str) -> DataDirectory:
    """A log with these events, the first time with their organization."""
    data = DataDirectory(path)
    with contextlib.closing(data.open_log()) as log:
        if not log.ends(USAGE_CONTROL)[0]:
            asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(line(name)) for name in names]))
    return data


def events_in(data: DataDirectory) -> int:
    """How many records of events the log has."""
    with contextlib.closing(data.open_log()) as log:
        return log.ends(USAGE_EVENTS)[0]


def modes(directory: Path) -> set[int]:
    """The permissions of all files in it."""
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()}


def test_a_running_server_is_backed_up_and_comes_back(tmp_path: Path) -> None:
    """What came in after the backup is gone, what came before is counted, and what was there is kept beside it."""
    event = {"name": "call", "external_customer_id": "ada"}
    with started(tmp_path) as place:
        assert place.ingest(event, event).status_code == 200
        done = place.run("backup", str(tmp_path / "copy"))
        assert (done.returncode, "The store is not in it" in done.stderr) == (0, True), done.stderr
        assert place.ingest(event).status_code == 200
        refused = place.run("restore", str(tmp_path / "copy"))
        assert (refused.returncode, "cannot restore: another server" in refused.stderr) == (1, True)
        assert place.stop() == 0

        done = place.run("restore", str(tmp_path / "copy"))
        assert done.returncode == 0, done.stderr
        (aside,) = place.data.glob("before-restore-*")
        assert {path.name for path in aside.iterdir()} >= {"log.sqlite", "store.duckdb"}
        assert modes(tmp_path / "copy") == modes(place.data) == {0o600}
        assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700
        place.start()
        eventually(lambda: _counted(place) == 2)


def _counted(place: Installation) -> int:
    return int(place.get("/v1/events/", name="call").json()["pagination"]["total_count"])


def test_no_copy_knows_more_than_the_log(tmp_path: Path) -> None:
    """The store of a stopped server is in the backup, and fits: nothing is wrong with what was restored."""
    data = written(tmp_path / "data", "a", "b")
    rebuild(data)
    State(data.forwarding).close()
    made = back_up(data, tmp_path / "copy")
    assert [each.name for each in made.files] == ["forward.sqlite", "log.sqlite", "store.duckdb"]
    assert made.ends == {USAGE_EVENTS: "0:2", USAGE_CONTROL: "0:1"}

    written(data.path, "c")
    restore(data, tmp_path / "copy")

    assert events_in(data) == 2
    assert [finding for finding in examine(data) if finding.heal] == []


def test_another_place_is_restored_to(tmp_path: Path) -> None:
    """Where nothing is yet, nothing is moved aside; what root restores is the directory's owner's."""
    data = written(tmp_path / "data", "a")
    back_up(data, tmp_path / "copy")
    other = DataDirectory(tmp_path / "other")
    other.path.mkdir()
    os.chown(other.path, NOBODY_USER, NOBODY_USER)

    _, aside = restore(other, tmp_path / "copy")

    assert aside is None
    assert other.log.stat().st_uid == NOBODY_USER
    assert stat.S_IMODE(other.log.stat().st_mode) == 0o600


def _with_a_file_of_another_place(copy: Path) -> None:
    """Have the list name a file by its absolute path, which a restore would write to."""
    listed = json.loads(copy.joinpath(MANIFEST).read_text())
    listed["files"][0]["name"] = str(copy / listed["files"][0]["name"])
    copy.joinpath(MANIFEST).write_text(json.dumps(listed))


def test_a_backup_that_is_not_whole_changes_nothing(tmp_path: Path) -> None:
    """A file that changed, one that is missing, and a directory without its list are refused before anything moves."""
    data = written(tmp_path / "data", "a")
    back_up(data, tmp_path / "copy")
    written(data.path, "b")
    for spoil, complaint in (
        (lambda copy: copy.joinpath("log.sqlite").write_bytes(b"?"), "is not the file that was backed up"),
        (lambda copy: copy.joinpath("log.sqlite").unlink(), "is not the file that was backed up"),
        (_with_a_file_of_another_place, "is not the file that was backed up"),
        (lambda copy: copy.joinpath(MANIFEST).unlink(), "no whole backup"),
    ):
        spoiled = tmp_path / "spoiled"
        shutil.copytree(tmp_path / "copy", spoiled)
        spoil(spoiled)
        with pytest.raises(GiveUp, match=complaint):
            restore(data, spoiled)
        shutil.rmtree(spoiled)
    assert events_in(data) == 2
    assert not list(data.path.glob("before-restore-*"))


def test_a_backup_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """A directory with something in it is not touched; where the store is needed and held, nothing is left."""
    data = written(tmp_path / "data", "a", "b")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(GiveUp, match="is not empty"):
        back_up(data, full)
    rebuild(data)
    with contextlib.closing(data.open_log()) as log:
        log.trim(USAGE_EVENTS, FAR)

    with data.hold("serve"), pytest.raises(GiveUp, match="stop the server and back up then"):
        back_up(data, tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []
    assert "store.duckdb" in {each.name for each in back_up(data, tmp_path / "copy").files}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_log_that_the_server_may_only_read_is_said_at_the_start(open_folder: Path) -> None:
    """Root restored it; the server runs as another user. It does not start, and the doctor says why to both."""
    data = written(open_folder / "data", "a")
    for path in (data.path, *data.path.iterdir()):
        os.chown(path, NOBODY_USER, NOBODY_USER)
    os.chown(data.log, 0, 0)
    data.log.chmod(0o644)
    (found,) = (finding for finding in examine(data) if finding.part == "owner")
    assert found.found == f"user {NOBODY_USER}, who owns {data.path}, cannot write log.sqlite"
    assert found.heal.startswith(f"chown {NOBODY_USER} log.sqlite")

    os.seteuid(NOBODY_USER)
    try:
        with pytest.raises(GiveUp, match=r"log.sqlite cannot be written by user 65534: it is user 0's with mode 0644"):
            data.open_log()
        assert [finding.part for finding in examine(data) if finding.heal] == ["log"]
    finally:
        os.seteuid(0)
