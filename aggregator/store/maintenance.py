"""Rare repairs of the store: skip lost log records, and count events of unknown organizations.

``find_lost`` and ``skip`` advance the positions past records that the log no longer has. ``Strangers`` counts stored
events whose organization does not exist; ``doctor`` and the metrics report them.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from aggregator.store.store import Store

# Skipping lost records.
#
# The reader stops when its next record is gone. Only an operator can decide that the records between the store's
# position and the beginning of the log will never be counted, so nothing calls ``skip`` automatically.

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


# Events of unknown organizations: stored, but not readable until the organization is created.
#
# Only a producer that bypasses the gateway can write such events. They are stored like all others, because the
# decision that creates the organization may be read after them, and the store must not depend on that order. They are
# counted so that an operator notices them.

_COUNT = """SELECT organization, count(*) FROM events
    WHERE organization IN (SELECT unnest($numbers)) GROUP BY organization"""


def stored_under(connection: duckdb.DuckDBPyConnection, known: Collection[str]) -> dict[str, int]:
    """How many events are stored under each organization that is not ``known``, most first."""
    unknown = _unknown(connection, known)
    if not unknown:
        return {}
    events = _count(connection, unknown)
    return {unknown[number]: events[number] for number in sorted(events, key=lambda number: -events[number])}


def _unknown(connection: duckdb.DuckDBPyConnection, known: Collection[str]) -> dict[int, str]:
    rows = connection.execute("SELECT number, id FROM organizations").fetchall()
    return {number: organization_id for number, organization_id in rows if organization_id not in known}


def _count(connection: duckdb.DuckDBPyConnection, numbers: Collection[int]) -> dict[int, int]:
    return dict(connection.execute(_COUNT, {"numbers": list(numbers)}).fetchall())


class Strangers:
    """The same sum, kept from round to round by the writer's thread. Costs nothing where there is no such event."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, known: Mapping[str, object]) -> None:
        """``known`` are the organizations that decisions made, as they are at each call."""
        self._known = known
        self._ids = _unknown(connection, known)
        self._events = _count(connection, self._ids) if self._ids else {}

    @property
    def events(self) -> int:
        """How many events are stored under organizations that no decision made."""
        return sum(self._events.values())

    def note(self, organizations: Sequence[tuple[int, str]], rows: pa.Table) -> None:
        """A round was committed and its decisions applied: it numbered these organizations and stored these rows."""
        self._ids.update(organizations)
        for number in [number for number, organization_id in self._ids.items() if organization_id in self._known]:
            del self._ids[number]
            self._events.pop(number, None)
        if self._ids and rows.num_rows:
            self._add(rows.column("organization").to_numpy())

    def _add(self, column: np.ndarray) -> None:
        for number, events in zip(*(found.tolist() for found in np.unique(column, return_counts=True)), strict=True):
            if number in self._ids:
                self._events[number] = self._events.get(number, 0) + events
