"""What a tenant's usage cost it, period by period: sums of ``_cost.amount``, and for how many customers.

Periods are calendar units of a time zone, but values are cut to the range asked for. Money is in cents.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal

import duckdb
import msgspec

from aggregator.store.queries.buckets import QUARTER, Bounds, in_buckets
from aggregator.store.queries.scope import Scope, aware, events_in
from aggregator.store.queries.usage import Question, by_bucket, value_of
from aggregator.store.sql import statement
from aggregator.store.stage import Parameters, fixed
from meters.aggregation import Aggregation
from meters.filter import EVERYTHING

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
    """The costs of each period, which follow one another and begin on quarter hours."""
    if not periods:
        return Costs(Decimal(0), [], 0)
    spent = by_bucket(connection, Question(filter=EVERYTHING, aggregation=COST, scope=scope), periods)
    active = _customers(connection, scope, periods)
    history = msgspec.structs.replace(scope, until=periods[0][0])
    before = value_of(connection, Question(filter=EVERYTHING, aggregation=COST, scope=history))
    shown = [Period(spent.values.get(starts, Decimal(0)), active.get(starts, 0)) for starts, _ in periods]
    return Costs(before.total, shown, active[None])


def _customers(
    connection: duckdb.DuckDBPyConnection, scope: Scope, periods: Sequence[Bounds]
) -> dict[datetime | None, int]:
    """Distinct customers by the period's start, and under None of all periods; one under two names counts twice."""
    parameters = Parameters()
    within = msgspec.structs.replace(scope, since=periods[0][0], until=periods[-1][1])
    events = events_in(within, parameters, "subject", QUARTER)
    query = in_buckets(events, periods, [fixed("COUNT(DISTINCT subject)")], parameters)
    query = query.group_by("GROUPING SETS ((starts), ())", copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    return {starts and aware(starts): count for starts, count in rows}
