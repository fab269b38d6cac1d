"""A sorted run of identities: what is searched lies in memory, what confirms a find may lie in a file.

A lookup searches the high halves. Only where one is found are the low half and the hash of the content looked at,
which for a new event is never and for a repetition once. So of a long run those 16 bytes an identity are kept in a
file, beside the store and without a name, and 8 bytes stay in memory. The file is a view like the run itself, and ends
with the process; where the disk takes no file, the run stays in memory as a whole.

By chance no two identities share a high half, but the hash has no key: whoever wants to can make any number of
external ids that do. They stand in the order of their low halves and are searched like the high ones.

It is read with ``pread`` and not mapped: an I/O error under a mapping kills the process, here it is an ``OSError``.
It is synced although nobody reads it after the process: what a disk took and then could not write is zeros when it is
read again, without an error, and what was stored would be new. A sync tells, while memory can still take the run.

A search by halves in ten million words misses the processor's cache at nearly every step. So a long run has an index:
where the high halves with the same leading bits begin. They are hashes, so that a handful of them are left to search.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.intp]
FILE_ROWS_MIN = 1_000_000  # 16 MB; shorter runs are merged so often that writing them would be most of the work
INDEXED_ROWS_MIN = 500_000  # a search by halves of so many takes 0.14 us, of 16,000,000 0.6; with an index 0.06, 0.09
PREFIX_BITS_LESS = 3  # 4 to 8 identities for each entry of the index: a byte of memory an identity at most
PIECE_ROWS = 262_144  # merged and written at a time: 4 MB
PAIR_BYTES = 16

Search = Callable[[Words, npt.NDArray[np.uint32], np.uint64, Words, Rows], None]
"""``kernels.search``: compiled, it takes half to two thirds of the time of the loop below, and holds no lock."""


class Confirming(Protocol):
    """The low halves and content hashes of a run: pairs, a row an identity, in the run's order."""

    def take(self, rows: Rows) -> Words:
        """Chosen pairs, in the order given. Raises OSError."""
        ...

    def slice(self, start: int, end: int) -> Words:
        """Pairs next to each other. Raises OSError."""
        ...


class InMemory(NamedTuple):
    """As an array."""

    pairs: Words

    def take(self, rows: Rows) -> Words:
        """See Confirming."""
        return self.pairs[rows]

    def slice(self, start: int, end: int) -> Words:
        """See Confirming."""
        return self.pairs[start:end]


class InFile:
    """In a file that only this object knows, closed with it."""

    def __init__(self, directory: Path, pieces: Iterable[Words]) -> None:
        """Write the pieces. Raises OSError, and leaves nothing then."""
        self._descriptor, path = tempfile.mkstemp(prefix=".identities-", dir=directory)
        os.unlink(path)
        with open(self._descriptor, "wb", closefd=False) as file:
            for piece in pieces:
                file.write(piece.data)
        os.fsync(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def take(self, rows: Rows) -> Words:
        """See Confirming."""
        found = [os.pread(self._descriptor, PAIR_BYTES, PAIR_BYTES * row) for row in rows.tolist()]
        return _pairs(b"".join(found), len(rows))

    def slice(self, start: int, end: int) -> Words:
        """See Confirming."""
        count = end - start
        return _pairs(os.pread(self._descriptor, PAIR_BYTES * count, PAIR_BYTES * start), count)


def _pairs(read: bytes, count: int) -> Words:
    if len(read) != PAIR_BYTES * count:
        raise OSError("the file of identities is shorter than it was written")
    return np.frombuffer(read, np.uint64).reshape(count, 2)


class Prefixes(NamedTuple):
    """Where the high halves of each value of their leading bits begin; one more entry says where the last ones end."""

    shift: np.uint64
    begins: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, hi: Words) -> "Prefixes | None":
        """The index of high halves in order; None where there are too few to need it."""
        if len(hi) < INDEXED_ROWS_MIN:
            return None
        bits = max(len(hi).bit_length() - PREFIX_BITS_LESS, 1)
        shift = np.uint64(64 - bits)
        begins = np.empty((1 << bits) + 1, np.uint32)
        for start in range(0, 1 << bits, PIECE_ROWS):
            end = min(start + PIECE_ROWS, 1 << bits)
            begins[start:end] = np.searchsorted(hi, np.arange(start, end, dtype=np.uint64) << shift)
        begins[-1] = len(hi)
        return cls(shift, begins)

    def around(self, hi: Words) -> tuple[Rows, Rows]:
        """Between which rows each high half would stand."""
        entries = (hi >> self.shift).astype(np.intp)
        return self.begins[entries].astype(np.intp), self.begins[entries + 1].astype(np.intp)


