"""The index of all event identities: answers "is this event new?" in memory, without a query.

An identity is 128 bits (``meters.event.identity``). ``Seen`` keeps the two 64-bit halves of each identity and a
64-bit hash of the event's content, in sorted arrays (``Run``). A lookup searches each run for the high half and
confirms with the low half, so the answer is exact. New identities form a small run; a background thread merges runs
of similar size. ``repeats`` finds identities that occur more than once within one batch.

The index holds only committed identities and is rebuilt from the store when an engine starts. It needs 8 to 9 bytes
of memory and 16 bytes of disk for an identity, and 24 bytes of memory for the newest ones.
"""

import contextlib
import heapq
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

# Runs.
#
# Only the high halves are searched. The low half and the content hash are read only when a high half matches: never
# for a new event, once for a duplicate. So a long run keeps those 16 bytes per identity in an unnamed file beside the
# store, and 8 bytes in memory. The file ends with the process. Where the disk accepts no file, the whole run stays in
# memory.
#
# Two identities with the same high half do not occur by chance. But the hash has no key, so a sender can construct
# any number of external ids with equal high halves. These are ordered by their low halves and found by binary search.
#
# The file is read with ``pread`` and not memory-mapped: an I/O error in a mapping kills the process, while ``pread``
# raises OSError. The file is synced although it does not outlive the process: data that the disk accepted and then
# failed to write reads back as zeros, without an error, and stored events would then look new. The sync reports such
# a failure while the run can still stay in memory.
#
# A binary search in ten million words misses the processor's cache at nearly every step. So a long run has an index
# of where the high halves with the same leading bits begin (``Prefixes``). High halves are hashes, so only a few
# candidates remain to be searched.

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.intp]
FILE_ROWS_MIN = 1_000_000  # 16 MB; shorter runs are merged so often that writing them would be most of the work
INDEXED_ROWS_MIN = 500_000  # a search by halves of so many takes 0.14 us, of 16,000,000 0.6; with an index 0.06, 0.09
PREFIX_BITS_LESS = 3  # 4 to 8 identities for each entry of the index: a byte of memory an identity at most
PIECE_ROWS = 262_144  # merged and written at a time: 4 MB
PAIR_BYTES = 16

Search = Callable[[Words, npt.NDArray[np.uint32], np.uint64, Words, Rows], None]
"""``kernels.search``, the one search by the index of prefixes; compiled, so that it takes a handful of steps each."""


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
        """For each high half the first row that is not less.

        Before loops are loaded, and where they cannot be, a long run is searched as a whole: slower, with one result.
        """
        if self.prefixes is None or search is None:
            return np.searchsorted(self.hi, hi)
        found = np.empty(len(hi), np.intp)
        search(self.hi, self.prefixes.begins, self.prefixes.shift, hi, found)
        return found

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


# The index.
#
# Merging two long runs takes seconds. Short runs would accumulate meanwhile, so those are merged at once, in
# milliseconds. A merge needs memory for its result beside its inputs, so no run grows beyond 16 million identities or
# a quarter of all identities.

RUN_GROWTH = 4  # merge while the newer runs hold at least a quarter of the next older one
AT_ONCE_ROWS_MAX = 200_000  # rows of a merge for which a round may wait: 13 ms where 50,000 are merged with 150,000
LONGEST_ROWS_MIN = 16_000_000  # a run may always get as long as this: 130 MB, merged in 1.6 s
LONGEST_PART = 4  # and as long as this part of all identities: of a billion there are a few long runs, not sixty


class Keys(NamedTuple):
    """Identities as columns: high halves, low halves and content hashes, one row an event."""

    hi: Words
    lo: Words
    content: Words

    def take(self, rows: npt.NDArray[np.intp]) -> "Keys":
        """The chosen rows, in the order given."""
        return Keys(self.hi[rows], self.lo[rows], self.content[rows])


