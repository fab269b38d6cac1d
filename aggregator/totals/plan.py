"""Compile all meters of an organization into one SQL statement over the rows of a batch.

``PreparedPlans`` keeps one compiled ``Plan`` for each organization, and ``Evaluated`` reads its result for each
meter. Each metadata text is parsed once. A meter adds a condition and a contribution to the statement, as columns;
meters that need the same column share it. Grouping in SQL instead would cost a hash table per meter and batch.

A thousand meters often compare one property with a thousand values, such as a model name. So where many meters
compare a property with a text, the property itself becomes a column. Its rows are sorted by value once, and each
meter selects its own rows (``_Index``). A meter whose value does not occur then costs nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from sqlglot import exp, parse_one

from aggregator.store.meter_sql import (
    DIALECT,
    Parameters,
    Stage,
    Statement,
    condition,
    considered,
    spelled_out,
    statement,
    value,
)
from aggregator.totals.accumulators import Amounts, Rows
from meters.aggregation import Aggregation
from meters.event_values import NAME, SOURCE, is_built_in
from meters.filters import Clause, Filter, Operator
from meters.meter import Meter

INDEXED_METERS_MIN = 8  # meters that compare one property with a text; for fewer the comparisons are as cheap
KEPT = ("subject", "ingested_at", "timestamp")
PREPARED_METERS_MAX = 5_000  # 45 MB of plans; the statements of further organizations are planned with every round
ARRIVING = "arriving"  # the relation that ``PreparedPlans`` read
_ARRIVING = f"SELECT *, 'user' AS source FROM {ARRIVING}"  # noqa: S608 - fixed text


class Choice(NamedTuple):
    """Which rows a meter takes, and what of them: numbers of columns of a plan.

    Those where ``condition`` holds; of them, with a ``key``, those whose key is ``text``. ``reads`` is the
    contribution, None for a meter that counts.
    """

    meter: Meter
    condition: int
    key: int | None
    text: str
    reads: int | None


class Plan(NamedTuple):
    """Columns of the statement: those kept, conditions ``c0, c1, …``, keys ``k0, k1, …``, contributions ``v0, v1, …``.

    A contribution is an amount, or for ``unique`` meters an identity.
    """

    choices: list[Choice]
    conditions: int
    keys: int
    contributions: int
    statement: Statement


class _Columns:
    """The columns asked for so far, each once."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._places = prefix, dict[object, int]()
        self.expressions: list[exp.Expr] = []

    def place(self, meaning: object, expression: Callable[[], exp.Expr]) -> int:
        """The number of the column that has this meaning; ``expression`` is called for a new one."""
        place = self._places.setdefault(meaning, len(self._places))
        if place == len(self.expressions):
            self.expressions.append(exp.alias_(expression(), f"{self._prefix}{place}"))
        return place


def plan(
    meters: Sequence[Meter], source: str, written: Callable[[exp.Expr, Parameters], Statement] = statement,
    keep: Sequence[str] = KEPT,
) -> Plan:  # fmt: skip
    """Compile meters over a relation with the columns of ``events``; ``written`` makes the statement of it."""
    stage, parameters = Stage(), Parameters()
    conditions, keys, contributions = _Columns("c"), _Columns("k"), _Columns("v")
    indexed = _indexed([meter.filter for meter in meters])

    def choice(meter: Meter) -> Choice:
        filter, key, text, aggregation = meter.filter, None, "", meter.aggregation
        clause = _equality(filter, indexed)
        if clause is not None:
            filter, text = _without(filter, clause), str(clause.value)
            key = keys.place(clause.property, lambda: _key(clause.property, stage))
        numeric = aggregation.func not in ("count", "unique")
        meaning = repr(filter), aggregation.property if numeric else None
        place = conditions.place(meaning, lambda: _holds(filter, aggregation, stage, parameters))
        reads = None
        if aggregation.func != "count" and aggregation.property is not None:
            reads = contributions.place((aggregation.property, numeric), lambda: value(aggregation, stage))
        return Choice(meter, place, key, text, reads)

    choices = [choice(meter) for meter in meters]
    relation = exp.Subquery(this=parse_one(source, dialect=DIALECT), alias=exp.to_identifier("source"))
    staged = stage.select(relation, keep, parameters).subquery("stage")
    columns = [*conditions.expressions, *keys.expressions, *contributions.expressions]
    query = exp.select(*map(exp.column, keep), *columns).from_(staged)
    sizes = len(conditions.expressions), len(keys.expressions), len(contributions.expressions)
    return Plan(choices, *sizes, written(query, parameters))


class Prepared(NamedTuple):
    """A plan, and what is executed for it."""

    plan: Plan
    text: str


