"""Going on where records of the log are gone for ever: an operator's decision, written into the positions.

Nothing does this by itself. A reader that cannot have its next record stops; only a person can say that what lies
between the store and the beginning of the log will never be counted.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

from aggregator.store.store import Store


class Lost(NamedTuple):
    """Records of one partition that the store never read: from ``position`` up to ``start``, which is still there."""

    stream: str
    partition: int
    position: int
    start: int


def find_lost(store: Store, stream: str, starts: Mapping[int, int]) -> list[Lost]:
    """Where the log begins behind what was read. ``starts`` are the offsets of its oldest records."""
    positions = store.positions(stream)
    return [
        Lost(stream, partition, positions.get(partition, 0), start)
        for partition, start in sorted(starts.items())
        if positions.get(partition, 0) < start
    ]


def skip(store: Store, lost: list[Lost]) -> None:
    """Go on at the beginning of the log, in every partition at once."""
    with contextlib.closing(store.cursor()) as connection:
        connection.execute("BEGIN")
        for stream, partition, position, start in lost:
            connection.execute(
                """UPDATE positions SET next_offset = ?, last_us = NULL
                   WHERE stream = ? AND log_partition = ? AND next_offset = ?""",
                [start, stream, partition, position],
            )
        connection.execute("COMMIT")
