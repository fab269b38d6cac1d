"""The forwarder's state file (SQLite): how far forwarding got, what waits, dead letters and replays; and its metrics.

``State.mark`` records a finished slice in one transaction: the reader's position, the outcome of each event, and the
tallies. Any number of processes may read the file; one forwards. ``ForwardingMetrics`` exposes it in ``/metrics``.

The state is not a table of the store, because the store may be deleted and rebuilt from the log, while sent events
stay sent. The store needs no outbox for the forwarder: its rows are the outbox
(``aggregator/store/queries/feed.py``).
"""

import contextlib
import json
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from aggregator.forward.planner import Item, Reached
from aggregator.forward.polar_client import BUSY_WAIT_S
from aggregator.forward.sqlite_errors import Unusable, explaining, transaction
from meters.log import (
    FeedPlace,
    format_places,
    format_witnesses,
    parse_places,
    parse_witnesses,
    witness_of,
)

# The tables.
#
#     lanes      the position of each reader of the feed (raw events, rollups, replays), and the range it has to cover
#     witnesses  of each reader's position: by them it is known that the log is still the one that was read
#     begins     where and when each lane began; earlier events are neither forwarded nor reconciled
#     waiting    events and rollups that were taken from the feed and are not sent yet
#     dead       events that Polar refuses for good, with Polar's message
#     replays    ranges of time to be sent again
#     tallies    by lane: taken = accepted + waiting + dead, at every moment
#     flags      operators' requests, and facts that are shown to them
#
# All tables but the flags belong to one server: events that the sandbox accepted must still be sent to production,
# and the sandbox later needs only what came since. So each server has its own positions, dead letters, replays and
# tallies. Those of servers that are not in use are kept in tables with the same columns plus the server.

