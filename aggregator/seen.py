"""Every identity ever stored, so that "is this event new?" costs no query.

An identity is 128 bits (``meters.event.identity``). The index keeps, for each, the two halves and a 64-bit hash of
the event's bytes in sorted runs (``run``). A lookup searches each run for the high half and
confirms on the low one, so an answer is about the whole key and "new" is never guessed. New identities become a
small run; runs of similar size are merged in the background, so there are few of them. A merge of long ones takes
seconds, in which short ones would pile up behind it; those are merged as they come, in milliseconds. A merge needs
memory for its result beside what it merges, so no run gets longer than 16 million or a quarter of all.

The index is a view: it is rebuilt from the store when the aggregator starts, and holds only what is committed.
8 to 9 bytes of memory an identity, and 16 on the disk; 24 of memory for the newest.
"""

import heapq
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aggregator.run import Run, Search, Words

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
