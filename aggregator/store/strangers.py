"""Events of organizations that no decision made: stored, and visible to nobody.

Only a producer that skips the gateway can name such an organization. Its events are stored like all others, because
the decision may be read after them, and the store must not depend on which came first. So they are counted, and said.
"""

from collections.abc import Collection, Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa

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
