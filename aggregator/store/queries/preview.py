"""What a meter would count, before there is one: enough to see whether its filter means what was meant."""

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

import duckdb
import pyarrow as pa
from sqlglot import exp

from aggregator.store.queries.scope import CONTRIBUTION, aware, counted
from aggregator.store.queries.usage import Question
from aggregator.store.sql import MEASURES, Measured, measures, statement
from aggregator.store.stage import Parameters, fixed
from meters.aggregation import Function

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
