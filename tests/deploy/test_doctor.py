"""What the doctor finds in a store that is sound: events that nobody can see. And whose a store is made again."""

import asyncio
import contextlib
import json
import os
from pathlib import Path

import duckdb
import pytest

from aggregator.store.database import VERSION
from deploy.doctor import Finding, examine
from deploy.errors import GiveUp
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from ingest.log import clock_us, open_log
from meters.catalogue.catalogue import MeterCreated
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.records import ORGANIZATION, OTHER_ORGANIZATION, decisions, entry, line, meter, organization
from tests.support.servers.installation import meterstream

NOBODY = "9f0e8f6a-5f0a-4f52-9d1b-4f1d7a6c3e33"
NOBODY_USER = 65534


def written(tmp_path: Path) -> DataDirectory:
    """A store with events of one organization that was made, and of two that were not."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        records = [entry(line("a")), entry(line("a"), organization_id=NOBODY, admitted=False)]
        records += [entry(line("a"), line("b"), organization_id=OTHER_ORGANIZATION, admitted=False)]
        asyncio.run(log.append(USAGE_EVENTS, records))
    assert rebuild(data)["stored"] == 4
    return data


def found(data: DataDirectory) -> Finding:
    """What is said of organizations."""
    (finding,) = (finding for finding in examine(data) if finding.part == "organizations")
    return finding


def test_organizations_that_nobody_made_are_named(tmp_path: Path) -> None:
    """With how many events each has, the most first; the way on makes them visible, and then nothing is wrong."""
    data = written(tmp_path)
    finding = found(data)
    assert finding.found.startswith("3 events are stored under organizations that nobody made")
    assert finding.found.endswith(f"{OTHER_ORGANIZATION} (2), {NOBODY} (1)")
    assert "meterstream orgs create NAME --id ID" in finding.heal
    assert ORGANIZATION not in finding.found

    for number, id in enumerate((OTHER_ORGANIZATION.upper(), NOBODY)):
        done = meterstream("orgs", "create", f"found {number}", "--id", id, "--data", str(tmp_path), "--output", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["id"] == id.lower()
    assert found(data) == Finding("organizations", "every event belongs to one that was made")


def test_a_clock_that_was_ahead_is_named(tmp_path: Path) -> None:
    """Until then records get the newest time. A producer of Kafka's has a clock of its own, and is not named here."""
    data = DataDirectory(tmp_path)
    for ahead_us, admitted, said in ((0, True, 0), (7_200_000_000, True, 1)):
        with contextlib.closing(open_log(f"embedded:{tmp_path}", clock_us=lambda: clock_us() + ahead_us)) as log:  # noqa: B023
            asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
            asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"), admitted=admitted)]))
        clocks = [finding for finding in examine(data) if finding.part == "clock"]
        assert len(clocks) == said
    assert clocks[0].found.startswith("the newest record's time is 7,")
    assert "check the clocks of this machine" in clocks[0].heal


def test_a_meter_that_passes_over_texts_is_named(tmp_path: Path) -> None:
    """With an example; numbers, archived meters and meters that count are in order."""
    data = DataDirectory(tmp_path)
    meters = [MeterCreated(meter("m0", func="sum", property="tokens")), MeterCreated(meter("m1"))]
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *meters])))
        lines = [line(id, metadata={"tokens": tokens}) for id, tokens in (("a", 812), ("b", "812"), ("c", "812.5"))]
        asyncio.run(log.append(USAGE_EVENTS, [entry(*lines)]))
    assert rebuild(data)["stored"] == 3

    (finding,) = (finding for finding in examine(data) if finding.part == "meters")

    assert finding.found == (
        "1 meter passes over events of the last 7 days that match: 'meter m0' (2 events, such as tokens = \"812.5\")"
    )
    assert "send the value as a JSON number" in finding.heal


