"""The endpoint that most teams write: FastAPI, a pydantic model per event, a row per event, a commit per request.

A baseline, as fast as that stack goes on SQLite (WAL, synchronous=FULL). With ``--meters`` it also counts: an upsert
for every meter that an event belongs to, in the same transaction. ``Store`` is used without the endpoint, too, by
whoever consumes events from a log one after the other.

    python -m benchmarks.usual_stack FILE PORT [--meters]
"""

import json
import sqlite3
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import reduce
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field

from benchmarks.end_to_end import meters

COMMIT_EVENTS = 500  # of a consumer: what most clients hand over at once

_TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS events (external_id TEXT PRIMARY KEY, name TEXT, customer TEXT, at TEXT, metadata TEXT);
CREATE TABLE IF NOT EXISTS totals (
    meter TEXT, customer TEXT, count INTEGER, sum, low, high, PRIMARY KEY (meter, customer)
) WITHOUT ROWID;
"""
_EVENT = "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)"
_UPSERT = """
INSERT INTO totals VALUES (?1, ?2, 1, ?3, ?3, ?3) ON CONFLICT DO UPDATE SET
    count = count + 1, sum = sum + excluded.sum, low = min(low, excluded.low), high = max(high, excluded.high)
"""


class UsageEvent(BaseModel):
    """An event as a model."""

    name: str = Field(max_length=128)
    external_customer_id: str
    external_id: str | None = None
    timestamp: datetime | None = None
    metadata: dict[str, Any] = {}


class Events(BaseModel):
    """A request body."""

    events: list[UsageEvent]


class Meter:
    """One of the ten meters of the benchmarks, as a function of an event."""

    def __init__(self, definition: dict[str, Any]) -> None:
        self.name = str(definition["name"])
        self._clauses = [(clause["property"], clause["value"]) for clause in definition["filter"]["clauses"]]
        self._path = str(definition["aggregation"].get("property", "")).split(".")

    def value(self, event: UsageEvent) -> Any:
        """What the event adds; None when it is none of this meter's."""
        for property, wanted in self._clauses:
            if (event.name if property == "name" else event.metadata.get(property)) != wanted:
                return None
        return 1 if self._path == [""] else reduce(dict.__getitem__, self._path, event.metadata)


class Store:
    """Events as rows and, with meters, totals of each customer."""

    def __init__(self, path: str, *, metered: bool) -> None:
        self.connection = sqlite3.connect(path, check_same_thread=False)
        self.connection.executescript(_TABLES)
        self._meters = [Meter(definition) for definition in meters()] if metered else []

    def add(self, events: Iterable[UsageEvent]) -> int:
        """Store and count in one transaction; how many events were new."""
        with self.connection as connection:
            if not self._meters:
                return connection.executemany(_EVENT, map(_row, events)).rowcount
            return sum(self._add_one(connection, event) for event in events)

    def _add_one(self, connection: sqlite3.Connection, event: UsageEvent) -> int:
        if not connection.execute(_EVENT, _row(event)).rowcount:
            return 0
        for meter in self._meters:
            if (value := meter.value(event)) is not None:
                connection.execute(_UPSERT, (meter.name, event.external_customer_id, value))
        return 1

    def total(self, meter: str) -> tuple[int, int]:
        """Count and sum over all customers."""
        ((count, amount),) = self.connection.execute("SELECT sum(count), sum(sum) FROM totals WHERE meter = ?", [meter])
        return count, amount

    def stored(self) -> int:
        """How many events there are."""
        ((count,),) = self.connection.execute("SELECT count(*) FROM events")
        return int(count)


def _row(event: UsageEvent) -> tuple[str | None, ...]:
    return (
        event.external_id, event.name, event.external_customer_id, str(event.timestamp), json.dumps(event.metadata),
    )  # fmt: skip


def application(add: Callable[[list[UsageEvent]], int]) -> FastAPI:
    """The endpoint over one store."""
    app = FastAPI()

    @app.post("/v1/events/ingest")
    async def ingest(body: Events) -> dict[str, int]:
        inserted = add(body.events)
        return {"inserted": inserted, "duplicates": len(body.events) - inserted}

    return app


if __name__ == "__main__":
    store = Store(sys.argv[1], metered="--meters" in sys.argv)
    uvicorn.run(application(store.add), port=int(sys.argv[2]), log_level="warning", access_log=False)
