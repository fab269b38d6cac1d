"""A meter counted again from the raw events, customer by customer or hour by hour.

The plainest way there is: every event of the organization, filtered and grouped in one statement. Nothing that is kept
beside the events takes part, so what is kept can be compared with it.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import duckdb
from sqlglot import exp

from aggregator.store.queries.scope import CONTRIBUTION, Scope, counted
from aggregator.store.sql import Measured, measures, statement
from aggregator.store.stage import Parameters, fixed
from meters.meter import Meter

ROWS_AT_ONCE = 10_000
HOUR = "DATE_TRUNC('hour', timestamp) AS hour"


def by_customer(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int
) -> Iterator[tuple[int, Measured]]:
    """(customer number, measures) in the order of the numbers; only customers with events that the meter counts."""
    for subject, *found in _rows(connection, meter, Scope(organization=organization), "subject"):
        yield int(subject), Measured(*found)


def by_hour(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int, subject: int
) -> list[tuple[datetime, Measured]]:
    """(hour in UTC, without saying so; measures) of one customer, in order."""
    scope = Scope(organization=organization, subjects=[subject])
    return [(hour, Measured(*found)) for hour, *found in _rows(connection, meter, scope, "hour")]


def _rows(
    connection: duckdb.DuckDBPyConnection, meter: Meter, scope: Scope, group: str
) -> Iterator[tuple[Any, ...]]:
    parameters = Parameters()
    computed = (HOUR,) if group == "hour" else ()
    events = counted(scope, meter.filter, meter.aggregation, parameters, keep=(group,), computed=computed)
    query = exp.select(fixed(group), *measures(meter.aggregation, CONTRIBUTION), copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    query = query.group_by(exp.column(group), copy=False).order_by(exp.column(group), copy=False)
    cursor = connection.execute(*statement(query, parameters))
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        yield from rows
