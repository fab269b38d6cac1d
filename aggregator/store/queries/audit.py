"""Queries for reconciliation: fingerprints of the store's rows, and recounts of meters from raw events.

``put`` runs one of ``QUESTIONS``, a closed list of named statements. ``everything``, ``by_customer``, ``by_hour`` and
``part`` recount meters without using any derived totals. ``aggregator.reconcile`` asks them of a stopped server's
file, and ``aggregator.api.audit`` answers them for a running server.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import duckdb
import msgspec
import pyarrow as pa
from sqlglot import exp

from aggregator.store.meter_sql import (
    Measured,
    Parameters,
    Stage,
    condition,
    considered,
    fixed,
    measures,
    statement,
    value,
)
from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted, events_in
from meters.meter import Meter
from meters.timestamps import KEPT_FROM

# Named statements.
#
# A question names log positions, so answers from different moments agree: a stored row never changes. A fingerprint
# is DuckDB's hash over everything that the store keeps of an event; ``aggregator.reconcile.lines`` computes the same
# hash from a log line. A place within a partition is one number: the offset, shifted left by 24 bits, plus the line.

SLICES = 16
"""Identities are looked at in so many parts, by their first four bits: a part of 100 million fits into memory."""

SEQ_BLOCK = 65_536
"""Sequence numbers whose sum is compared at once."""

_PRINT = """hash(
    e.id_hi, e.id_lo, e.content, o.id, s.kind, s.text, e.name, e.timestamp, e.ingested_at, e.external_id, e.parent,
    e.member_id, e.external_member_id, CAST(json(e.metadata) AS VARCHAR), e.awkward, e.source)"""
"""Of a row ``e``, its organization ``o`` and its subject ``s``. Metadata is written as DuckDB's JSON writes it."""

