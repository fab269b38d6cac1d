"""After the faults: the log, the store, the answers and the sender's own books must agree, to the last event.

Nothing here asks the code under test what is right. The log is read record by record, the store's rows are read with
DuckDB, and both are compared with the numbers that the sender sent and was told to be safe.
"""

from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt

from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log
from tests.faults.soak.tally import ACKNOWLEDGED, Expected, Numbers, Tally, content, expected

READ_BYTES = 16 << 20
ROWS_A_BATCH = 1_000_000
_CALL = b'{"name":"call","external_customer_id"'
_BOOKKEEPING = ("about", "streams")  # whose writer it is; not derived from the log
_WITHOUT_NUMBERS = {
    "organizations": "SELECT id FROM organizations",
    "subjects": "SELECT kind, text, id FROM subjects JOIN organizations ON organization = organizations.number",
    "events": "SELECT events.* EXCLUDE (seq, subject, organization), kind, text, organizations.id FROM events "
    "JOIN subjects ON subject = subjects.number JOIN organizations ON events.organization = organizations.number",
    "dead_letters": "SELECT * EXCLUDE (number) FROM dead_letters",
}


class Lines(NamedTuple):
    """What a log holds: events of the sender's (repetitions among them), and lines that are none."""

    calls: int
    poison: int


def read_log(log: Log) -> tuple[Lines, list[str]]:
    """Every record of the log, and gaps between them, in words."""
    position, ends = log.starts(USAGE_EVENTS), log.ends(USAGE_EVENTS)
    calls = poison = 0
    problems = []
    while any(position[partition] < end for partition, end in ends.items()):
        for record in log.read(USAGE_EVENTS, position, bytes_max=READ_BYTES, wait_s=10.0):
            if record.offset != position[record.partition]:
                problems.append(f"I3: after {position[record.partition]} the log has {record.offset}")
            position[record.partition] = record.offset + 1
            found = record.value.count(_CALL)
            calls, poison = calls + found, poison + record.value.count(b"\n") + 1 - found
    return Lines(calls, poison), problems


def stored_numbers(connection: duckdb.DuckDBPyConnection, numbers_max: int) -> npt.NDArray[np.uint16]:
    """How often each number is stored."""
    found = np.zeros(numbers_max, np.uint16)
    sql = "SELECT substr(external_id, 6)::BIGINT AS number FROM events WHERE name = 'call'"
    batches: Any = connection.execute(sql).to_arrow_reader(ROWS_A_BATCH)
    for batch in batches:
        np.add.at(found, batch.column(0).to_numpy(), 1)
    return found


class Books(NamedTuple):
    """The sender's and the store's, compared."""

    sent: int
    acknowledged: int
    stored: int
    dead: int
    lost: int
    doubled: int
    invented: int


def compare(connection: duckdb.DuckDBPyConnection, tally: Tally, log: Log) -> tuple[Books, Numbers, list[str]]:
    """I1, I2 and I3: the books, the numbers that are stored, and what is wrong, in words."""
    times = stored_numbers(connection, len(tally.states))
    stored, states = times > 0, np.asarray(tally.states)
    (dead,) = _one(connection, "SELECT count(*) FROM dead_letters")
    books = Books(
        int(np.count_nonzero(states)), int(np.count_nonzero(states == ACKNOWLEDGED)), int(np.count_nonzero(stored)),
        dead, int(np.count_nonzero((states == ACKNOWLEDGED) & ~stored)), int(times.sum() - np.count_nonzero(stored)),
        int(np.count_nonzero(stored & (states == 0))),
    )  # fmt: skip
    problems = [f"{name} {getattr(books, name)}" for name in ("lost", "doubled", "invented") if getattr(books, name)]
    return books, np.flatnonzero(stored), problems + _against_log(connection, log, books)


def _against_log(connection: duckdb.DuckDBPyConnection, log: Log, books: Books) -> list[str]:
    lines, problems = read_log(log)
    sql = "SELECT sum(stored), sum(duplicates), sum(conflicts), sum(dead) FROM tallies"
    stored, duplicates, conflicts, dead = map(int, _one(connection, sql))
    sql = "SELECT log_partition, next_offset FROM positions WHERE stream = ?"
    positions = dict(connection.execute(sql, [USAGE_EVENTS]).fetchall())
    claims: dict[str, tuple[object, object]] = {
        "I3: the store's positions and the log's ends": (positions, log.ends(USAGE_EVENTS)),
        "I3: lines counted and lines in the log": (stored + duplicates + conflicts, lines.calls),
        "conflicts": (conflicts, 0),
        "stored events counted and stored": (stored, books.stored),
        "dead letters counted, and lines that are no events": (dead, lines.poison),
        "dead letters stored, and lines that are no events": (books.dead, lines.poison),
        "control records read and written": (
            _one(connection, "SELECT count(*) FROM control")[0], sum(log.ends(USAGE_CONTROL).values())
        ),
    }
    return problems + [f"{claim}: {one} and {other}" for claim, (one, other) in claims.items() if one != other]


def totals_differ(answered: Expected, stored: Numbers) -> list[str]:
    """I4: what the meters answered, and the exact sums over the stored events."""
    right = expected(stored)
    return [
        f"I4: the meter of {name} shows {one} instead of {other}"
        for name, one, other in zip(right._fields, answered, right, strict=True)
        if one != other
    ]


def usage_of(stored: Numbers, customer: int) -> Decimal:
    """How many events of a customer are stored."""
    return Decimal(int(np.count_nonzero(content(stored).customer == customer)))


def fingerprint(store: Path, *, one_partition: bool) -> dict[str, tuple[Any, ...]]:
    """I7: rows and hashes of every table that is derived from the log; equal for equal content in any order.

    Customers, events and dead letters are numbered as they come, and partitions come as they like: with several of
    them the numbers are left out, and customers are compared by what they are called.
    """
    queries = {} if one_partition else _WITHOUT_NUMBERS
    with duckdb.connect(str(store), read_only=True) as connection:
        tables = [row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
        sql = "SELECT count(*), bit_xor(hash(row)), sum(hash(row)::HUGEINT) FROM ({}) AS row"
        return {
            name: _one(connection, sql.format(queries.get(name, f"SELECT * FROM {name}")))
            for name in sorted(tables) if name not in _BOOKKEEPING
        }  # fmt: skip


def _one(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return row
