"""What a customer used of a meter, by the quarter hour in which it arrived: the lines of a statement."""

from collections.abc import Sequence
from datetime import datetime

import duckdb
from sqlglot import exp

from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted, naive
from aggregator.store.sql import Measured, measures, statement
from aggregator.store.stage import Parameters, fixed
from meters.meter import Meter
from meters.statement import QUARTER, Usage

_COMPUTED = (
    "TIME_BUCKET(INTERVAL '15 minutes', ingested_at) AS quarter",
    "LEN(LIST_FILTER(CAST($cuts AS TIMESTAMP[]), LAMBDA cut: cut <= ingested_at)) AS cut_number",
)
_KEPT = ("seq", "ingested_at", "quarter", "cut_number")
_IS_FIRST = """contribution IS NOT NULL
    AND ROW_NUMBER() OVER (PARTITION BY cut_number, contribution ORDER BY ingested_at, seq) = 1 AS is_first"""


def by_quarter(
    connection: duckdb.DuckDBPyConnection, meter: Meter, scope: Scope, cuts: Sequence[datetime]
) -> list[Usage]:
    """Usage in the order of its arrival, split where a window begins (``cuts``, ascending)."""
    parameters = Parameters()
    parameters.named("cuts", [naive(cut) for cut in cuts])
    events = counted(scope, meter.filter, meter.aggregation, parameters, keep=_KEPT, computed=_COMPUTED)
    columns = [exp.column(name) for name in (*_KEPT, CONTRIBUTION.name)]
    first = fixed(_IS_FIRST if meter.aggregation.func == "unique" else "FALSE AS is_first")
    marked = exp.select(*columns, first, copy=False).from_(events.subquery("events", copy=False), copy=False)
    query = exp.select(
        exp.column("cut_number"), exp.column("quarter"), fixed("MAX(ingested_at) AS last_at"),
        fixed("COUNT(*) AS events"), fixed("COUNT(*) FILTER (WHERE is_first) AS new_values"),
        *measures(meter.aggregation, CONTRIBUTION), copy=False,
    ).from_(marked.subquery("marked", copy=False), copy=False)  # fmt: skip
    query = query.group_by("cut_number", "quarter", copy=False).order_by("cut_number", "quarter", copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    return [
        _usage(cuts, cut_number, aware(quarter), aware(last_at), count, distinct, Measured(*found))
        for cut_number, quarter, last_at, count, distinct, *found in rows
    ]


def _usage(
    cuts: Sequence[datetime], cut_number: int, quarter: datetime, last_at: datetime, count: int, distinct: int,
    found: Measured,
) -> Usage:  # fmt: skip
    """``cut_number`` windows began before it."""
    starts = max([quarter, *cuts[cut_number - 1 : cut_number]] if cut_number else [quarter])
    ends = min([quarter + QUARTER, *cuts[cut_number : cut_number + 1]])
    return Usage(
        arrived_from=starts, arrived_until=ends, last_at=last_at, count=count, sum=found.total, min=found.min,
        max=found.max, distinct=distinct,
    )  # fmt: skip
