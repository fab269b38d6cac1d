"""The index of identities."""

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.decode import identities, kernels
from aggregator.decode.identities import Keys, Seen, repeats

few = st.integers(0, 3)  # a small range makes halves collide all the time
batches = st.lists(st.lists(st.tuples(few, few), max_size=12), max_size=12)
HIGH = [0, 1, 2**63, 2**64 - 1]  # what 0 to 3 stand for there: high halves with the same leading bits and with others


def keys(identities: list[tuple[int, int]]) -> Keys:
    """Columns of identities, each with a content hash made from it."""
    hi = np.array([hi for hi, _ in identities], np.uint64)
    lo = np.array([lo for _, lo in identities], np.uint64)
    return Keys(hi, lo, hi * np.uint64(1000) + lo + np.uint64(1))


@contextmanager
def files_from(rows: int) -> Iterator[None]:
    """Runs of so many rows have an index, and what confirms a find in a file; both are made in small pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identities, "FILE_ROWS_MIN", rows)
        patch.setattr(identities, "PIECE_ROWS", 3)
        patch.setattr(identities, "INDEXED_ROWS_MIN", rows)
        patch.setattr(identities, "AT_ONCE_ROWS_MAX", 4)  # the others are merged in the background
        yield


def settle(index: Seen) -> None:
    """Wait for merges under way."""
    while index._merging is not None and index._merging.is_alive():
        index._merging.join()


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
        new = sorted({(HIGH[hi], lo) for hi, lo in batch} - model)
        seen.add(keys(new))
        model |= set(new)
        everything = [(hi, lo) for hi in HIGH for lo in range(4)]
        asked = keys(everything)
        for search in (None, kernels.search):
            found, content = seen.find(asked.hi, asked.lo, search)

            assert [identity in model for identity in everything] == found.tolist()
            assert [int(c) for c, f in zip(asked.content, found, strict=True) if f] == content[found].tolist()
    settle(seen)
    assert len(model) == len(seen)


CROWD = 200  # external ids whose identities share a high half; a sender can make any number of them


@pytest.mark.parametrize("rows", [1, identities.FILE_ROWS_MIN])
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
            settle(seen)
            searched = [seen.find(asked.hi, asked.lo, search) for search in (None, kernels.search)]

        for found, content in searched:
            assert [any(identity in batch for batch in batches) for identity in everything] == found.tolist()
            assert asked.content[found].tolist() == content[found].tolist()


def test_runs_that_pile_up_are_copied_a_few_times_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a long merge hundreds may wait, and each lookup searches them all, so they have to be one soon."""
    copied, merged = [], identities.Run.merged

    def counting(older: identities.Run, newer: identities.Run, directory: Path | None) -> identities.Run:
        copied.append(len(older.hi) + len(newer.hi))
        return merged(older, newer, directory)

    monkeypatch.setattr(identities.Run, "merged", counting)
    count, rows = 256, 4
    pile = [keys([(number * rows + row, 0) for row in range(rows)]) for number in range(count)]
    one = identities._merged(tuple(identities.Run.of(*each, None) for each in pile), None)
    assert one.hi.tolist() == list(range(count * rows))
    assert sum(copied) == count * rows * 8  # the binary logarithm of 256


def test_few_runs_stand_behind_a_long_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """While millions are merged, which takes seconds, rounds go on, and each of them searches every run."""
    going_on, merge_all = threading.Event(), identities._merged

    def slowly(runs: tuple[identities.Run, ...], directory: Path | None) -> identities.Run:
        if threading.current_thread().name == "seen-merge":
            assert going_on.wait(60)
        return merge_all(runs, directory)

    monkeypatch.setattr(identities, "_merged", slowly)
    monkeypatch.setattr(identities, "AT_ONCE_ROWS_MAX", 400)
    index = Seen()
    for first in range(0, 8_000, 20):
        index.add(keys([(row, row) for row in range(first, first + 20)]))
    runs = len(index._runs)
    going_on.set()
    settle(index)
    index.add(keys([(row, row) for row in range(8_000, 8_100)]))  # whoever comes next has them merged
    settle(index)
    assert runs < 8_000 / 400 * 2  # and not the 400 that were added
    assert len(index._runs) < 10
    found, _ = index.find(*keys([(row, row) for row in range(9_000)])[:2])
    assert found.tolist() == [row < 8_100 for row in range(9_000)]


def test_no_run_is_merged_into_one_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a merge holds in memory besides is a part of the whole: none makes more than a quarter of all identities."""
    monkeypatch.setattr(identities, "LONGEST_ROWS_MIN", 100)
    index = Seen()
    for first in range(0, 2_000, 10):
        index.add(keys([(row, row) for row in range(first, first + 10)]))
        settle(index)
        assert max(len(each.hi) for each in index._runs) <= max(100, (first + 10) // identities.LONGEST_PART)
    assert len(index._runs) < 20


def test_without_room_for_a_file_the_index_is_in_memory(tmp_path: Path) -> None:
    """A directory that takes no file costs memory and changes no answer."""
    is_in_memory_and_knows_forty(tmp_path / "gone")


def test_where_a_file_may_not_reach_the_disk_the_index_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk took and then lost is read as zeros later, without an error, so that known identities look new."""

    def lost(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", lost)
    is_in_memory_and_knows_forty(tmp_path)


def is_in_memory_and_knows_forty(directory: Path) -> None:
    """Adds forty identities where every run should have a file, and asks for fifty."""
    with files_from(1):
        seen = Seen(directory)
        for first in range(0, 40, 4):
            seen.add(keys([(number % 7, number) for number in range(first, first + 4)]))
        settle(seen)
        asked = keys([(number % 7, number) for number in range(50)])
        found, content = seen.find(asked.hi, asked.lo)

    assert {identities.InMemory} == {type(each.confirming) for each in seen._runs}
    assert found.tolist() == [number < 40 for number in range(50)]
    assert content[found].tolist() == asked.content[found].tolist()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Half of it gone, say: an identity is never called new for that."""
    with files_from(1):
        seen = Seen(tmp_path)
        seen.add(keys([(number, number) for number in range(20)]))
        [only] = seen._runs
        assert isinstance(only.confirming, identities.InFile)
        os.truncate(only.confirming._descriptor, 10 * identities.PAIR_BYTES)
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
