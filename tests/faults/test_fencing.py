"""One writer, one log, one store: whoever is not the one stops and says so, before it can make a number wrong."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from aggregator.engine.supervisor import Aggregator
from aggregator.store import database
from aggregator.store.database import Unopenable
from aggregator.store.store import Replaced, Store
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, PositionLost
from tests.support.faults.store_checks import (
    Tables,
    assert_store_tells,
    caught_up,
    count,
    ends,
    export,
    usage,
    write_sample,
)
from tests.support.records import SMALL, entry
from tests.support.servers.installation import meterstream
from tests.support.waiting import eventually

STORE = "store.duckdb"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """The log of the data directory, with one of everything."""
    opened = open_log(str(tmp_path))
    write_sample(opened)
    yield opened
    opened.close()


def follow(log: Log, path: Path) -> Aggregator:
    """An aggregator that has read everything."""
    aggregator = Aggregator(log, path, SMALL)
    aggregator.start()
    eventually(lambda: caught_up(aggregator, ends(log)))
    return aggregator


def followed(log: Log, path: Path) -> Tables:
    """What a store says after an aggregator has read everything and gone."""
    follow(log, path).stop()
    return export(path)


def append(log: Log, id: str) -> None:
    """One more event."""
    asyncio.run(log.append(USAGE_EVENTS, [entry(usage(id))]))


def identities(log: Log) -> dict[str, str]:
    """Which log this is."""
    return {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}


def test_a_second_process_is_refused_with_one_clear_line(log: Log, tmp_path: Path) -> None:
    """The store's file has one owner; another aggregator leaves with exit code 1 and the first one goes on."""
    aggregator = follow(log, tmp_path / STORE)
    second = meterstream("aggregate", "--data", str(tmp_path))
    append(log, "after")
    eventually(lambda: caught_up(aggregator, ends(log)))
    aggregator.stop()

    assert second.returncode == 1
    assert "is in use by another process: stop that one first" in second.stderr
    assert len([line for line in second.stderr.splitlines() if line.startswith("meterstream: ")]) == 1
    assert_store_tells(export(tmp_path / STORE), count(log))


def test_a_writer_that_was_replaced_cannot_commit(log: Log, tmp_path: Path) -> None:
    """A newer writer has the higher epoch: the older one's next round is refused, whole, and it ends for good."""
    aggregator = follow(log, tmp_path / STORE)
    before = aggregator._now.store.positions(USAGE_EVENTS)
    with aggregator._now.store.cursor() as newer:
        assert database._claim_epoch(newer) == aggregator._now.store.epoch + 1
    append(log, "after")
    eventually(aggregator.ended.is_set)
    aggregator.stop()
    with contextlib.closing(Store.open(tmp_path / STORE, identities(log), SMALL)) as store:
        after, tallies = store.positions(USAGE_EVENTS), store.tallies()

    assert isinstance(aggregator.failure, Replaced)
    assert before == after
    assert count(log, before).tallies == tallies
    assert_store_tells(followed(log, tmp_path / STORE), count(log))


def test_a_store_whose_position_was_moved_is_not_written(log: Log, tmp_path: Path) -> None:
    """Nobody claimed it, and yet it is not where its writer left it: another round could count something twice."""
    move_on = "UPDATE positions SET next_offset = next_offset + ? WHERE stream = ?"
    aggregator = follow(log, tmp_path / STORE)
    with aggregator._now.store.cursor() as other:
        other.execute(move_on, [1, USAGE_EVENTS])
    append(log, "after")
    eventually(aggregator.ended.is_set)
    aggregator.stop()
    with duckdb.connect(str(tmp_path / STORE)) as back:
        back.execute(move_on, [-1, USAGE_EVENTS])

    assert isinstance(aggregator.failure, Replaced)
    assert_store_tells(followed(log, tmp_path / STORE), count(log))


