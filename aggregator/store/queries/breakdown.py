"""Queries for ``GET /v1/usage``: a meter's value by calendar unit and by group, over a half-open range.

``breakdown`` finds the groups first, largest or smallest first or by their names, and then measures each of them in
each unit, what the other groups have together, and the whole range. The range cuts the first and the last unit.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import duckdb
import msgspec
import pyarrow as pa
from sqlglot import exp

from aggregator.store.meter_sql import Measured, Parameters, fixed, measures, statement
from aggregator.store.queries.scope import (
    CONTRIBUTION,
    QUARTER_COLUMN,
    Bounds,
    Scope,
    aware,
    counted,
    in_buckets,
)
from meters.aggregation import Aggregation
from meters.filters import Filter

METADATA = "metadata."
"""What a key begins with that stands for a path of the metadata."""

ROWS_MAX = 10_000
"""Rows of an answer, over all its meters: a year of hours, or a month of days of 300 customers; some two megabytes."""

Group = tuple[str | None, ...]
"""The value of each key; None where an event has none."""


class TooManyRows(Exception):
    """The answer would have more rows than ROWS_MAX."""


class Known(NamedTuple):
    """The two names of a customer, for one of the numbers that events name it by."""

    subject: int
    customer_id: str
    external_customer_id: str | None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured. ``scope`` has the range; ``units`` are the whole calendar units that it touches, or none.

    ``keys`` are ``name``, ``customer_id``, ``external_customer_id`` and ``metadata.PATH``. Groups are ordered by their
    value over the range, or by their names (``by_name``); of them ``top`` are shown. ``rows_max`` bounds the rows.
    """

    filter: Filter
    aggregation: Aggregation
    scope: Scope
    units: Sequence[Bounds] = ()
    keys: Sequence[str] = ()
    by_name: bool = False
    ascending: bool = False
    top: int | None = None
    rows_max: int = ROWS_MAX


class Found(NamedTuple):
    """Values by place of the group and start of the unit (None: of the whole range); of the rest by unit; and of all.

    A group or a unit without events is absent; ``rest`` is empty where every group is shown.
    """

    groups: list[Group]
    values: dict[tuple[int, datetime | None], Decimal]
    rest: dict[datetime | None, Decimal]
    total: Decimal


def breakdown(connection: duckdb.DuckDBPyConnection, wanted: Wanted, known: Iterable[Known]) -> Found:
    """Measure the meter. ``known`` are the customers, where a key asks for them. Raises TooManyRows."""
    columns = list(zip(*known, strict=True)) or [(), (), ()]
    connection.register("known", pa.table(list(map(list, columns)), schema=_KNOWN))
    try:
        groups: list[Group] = _ranked(connection, wanted) if wanted.keys else [()]
        if len(groups) * max(len(wanted.units), 1) > wanted.rows_max:
            raise TooManyRows
        connection.register("leading", _leading(wanted, groups))
        try:
            return _measured(connection, wanted, groups)
        finally:
            connection.unregister("leading")
    finally:
        connection.unregister("known")


_KNOWN = pa.schema([
    ("subject", pa.int32()), ("known_customer_id", pa.string()), ("known_external_customer_id", pa.string()),
])  # fmt: skip


def _leading(wanted: Wanted, groups: Sequence[Group]) -> pa.Table:
    columns: dict[str, Any] = {"place": pa.array(range(len(groups)), pa.int32())}
    columns |= {
        column: pa.array([group[number] for group in groups], pa.string())
        for number, column in enumerate(_columns(wanted))
    }
    return pa.table(columns)


def _columns(wanted: Wanted) -> list[str]:
    return [f"key{number}" for number in range(len(wanted.keys))]


