"""Queries for usage: a meter's quantities, previews, usage by time of arrival, and cost metrics.

``quantities`` answers ``GET /v1/meters/{id}/quantities``; ``in_windows`` and ``value_of`` measure customers' windows;
``preview`` evaluates a meter that does not exist yet; ``by_quarter`` lists a customer's usage for the ledger;
``costs`` sums ``_cost.amount`` by period. ``meters.meter`` defines the results, and tests compare these queries with
it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from typing import NamedTuple

import duckdb
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sqlglot import exp

from aggregator.store.meter_sql import MEASURES, Measured, Parameters, amount_type, fixed, measures, statement
from aggregator.store.queries.scope import (
    CONTRIBUTION,
    QUARTER_COLUMN,
    Bounds,
    Scope,
    aware,
    by_customer,
    counted,
    events_in,
    in_buckets,
    naive,
)
from meters.aggregation import Aggregation, Function, combine, exact_sum, mean
from meters.filters import EVERYTHING, Filter
from meters.ledger.statement import QUARTER, Usage
from meters.meter import Meter, Quantities, Quantity
from meters.timestamps import Interval, bucket, series

# Quantities: a meter's value in each time bucket and in total.

ROWS_AT_ONCE = 10_000  # fetched; a bucket may have as many rows as there are customers

_MEASURE: dict[Function, str] = {"count": "count", "unique": "count", "sum": "sum", "min": "min", "max": "max"}
"""Which measure is the value of a function, where one is."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted (a meter's filter and aggregation), where, and whether customer by customer first."""

    filter: Filter
    aggregation: Aggregation
    scope: Scope
    per_customer: Function | None = None


class Answer(NamedTuple):
    """The value of each bucket that has events, by the bucket's start, and the total over all of them."""

    values: dict[datetime, Decimal]
    total: Decimal


def quantities(
    connection: duckdb.DuckDBPyConnection,
    question: Question,
    *,
    start: datetime,
    end: datetime,
    interval: Interval,
    timezone: str,
) -> Quantities:
    """The series from ``start`` to ``end`` with its total, as ``meters.meter`` defines them."""
    points, bounds = spans(start, end, interval, timezone)
    return _shown(points, bounds, by_bucket(connection, question, bounds))


def spans(start: datetime, end: datetime, interval: Interval, timezone: str) -> tuple[list[datetime], list[Bounds]]:
    """The points of a series, and the bucket that each stands for."""
    points = series(start, end, interval, timezone)
    return points, [bucket(point, interval, timezone) for point in points]


def from_parts(
    aggregation: Aggregation, points: Sequence[datetime], bounds: Sequence[Bounds], parts: Sequence[Measured]
) -> Quantities:
    """The same series from the measures of each bucket, which somebody else has."""
    held = {starts: part for (starts, _), part in zip(bounds, parts, strict=True) if part.count}
    values = {starts: part.value(aggregation) for starts, part in held.items()}
    return _shown(points, bounds, Answer(values, _total(aggregation, values, list(held.values()), 0)))


def _shown(points: Sequence[datetime], bounds: Sequence[Bounds], answer: Answer) -> Quantities:
    shown = [
        Quantity(point, answer.values.get(starts, Decimal(0)))
        for point, (starts, _) in zip(points, bounds, strict=True)
    ]
    return Quantities(shown, answer.total)


def by_bucket(connection: duckdb.DuckDBPyConnection, question: Question, bounds: Sequence[Bounds]) -> Answer:
    """The meter's value in each of the half-open buckets, which begin and end on quarter hours."""
    buckets = sorted(set(bounds))
    if not buckets:
        return Answer({}, Decimal(0))
    question = msgspec.structs.replace(question, scope=_within(question.scope, buckets))
    if question.per_customer is not None:
        values = _by_customer(connection, question, buckets, question.per_customer)
        if values is not None:
            return Answer(values, _customers_total(connection, question, buckets, values))
    return _by_row(connection, question, buckets)


