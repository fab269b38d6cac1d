"""The index of identities."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import run, seen
from aggregator.seen import Keys, Seen, repeats

few = st.integers(0, 3)  # a small range makes halves collide all the time
batches = st.lists(st.lists(st.tuples(few, few), max_size=12), max_size=12)


def keys(identities: list[tuple[int, int]]) -> Keys:
    """Columns of identities, each with a content hash made from it."""
    hi = np.array([hi for hi, _ in identities], np.uint64)
    lo = np.array([lo for _, lo in identities], np.uint64)
    return Keys(hi, lo, hi * np.uint64(1000) + lo + np.uint64(1))


@contextmanager
def files_from(rows: int) -> Iterator[None]:
    """Runs of so many rows and more keep what confirms a find in a file, which is written in small pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FILE_ROWS_MIN", rows)
        patch.setattr(run, "PIECE_ROWS", 3)
        yield


@given(batches)
def test_the_index_knows_exactly_what_was_added(batches: list[list[tuple[int, int]]]) -> None:
    """After any batches, each new identity once, an identity is found if and only if it was added, with its content."""
    knows_exactly_what_was_added(Seen(), batches)


@given(batches, st.integers(1, 8))
def test_so_does_one_that_keeps_files(batches: list[list[tuple[int, int]]], rows: int) -> None:
    """The same with a part of every run, or of the longer ones, on the disk."""
    with tempfile.TemporaryDirectory() as directory, files_from(rows):
        knows_exactly_what_was_added(Seen(Path(directory)), batches)
        assert os.listdir(directory) == [], "a file has no name that could be left behind"


def knows_exactly_what_was_added(seen: Seen, batches: list[list[tuple[int, int]]]) -> None:
    """Adds, and asks for everything there may be, after each batch."""
    model = set[tuple[int, int]]()
    for batch in batches:
        new = sorted(set(batch) - model)
        seen.add(keys(new))
        model |= set(new)
        everything = [(hi, lo) for hi in range(4) for lo in range(4)]
        asked = keys(everything)
        found, content = seen.find(asked.hi, asked.lo)

        assert [identity in model for identity in everything] == found.tolist()
        assert [int(c) for c, f in zip(asked.content, found, strict=True) if f] == content[found].tolist()
    seen.settle()
    assert len(model) == len(seen)


CROWD = 200  # external ids whose identities share a high half; a sender can make any number of them


@pytest.mark.parametrize("rows", [1, run.FILE_ROWS_MIN])
def test_any_number_of_identities_may_share_a_high_half(tmp_path: Path, rows: int) -> None:
    """Added at once or one by one, in runs that merge: each is found with its content, and no other one."""
    crowd = [(7, (number * 37) % CROWD * 2) for number in range(CROWD)]
    everything = [*((7, low) for low in range(2 * CROWD)), (6, 0), (6, 2), (8, 0), (8, 1)]
    asked = keys(everything)
    for size in (1, 9, CROWD):
        batches = [[*crowd[first : first + size], (6, first), (8, first)] for first in range(0, CROWD, size)]
        with files_from(rows):
            seen = Seen(tmp_path)
            for batch in batches:
                seen.add(keys(batch))
            seen.settle()
            found, content = seen.find(asked.hi, asked.lo)

        assert [any(identity in batch for batch in batches) for identity in everything] == found.tolist()
        assert asked.content[found].tolist() == content[found].tolist()


def test_runs_that_pile_up_are_copied_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a long merge hundreds may wait, and each lookup searches them all, so they have to be one soon."""
    copied, merged = [], run.Run.merged

    def counting(older: run.Run, newer: run.Run, directory: Path | None) -> run.Run:
        copied.append(len(older.hi) + len(newer.hi))
        return merged(older, newer, directory)

    monkeypatch.setattr(run.Run, "merged", counting)
    count, rows = 256, 4
    pile = [keys([(number * rows + row, 0) for row in range(rows)]) for number in range(count)]
    one = seen._merged(tuple(run.Run.of(*each, None) for each in pile), None)
    assert one.hi.tolist() == list(range(count * rows))
    assert sum(copied) == count * rows * 8  # the binary logarithm of 256


def test_without_room_for_a_file_the_index_is_in_memory(tmp_path: Path) -> None:
    """A directory that takes no file costs memory and changes no answer."""
    with files_from(1):
        seen = Seen(tmp_path / "gone")
        for first in range(0, 40, 4):
            seen.add(keys([(number % 7, number) for number in range(first, first + 4)]))
        seen.settle()
        asked = keys([(number % 7, number) for number in range(50)])
        found, content = seen.find(asked.hi, asked.lo)

    assert found.tolist() == [number < 40 for number in range(50)]
    assert content[found].tolist() == asked.content[found].tolist()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Half of it gone, say: an identity is never called new for that."""
    with files_from(1):
        seen = Seen(tmp_path)
        seen.add(keys([(number, number) for number in range(20)]))
        [only] = seen._runs
        assert isinstance(only.confirming, run.InFile)
        os.truncate(only.confirming._descriptor, 10 * run.PAIR_BYTES)
        asked = keys([(15, 15)])
        with pytest.raises(OSError, match="shorter"):
            seen.find(asked.hi, asked.lo)


@given(st.lists(st.tuples(few, few), max_size=30))
def test_repeats_name_the_first_row_of_an_identity(identities: list[tuple[int, int]]) -> None:
    """Within a batch every row points at the first row of its identity, and only that row is first."""
    columns = keys(identities)
    found = repeats(columns.hi, columns.lo)

    expected = [identities.index(identity) for identity in identities]
    assert expected == found.of.tolist()
    assert [row == first for row, first in enumerate(expected)] == found.first.tolist()
