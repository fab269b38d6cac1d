"""The journal before the spool's file: what was written is there, half of a line is nothing, nothing is made up."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.client import spool as journal_module
from ingest.client.spool import JOURNAL_SUFFIX, Journal, Spool, spools
from tests.support.faults.small_disk import SmallDisk

OWNER = "owner"
Needed = dict[int, bytes]


def reopened(spool: Path) -> Needed:
    """What another process finds."""
    journal = Journal(spool)
    journal.drop()
    return journal.needed


def lived(spool: Path, choices: list[int]) -> list[tuple[int, Needed]]:
    """A journal's life: an event for each choice, after which all, or some here and there, may be settled. The bytes
    of the file and what was needed after each step, since the file was empty last."""
    journal = Journal(spool)
    steps: list[tuple[int, Needed]] = [(0, {})]
    for number, choice in enumerate(choices, 7):
        journal.append(number, b'{"n":%d,"x":"%b"}' % (number, b"x" * choice))
        steps.append((journal._bytes, dict(journal.needed)))
        if choice % 3 == 0:
            journal.settle(list(journal.needed)[choice % 5 :: 1 + choice % 4] or [number])
            steps = [*steps, (journal._bytes, dict(journal.needed))] if journal.needed else [(0, {})]
    journal.drop()
    return steps


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.floats(0, 1))
def test_a_file_cut_anywhere_holds_what_was_written_before(choices: list[int], part: float) -> None:
    """Every whole step is there. Of a step that was cut nothing is, or, of a settlement, some of it."""
    with TemporaryDirectory() as directory:
        steps = lived(spool := Path(directory) / "a", choices)
        cut = round(steps[-1][0] * part)
        with Path(f"{spool}{JOURNAL_SUFFIX}").open("r+b") as file:
            file.truncate(cut)
        done = max(index for index, (end, _) in enumerate(steps) if end <= cut)
        before, after = steps[done][1], steps[min(done + 1, len(steps) - 1)][1]

        found = reopened(spool)

    assert found.items() <= before.items()
    assert found == before or len(after) < len(found)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_pages_that_a_power_cut_took_make_nothing_up(choices: list[int], start: float, length: float) -> None:
    """They read as zeros: every event that is found was written just so."""
    with TemporaryDirectory() as directory:
        steps = lived(spool := Path(directory) / "a", choices)
        path = Path(f"{spool}{JOURNAL_SUFFIX}")
        content = path.read_bytes()
        begin = round(len(content) * start)
        end = begin + round((len(content) - begin) * length)
        path.write_bytes(content[:begin] + bytes(end - begin) + content[end:])
        written = {item for _, needed in steps for item in needed.items()}

        assert reopened(spool).items() <= written


def test_what_follows_an_unfinished_line_is_read(tmp_path: Path) -> None:
    """Whoever takes a torn file over writes where the last whole line ends."""
    journal = Journal(tmp_path / "a")
    for number in (1, 2, 3):
        journal.append(number, b"%d" % number)
    journal.drop()
    with Path(f"{tmp_path / 'a'}{JOURNAL_SUFFIX}").open("ab") as file:
        file.write(b'+4 {"half":')

    second = Journal(tmp_path / "a")
    assert list(second.needed) == [1, 2, 3]
    second.settle([2])
    second.drop()
    assert list(reopened(tmp_path / "a")) == [1, 3]


def test_an_empty_journal_takes_no_room(tmp_path: Path) -> None:
    """When nothing in it is needed it is emptied, and goes on."""
    journal = Journal(tmp_path / "a")
    for number in range(1, 10):
        journal.append(number, b"x" * 1000)
    journal.settle(range(1, 10))
    assert Path(f"{tmp_path / 'a'}{JOURNAL_SUFFIX}").stat().st_size == 0

    journal.append(10, b"ten")
    journal.drop()
    assert reopened(tmp_path / "a") == {10: b"ten"}


def test_a_line_that_did_not_fit_is_not_there(disk: SmallDisk) -> None:
    """On a full disk the half that did fit is written over; everything before and after is kept."""
    journal, number, refused = Journal(disk.path / "a"), 0, 0
    disk.fill(leave_kib=64)
    while refused < 3:
        number += 1
        try:
            journal.append(number, b"%05d" % number + b"x" * 3000)
        except OSError:
            refused += 1
    disk.empty()
    journal.append(number + 1, b"short")
    journal.settle([2])
    journal.append(number + 2, b"last")
    journal.drop()

    found = reopened(disk.path / "a")
    assert found == journal.needed
    assert list(found) == [1, *range(3, number - 2), number + 1, number + 2]


def found_by_others(directory: Path) -> list[bytes]:
    """Everything in the files that belong to nobody, as it is taken over, piece by piece."""
    found: list[bytes] = []
    for spool in filter(Spool.claim, spools(directory, [OWNER])):
        while rows := spool.read(-1, 3):
            found += [line for _, line in rows]
            spool.delete([number for number, _ in rows])
        spool.close()
    return found


@pytest.mark.parametrize("emptied", [False, True])
def test_what_moves_into_the_file_is_found_once(tmp_path: Path, emptied: bool) -> None:
    """A full journal moves; killed before the journal was emptied, its process leaves the events in both places."""
    lines = [b"%02d" % number for number in range(25)]
    spool = Spool(tmp_path, OWNER)
    with patch.object(journal_module, "_EVENTS_MAX", 10):
        for number, line in enumerate(lines):
            if number == 20 and not emptied:
                shutil.copy(*_journal_and_copy(tmp_path))
            spool.append(number, line)
    assert spool.read(-1, 100) == list(enumerate(lines))
    assert spool.read(8, 14) == list(enumerate(lines))[9:23]
    assert spool._opened is not None
    connection, journal = spool._opened
    connection.close()  # without a word to anybody
    journal.drop()
    if not emptied:
        shutil.copy(*reversed(_journal_and_copy(tmp_path)))
        lines = lines[:20]

    assert found_by_others(tmp_path) == lines
    assert [path.suffix for path in tmp_path.iterdir()] == ([] if emptied else [".copy"])


def _journal_and_copy(directory: Path) -> tuple[Path, Path]:
    [path] = directory.glob(f"*{JOURNAL_SUFFIX}")
    return path, directory / "journal.copy"


def test_a_move_that_seemed_to_fail_is_read_once(tmp_path: Path) -> None:
    """A disk may fail after SQLite has written everything: then the events are in both places, in one process."""
    spool = Spool(tmp_path, OWNER)
    spool.append(1, b"a")
    spool.append_all([(2, b"b")])
    assert spool._opened is not None
    spool._opened[1].needed[2] = b"b"
    spool.append(3, b"c")

    assert spool.read(-1, 10) == [(1, b"a"), (2, b"b"), (3, b"c")]
    spool.close()
    assert found_by_others(tmp_path) == [b"a", b"b", b"c"]


def test_settled_events_leave_both(tmp_path: Path) -> None:
    """Wherever they are; the rest is for the next process, in the one file."""
    spool = Spool(tmp_path, OWNER)
    with patch.object(journal_module, "_EVENTS_MAX", 4):
        for number in range(10):
            spool.append(number, b"%d" % number)
    assert spool._opened is not None
    assert list(spool._opened[1].needed) == [8, 9]  # the others have moved
    spool.delete([2, 6, 7, 8])
    assert [number for number, _ in spool.read(-1, 100)] == [0, 1, 3, 4, 5, 9]
    spool.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".spool"]

    assert found_by_others(tmp_path) == [b"0", b"1", b"3", b"4", b"5", b"9"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_full_disk_left_of_a_line_settles_nothing(tmp_path: Path) -> None:
    """A write that stopped short is taken back whole: what is left of it is no line behind the next ones."""
    spool = tmp_path / "owner.spool"
    journal = Journal(spool)
    for number in range(1, 201):
        journal.append(number, b"{}")
    full = journal_module.os.write
    half = patch.object(journal_module.os, "write", lambda file, lines: full(file, lines[: len(lines) // 2]))
    with half, pytest.raises(OSError, match="No space"):
        journal.settle(list(range(2, 102, 2)))
    journal.append(201, b"{}")
    journal.append(202, b"{}")
    journal.drop()

    assert sorted(reopened(spool)) == list(range(1, 203))


def test_an_event_that_changed_on_the_disk_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its checksum tells; the events before and behind it are there."""
    journal = Journal(tmp_path / "a")
    for number in (1, 2, 3):
        journal.append(number, b'{"tokens":%d}' % number)
    journal.drop()
    path = Path(f"{tmp_path / 'a'}{JOURNAL_SUFFIX}")
    path.write_bytes(path.read_bytes().replace(b'{"tokens":2}', b'{"tokens":9}'))

    assert reopened(tmp_path / "a") == {1: b'{"tokens":1}', 3: b'{"tokens":3}'}
    assert "an event in a spool's journal is damaged and is not sent" in caplog.text


def test_a_journal_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has no checksums; what is appended to it has one."""
    path = Path(f"{tmp_path / 'a'}{JOURNAL_SUFFIX}")
    path.write_bytes(b"+1 one\n+2 two\n-1 1\n")
    journal = Journal(tmp_path / "a")
    journal.append(3, b"three")
    journal.drop()

    assert reopened(tmp_path / "a") == {2: b"two", 3: b"three"}
