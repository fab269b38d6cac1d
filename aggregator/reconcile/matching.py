"""Places and fingerprints of two sides against each other, as arrays. Pure.

Where both sides have the same places with the same fingerprints nothing else is looked at. Elsewhere each place falls
into one of six heaps, and only those are read as rows.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aggregator.reconcile.lines import HOUR_US, Integers, Words

Rows = npt.NDArray[np.intp]


class Heaps(NamedTuple):
    """Lines by row number in the log's arrays, rows of the store by place."""

    stored: Rows  # lines that the store has, as they are
    changed: Rows  # lines that the store has at their place, with another fingerprint
    dead: Rows  # lines that are dead letters
    elsewhere: Rows  # lines without a row at their place: repetitions, or lost
    doubled: Integers  # places that the store has more than once
    unfounded: Integers  # places of the store without a line


def sort_out(keys: Integers, prints: Words, row_keys: Integers, row_prints: Words, dead_keys: Integers) -> Heaps:
    """Compare. ``keys`` and ``row_keys`` are in order; only ``row_keys`` may repeat themselves."""
    nothing, no_places = np.zeros(0, np.intp), np.zeros(0, np.int64)
    if len(keys) == len(row_keys) and np.array_equal(keys, row_keys) and np.array_equal(prints, row_prints):
        return Heaps(np.arange(len(keys)), nothing, nothing, nothing, no_places, no_places)
    if len(row_keys):
        place = np.minimum(np.searchsorted(row_keys, keys), len(row_keys) - 1)
        present = row_keys[place] == keys
        same = present & (row_prints[place] == prints)
    else:
        present = same = np.zeros(len(keys), np.bool_)
    is_dead = np.isin(keys, dead_keys) & ~present
    return Heaps(
        stored=np.flatnonzero(same),
        changed=np.flatnonzero(present & ~same),
        dead=np.flatnonzero(is_dead),
        elsewhere=np.flatnonzero(~present & ~is_dead),
        doubled=np.unique(row_keys[1:][row_keys[1:] == row_keys[:-1]]),
        unfounded=np.setdiff1d(row_keys, keys),
    )


class HourSums:
    """Counts and checksums by hour. A checksum is the sum of fingerprints, modulo 2^64, so order does not matter."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sums: dict[int, int] = {}

    def add(self, ingested_us: Integers, prints: Words | None = None) -> None:
        """Add rows by their time of ingestion."""
        hours = ingested_us // HOUR_US
        found, first, counts = np.unique(hours, return_inverse=True, return_counts=True)
        sums = np.zeros(len(found), np.uint64)
        if prints is not None:
            np.add.at(sums, first, prints)
        for hour, count, sum_ in zip(found.tolist(), counts.tolist(), sums.tolist(), strict=True):
            self.counts[hour] = self.counts.get(hour, 0) + count
            self.sums[hour] = (self.sums.get(hour, 0) + sum_) % 2**64
