"""The books of servers that are not forwarded to just now, beside those of the one that is.

What a server took says nothing of another one: whoever tries the sandbox first wants production to get everything, and
the sandbox, on the way back, only what came since. So each has its own place in the log, its own dead letters and
replays, and its own sums. Those of the present one stand in the tables that everybody reads; those of any other stand
in a table of the same columns and the server.
"""

import sqlite3
from collections.abc import Iterable

SEEN = ("taken_last", "pending", "oldest_us", "rate")  # flags that were true of the server before


def exchange(file: sqlite3.Connection, tables: Iterable[str], left: str, reached: str) -> None:
    """Keep the books of the server that is left, and open those of the other, if there are any."""
    for table in tables:
        found = file.execute("SELECT name FROM pragma_table_info(?)", [table]).fetchall()
        columns, kept = ", ".join(name for (name,) in found), f"elsewhere_{table}"
        file.execute(f"CREATE TABLE IF NOT EXISTS {kept} AS SELECT '' AS server, {columns} FROM {table} LIMIT 0")  # noqa: S608 (our tables)
        file.execute(f"INSERT INTO {kept} SELECT ?, {columns} FROM {table}", [left])  # noqa: S608
        file.execute(f"DELETE FROM {table}")  # noqa: S608
        file.execute(f"INSERT INTO {table} SELECT {columns} FROM {kept} WHERE server = ?", [reached])  # noqa: S608
        file.execute(f"DELETE FROM {kept} WHERE server = ?", [reached])  # noqa: S608
    file.executemany("DELETE FROM flags WHERE name = ?", [(name,) for name in SEEN])
