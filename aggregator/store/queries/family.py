"""Events and what hangs below them.

``hierarchy`` has a row for every event with a complete chain of parents. Walking down from an event looks only at the
rows of its root, so the walk is as long as the trace is deep and no larger than the trace.
"""

from collections.abc import Sequence
from decimal import Decimal

import duckdb
from sqlglot import exp

from aggregator.store.queries.scope import Scope, events_in
from aggregator.store.sql import Measured, measures, statement
from aggregator.store.stage import Parameters, Stage, fixed
from meters.aggregation import Aggregation

Identity = tuple[int, int]

# The casts matter: numbers that happen to be small would make a column too narrow for the next.
_ASKED = "SELECT UNNEST(CAST($tops_hi AS UBIGINT[])) AS top_hi, UNNEST(CAST($tops_lo AS UBIGINT[])) AS top_lo"
_ROOTS = """
    SELECT COALESCE(root_hi, top_hi) AS root_hi, COALESCE(root_lo, top_lo) AS root_lo
    FROM asked LEFT JOIN hierarchy ON id_hi = top_hi AND id_lo = top_lo
"""
_RELATIVES = """
    SELECT id_hi, id_lo, parent_hi, parent_lo FROM hierarchy
    WHERE (root_hi, root_lo) IN (SELECT root_hi, root_lo FROM roots)
"""
_DESCENDANTS = """
    SELECT top_hi, top_lo, top_hi AS id_hi, top_lo AS id_lo, 0 AS level FROM asked
    UNION ALL
    SELECT d.top_hi, d.top_lo, r.id_hi, r.id_lo, d.level + 1
    FROM descendants d JOIN relatives r ON r.parent_hi = d.id_hi AND r.parent_lo = d.id_lo
"""
_PARTS = {"asked": _ASKED, "roots": _ROOTS, "relatives": _RELATIVES, "descendants": _DESCENDANTS}
_CTES = ", ".join(f"{name} AS ({source})" for name, source in _PARTS.items())
_COUNTS = f"WITH RECURSIVE {_CTES} SELECT top_hi, top_lo, COUNT(*) - 1 FROM descendants GROUP BY top_hi, top_lo"  # noqa: S608 - fixed text
_MEMBERS = "(id_hi, id_lo) IN (SELECT id_hi, id_lo FROM descendants)"


def with_descendants(query: exp.Select, tops: Sequence[Identity], parameters: Parameters) -> exp.Select:
    """Let the query use ``descendants``: top_hi, top_lo, id_hi, id_lo, level; each top is its own at level 0."""
    for name, value in _asked(tops).items():
        parameters.named(name, value)
    for name, source in _PARTS.items():
        query = query.with_(name, as_=fixed(source), recursive=True, copy=False)
    return query


def descendant_counts(connection: duckdb.DuckDBPyConnection, tops: Sequence[Identity]) -> dict[Identity, int]:
    """How many events hang below each of these, at any depth."""
    rows = connection.execute(_COUNTS, _asked(tops)).fetchall()
    return {(hi, lo): count for hi, lo, count in rows}


def _asked(tops: Sequence[Identity]) -> dict[str, list[int]]:
    return {"tops_hi": [hi for hi, _ in tops], "tops_lo": [lo for _, lo in tops]}


def sums_below(
    connection: duckdb.DuckDBPyConnection, organization: int, tops: Sequence[Identity], path: str
) -> dict[Identity, Decimal]:
    """What stands at a path of the metadata, summed over each event and all below it; left out where no number does.

    A path is no property of a meter: ``timestamp`` is a key here, and not the event's own.
    """
    parameters, stage = Parameters(), Stage()
    sums = measures(Aggregation("sum", path), stage.number(path))
    members = events_in(Scope(organization=organization), parameters, "*").where(fixed(_MEMBERS), copy=False)
    events = stage.select(members.subquery("members", copy=False), ("id_hi", "id_lo"), parameters)
    query = exp.select("top_hi", "top_lo", *sums).from_("descendants")
    query = query.join(events.subquery("events"), using=["id_hi", "id_lo"]).group_by("top_hi", "top_lo")
    rows = connection.execute(*statement(with_descendants(query, tops, parameters), parameters)).fetchall()
    found = {(hi, lo): Measured(*measured) for hi, lo, *measured in rows}
    return {top: measured.total for top, measured in found.items() if measured.count}
