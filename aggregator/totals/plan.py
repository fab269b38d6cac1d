"""Compile all meters of an organization into one SQL statement over the rows of a batch.

``PreparedPlans`` keeps one compiled ``Plan`` for each organization, or a few while its meters change. ``Evaluated``
reads a plan's result for each meter. Each metadata text is parsed once. A meter adds a condition and a contribution to
the statement, as columns; meters that need the same column share it. Grouping in SQL instead would cost a hash table
per meter and batch.

A thousand meters often compare one property with a thousand values, such as a model name. So where many meters
compare a property with a text, the property itself becomes a column. Its rows are sorted by value once, and each
meter selects its own rows (``_Index``). A meter whose value does not occur then costs nothing.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import structlog
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
from aggregator.store.store import Slot
from aggregator.totals.accumulators import Amounts, Rows
from meters.aggregation import Aggregation
from meters.event_values import NAME, SOURCE, is_built_in
from meters.filters import Clause, Filter, Operator
from meters.meter import Meter

INDEXED_METERS_MIN = 8  # meters that compare one property with a text; for fewer the comparisons are as cheap
KEPT = ("subject", "ingested_at", "timestamp")
APART_METERS_MIN = 16  # an organization's: for fewer a statement is made in some tens of milliseconds
PREPARED_METERS_MAX = 5_000  # 45 MB of plans; the statements of further organizations are planned with every round
ARRIVING = "arriving"  # the relation that ``PreparedPlans`` read
_ARRIVING = f"SELECT *, 'user' AS source FROM {ARRIVING}"  # noqa: S608 - fixed text

logger = structlog.get_logger("aggregator")


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

    choices: list[Choice]  # of meters that are still counted by it
    meters: int  # how many it was made for
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
    return Plan(choices, len(choices), *sizes, written(query, parameters))


# Prepared plans.
#
# To plan and to prepare the statement of four hundred meters takes more than a second, in which nothing would be
# counted. So a large statement is made in a thread, over a connection of its own. Until it is ready, the statement that
# was there goes on counting the meters that are still as they were, and small statements count those that are new.

class Prepared(NamedTuple):
    """A plan, and where and how it is executed."""

    plan: Plan
    text: str
    connection: duckdb.DuckDBPyConnection
    slot: Slot
    name: str  # of the prepared statement; empty where it is planned with every batch
    is_alone: bool  # whether the connection is this plan's own

    def close(self) -> None:
        """Let go of the statement."""
        if self.is_alone:
            self.connection.close()
        elif self.name:
            self.connection.execute(f"DEALLOCATE {self.name}")

    @property
    def is_whole(self) -> bool:
        """Whether every meter that it was made for is still counted by it."""
        return len(self.plan.choices) == self.plan.meters

    def run(self, rows: pa.Table) -> pa.Table:
        """Return what the statement finds in the rows."""
        self.slot.table = rows
        found = self.connection.execute(self.text).to_arrow_table()
        self.slot.table = rows.slice(0, 0)  # or a batch's memory would be held until the next
        return found


class _Plans:
    """The plans of one organization. Together they have each of its meters once."""

    def __init__(self) -> None:
        self.found: list[Prepared] = []
        self.is_current = False  # whether ``found`` has the meters that there are now
        self.making: Future[Prepared] | None = None


class PreparedPlans:
    """Plans of organizations' meters over ``ARRIVING``, each made when it is first asked for. For one thread at a time.

    While there is room DuckDB plans a statement once: that takes as long as a thousand rows.
    """

    def __init__(self, connect: Callable[[], duckdb.DuckDBPyConnection]) -> None:
        self._connect, self._connection = connect, connect()
        self._slot: Slot | None = None
        self._plans: dict[int, _Plans] = {}
        self._numbers = count()
        self._making = ThreadPoolExecutor(1, "plan")

    def close(self) -> None:
        """Wait for the statement that is being made, and let go of all connections."""
        self._making.shutdown(cancel_futures=True)
        for plans in self._plans.values():
            made = plans.making
            alone = [made.result()] if made and not made.cancelled() and made.exception() is None else []
            for prepared in [*(one for one in plans.found if one.is_alone), *alone]:
                prepared.close()
        self._plans.clear()
        self._connection.close()

    def of(
        self, organization: int, meters_of: Callable[[int], Sequence[Meter]], schema: pa.Schema
    ) -> Sequence[Prepared]:
        """Return the organization's plans, none where it has no meters, which ``meters_of`` gives.

        ``schema`` is that of the rows they are for, always the same.
        """
        plans = self._plans.setdefault(organization, _Plans())
        if not plans.is_current or (plans.making is not None and plans.making.done()):
            self._take(plans)
            self._renew(plans, {meter.id: meter for meter in meters_of(organization)}, schema)
            plans.is_current = True
        return plans.found

    def forget(self, organization: int) -> None:
        """Look at the organization's meters again before the next rows."""
        if organization in self._plans:
            self._plans[organization].is_current = False

    def _take(self, plans: _Plans) -> None:
        """Put the statement that a thread has made, if it did, before those that it replaces."""
        making = plans.making
        if making is None or not making.done():
            return
        plans.making = None
        if making.exception() is None:
            plans.found.insert(0, making.result())
        else:  # as where memory is short: the small statements count all the same
            logger.warning("plan_not_made", reason=str(making.exception()))

    def _renew(self, plans: _Plans, meters: Mapping[str, Meter], schema: pa.Schema) -> None:
        """Have plans of these meters; one of all of them at once where they are few, and else when a thread made it."""
        missing = _divide(plans, meters)
        if not missing and len(plans.found) < 2 and all(one.is_whole for one in plans.found):
            return
        if not plans.found or len(meters) < APART_METERS_MIN:
            for before in plans.found:
                before.close()
            plans.found[:] = []
            plans.found.append(self._prepared(list(meters.values()), schema, self._connection))
            return
        if missing:
            plans.found.append(self._prepared(missing, schema, self._connection))
        if plans.making is None:
            plans.making = self._making.submit(self._made_apart, list(meters.values()), schema)

    def _made_apart(self, meters: list[Meter], schema: pa.Schema) -> Prepared:
        """A thread: as ``_prepared``, over another connection."""
        connection = self._connect()
        try:
            return self._prepared(meters, schema, connection)
        except BaseException:
            connection.close()
            raise

    def _prepared(self, meters: Sequence[Meter], schema: pa.Schema, connection: duckdb.DuckDBPyConnection) -> Prepared:
        is_alone = connection is not self._connection
        slot = None if is_alone else self._slot
        if slot is None:
            slot = Slot(connection, ARRIVING, schema.empty_table())
        if not is_alone:
            self._slot = slot
        compiled = plan(meters, _ARRIVING, spelled_out)
        room = PREPARED_METERS_MAX - sum(
            one.plan.meters for plans in list(self._plans.values()) for one in list(plans.found) if one.name
        )
        sql = compiled.statement.sql
        if len(meters) > room:
            return Prepared(compiled, sql, connection, slot, "", is_alone)
        name = f"meters_{next(self._numbers)}"
        connection.execute(f"PREPARE {name} AS {sql}")
        return Prepared(compiled, f"EXECUTE {name}", connection, slot, name, is_alone)


def _divide(plans: _Plans, meters: Mapping[str, Meter]) -> list[Meter]:
    """Leave each meter to the first plan that has it as it is now, close plans without any, return what none has."""
    missing, found = dict(meters), list[Prepared]()
    for prepared in plans.found:
        choices = [
            choice for choice in prepared.plan.choices
            if choice.meter.id in missing and means_the_same(choice.meter, missing[choice.meter.id])
        ]  # fmt: skip
        for choice in choices:
            del missing[choice.meter.id]
        if choices:
            found.append(prepared._replace(plan=prepared.plan._replace(choices=choices)))
        else:
            prepared.close()
    plans.found[:] = found
    return list(missing.values())


def means_the_same(before: Meter, after: Meter) -> bool:
    """Whether a change leaves what is counted: another name, say, or a label, or that the meter is archived."""
    return before is after or (before.filter, before.aggregation) == (after.filter, after.aggregation)


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