class PreparedPlans:
    """Plans of organizations' meters over ``ARRIVING``, each made when it is first asked for.

    While there is room DuckDB plans the statement once: that takes as long as a thousand rows.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._plans: dict[int, Prepared | None] = {}
        self._meters: dict[int, int] = {}  # by organization: how many are in its prepared statement

    def of(self, organization: int, meters_of: Callable[[int], Sequence[Meter]]) -> Prepared | None:
        """The organization's, until it is forgotten; None where it has no meters, which ``meters_of`` gives."""
        if organization not in self._plans:
            meters = meters_of(organization)
            compiled = plan(meters, _ARRIVING, spelled_out) if meters else None
            self._plans[organization] = self._prepared(organization, compiled)
        return self._plans[organization]

    def forget(self, organization: int) -> None:
        """Its meters are others now."""
        self._plans.pop(organization, None)

    def _prepared(self, organization: int, compiled: Plan | None) -> Prepared | None:
        name = f"meters_of_{organization}"
        if self._meters.pop(organization, 0):
            self._connection.execute(f"DEALLOCATE {name}")
        if compiled is None:
            return None
        sql, meters = compiled.statement.sql, len(compiled.choices)
        if sum(self._meters.values()) + meters > PREPARED_METERS_MAX:
            return Prepared(compiled, sql)
        self._connection.execute(f"PREPARE {name} AS {sql}")
        self._meters[organization] = meters
        return Prepared(compiled, f"EXECUTE {name}")


def _holds(filter: Filter, aggregation: Aggregation, stage: Stage, parameters: Parameters) -> exp.Expr:
    holds = exp.and_(condition(filter, stage, parameters), considered(aggregation, stage))
    return exp.Coalesce(this=exp.paren(holds), expressions=[exp.false()])


def _indexed(filters: Sequence[Filter]) -> frozenset[str]:
    """The properties that enough filters compare with a text."""
    asked = Counter(clause.property for filter in filters for clause in _equalities(filter))
    return frozenset(property for property, meters in asked.items() if meters >= INDEXED_METERS_MIN)


def _equalities(filter: Filter) -> list[Clause]:
    """Clauses, one for each property, without which the filter cannot hold and that one text alone satisfies."""
    if filter.conjunction != "and":
        return []
    found = [
        part for part in filter.clauses
        if isinstance(part, Clause) and part.operator is Operator.EQ and isinstance(part.value, str)
        and (part.property in (NAME, SOURCE) or not is_built_in(part.property))
    ]  # fmt: skip
    return list({clause.property: clause for clause in found}.values())


def _equality(filter: Filter, indexed: frozenset[str]) -> Clause | None:
    return next((clause for clause in _equalities(filter) if clause.property in indexed), None)


def _without(filter: Filter, clause: Clause) -> Filter:
    return Filter("and", [part for part in filter.clauses if part is not clause])


def _key(property: str, stage: Stage) -> exp.Expr:
    return stage.built_in(property) if is_built_in(property) else stage.string(property)


class Evaluated:
    """What a plan says of some rows."""

    def __init__(self, plan: Plan, table: pa.Table) -> None:
        self._masks = [table.column(f"c{place}").to_numpy() for place in range(plan.conditions)]
        self._rows: list[Rows | None] = [None] * plan.conditions
        self._keys = [_Index(table.column(f"k{place}")) for place in range(plan.keys)]
        columns = [table.column(f"v{place}").combine_chunks() for place in range(plan.contributions)]
        self._contributions = [Amounts.of(found) if pa.types.is_decimal(found.type) else found for found in columns]

    def rows(self, choice: Choice) -> Rows:
        """The numbers of the rows that the meter takes, in order."""
        if choice.key is not None:
            held = self._keys[choice.key].rows(choice.text)
            return held[self._masks[choice.condition][held]] if len(held) else held
        found = self._rows[choice.condition]
        if found is None:
            found = self._rows[choice.condition] = np.flatnonzero(self._masks[choice.condition])
        return found

    def contributions(self, choice: Choice) -> Any:
        """What each row contributes, an ``Amounts`` or a column of identities; None for a meter that counts."""
        return None if choice.reads is None else self._contributions[choice.reads]


class _Index:
    """Rows by the text they have in a column."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        encoded = column.combine_chunks().dictionary_encode()
        codes = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()
        self._order: Rows = np.argsort(codes, kind="stable")
        self._edges = np.searchsorted(codes[self._order], np.arange(len(encoded.dictionary) + 1))
        self._codes = {text: code for code, text in enumerate(encoded.dictionary.to_pylist())}

    def rows(self, text: str) -> Rows:
        """The numbers of the rows that have it, in order."""
        code = self._codes.get(text)
        return self._order[:0] if code is None else self._order[self._edges[code] : self._edges[code + 1]]