def _events(wanted: Wanted, parameters: Parameters) -> exp.Select:
    """SELECT quarter, contribution, and a column for each key, of the events that are counted."""
    columns = dict(zip(_columns(wanted), wanted.keys, strict=True))
    texts = {column: key.removeprefix(METADATA) for column, key in columns.items() if key.startswith(METADATA)}
    events = counted(
        wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=("quarter", "subject", "name"),
        computed=(QUARTER_COLUMN,), texts=texts,
    )  # fmt: skip
    grouped = [exp.alias_(exp.column(column) if column in texts else fixed(_KEYS[key]), column, copy=False)
               for column, key in columns.items()]  # fmt: skip
    query = exp.select("quarter", CONTRIBUTION.name, *grouped, copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    if not {"customer_id", "external_customer_id"} & set(wanted.keys):
        return query
    query = query.join(exp.to_table("known"), using="subject", join_type="left", copy=False)
    return query.join(exp.to_table("subjects"), on="subjects.number = subject", join_type="left", copy=False)


_KEYS = {
    "name": "name",
    "customer_id": "COALESCE(known_customer_id, CASE WHEN kind = 'customer' THEN text END)",
    "external_customer_id": "COALESCE(known_external_customer_id, CASE WHEN kind = 'external' THEN text END)",
}
"""What events are grouped by that is no metadata. A customer that nobody created has the one name of its events."""

# The groups are found in the order of their values. A double holds 15 digits of a value, and where two are the same
# double the exact sum of ordinary amounts decides. So the order is exact but for amounts beyond ORDINARY and for means
# that differ after the fifteenth digit.

_SUM = 'CAST(COALESCE("sum", 0) AS DOUBLE) + COALESCE(LIST_SUM(CAST(enormous AS DOUBLE[])), 0)'
_DOUBLES = {"sum": _SUM, "avg": f'({_SUM}) / "count"', "min": '"min"', "max": '"max"'}  # others: the count


def _ranked(connection: duckdb.DuckDBPyConnection, wanted: Wanted) -> list[Group]:
    """The groups in the order asked for, and no more of them than decide whether there are too many."""
    parameters = Parameters()
    columns = _columns(wanted)
    groups = exp.select(*columns, *measures(wanted.aggregation, CONTRIBUTION), copy=False)
    groups = groups.from_(_events(wanted, parameters).subquery("events", copy=False), copy=False)
    groups = groups.group_by(*columns, copy=False)
    named = [exp.Ordered(this=exp.column(column), desc=wanted.by_name and not wanted.ascending, nulls_first=False)
             for column in columns]  # fmt: skip
    valued = [
        exp.Ordered(this=fixed(source), desc=not wanted.ascending, nulls_first=False)
        for source in (_DOUBLES.get(wanted.aggregation.func, '"count"'), '"sum"')
    ]
    parameters.named("groups_max", wanted.rows_max + 1 if wanted.top is None else wanted.top)
    query = exp.select(*columns, copy=False).from_(groups.subquery("groups", copy=False), copy=False)
    query = query.order_by(*([] if wanted.by_name else valued), *named, copy=False)
    query = query.limit(exp.Placeholder(this="groups_max"), copy=False)
    return connection.execute(*statement(query, parameters)).fetchall()


def _measured(connection: duckdb.DuckDBPyConnection, wanted: Wanted, groups: list[Group]) -> Found:
    parameters = Parameters()
    events = _events(wanted, parameters)
    if wanted.keys:
        same = " AND ".join(f"leading.{column} IS NOT DISTINCT FROM events.{column}" for column in _columns(wanted))
        placed = exp.select("quarter", CONTRIBUTION.name, "place", copy=False)
        placed = placed.from_(events.subquery("events", copy=False), copy=False)
        events = placed.join(exp.to_table("leading"), on=fixed(same), join_type="left", copy=False)
    else:
        events = events.select(fixed("0 AS place"), copy=False)
    keys = ["place", "starts"] if wanted.units else ["place"]
    level = fixed(f"GROUPING({', '.join(keys)}) AS level")
    columns = [exp.column("place"), level, *measures(wanted.aggregation, CONTRIBUTION)]
    if wanted.units:
        query = in_buckets(events, wanted.units, columns, parameters)
    else:
        query = exp.select(fixed("NULL AS starts"), *columns, copy=False)
        query = query.from_(events.subquery("events", copy=False), copy=False)
    sets = [exp.Tuple(expressions=[exp.column(key) for key in keys]), exp.Tuple(expressions=[])]
    query = query.group_by(exp.GroupingSets(expressions=sets), copy=False)
    values: dict[tuple[int, datetime | None], Decimal] = {}
    rest: dict[datetime | None, Decimal] = {}
    total = Decimal(0)
    for starts, place, level_found, *found in connection.execute(*statement(query, parameters)).fetchall():
        value = Measured(*found).value(wanted.aggregation)
        when = starts and aware(starts)
        if level_found:
            total = value
        elif place is None:
            rest[when] = value
        else:
            values[place, when] = value
    return Found(groups, values, rest, total)