class Seen:
    """The index. One thread adds; any thread may look up."""

    def __init__(self, directory: Path | None = None) -> None:
        """``directory`` is where files of long runs may lie; without one all is in memory."""
        self._directory = directory
        self._runs: tuple[Run, ...] = ()
        self._merging: threading.Thread | None = None
        self._held = 0  # so many of the oldest runs are in the hands of the thread that merges
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(run.hi) for run in self._runs)

    def add(self, keys: Keys) -> None:
        """Remember identities; the caller promises that they are new and committed."""
        if len(keys.hi) == 0:
            return
        run = Run.of(*keys, self._directory)
        with self._lock:
            behind = (*self._runs[self._held :], run)
            self._runs = (*self._runs[: self._held], *(_tidied(behind) if self._held else behind))
        self._merge_in_background()

    def find(self, hi: Words, lo: Words, search: Search | None = None) -> tuple[npt.NDArray[np.bool_], Words]:
        """For each identity: whether it is known, and the content hash it was stored with (0 when unknown).

        Raises OSError when a file cannot be read.
        """
        found = np.zeros(len(hi), dtype=np.bool_)
        content = np.zeros(len(hi), dtype=np.uint64)
        order = np.argsort(hi, kind="stable")  # sorted needles walk a run front to back instead of jumping in it
        hi_sorted, lo_sorted = hi[order], lo[order]
        for run in self._runs:
            rows, hashes = run.find(hi_sorted, lo_sorted, search)
            found[order[rows]], content[order[rows]] = True, hashes
        return found, content

    def _merge_in_background(self) -> None:
        if self._merging is not None and self._merging.is_alive():
            return
        if _mergeable(self._runs) >= 2:
            self._merging = threading.Thread(target=self._merge, name="seen-merge", daemon=True)
            self._merging.start()

    def _merge(self) -> None:
        while True:
            with self._lock:
                runs, count = self._runs, _mergeable(self._runs)
                self._held = len(runs) if count >= 2 else 0
            if count < 2:
                return
            merged = _merged(runs[-count:], self._directory)
            with self._lock:
                # runs added meanwhile stand behind the ones just merged
                self._runs = (*runs[:-count], merged, *self._runs[len(runs) :])
                self._held = 0


def _mergeable(runs: tuple[Run, ...]) -> int:
    """How many of the newest runs to merge: all that are not small beside what is newer, unless it gets too long."""
    longest = max(LONGEST_ROWS_MIN, sum(len(run.hi) for run in runs) // LONGEST_PART)
    count, rows = 0, 0
    for run in reversed(runs):
        if count >= 1 and (len(run.hi) > RUN_GROWTH * rows or len(run.hi) + rows > longest):
            break
        count, rows = count + 1, rows + len(run.hi)
    return count


def _tidied(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """The runs with the newest ones merged, as long as that takes no time to speak of."""
    count = _mergeable(runs)
    while count > 1 and sum(len(run.hi) for run in runs[-count:]) > AT_ONCE_ROWS_MAX:
        count -= 1
    return runs if count < 2 else (*runs[:-count], _merged(runs[-count:], None))


def _merged(runs: tuple[Run, ...], directory: Path | None) -> Run:
    """Sorted runs as one, always the two smallest first.

    While a large merge goes on, small runs pile up behind it. One into the other they would be copied as many times as
    there are of them; that takes longer than the next ones take to come, and every lookup searches each of them.
    """
    waiting = [(len(run.hi), number, run) for number, run in enumerate(runs)]
    heapq.heapify(waiting)
    while len(waiting) > 1:
        rows, number, small = heapq.heappop(waiting)
        more, _, large = waiting[0]
        heapq.heapreplace(waiting, (rows + more, number, large.merged(small, directory)))
    return waiting[0][2]


class Repeats(NamedTuple):
    """Within one batch: ``first`` marks the first row of each identity; ``of`` names that row for every row."""

    first: npt.NDArray[np.bool_]
    of: npt.NDArray[np.intp]


def repeats(hi: Words, lo: Words) -> Repeats:
    """Find identities that occur more than once among the rows of one batch."""
    rows = len(hi)
    in_order = np.sort(hi)
    if not (in_order[1:] == in_order[:-1]).any():  # as nearly always
        return Repeats(np.ones(rows, np.bool_), np.arange(rows))
    order = np.lexsort((np.arange(rows), lo, hi))
    same = np.zeros(rows, dtype=np.bool_)
    same[1:] = (hi[order][1:] == hi[order][:-1]) & (lo[order][1:] == lo[order][:-1])
    head = np.maximum.accumulate(np.where(same, 0, np.arange(rows)))
    first = np.zeros(rows, dtype=np.bool_)
    first[order[~same]] = True
    of = np.empty(rows, dtype=np.intp)
    of[order] = order[head]
    return Repeats(first, of)