def _within(scope: Scope, buckets: Sequence[Bounds]) -> Scope:
    """The scope as far as the buckets reach, which follow one another; its own range cuts the first and the last."""
    since, until = buckets[0][0], buckets[-1][1]
    return msgspec.structs.replace(
        scope, since=max(scope.since or since, since), until=min(scope.until or until, until)
    )


def _by_row(connection: duckdb.DuckDBPyConnection, question: Question, buckets: Sequence[Bounds]) -> Answer:
    """Values from rows by bucket, or by bucket and customer, put together in Python."""
    parts: dict[datetime, Measured] = {}
    values: dict[datetime, Decimal] = {}
    distinct = 0
    for starts, group in groupby(_rows(connection, question, buckets), key=lambda row: row.starts):
        if starts is None:
            distinct = next(iter(group)).measured.count
            continue
        found = [row.measured for row in group]
        values[aware(starts)] = _bucket_value(question, found)
        parts[aware(starts)] = _together(found)
    return Answer(values, _total(question.aggregation, values, list(parts.values()), distinct))


class _Row(NamedTuple):
    """The measures of one bucket, or of one customer in it; ``starts`` is None for all of them together."""

    starts: datetime | None
    measured: Measured


def _rows(connection: duckdb.DuckDBPyConnection, question: Question, buckets: Sequence[Bounds]) -> Iterable[_Row]:
    parameters = Parameters()
    query = _measured(question, buckets, parameters)
    query = query.group_by(*_groups(question), copy=False).order_by(exp.column("starts"), copy=False)
    cursor = connection.execute(*statement(query, parameters))
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        for starts, *found in rows:
            yield _Row(starts, Measured(*found))


def _measured(question: Question, buckets: Sequence[Bounds], parameters: Parameters) -> exp.Select:
    """SELECT starts, measures of the events in each bucket; the caller groups."""
    events = counted(
        question.scope, question.filter, question.aggregation, parameters, keep=("quarter", "subject"),
        computed=(QUARTER_COLUMN,),
    )  # fmt: skip
    if question.per_customer is not None:
        events = by_customer(events, question.scope, parameters, "quarter", CONTRIBUTION.name)
    return in_buckets(events, buckets, measures(question.aggregation, CONTRIBUTION), parameters)