WAITING_MAX = 100_000  # rows; nothing more is taken from the feed while so many wait
WAITING = "waiting"  # the lane of slices that are made of waiting rows
REPLAY = "replay "
TABLES = """
CREATE TABLE IF NOT EXISTS lanes (name TEXT PRIMARY KEY, position TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS witnesses (lane TEXT PRIMARY KEY, witness TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS begins (name TEXT PRIMARY KEY, position TEXT NOT NULL, began_us INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS waiting (
    number INTEGER PRIMARY KEY AUTOINCREMENT, lane TEXT, external_id TEXT, who TEXT, timestamp_us INTEGER,
    ingested_us INTEGER, due_us INTEGER, body BLOB);
CREATE INDEX IF NOT EXISTS waiting_due ON waiting (due_us);
CREATE INDEX IF NOT EXISTS waiting_who ON waiting (who, number);
CREATE TABLE IF NOT EXISTS dead (
    external_id TEXT PRIMARY KEY, lane TEXT, words TEXT, body BLOB, ingested_us INTEGER, refused_us INTEGER);
CREATE TABLE IF NOT EXISTS replays (
    number INTEGER PRIMARY KEY AUTOINCREMENT, since TEXT, until TEXT, asked_us INTEGER, ended_us INTEGER);
CREATE TABLE IF NOT EXISTS tallies (lane TEXT, name TEXT, value INTEGER, PRIMARY KEY (lane, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS flags (name TEXT PRIMARY KEY, value TEXT);
"""
BOOKS = [name for name in re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", TABLES) if name != "flags"]  # of one server
SEEN = ("taken_last", "pending", "oldest_us", "rate")  # flags that were true of the server before


class Replay(NamedTuple):
    """A range of time (of the events' own, half-open) that is being sent again; its lane is ``replay N``."""

    number: int
    since: str
    until: str

    @property
    def lane(self) -> str:
        """The name of its reader."""
        return f"{REPLAY}{self.number}"


class Begin(NamedTuple):
    """Where a lane began, and when that was decided (UTC, microseconds)."""

    position: dict[int, FeedPlace]
    began_us: int


class DeadLetter(NamedTuple):
    """An event that Polar does not take, and why."""

    external_id: str
    lane: str
    words: str
    body: bytes
    ingested_us: int
    refused_us: int


class State:
    """The file. Any number of processes may look at it; one forwards. Safe for threads."""

    def __init__(self, path: Path) -> None:
        """Raises Unusable."""
        try:
            path.touch(mode=0o600, exist_ok=True)  # the feed's token is in it
        except OSError as error:
            raise Unusable(path, error.strerror or str(error), is_damaged=False) from error
        self._path, self._lock = path, threading.RLock()
        with explaining(path), contextlib.ExitStack() as undo:
            self._file = sqlite3.connect(path, timeout=BUSY_WAIT_S, isolation_level=None, check_same_thread=False)
            undo.callback(self._file.close)
            self._file.execute("PRAGMA journal_mode = WAL").fetchone()
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.executescript(TABLES)
            undo.pop_all()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read_through(self) -> None:
        """Read all of it. Raises Unusable."""
        with explaining(self._path):
            ((found,),) = self._rows("PRAGMA quick_check(1)")
        if found != "ok":
            raise Unusable(self._path, " ".join(str(found).split()), is_damaged=True)

    def copy(self, target: Path) -> None:
        """Copy the file as it is at one moment into one that is not there. Raises Unusable, sqlite3.Error."""
        self.read_through()
        with self._lock:
            self._file.execute("VACUUM INTO ?", [str(target)])

    @contextlib.contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        with self._lock, transaction(self._file, begin):
            yield

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Everything that is read inside is of one moment."""
        return self._transaction("BEGIN")

    def _rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._file.execute(sql, values).fetchall()

    def turn_to(self, server: str) -> str | None:
        """Forward to this server from now on, with its own books; the one that is left, if it is another.

        Books that name no server yet are those of the first one.
        """
        with self._transaction():
            left: str | None = self.flags().get("server")
            if left == server:
                return None
            if left is not None:
                self._exchange(left, server)
            self._file.execute("INSERT OR REPLACE INTO flags VALUES ('server', ?)", [json.dumps(server)])
        return left

    def _exchange(self, left: str, reached: str) -> None:
        """Keep the books of the server that is left, and open those of the other, if there are any."""
        for table in BOOKS:
            found = self._rows("SELECT name FROM pragma_table_info(?)", table)
            columns, kept = ", ".join(name for (name,) in found), f"elsewhere_{table}"
            made = f"SELECT '' AS server, {columns} FROM {table} LIMIT 0"  # noqa: S608 (our tables)
            self._file.execute(f"CREATE TABLE IF NOT EXISTS {kept} AS {made}")
            self._file.execute(f"INSERT INTO {kept} SELECT ?, {columns} FROM {table}", [left])  # noqa: S608
            self._file.execute(f"DELETE FROM {table}")  # noqa: S608
            self._file.execute(f"INSERT INTO {table} SELECT {columns} FROM {kept} WHERE server = ?", [reached])  # noqa: S608
            self._file.execute(f"DELETE FROM {kept} WHERE server = ?", [reached])  # noqa: S608
        self._file.executemany("DELETE FROM flags WHERE name = ?", [(name,) for name in SEEN])

    def position(self, lane: str) -> dict[int, FeedPlace]:
        """Where the lane's reader stands; the beginning when it never read."""
        rows = self._rows("SELECT position FROM lanes WHERE name = ?", lane)
        return (parse_places(rows[0][0]) or {}) if rows else {}

    def reached(self, lane: str) -> Reached:
        """Where the lane's reader stands, and how to know that place again."""
        with self.at_once():
            return self._reached(lane)

    def _reached(self, lane: str) -> Reached:
        rows = self._rows("SELECT witness FROM witnesses WHERE lane = ?", lane)
        is_new = not self.knows(lane)
        witnesses = parse_witnesses(rows[0][0]) if rows else {} if is_new else None
        return Reached(self.position(lane), witnesses)

    def begin(self, lane: str, reached: Reached, now_us: int) -> None:
        """Where a lane that never read begins; kept, because nothing else tells it once the lane has moved on."""
        with self._transaction():
            place = format_places(reached.position)
            if self._file.execute("INSERT OR IGNORE INTO lanes VALUES (?, ?)", [lane, place]).rowcount:
                self._file.execute("INSERT OR REPLACE INTO begins VALUES (?, ?, ?)", [lane, place, now_us])
                self._recognize(lane, reached.witnesses)

    def recognize(self, lane: str, witnesses: Mapping[int, str]) -> None:
        """Keep the witnesses of the place where the lane's reader stands."""
        with self._transaction():
            self._recognize(lane, witnesses)

    def _recognize(self, lane: str, witnesses: Mapping[int, str] | None) -> None:
        if witnesses is None:
            self._file.execute("DELETE FROM witnesses WHERE lane = ?", [lane])
        else:
            self._file.execute("INSERT OR REPLACE INTO witnesses VALUES (?, ?)", [lane, format_witnesses(witnesses)])

    def begin_anew(self, begins: Mapping[str, Reached], now_us: int) -> None:
        """Forget where every reader stood, because that was in another log, and have these begin there.

        What waits to be sent and what was refused stays. A replay under way starts over.
        """
        with self._transaction():
            for table in ("lanes", "witnesses", "begins"):
                self._file.execute(f"DELETE FROM {table}")  # noqa: S608 (our tables)
            for lane, reached in begins.items():
                place = format_places(reached.position)
                self._file.execute("INSERT INTO lanes VALUES (?, ?)", [lane, place])
                self._file.execute("INSERT INTO begins VALUES (?, ?, ?)", [lane, place, now_us])
                self._recognize(lane, reached.witnesses)
            self._file.execute("DELETE FROM flags WHERE name IN ('adopt', 'stopped', 'is_elsewhere', 'waits_for')")

    def begin_of(self, lane: str) -> Begin | None:
        """Where the lane began; None for one that never did."""
        rows = self._rows("SELECT position, began_us FROM begins WHERE name = ?", lane)
        return Begin(parse_places(rows[0][0]) or {}, rows[0][1]) if rows else None

    def knows(self, lane: str) -> bool:
        """Whether the lane has a position."""
        return bool(self._rows("SELECT 1 FROM lanes WHERE name = ?", lane))

    def mark(
        self, lane: str, items: Sequence[Item], behind: Reached | None, now_us: int, **answer: int
    ) -> None:
        """These items are done: accepted, or to be parked, or condemned. The lane moves behind them, or to ``behind``.

        Items that come from the waiting ones leave them, unless they are parked again. ``answer`` is Polar's own count.
        """
        with self._transaction():
            self._take_out([item for item in items if item.number and not item.due_us])
            self._park([item for item in items if item.due_us])
            self._bury([item for item in items if item.condemned and not item.due_us], now_us)
            accepted = [item for item in items if item.is_sent]
            self._revive(accepted)
            self._add("taken", (item.lane for item in items if not item.number))
            self._add("accepted", (item.lane for item in accepted))
            for name, number in answer.items():
                self._count("", name, number)
            if lane != WAITING:
                self._move(lane, items, behind)

    def _move(self, lane: str, items: Sequence[Item], behind: Reached | None) -> None:
        position, witnesses = self._reached(lane)
        for item in items:
            position[item.partition] = (item.offset, item.line + 1)
            if witnesses is not None:
                place = item.offset, item.line
                witnesses[item.partition] = witness_of(place, item.ingested_us, item.external_id)
        if behind is not None:
            position, witnesses = position | behind.position, behind.witnesses
        self._file.execute("INSERT OR REPLACE INTO lanes VALUES (?, ?)", [lane, format_places(position)])
        self._recognize(lane, witnesses)

    def _take_out(self, items: Sequence[Item]) -> None:
        self._file.executemany("DELETE FROM waiting WHERE number = ?", [(item.number,) for item in items])

    def _park(self, items: Sequence[Item]) -> None:
        first: dict[str, tuple[int, int]] = {}  # by customer: of the events that wait again, and until when
        for item in items:
            if not item.number:
                self._wait(item, item.due_us)
                continue
            self._file.execute("UPDATE waiting SET due_us = ? WHERE number = ?", [item.due_us, item.number])
            if item.lane != "rollup":
                number, due_us = first.get(item.who, (item.number, item.due_us))
                first[item.who] = min(number, item.number), max(due_us, item.due_us)
        self._file.executemany(  # what waits behind them was parked when less was assumed, and would overtake them
            "UPDATE waiting SET due_us = MAX(due_us, ?) WHERE who = ? AND number > ? AND lane <> 'rollup'",
            [(due_us, who, number) for who, (number, due_us) in first.items()],
        )

    def hold(self, who: str, until_us: int) -> None:
        """Nothing of a customer's that waits is due before then; rollups have no order and are not held."""
        with self._transaction():
            self._file.execute(
                "UPDATE waiting SET due_us = MAX(due_us, ?) WHERE who = ? AND lane <> 'rollup'", [until_us, who]
            )

    def _wait(self, item: Item, due_us: int) -> None:
        row = [item.lane, item.external_id, item.who, item.timestamp_us, item.ingested_us, due_us, item.body]
        self._file.execute("INSERT INTO waiting VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", row)

    def _bury(self, items: Sequence[Item], now_us: int) -> None:
        """Keep what is refused for good. A replayed event that is refused again stays the dead letter that it was."""
        for item in items:
            row = [item.external_id, item.lane, item.condemned, item.body, item.ingested_us, now_us]
            self._file.execute("INSERT OR IGNORE INTO dead VALUES (?, ?, ?, ?, ?, ?)", row)
            self._count(item.lane, "dead", 1)

    def _revive(self, items: Sequence[Item]) -> None:
        """An accepted event is no dead letter any more, whichever way it came."""
        if not self._rows("SELECT 1 FROM dead LIMIT 1"):
            return
        for item in items:
            for (lane,) in self._rows("DELETE FROM dead WHERE external_id = ? RETURNING lane", item.external_id):
                if lane != item.lane:
                    self._count(lane, "dead", -1)
                    self._count(lane, "accepted", 1)

    def _add(self, name: str, lanes: Iterable[str]) -> None:
        for lane, number in Counter(lanes).items():
            self._count(lane, name, number)

    def _count(self, lane: str, name: str, value: int) -> None:
        self._file.execute(
            "INSERT INTO tallies VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
            [lane, name, value],
        )

    def roll(self, items: Sequence[Item], reached: Reached) -> None:
        """Rollups are made up to there: they wait to be sent, as they are."""
        with self._transaction():
            self._add("taken", (item.lane for item in items))
            for item in items:
                self._wait(item, item.timestamp_us)
            self._move("rollup", [], reached)

    def due(self, now_us: int, limit: int) -> list[Item]:
        """Waiting items whose time has come, in the order in which they came; a customer's only up to one not due."""
        rows = self._rows(
            """SELECT lane, external_id, who, timestamp_us, ingested_us, body, number FROM waiting
               WHERE due_us <= ? ORDER BY number LIMIT ?""", now_us, limit
        )
        return [
            Item(lane=lane, external_id=external_id, who=who, timestamp_us=timestamp_us, ingested_us=ingested_us,
                 body=body, number=number)
            for lane, external_id, who, timestamp_us, ingested_us, body, number in rows
        ]  # fmt: skip

    def waiting_customers(self) -> dict[str, int]:
        """{customer: when its last waiting event is due}, of events; rollups have no order."""
        return dict(self._rows("SELECT who, MAX(due_us) FROM waiting WHERE lane <> 'rollup' GROUP BY who"))

    def waiting_ids(self) -> frozenset[str]:
        """The external ids of events that wait."""
        return frozenset(id for (id,) in self._rows("SELECT external_id FROM waiting WHERE lane <> 'rollup'"))

    def waiting(self) -> tuple[int, int | None]:
        """How many wait, and when the oldest of them came in."""
        ((number, oldest_us),) = self._rows("SELECT COUNT(*), MIN(ingested_us) FROM waiting")
        return number, oldest_us

    def count(self, lane: str, **changes: int) -> None:
        """Add to a lane's tallies."""
        with self._transaction():
            for name, value in changes.items():
                self._count(lane, name, value)

    def tallies(self) -> dict[str, dict[str, int]]:
        """{lane: {name: value}}."""
        found: dict[str, dict[str, int]] = {}
        for lane, name, value in self._rows("SELECT lane, name, value FROM tallies"):
            found.setdefault(lane, {})[name] = value
        return found

    def dead(self, limit: int = 1_000) -> list[DeadLetter]:
        """Dead letters, the newest first."""
        sql = "SELECT * FROM dead ORDER BY refused_us DESC, external_id LIMIT ?"
        return [DeadLetter(*row) for row in self._rows(sql, limit)]

    def ask_replay(self, since: str, until: str, now_us: int) -> int:
        """Have a range of time sent again; its number."""
        with self._transaction():
            cursor = self._file.execute("INSERT INTO replays VALUES (NULL, ?, ?, ?, NULL)", [since, until, now_us])
            return int(cursor.lastrowid or 0)

    def replays(self) -> list[Replay]:
        """Those that are not finished, the oldest first."""
        return [
            Replay(*row)
            for row in self._rows("SELECT number, since, until FROM replays WHERE ended_us IS NULL ORDER BY number")
        ]

    def end_replay(self, number: int, now_us: int) -> None:
        """It has come to its end."""
        with self._transaction():
            self._file.execute("UPDATE replays SET ended_us = ? WHERE number = ?", [now_us, number])

    def flags(self) -> dict[str, Any]:
        """What operators asked for and want to see."""
        return {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM flags")}

    def complain(self, reason: str) -> None:
        """Say what keeps the forwarder from its work, if the file can be written at all."""
        with contextlib.suppress(sqlite3.Error):
            self.set(waits_for=reason)

    def set(self, **flags: object) -> None:
        """Set flags; None removes one."""
        with self._transaction():
            for name, value in flags.items():
                if value is None:
                    self._file.execute("DELETE FROM flags WHERE name = ?", [name])
                else:
                    self._file.execute("INSERT OR REPLACE INTO flags VALUES (?, ?)", [name, json.dumps(value)])


# Metrics. The forwarder listens on no port: the process that serves ``/metrics`` reads them from the forwarder's
# file. So they are available while the forwarder is down.

SILENT_US = 30_000_000  # a forwarder at work writes something every few seconds
COUNTERS = {
    "requests": "Requests to Polar",
    "inserted": "Events that Polar counted",
    "duplicates": "Events that Polar had already",
    "postponed": "Requests that have to be made again",
    "refused": "Requests whose content was refused",
}
STOPPED = "Whether somebody has to do something"

logger = structlog.get_logger("aggregator.forward")


class ForwardingMetrics:
    """A collector. It says nothing while nothing was ever forwarded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        if self._path.exists():
            yield from self._found()

    def _found(self) -> list[Metric]:
        try:
            with explaining(self._path), closing(State(self._path)) as state:
                return list(_metrics(state))
        except Unusable as reason:
            return [_gauge("stopped", STOPPED, 1)] if reason.is_damaged else []  # a locked file: another time
        except Exception:  # whatever lies in the file, it must not cost the metrics of counting
            logger.exception("forwarding_unreadable")
            return [_gauge("stopped", STOPPED, 1)]


def _oldest_unsent_s(flags: dict[str, Any], oldest_waiting_us: int | None, now_s: float) -> float:
    """The age of the oldest unsent event. While no forwarder is at work, all since its last sign of life is unsent."""
    seen_us = flags.get("seen_us", 0)
    silent_us = seen_us if now_s * 1e6 - seen_us > SILENT_US else None
    known = [us for us in (flags.get("oldest_us"), oldest_waiting_us, silent_us) if us is not None]
    return max(0.0, now_s - min(known) / 1e6) if known else 0.0


def _metrics(state: State) -> Iterator[Metric]:
    flags, tallies = state.flags(), state.tallies()
    waiting, oldest_waiting_us = state.waiting()
    for name, about in COUNTERS.items():
        yield CounterMetricFamily(f"meterstream_forward_{name}", about, value=tallies.get("", {}).get(name, 0))
    for name, about in (("accepted", "Events that Polar has"), ("dead", "Events that Polar refuses for good")):
        family = GaugeMetricFamily(f"meterstream_forward_{name}", about, labels=["lane"])
        for lane, counts in tallies.items():
            if lane and not lane.startswith("replay"):
                family.add_metric([lane], counts.get(name, 0))
        yield family
    age_s = _oldest_unsent_s(flags, oldest_waiting_us, time.time())
    gauges = {
        "pending_events": ("Events that are counted and not yet taken", flags.get("pending") or 0),
        "waiting_events": ("Events that are taken and wait: of the future, or rollups", waiting),
        "oldest_unsent_seconds": ("Age of the oldest event that Polar does not have", age_s),
        "window_seconds": ("Window of rollups, which are sent once it has ended", flags.get("window_s") or 0),
        "events_per_second": ("Events that Polar took during the last minute, per second", flags.get("rate") or 0),
        "circuit_open": ("Whether Polar failed so often that it is only probed", flags.get("circuit") != "closed"),
        "stopped": (STOPPED, bool(flags.get("stopped"))),
        "paused": ("Whether an operator paused it", bool(flags.get("paused"))),
        "seen_timestamp_seconds": ("When the forwarder was last at work", (flags.get("seen_us") or 0) / 1e6),
    }
    for name, (about, value) in gauges.items():
        yield _gauge(name, about, value)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"meterstream_forward_{name}", about, value=float(value))