QUESTIONS: Mapping[str, str] = {
    "tallies": """
        SELECT t.*, p.next_offset FROM tallies t JOIN positions p USING (log_partition)
        WHERE p.stream = 'usage.events' ORDER BY 1""",
    "decided": "SELECT coalesce(max(next_offset), 0) AS next_offset FROM positions WHERE stream = 'usage.control'",
    "control": "SELECT log_offset, value FROM control ORDER BY log_offset",
    "customers": "SELECT coalesce(max(number) + 1, 0) AS customers FROM subjects",
    "subject": "SELECT kind, text FROM subjects WHERE number = $number",
    # what the log is compared with
    "rows": """
        SELECT e.log_offset << 24 | e.line AS key, PRINT AS print, epoch_us(e.ingested_at) AS ingested_us
        FROM events e
        LEFT JOIN organizations o ON o.number = e.organization
        LEFT JOIN subjects s ON s.number = e.subject
        WHERE e.log_partition = $partition AND e.log_offset >= $since AND e.log_offset < $until
        ORDER BY 1""".replace("PRINT", _PRINT),
    "dead": """
        SELECT log_offset << 24 | line AS key, reason, raw, rests FROM dead_letters LEFT JOIN (
            SELECT log_partition, log_offset, line, list(raw ORDER BY part) AS rests FROM dead_rests
            WHERE log_partition = $partition AND log_offset >= $since AND log_offset < $until GROUP BY ALL
        ) USING (log_partition, log_offset, line)
        WHERE log_partition = $partition AND log_offset >= $since AND log_offset < $until ORDER BY 1""",
    "at": """
        SELECT e.*, e.log_offset << 24 | e.line AS key, o.id AS organization_id, s.kind, s.text AS who
        FROM events e JOIN asked ON e.log_partition = asked.partition
            AND e.log_offset << 24 | e.line = asked.key
        LEFT JOIN organizations o ON o.number = e.organization LEFT JOIN subjects s ON s.number = e.subject
        WHERE e.log_offset BETWEEN (SELECT min(key) >> 24 FROM asked)
            AND (SELECT max(key) >> 24 FROM asked)
        ORDER BY key, seq""",
    "known": """
        WITH found AS MATERIALIZED (
            SELECT e.id_hi, e.id_lo, e.content, e.log_partition AS partition, e.log_offset << 24 | e.line AS key
            FROM events e SEMI JOIN asked ON e.id_hi = asked.id_hi AND e.id_lo = asked.id_lo)
        SELECT asked.number, found.content, found.partition, found.key
        FROM asked JOIN found ON found.id_hi = asked.id_hi AND found.id_lo = asked.id_lo""",
    # the store against itself
    "bookkeeping": """
        SELECT partition, any_value(next_offset) AS next_offset, any_value(stored) AS stored,
            any_value(conflicts) AS conflicts, any_value(dead) AS dead, coalesce(sum(stored_rows), 0) AS stored_rows,
            coalesce(sum(conflicts_rows), 0) AS conflicts_rows, coalesce(sum(dead_rows), 0) AS dead_rows,
            coalesce(max(ends), 0) AS ends
        FROM (
            SELECT log_partition AS partition, stored, conflicts, dead FROM tallies
            UNION ALL BY NAME
            SELECT log_partition AS partition, next_offset FROM positions WHERE stream = 'usage.events'
            UNION ALL BY NAME
            SELECT log_partition AS partition, count(*) AS stored_rows, max(log_offset) + 1 AS ends
            FROM events GROUP BY log_partition
            UNION ALL BY NAME
            SELECT log_partition AS partition, count(*) FILTER (WHERE reason = 'conflict') AS conflicts_rows,
                count(*) FILTER (WHERE reason <> 'conflict') AS dead_rows, max(log_offset) + 1 AS ends
            FROM dead_letters GROUP BY log_partition
        ) GROUP BY partition ORDER BY partition""",
    "hours": f"""
        SELECT DISTINCT date_trunc('hour', timestamp) AS hour FROM events
        WHERE timestamp >= TIMESTAMP '{KEPT_FROM:%Y-%m-%d}' ORDER BY hour""",  # noqa: S608 - our date
    "stored": "SELECT count(*) AS stored FROM events",
    "repeated_identities": """
        SELECT id_hi, id_lo, count(*) AS times FROM events WHERE id_hi >> 60 = $slice
        GROUP BY ALL HAVING count(*) > 1 ORDER BY ALL LIMIT $most""",
    "seq_blocks": """
        SELECT seq // 65536 AS block, count(*) AS rows, min(seq) AS first, max(seq) AS last,
            sum(seq - seq // 65536 * 65536) AS sum FROM events GROUP BY block ORDER BY block""",
    "dead_numbers": "SELECT count(*) AS rows, min(number) AS first, max(number) AS last FROM dead_letters",
    "control_numbers": "SELECT count(*) AS rows, min(log_offset) AS first, max(log_offset) AS last FROM control",
    "strays": """
        SELECT count(*) FILTER (WHERE o.number IS NULL) AS organizations,
            count(*) FILTER (WHERE s.number IS NULL OR s.organization <> e.organization) AS subjects
        FROM events e LEFT JOIN organizations o ON o.number = e.organization
        LEFT JOIN subjects s ON s.number = e.subject""",
    "kin": """
        WITH named AS (
            SELECT e.id_hi, e.id_lo, e.parent, h.parent_hi, h.parent_lo, h.root_hi, h.root_lo, h.depth,
                p.id_hi IS NOT NULL AS waits
            FROM events e LEFT JOIN hierarchy h ON h.id_hi = e.id_hi AND h.id_lo = e.id_lo
            LEFT JOIN (SELECT DISTINCT id_hi, id_lo FROM pending) p ON p.id_hi = e.id_hi AND p.id_lo = e.id_lo
            WHERE e.parent IS NOT NULL
        ), placed AS (
            SELECT n.*, above.id_hi IS NOT NULL AND (above.external_id = n.parent
                    OR format('{:016x}{:016x}', above.id_hi, above.id_lo) = replace(lower(n.parent), '-', ''))
                AND n.root_hi = coalesce(up.root_hi, above.id_hi) AND n.root_lo = coalesce(up.root_lo, above.id_lo)
                AND n.depth = coalesce(up.depth, 0) + 1 AS is_right
            FROM named n LEFT JOIN events above ON above.id_hi = n.parent_hi AND above.id_lo = n.parent_lo
            LEFT JOIN hierarchy up ON up.id_hi = n.parent_hi AND up.id_lo = n.parent_lo
        )
        SELECT id_hi, id_lo, CASE WHEN depth IS NULL THEN 'lost' ELSE 'wrong' END AS what FROM placed
        WHERE CASE WHEN depth IS NULL THEN NOT waits ELSE waits OR NOT is_right END
        UNION ALL
        SELECT h.id_hi, h.id_lo, 'strange' FROM hierarchy h
        ANTI JOIN (SELECT * FROM events WHERE parent IS NOT NULL) e ON e.id_hi = h.id_hi AND e.id_lo = h.id_lo
        ORDER BY ALL LIMIT $most""",
    "numbers": """
        SELECT 'organizations' AS name, count(*) AS rows, count(DISTINCT number) AS numbers, count(DISTINCT id) AS texts
        FROM organizations
        UNION ALL
        SELECT 'subjects', count(*), count(DISTINCT number), count(DISTINCT (organization, kind, text))
        FROM subjects""",
}
"""By name. Parameters stand for numbers; ``asked`` is a table that comes with the question.

65536 is SEQ_BLOCK.
"""


