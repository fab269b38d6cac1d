"""The endpoint that most teams write: FastAPI, a pydantic model per event, a row per event, a commit per request.

A baseline for ``benchmarks.accept``, as fast as that stack goes on SQLite (WAL, synchronous=FULL, executemany).

    python -m benchmarks.usual_stack FILE PORT
"""

import json
import sqlite3
import sys
from datetime import datetime
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field


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


def application(path: str) -> FastAPI:
    """The endpoint over one SQLite file."""
    connection = sqlite3.connect(path, check_same_thread=False)
    connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
    columns = "external_id TEXT PRIMARY KEY, name TEXT, customer TEXT, at TEXT, metadata TEXT"
    connection.execute(f"CREATE TABLE IF NOT EXISTS events ({columns})")
    app = FastAPI()

    @app.post("/v1/events/ingest")
    async def ingest(body: Events) -> dict[str, int]:
        rows = [
            (sent.external_id, sent.name, sent.external_customer_id, str(sent.timestamp), json.dumps(sent.metadata))
            for sent in body.events
        ]
        with connection:
            cursor = connection.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", rows)
        return {"inserted": cursor.rowcount, "duplicates": len(rows) - cursor.rowcount}

    return app


if __name__ == "__main__":
    uvicorn.run(application(sys.argv[1]), port=int(sys.argv[2]), log_level="warning", access_log=False)
