"""A meter counted again from the raw events: by customer, by hour, or one customer or hour alone.

The plainest way there is: the organization's events, filtered and grouped in one statement. Nothing that is kept beside
the events takes part, so what is kept can be compared with it.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import duckdb
import msgspec
from sqlglot import exp

from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted
from aggregator.store.sql import Measured, measures, statement
from aggregator.store.stage import Parameters, fixed
from meters.meter import Meter

ROWS_AT_ONCE = 10_000
_HOUR = "DATE_TRUNC('hour', timestamp) AS hour"


def by_customer(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int
) -> Iterator[tuple[int, Measured]]:
    """(customer number, measures) in the order of the numbers; only customers with events that the meter counts."""
    for subject, *found in _rows(connection, meter, Scope(organization=organization), "subject"):
        yield int(subject), Measured(*found)


def by_hour(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int, subject: int | None = None
) -> Iterator[tuple[datetime, Measured]]:
    """(beginning of the hour in UTC, measures) in order, of everybody or one customer."""
    scope = Scope(organization=organization, subjects=None if subject is None else [subject])
    for hour, *found in _rows(connection, meter, scope, "hour"):
        yield aware(hour), Measured(*found)


def part(
    connection: duckdb.DuckDBPyConnection, meter: Meter, organization: int, which: "Which"
) -> Measured:
    """One customer, or one hour of everybody."""
    scope = Scope(organization=organization, subjects=None if which.subject is None else [which.subject])
    if which.hour is not None:
        scope = msgspec.structs.replace(scope, since=which.hour, until=which.hour + timedelta(hours=1))
    group = "subject" if which.subject is not None else "hour"
    for _, *found in _rows(connection, meter, scope, group):
        return Measured(*found)
    return Measured(0)


class Which(msgspec.Struct, frozen=True):
    """One customer's number, or the beginning of one hour."""

    subject: int | None = None
    hour: datetime | None = None


def _rows(
    connection: duckdb.DuckDBPyConnection, meter: Meter, scope: Scope, group: str
) -> Iterator[tuple[Any, ...]]:
    parameters = Parameters()
    computed = (_HOUR,) if group == "hour" else ()
    events = counted(scope, meter.filter, meter.aggregation, parameters, keep=(group,), computed=computed)
    query = exp.select(fixed(group), *measures(meter.aggregation, CONTRIBUTION), copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    query = query.group_by(exp.column(group), copy=False).order_by(exp.column(group), copy=False)
    cursor = connection.execute(*statement(query, parameters))
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        yield from rows