def put(
    connection: duckdb.DuckDBPyConnection, question: str, asked: pa.Table | None, parameters: Mapping[str, int]
) -> pa.Table:
    """Put one of ``QUESTIONS`` to a connection. Raises KeyError for any other."""
    statement = QUESTIONS[question]
    if asked is None:
        return connection.sql(statement, params=dict(parameters)).to_arrow_table()
    connection.register("asked", asked)
    try:
        return connection.sql(statement, params=dict(parameters)).to_arrow_table()
    finally:
        connection.unregister("asked")


# Recounts.
#
# All meters of an organization are counted in one pass, in two ways at once: by blocks of customers and by hours.
# When a block agrees, all of its customers agree, so single customers are read only inside a block that differs.

BLOCK = 1_000
"""Customers, by their numbers, that are compared at once."""

_HOUR = "DATE_TRUNC('hour', timestamp) AS hour"
_BLOCK = "subject // 1000 AS block"
_BEFORE = "log_offset < list_extract($offsets, list_position($partitions, log_partition))"


class Which(msgspec.Struct, frozen=True):
    """One customer's number, or the beginning of one hour."""

    subject: int | None = None
    hour: datetime | None = None


class Part(NamedTuple):
    """A block of customers or an hour of everybody, whichever is not None, and each meter's measures of it."""

    block: int | None
    hour: datetime | None
    measured: list[Measured]


def everything(
    connection: duckdb.DuckDBPyConnection, meters: Sequence[Meter], organization: int,
    until: Mapping[int, int] | None = None,
) -> Iterator[Part]:  # fmt: skip
    """Every block of customers and every hour, in one pass over the organization's events.

    ``until`` are the positions of the log where to stop, by partition; None takes whatever is there.
    """
    stage, parameters = Stage(), Parameters()
    columns: list[exp.Expr] = []
    found: list[exp.Expr] = []
    for place, meter in enumerate(meters):
        holds = exp.and_(condition(meter.filter, stage, parameters), considered(meter.aggregation, stage))
        contribution = exp.case().when(holds, value(meter.aggregation, stage))  # else NULL, which adds nothing
        columns.append(exp.alias_(contribution, f"x{place}"))
        found += measures(meter.aggregation, exp.column(f"x{place}"))
    source = events_in(Scope(organization=organization), parameters, "*", _HOUR, _BLOCK)
    if until is not None:
        parameters.named("partitions", list(until))
        parameters.named("offsets", list(until.values()))
        source = source.where(fixed(_BEFORE), copy=False)
    staged = stage.select(source.subquery("source", copy=False), ("block", "hour"), parameters)
    inner = exp.select("block", "hour", *columns, copy=False).from_(staged.subquery("stage", copy=False), copy=False)
    query = exp.select("block", "hour", *found, copy=False).from_(inner.subquery("counted", copy=False), copy=False)
    sets = [exp.Tuple(expressions=[exp.column(name)]) for name in ("block", "hour")]
    query = query.group_by(exp.GroupingSets(expressions=sets), copy=False)
    for block, hour, *rest in connection.execute(*statement(query, parameters)).fetchall():
        width = len(rest) // len(meters)
        parts = [rest[start : start + width] for start in range(0, len(rest), width)]
        yield Part(block, None if hour is None else aware(hour), [Measured(*part) for part in parts])


def by_customer(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int, block: int
) -> list[tuple[int, Measured]]:
    """(customer number, measures) of a block; only customers with events that the meter counts."""
    scope = Scope(organization=organization, subjects=list(range(block * BLOCK, (block + 1) * BLOCK)))
    return [(int(subject), Measured(*found)) for subject, *found in _rows(connection, meter, scope, "subject")]


def by_hour(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int, subject: int
) -> list[tuple[datetime, Measured]]:
    """(beginning of the hour in UTC, measures) of one customer, in order."""
    scope = Scope(organization=organization, subjects=[subject])
    return [(aware(hour), Measured(*found)) for hour, *found in _rows(connection, meter, scope, "hour")]


def part(connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int, which: Which) -> Measured:
    """One customer, or one hour of everybody."""
    scope = Scope(organization=organization, subjects=None if which.subject is None else [which.subject])
    if which.hour is not None:
        scope = msgspec.structs.replace(scope, since=which.hour, until=which.hour + timedelta(hours=1))
    for _, *found in _rows(connection, meter, scope, "subject" if which.subject is not None else "hour"):
        return Measured(*found)
    return Measured(0)


def _rows(connection: duckdb.DuckDBPyConnection, meter: Meter, scope: Scope, group: str) -> list[tuple[Any, ...]]:
    parameters = Parameters()
    computed = (_HOUR,) if group == "hour" else ()
    events = counted(scope, meter.filter, meter.aggregation, parameters, keep=(group,), computed=computed)
    query = exp.select(fixed(group), *measures(meter.aggregation, CONTRIBUTION), copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    query = query.group_by(exp.column(group), copy=False).order_by(exp.column(group), copy=False)
    return connection.execute(*statement(query, parameters)).fetchall()
