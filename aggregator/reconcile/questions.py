"""Where questions to a store are put.

The store belongs to a running aggregator, or to nobody. Either way the questions are the same
(``store.queries.audit``): ``StoppedStore`` opens the file read-only and asks it; a running aggregator answers them on
its own socket (``aggregator.api.audit``), and the log is compared outside of it.
"""

import contextlib
from pathlib import Path
from typing import Protocol

import duckdb
import pyarrow as pa

from aggregator.store import schema
from aggregator.store.queries.audit import put

MEMORY_LIMIT = "192MB"  # blocks are read once or twice, so keeping more of them saves little; what needs more spills


class StoreSide(Protocol):
    """A store, as reconciliation sees it."""

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """The answer to one of ``QUESTIONS``."""
        ...


class Foreign(Exception):
    """The file cannot be reconciled by this program. The message says why and what to do."""


class StoppedStore:
    """The file of a server that does not run, opened so that nothing in it can change."""

    def __init__(self, path: Path) -> None:
        """Raises Foreign."""
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY_LIMIT, "threads": 2, "temp_directory": f"{path}.reconcile.tmp"
        }
        try:
            self.connection = duckdb.connect(str(path), read_only=True, config=settings)
        except duckdb.Error as error:
            raise Foreign(f"{path} cannot be read ({str(error).splitlines()[0]}): run meterstream doctor") from error
        version = self.connection.execute("SELECT version FROM about").fetchone()
        if version != (schema.VERSION,):
            self.connection.close()
            raise Foreign(f"{path} has layout {version}, this program has {schema.VERSION}: run meterstream rebuild")

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """The answer to one of ``QUESTIONS``."""
        with contextlib.closing(self.connection.cursor()) as cursor:
            return put(cursor, question, asked, parameters)