@pytest.mark.parametrize("restored", [True, False])
def test_a_writer_whose_file_was_taken_away_cannot_commit(log: Log, tmp_path: Path, restored: bool) -> None:
    """It would go on in a file without a name: a copy that was put in its place counts from where the copy stands."""
    followed(log, tmp_path / STORE)
    copy = Path(shutil.copy(tmp_path / STORE, tmp_path / "copy"))
    aggregator = follow(log, tmp_path / STORE)
    copied = copy.read_bytes()
    if restored:
        copy.replace(tmp_path / STORE)
    else:
        (tmp_path / STORE).unlink()
    append(log, "after")
    eventually(aggregator.ended.is_set)
    aggregator.stop()

    assert isinstance(aggregator.failure, Replaced)
    assert "another file is at" in str(aggregator.failure)
    if restored:
        assert (tmp_path / STORE).read_bytes() == copied
    assert_store_tells(followed(log, tmp_path / STORE), count(log))


def test_a_store_of_another_log_is_refused(log: Log, tmp_path: Path) -> None:
    """A store counts one log; beside any other it is not opened, and the message says both ways on."""
    followed(log, tmp_path / STORE)
    other = open_log(str(tmp_path / "other"))
    with pytest.raises(Unopenable, match=r"bring back the right log, .*meterstream rebuild, which .* keeps the old"):
        Aggregator(other, tmp_path / STORE, SMALL).start()
    other.close()

    assert_store_tells(followed(log, tmp_path / STORE), count(log))


def test_a_log_that_is_replaced_ends_its_reader(log: Log, tmp_path: Path) -> None:
    """A log that is deleted under a running aggregator is not waited for: what comes next is another log."""
    aggregator = follow(log, tmp_path / STORE)
    move(tmp_path, tmp_path / "deleted")
    open_log(str(tmp_path)).close()
    eventually(aggregator.ended.is_set)
    aggregator.stop()

    assert isinstance(aggregator.failure, PositionLost)


def test_a_log_made_anew_is_refused_and_the_way_on_works(log: Log, tmp_path: Path) -> None:
    """Neither a silent zero nor the old numbers gone: a rebuild counts the new log, and keeps the other's store."""
    old = followed(log, tmp_path / STORE)
    kept = tmp_path / f"{STORE}.{log.identity(USAGE_EVENTS)[:8]}"
    log.close()
    move(tmp_path, tmp_path / "deleted")
    with_new = open_log(str(tmp_path))
    append(with_new, "new")
    refused = meterstream("aggregate", "--data", str(tmp_path))
    ill = meterstream("doctor", "--data", str(tmp_path), "--output", "json")
    healed = meterstream("rebuild", "--data", str(tmp_path))
    counted = count(with_new)
    with_new.close()

    assert refused.returncode == 1
    assert "the store was made from another" in refused.stderr
    assert ill.returncode == 1
    assert any("bring back the right log" in finding["heal"] for finding in json.loads(ill.stdout))
    assert healed.returncode == 0, healed.stderr
    assert f"{kept} is the old store" in healed.stderr
    assert_store_tells(export(tmp_path / STORE), counted)
    assert export(kept) == old


def test_a_store_of_another_log_is_kept_with_its_write_ahead_log(log: Log, tmp_path: Path) -> None:
    """A crash left its newest rows there alone."""
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    aggregator = follow(log, tmp_path / STORE)
    for file in tmp_path.glob(f"{STORE}*"):
        shutil.copy(file, crashed)
    aggregator.stop()
    old = export(tmp_path / STORE)
    log.close()
    move(tmp_path, tmp_path / "deleted")
    shutil.copytree(crashed, tmp_path, dirs_exist_ok=True)
    open_log(str(tmp_path)).close()
    kept: list[Path] = []
    rebuild(DataDirectory(tmp_path), kept=kept.append)

    assert (crashed / f"{STORE}.wal").exists()
    assert [export(path) for path in kept] == [old]


