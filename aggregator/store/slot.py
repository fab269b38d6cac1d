"""A name in SQL under which one table after another is handed to DuckDB.

Registering a table makes a view, which costs a millisecond, and a statement over a view made anew is planned anew,
which costs two. In a round of a few thousand events that is as much as the events. A slot is registered once and
shows whatever lies in it when a statement runs, so that a statement over it can stay prepared.

A statement over the store's own tables is planned anew whenever it runs, prepared or not. The few of a round leave an
optimizer nothing to find: without it, moving the positions on takes 2 ms instead of 5.
"""

import contextlib
from collections.abc import Iterator

import duckdb
import pyarrow as pa

from aggregator.store.opening import another


def as_written(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Another connection to the file, which executes statements as they are written."""
    with contextlib.ExitStack() as undo:
        made = another(connection)
        undo.callback(made.close)  # an instance that is half open would be in the next opener's way
        made.execute("PRAGMA disable_optimizer")
        undo.pop_all()
    return made


@contextlib.contextmanager
def optimizing(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Around statements that join or search. After an error in there nobody uses the connection again."""
    connection.execute("PRAGMA enable_optimizer")
    yield
    connection.execute("PRAGMA disable_optimizer")


class Slot:
    """Holds the table that a statement will read. All tables of a slot have one schema."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
        self.table = table
        connection.register(name, self)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """The table, as Arrow's own protocol between libraries hands it over."""
        return self.table.__arrow_c_stream__(requested_schema)


class Prepared:
    """A statement that changes rows by what a slot shows. Prepared when the first table tells its schema."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, sql: str) -> None:
        self._connection, self._name, self._sql = connection, name, sql
        self._slot: Slot | None = None

    def __call__(self, table: pa.Table) -> int:
        """Execute it with this table in the slot; how many rows changed."""
        if self._slot is None:
            self._slot = Slot(self._connection, self._name, table)
            self._connection.execute(f"PREPARE with_{self._name} AS {self._sql}")
        self._slot.table = table
        row = self._connection.execute(f"EXECUTE with_{self._name}").fetchone()
        self._slot.table = table.slice(0, 0)  # or a round's memory would be held until the next
        return int(row[0]) if row else 0
