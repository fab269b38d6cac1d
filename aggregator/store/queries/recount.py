"""Meters counted again from the raw events, with nothing that is kept beside them.

All meters of an organization are counted in one pass, in two ways at once: by blocks of customers and by hours. What
agrees in a block agrees for everyone in it, so customers are told apart only inside of a block that does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import duckdb
import msgspec
from sqlglot import exp

from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted, events_in
from aggregator.store.sql import Measured, condition, considered, measures, statement, value
from aggregator.store.stage import Parameters, Stage, fixed
from meters.meter import Meter

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