@pytest.mark.usefixtures("log")
def test_a_topic_s_id_becomes_a_file_s_name(tmp_path: Path) -> None:
    """It is base64, so it may have slashes."""
    Store.open(tmp_path / STORE, {USAGE_EVENTS: "xz/jK+NvQ8q/v9GC5oQT9g", USAGE_CONTROL: "other"}, SMALL).close()
    kept: list[Path] = []
    rebuild(DataDirectory(tmp_path), kept=kept.append)

    assert kept == [tmp_path / f"{STORE}.xzjKNvQ8"]
    assert kept[0].exists()


def test_a_store_that_was_kept_is_not_written_over(log: Log, tmp_path: Path) -> None:
    """Nor is one that nobody can read: it may be of another log. One of this log is made again in its place."""
    data = DataDirectory(tmp_path)
    kept: list[Path] = []
    for content in (b"no store", b"nor this"):
        (tmp_path / STORE).write_bytes(content)
        rebuild(data, kept=kept.append)
    rebuild(data, kept=kept.append)

    assert [path.name for path in kept] == [f"{STORE}.unreadable", f"{STORE}.unreadable-2"]
    assert [path.read_bytes() for path in kept] == [b"no store", b"nor this"]
    assert_store_tells(export(tmp_path / STORE), count(log))


@pytest.mark.parametrize(("written_on", "found"), [(0, "the log lost records"), (3, "restored from an older copy")])
def test_a_log_restored_from_an_older_copy_is_not_continued(
    log: Log, tmp_path: Path, written_on: int, found: str
) -> None:
    """It gives offsets a second time, to records that would never be counted: the aggregator ends, and says why."""
    back_up(log, tmp_path)
    later = open_log(str(tmp_path))
    append(later, "later")
    before = followed(later, tmp_path / STORE)
    later.close()
    restored = restore(tmp_path)
    for number in range(written_on):
        append(restored, f"again-{number}")
    aggregator = Aggregator(restored, tmp_path / STORE, SMALL)
    with pytest.raises(PositionLost):
        aggregator.start()
    restored.close()
    ill = meterstream("doctor", "--data", str(tmp_path), "--output", "json")

    assert before == export(tmp_path / STORE)
    assert ill.returncode == 1
    assert any(found in finding["found"] for finding in json.loads(ill.stdout))


@pytest.mark.parametrize("stream", [USAGE_EVENTS, USAGE_CONTROL])
def test_a_log_written_on_from_an_older_copy_is_known_by_what_was_only_read(
    log: Log, tmp_path: Path, stream: str
) -> None:
    """A repetition leaves no event and a decision none either, and yet another record under its number is found."""
    back_up(log, tmp_path)
    later = open_log(str(tmp_path))
    known = later.read(stream, {0: 0}, bytes_max=1)[0]
    repetition = Entry(known.value, organization_id=known.organization_id)
    asyncio.run(later.append(stream, [repetition]))
    followed(later, tmp_path / STORE)
    later.close()
    restored = restore(tmp_path)
    asyncio.run(restored.append(stream, [repetition, repetition]))
    aggregator = Aggregator(restored, tmp_path / STORE, SMALL)

    with pytest.raises(PositionLost, match=f"{stream} partition 0 has another record"):
        aggregator.start()
    restored.close()


def back_up(log: Log, data: Path) -> None:
    """Keep a copy of the log as it is, and close it."""
    log.close()
    move(data, data / "backup")
    shutil.copytree(data / "backup", data, dirs_exist_ok=True)


def restore(data: Path) -> Log:
    """Put the copy in the log's place."""
    move(data, data / "lost")
    shutil.copytree(data / "backup", data, dirs_exist_ok=True)
    return open_log(str(data))


def move(data: Path, to: Path) -> None:
    """Take the log's files away."""
    to.mkdir(exist_ok=True)
    for file in data.glob("log.sqlite*"):
        shutil.move(file, to)