def test_an_organization_is_made_once_and_of_an_id_that_is_one(tmp_path: Path) -> None:
    """An id that is taken, or that no record could name, is refused with one line."""
    written(tmp_path)
    for id, complaint in ((ORGANIZATION, "there is an organization"), ("acme", "a UUID of version 4")):
        done = meterstream("orgs", "create", "again", "--id", id, "--data", str(tmp_path))
        assert done.returncode == 2
        assert complaint in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_of_many_organizations_the_largest_are_named(tmp_path: Path) -> None:
    """A producer that makes up an id for every event fills no screen."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        ids = [f"9f0e8f6a-5f0a-4f52-9d1b-{number:012d}" for number in range(25)]
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(line("a"), organization_id=id, admitted=False) for id in ids]))
    assert rebuild(data)["stored"] == 25
    assert found(data).found.count("(1)") == 10
    assert found(data).found.endswith("and 15 more")


def lay_out(data: DataDirectory, version: int) -> None:
    """Have the store say that another version made it."""
    with contextlib.closing(duckdb.connect(str(data.store))) as connection:
        connection.execute("UPDATE about SET version = ?", [version])


def heal_of_store(data: DataDirectory) -> str:
    """What the doctor advises for the store."""
    (finding,) = (finding for finding in examine(data) if finding.part == "store")
    return finding.heal


def test_a_remedy_names_the_directory_unless_that_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the default, or METERSTREAM_DATA, is found without; a path with a blank is one word."""
    remedy = "run meterstream rebuild"
    named = "run meterstream rebuild --data 'my data'"
    monkeypatch.delenv("METERSTREAM_DATA", raising=False)
    assert DataDirectory(Path("data")).healing(remedy) == remedy
    assert DataDirectory(Path("my data")).healing(remedy) == named

    monkeypatch.setenv("METERSTREAM_DATA", "my data")

    assert DataDirectory(Path("my data")).healing(remedy) == remedy


def test_a_store_of_another_version_is_made_again_only_where_that_is_the_way(tmp_path: Path) -> None:
    """A newer one is for the newer program; an older one for the older, once retention took the log's beginning."""
    data = written(tmp_path)
    lay_out(data, VERSION + 1)
    assert heal_of_store(data) == "start the Meterstream that made it"
    lay_out(data, VERSION - 1)
    assert heal_of_store(data) == f"meterstream rebuild --data {data.path}"
    with contextlib.closing(data.open_log()) as log:
        assert log.trim(USAGE_EVENTS, 1 << 62) == 2

    assert heal_of_store(data).startswith("start the version that made it; retention has removed records")
    data.store.write_bytes(b"no store" * 1000)
    assert heal_of_store(data).startswith("restore the whole directory from a backup; retention has removed records")


def test_what_a_killed_rebuild_left_is_named_and_what_a_failed_one_made_is_gone(tmp_path: Path) -> None:
    """A part of a store takes room and is of no use; a rebuild that fails takes it away."""
    data = written(tmp_path)
    left = tmp_path / "store.duckdb.new"
    left.write_bytes(b"a part")
    (finding,) = (finding for finding in examine(data) if finding.part == "rebuild")
    assert finding.found.startswith("store.duckdb.new (6 bytes) is what a rebuild left")
    with contextlib.closing(data.open_log()) as log:
        log.trim(USAGE_EVENTS, 1 << 62)

    with pytest.raises(GiveUp, match="cannot be rebuilt: the first 2 records left the log"):
        rebuild(data)

    assert not left.exists()
    assert not any(finding.heal for finding in examine(data) if finding.part == "rebuild")


def test_a_file_of_forwarding_that_was_emptied_is_to_be_restored(tmp_path: Path) -> None:
    """Forwarding would begin anew with it, and rollups might count twice."""
    data = written(tmp_path)
    data.forwarding.touch()
    (finding,) = (finding for finding in examine(data) if finding.part == "forwarding")

    assert "is empty" in finding.found
    assert "restore it from a backup, or move it away" in finding.heal


def test_what_root_makes_again_is_the_servers(tmp_path: Path) -> None:
    """The store belongs to the owner of the directory, and so does the lock: the server's user can open both."""
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    data = written(tmp_path)
    (tmp_path / "serve.lock").unlink()
    for path in (tmp_path, *tmp_path.iterdir()):
        os.chown(path, NOBODY_USER, NOBODY_USER)
    data.store.unlink()
    assert rebuild(data)["stored"] == 4

    assert {"store.duckdb", "serve.lock"} <= {path.name for path in tmp_path.iterdir()}
    assert {(path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()} == {(NOBODY_USER, NOBODY_USER)}


def test_rows_that_are_missing_are_found(tmp_path: Path) -> None:
    """The store can be read and fits the log, and yet lacks what it says that it has."""
    data = written(tmp_path)
    assert [finding.part for finding in examine(data) if finding.part == "rows" and not finding.heal] == ["rows"]
    with contextlib.closing(duckdb.connect(str(data.store))) as connection:
        connection.execute("DELETE FROM events WHERE seq = 1")

    (finding,) = (finding for finding in examine(data) if finding.part == "rows")
    assert "partition 0" in finding.found or "row" in finding.found
    assert finding.heal == f"meterstream rebuild --data {tmp_path}; `meterstream reconcile` shows all of them"
