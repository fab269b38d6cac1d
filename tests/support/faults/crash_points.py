"""Every place of a round where something can go wrong, found by watching a round instead of by a list.

``watch`` puts itself around the calls a round is made of: each statement to DuckDB, each reading of the log, each
step in between. A call is two points, one before it and one after it, told apart by name and by how often the name
came already. What happens at a point is up to whoever watches: count it, raise, or end the process.
"""

import contextlib
import errno
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import duckdb

from aggregator.decode.identities import Seen
from aggregator.engine import pipeline, supervisor
from aggregator.store import database
from aggregator.store.store import Store
from aggregator.totals.running import RunningTotals
from ingest.log.sqlite_log import EmbeddedLog
from meters.catalogue.catalogue import Catalogue

Point = tuple[str, int]  # name, and which time it comes
STATEMENTS = ("execute", "executemany", "sql", "register", "unregister", "cursor", "close")
WORDS = 3  # of a statement's text, enough to tell statements apart: "INSERT INTO events"
CALLS: tuple[tuple[Any, str], ...] = (
    (pipeline, "decode"), (pipeline, "join"), (pipeline, "judge"), (pipeline, "step"), (pipeline, "nothing"),
    (Seen, "find"), (Seen, "add"), (Catalogue, "apply"), (RunningTotals, "changed"), (RunningTotals, "add"),
    (RunningTotals, "start"), (pipeline.Checkpointer, "wrote"), (Store, "commit"), (Store, "directory"),
    (Store, "seen"), (Store, "checkpoint"), (supervisor, "prepare_partitions"), (supervisor.Aggregator, "_observed"),
    (EmbeddedLog, "read"), (EmbeddedLog, "identity"), (EmbeddedLog, "ends"), (database, "_make"), (database, "_check"),
)
# Rounds of one record, threads that look around often, a checkpoint whenever there is something to fold in.
HURRIED: tuple[tuple[Any, str, Any], ...] = (
    (pipeline, "ROUND_BYTES_MAX", 1), (pipeline, "_STOP_POLL_S", 0.003), (pipeline, "IDLE_WAIT_S", 0.003),
    (supervisor, "RESTART_DELAY_S", 0.001), (supervisor, "RESTART_DELAY_MAX_S", 0.01),
    (supervisor, "OPENING_DELAY_MAX_S", 0.01),
    (pipeline, "ROWS_BETWEEN", 1), (pipeline, "AGAIN_S", 0.003),
)


class Points:
    """Counts what comes by; ``strike`` decides what happens there, until all is ``silent``."""

    def __init__(self, strike: Callable[[Point], None]) -> None:
        self._strike = strike
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.silent = False

    def at(self, name: str) -> None:
        """A point was reached."""
        with self._lock:
            self._seen[name] += 1
            point = name, self._seen[name]
        if not self.silent:
            self._strike(point)

    def opened(self, connection: duckdb.DuckDBPyConnection) -> "Connection":
        """Watch a connection or cursor, and remember it: an error at its birth or its close leaves it open."""
        watched = Connection(connection, self)
        with self._lock:
            self._opened.add(watched)
        return watched

    def close(self) -> None:
        """Close what errors keep open, or whoever opens the file next would find it in use with other settings."""
        self.silent = True
        for connection in self._opened:
            connection.close()

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with a point on either side."""

        def watched(*arguments: Any, **named: Any) -> Any:
            self.at(f"before {name}")
            result = call(*arguments, **named)
            self.at(f"after {name}")
            return result

        return watched


class Connection:
    """A DuckDB connection whose every statement is two points."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, points: Points) -> None:
        self._connection, self._points = connection, points

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._connection, name)
        if name not in STATEMENTS:
            return attribute

        def statement(*arguments: Any, **named: Any) -> Any:
            text = getattr(arguments[0], "query", arguments[0]) if arguments else ""
            return self._points.around(" ".join([name, *str(text).split()[:WORDS]]), attribute)(*arguments, **named)

        return {"cursor": self._cursor, "close": self._close}.get(name, statement)

    def _cursor(self) -> "Connection":
        cursor: Connection = self._points.around("cursor", lambda: self._points.opened(self._connection.cursor()))()
        return cursor

    def _close(self) -> None:
        """Closed whatever happens at its points: DuckDB lets go of the file even where its last writing fails."""
        try:
            self._points.at("before close")
        finally:
            self._connection.close()
        self._points.at("after close")


@contextlib.contextmanager
def watch(strike: Callable[[Point], None]) -> Iterator[Points]:
    """While it lasts, every step of every aggregator in this process is a point, and it hurries."""
    points = Points(strike)
    real_connect = database._connect
    connect = points.around("connect", lambda *where: points.opened(real_connect(*where)))
    with contextlib.closing(points), contextlib.ExitStack() as patches:
        for home, name in CALLS:
            label = f"{getattr(home, '__name__', home).rpartition('.')[2]}.{name}"
            patches.enter_context(patch.object(home, name, points.around(label, getattr(home, name))))
        for home, name, value in HURRIED:
            patches.enter_context(patch.object(home, name, value))
        patches.enter_context(patch.object(database, "_connect", connect))
        yield points


def disk_error(point: Point, number: int = errno.ENOSPC) -> Exception:
    """What a full disk, or another error, raises there: DuckDB's own from a statement, the system's from the rest."""
    words = os.strerror(number)
    if point[0].split()[1] in STATEMENTS:
        return duckdb.IOException(f"IO Error: {words} (injected {point})")
    return OSError(number, words, str(point))