def _by_customer(
    connection: duckdb.DuckDBPyConnection, question: Question, buckets: Sequence[Bounds], function: Function
) -> dict[datetime, Decimal] | None:
    """Values of a function over customers, without a row per customer leaving DuckDB.

    None where DuckDB cannot tell exactly: for the mean of each customer, and if there is an enormous amount.
    """
    measure = _MEASURE.get(question.aggregation.func)
    if measure is None:
        return None
    parameters = Parameters()
    customers = _measured(question, buckets, parameters).group_by("starts", "subject", copy=False)
    outer = Aggregation(function, "")
    contribution = exp.Cast(this=exp.column(measure, quoted=True), to=amount_type())
    query = exp.select(
        exp.column("starts"), fixed("BOOL_OR(enormous IS NOT NULL)"), *measures(outer, contribution), copy=False
    )
    query = query.from_(customers.subquery("customers", copy=False), copy=False).group_by("starts", copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    if any(is_enormous for _, is_enormous, *_ in rows):
        return None
    return {aware(starts): Measured(*found).value(outer) for starts, _, *found in rows}


def _customers_total(
    connection: duckdb.DuckDBPyConnection,
    question: Question,
    buckets: Sequence[Bounds],
    values: dict[datetime, Decimal],
) -> Decimal:
    """Totals of distinct values do not know customers; all others are made from the values."""
    if question.aggregation.func != "unique":
        return _total(question.aggregation, values, [], 0)
    return _by_row(connection, msgspec.structs.replace(question, per_customer=None), buckets).total


def _groups(question: Question) -> list[exp.Expr]:
    """Distinct values cannot be added, so their total is a group of its own."""
    names = ["starts"] if question.per_customer is None else ["starts", "subject"]
    columns: list[exp.Expr] = [exp.column(name) for name in names]
    if question.aggregation.func != "unique":
        return columns
    return [exp.GroupingSets(expressions=[exp.Tuple(expressions=columns), exp.Tuple(expressions=[])])]


def _bucket_value(question: Question, found: list[Measured]) -> Decimal:
    values = [measured.value(question.aggregation) for measured in found]
    return values[0] if question.per_customer is None else combine(question.per_customer, values)


def _together(parts: Sequence[Measured]) -> Measured:
    """Count and sum of disjoint parts as one."""
    return Measured(sum(part.count for part in parts), enormous=[exact_sum(part.total for part in parts)])


def _total(
    aggregation: Aggregation, values: dict[datetime, Decimal], parts: Sequence[Measured], distinct: int
) -> Decimal:
    match aggregation.func:
        case "unique":
            return Decimal(distinct)
        case "avg":
            whole = _together(parts)
            return mean(whole.total, whole.count)
        case "min" | "max":
            return combine(aggregation.func, list(values.values()))
        case _:
            return exact_sum(values.values())


class Windows(NamedTuple):
    """Columns: the numbers of customers, whom each stands for, and since when what arrived is counted, in us."""

    subjects: npt.NDArray[np.int64]
    whose: npt.NDArray[np.int64]
    since: npt.NDArray[np.int64]


def in_windows(
    connection: duckdb.DuckDBPyConnection, question: Question, windows: Windows
) -> Iterator[tuple[int, Measured]]:
    """The meter's measures of everyone, each over what arrived in a window of their own, under all their numbers."""
    parameters, keep = Parameters(), ("subject", "ingested_at")
    events = counted(question.scope, question.filter, question.aggregation, parameters, keep=keep)
    query = exp.select("whose", *measures(question.aggregation, CONTRIBUTION), copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    query = query.join(exp.to_table("windows"), using="subject", copy=False)
    query = query.where(fixed("ingested_at >= since"), copy=False).group_by("whose", copy=False)
    since = pa.array(windows.since, pa.timestamp("us"))
    connection.register("windows", pa.table({"subject": windows.subjects, "whose": windows.whose, "since": since}))
    try:
        rows = connection.execute(*statement(query, parameters)).fetchall()
    finally:
        connection.unregister("windows")
    for whose, *found in rows:
        yield whose, Measured(*found)


def value_of(connection: duckdb.DuckDBPyConnection, question: Question) -> Measured:
    """The meter's measures over the whole scope, customers and time together."""
    parameters = Parameters()
    events = counted(question.scope, question.filter, question.aggregation, parameters, keep=("subject",))
    query = exp.select(*measures(question.aggregation, CONTRIBUTION), copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    (row,) = connection.execute(*statement(query, parameters)).fetchall()
    return Measured(*row)


# Previews: what a meter would count, before it is created, so that a user can check its filter.

_ABOUT = (
    "COUNT(*) AS events",
    "COUNT(DISTINCT whose) AS customers",
    "MIN(timestamp) AS first",
    "MAX(timestamp) AS last",
)
_USED: dict[Function, str] = {  # others: the count
    "sum": "SUM(CAST(contribution AS DOUBLE))",
    "avg": "AVG(CAST(contribution AS DOUBLE))",
    "min": "MIN(contribution)",
    "max": "MAX(contribution)",
}
"""Whose usage is the largest. Doubles are near enough to find the few; what is shown of those is exact."""


_SAME = pa.schema([("subject", pa.int32()), ("other", pa.int32())])


class CustomerUsage(NamedTuple):
    """What one customer used; ``kind`` says by which of its names (``who``) it was named."""

    kind: str
    who: str
    measured: Measured


class Preview(NamedTuple):
    """Everything together, and the customers whose own value is the largest, largest first."""

    whole: Measured
    events: int
    customers_count: int
    first_seen: datetime | None
    last_seen: datetime | None
    customers: list[CustomerUsage]


def preview(
    connection: duckdb.DuckDBPyConnection, question: Question, customers_max: int, same: Mapping[int, int]
) -> Preview:
    """Evaluate the meter over its whole scope, once for everyone and once by customer.

    ``same`` are customer numbers that stand for somebody who has another one: those to that one.
    """
    parameters = Parameters()
    about = exp.select(*measures(question.aggregation, CONTRIBUTION), *map(fixed, _ABOUT))
    query = about.from_(_events(question, parameters).subquery("events"))
    columns = {"subject": list(same), "other": list(same.values())}
    connection.register("same", pa.table(columns, schema=_SAME))
    try:
        ((*found, events, customers, first, last),) = connection.execute(*statement(query, parameters)).fetchall()
        top = _top(connection, question, customers_max)
    finally:
        connection.unregister("same")
    return Preview(Measured(*found), events, customers, first and aware(first), last and aware(last), top)


def _top(connection: duckdb.DuckDBPyConnection, question: Question, customers_max: int) -> list[CustomerUsage]:
    parameters = Parameters()
    aggregation = question.aggregation
    largest = fixed(_USED.get(aggregation.func, '"count"'))
    used = exp.select("whose", *measures(aggregation, CONTRIBUTION))
    used = used.from_(_events(question, parameters).subquery("events")).group_by("whose")
    used = used.order_by(exp.Ordered(this=largest, desc=True, nulls_first=False), "whose")
    used = used.limit(parameters.add(customers_max))
    columns = [exp.column(name, "used", quoted=True) for name in MEASURES]
    query = exp.select("kind", "text", *columns).from_(used.subquery("used"))
    query = query.join("subjects", on="subjects.number = used.whose").order_by("whose")
    rows = connection.execute(*statement(query, parameters)).fetchall()
    customers = [CustomerUsage(kind, who, Measured(*found)) for kind, who, *found in rows]
    return sorted(customers, key=lambda one: (one.measured.count > 0, one.measured.value(aggregation)), reverse=True)


def _events(question: Question, parameters: Parameters) -> exp.Select:
    """What is counted, each with the one number of ``whose`` it is."""
    keep = ("subject", "timestamp")
    events = counted(question.scope, question.filter, question.aggregation, parameters, keep=keep)
    found = exp.select("contribution", "timestamp", fixed("COALESCE(other, subject) AS whose"))
    return found.from_(events.subquery("counted")).join(exp.to_table("same"), using="subject", join_type="left")


# Usage by the quarter hour in which it arrived: the usage entries of a ledger.

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


# Cost metrics. Periods are calendar units of a time zone, but values are cut to the requested range. Amounts are in
# cents.

COST = Aggregation("sum", "_cost.amount")


class Period(msgspec.Struct, frozen=True):
    """One period: what its events cost, and how many customers they name."""

    costs: Decimal
    customers: int


class Costs(msgspec.Struct, frozen=True):
    """Costs by period, before the first one, and the customers of all periods together."""

    before: Decimal
    periods: list[Period]
    customers: int


def costs(connection: duckdb.DuckDBPyConnection, scope: Scope, periods: Sequence[Bounds]) -> Costs:
    """The costs of each period, which follow one another and begin on quarter hours.

    The scope's own range cuts the first and the last period.
    """
    if not periods:
        return Costs(Decimal(0), [], 0)
    begins = _within(scope, periods).since
    spent = by_bucket(connection, Question(filter=EVERYTHING, aggregation=COST, scope=scope), periods)
    active = _customers(connection, scope, periods)
    history = msgspec.structs.replace(scope, since=None, until=begins)
    before = value_of(connection, Question(filter=EVERYTHING, aggregation=COST, scope=history))
    shown = [Period(spent.values.get(starts, Decimal(0)), active.get(starts, 0)) for starts, _ in periods]
    return Costs(before.total, shown, active[None])


def _customers(
    connection: duckdb.DuckDBPyConnection, scope: Scope, periods: Sequence[Bounds]
) -> dict[datetime | None, int]:
    """Distinct customers by the period's start, and under None of all periods."""
    parameters = Parameters()
    events = events_in(_within(scope, periods), parameters, "subject", QUARTER_COLUMN)
    events = by_customer(events, scope, parameters, "quarter")
    query = in_buckets(events, periods, [fixed("COUNT(DISTINCT subject)")], parameters)
    query = query.group_by("GROUPING SETS ((starts), ())", copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    return {starts and aware(starts): count for starts, count in rows}