class Run(NamedTuple):
    """Identities in order: by their high halves, and where these are equal by their low halves."""

    hi: Words
    confirming: Confirming
    prefixes: Prefixes | None

    @classmethod
    def of(cls, hi: Words, lo: Words, content: Words, directory: Path | None) -> "Run":
        """A run of identities in any order. ``directory`` is where a file may lie, None for memory alone."""
        order = np.argsort(hi, kind="stable")
        in_order = hi[order]
        if (in_order[1:] == in_order[:-1]).any():
            order = np.lexsort((lo, hi))
        pairs = np.stack((lo[order], content[order]), axis=1)
        return cls(in_order, _kept(lambda: [pairs], len(hi), directory), Prefixes.of(in_order))

    def merged(self, newer: "Run", directory: Path | None) -> "Run":
        """This run and a newer, smaller one as one. It copies; sorting anew would cost six times that."""
        place = np.searchsorted(self.hi, newer.hi, side="right")  # how many of the older ones stand before each
        alike = np.flatnonzero(self.hi[np.maximum(place - 1, 0)] == newer.hi)
        if len(alike):
            begins = np.searchsorted(self.hi, newer.hi[alike])
            place[alike] = self._place(newer.confirming.take(alike)[:, 0], begins, place[alike])
        place += np.arange(len(newer.hi))  # no second array: eight million and as many would take 286 MB, and not 222
        older = np.ones(len(self.hi) + len(newer.hi), np.bool_)
        older[place] = False
        hi = np.empty(len(older), np.uint64)
        hi[place], hi[older] = newer.hi, self.hi
        confirming = _kept(lambda: _interleaved(self.confirming, newer.confirming, older), len(hi), directory)
        return Run(hi, confirming, Prefixes.of(hi))

    def find(self, hi: Words, lo: Words, search: Search | None = None) -> tuple[Rows, Words]:
        """Which of the identities asked for are here: their rows, and the content hashes they were kept with.

        Faster for identities in order. Raises OSError when the file cannot be read.
        """
        here, last = self._first(hi, search), len(self.hi) - 1
        rows = np.flatnonzero(self.hi[np.minimum(here, last)] == hi)
        if not len(rows):
            return rows, hi[:0]
        here = here[rows]
        crowded = np.flatnonzero((self.hi[np.minimum(here + 1, last)] == hi[rows]) & (here < last))
        if len(crowded):
            among = rows[crowded]
            ends = np.searchsorted(self.hi, hi[among], side="right")
            here[crowded] = self._place(lo[among], here[crowded], ends - 1)
        pairs = self.confirming.take(here)
        same = pairs[:, 0] == lo[rows]
        return rows[same], pairs[same, 1]

    def _first(self, hi: Words, search: Search | None) -> Rows:
        """For each high half the first row that is not less."""
        if self.prefixes is None:
            return np.searchsorted(self.hi, hi)
        if search is not None:
            found = np.empty(len(hi), np.intp)
            search(self.hi, self.prefixes.begins, self.prefixes.shift, hi, found)
            return found
        low, high = self.prefixes.around(hi)
        while (apart := low < high).any():  # three or four times; of whole arrays, since to pick rows costs more
            middle = (low + high) >> 1
            less = apart & (self.hi.take(middle, mode="clip") < hi)
            low, high = np.where(less, middle + 1, low), np.where(less, high, middle)
        return low

    def _place(self, lo: Words, begins: Rows, ends: Rows) -> Rows:
        """For each low half the first place from ``begins`` on whose low half is not less, or else ``ends``.

        From one to the other all high halves are equal, so that the low ones are in order.
        """
        low, high = begins.copy(), ends.copy()
        while len(apart := np.flatnonzero(low < high)):  # only these, since each may be read from a file
            middle = (low[apart] + high[apart]) // 2
            less = self.confirming.take(middle)[:, 0] < lo[apart]
            low[apart[less]], high[apart[~less]] = middle[less] + 1, middle[~less]
        return low


def _interleaved(old: Confirming, new: Confirming, older: npt.NDArray[np.bool_]) -> Iterator[Words]:
    """The pairs of two runs in their common order, in pieces; ``older`` says for each place whose it is."""
    old_start = new_start = 0
    for start in range(0, len(older), PIECE_ROWS):
        of_old = older[start : start + PIECE_ROWS]
        old_end = old_start + int(np.count_nonzero(of_old))
        new_end = new_start + len(of_old) - (old_end - old_start)
        piece = np.empty((len(of_old), 2), np.uint64)
        piece[of_old], piece[~of_old] = old.slice(old_start, old_end), new.slice(new_start, new_end)
        yield piece
        old_start, new_start = old_end, new_end


def _kept(pieces: Callable[[], Iterable[Words]], rows: int, directory: Path | None) -> Confirming:
    """Many pairs in a file; few of them, and all where the disk takes none, in memory."""
    if directory is not None and rows >= FILE_ROWS_MIN:
        with contextlib.suppress(OSError):
            return InFile(directory, pieces())
    return InMemory(np.concatenate(list(pieces())))
