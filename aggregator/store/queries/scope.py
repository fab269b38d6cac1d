"""The scope of a query: which stored events it reads, and the time buckets that it groups them by.

``Scope`` restricts columns (organization, customers, names, time); ``events_in`` turns it into SQL. ``counted`` adds
a meter: the scope's events that pass the meter's filter, with their contribution. ``in_buckets`` joins events with
calendar units such as days or months of a time zone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime

import duckdb
import msgspec
from sqlglot import exp

from aggregator.store.meter_sql import (
    Parameters,
    Stage,
    before_reading,
    condition,
    considered,
    fixed,
    passed_over,
    stated,
    value,
)
from meters.aggregation import Aggregation
from meters.filters import Filter

# A query is narrowed in two steps. The scope's columns come first, so metadata outside the scope is never parsed. The
# filter is then evaluated over a stage that parses each text once. The stage is materialized because DuckDB would
# otherwise push the conditions below it and parse twice.

NOBODY = -1
"""The number of an organization that has no events yet."""

CONTRIBUTION = exp.column("contribution")
"""What ``counted`` calls the value that an event adds."""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """The events of one organization, narrowed down. None means no restriction; an empty list, nothing.

    ``subjects`` are customer numbers (``aggregator.decode.directory``), or what looks them up: a question may wait in
    line while a customer's first event is counted, so the numbers are those of the snapshot that it is asked of.
    ``since`` is inclusive, ``until`` and ``after``
    are not; nor is ``arrived_until``, while ``arrived_since`` is. ``metadata`` keeps events whose value at each
    top-level key has one of the texts. ``same`` has the further numbers of customers who have several, each with the
    first one of the customer, for answers that tell customers apart.
    """

    organization: int
    subjects: list[int] | Callable[[], list[int]] | None = None
    names: list[str] | None = None
    sources: list[str] | None = None
    since: datetime | None = None
    until: datetime | None = None
    after: datetime | None = None
    arrived_since: datetime | None = None
    arrived_until: datetime | None = None
    metadata: Mapping[str, Collection[str]] = {}
    same: Mapping[int, int] = {}


def organization_number(connection: duckdb.DuckDBPyConnection, organization_id: str) -> int:
    """The number that the organization's events carry, or NOBODY."""
    rows = connection.execute("SELECT number FROM organizations WHERE id = ?", [organization_id]).fetchall()
    return int(rows[0][0]) if rows else NOBODY


def naive(instant: datetime) -> datetime:
    """The instant as the store writes it: UTC, without saying so."""
    return instant.astimezone(UTC).replace(tzinfo=None)


def aware(instant: datetime) -> datetime:
    """The inverse of ``naive``."""
    return instant.replace(tzinfo=UTC)


def events_in(scope: Scope, parameters: Parameters, *columns: str) -> exp.Select:
    """SELECT ``columns`` FROM events, of the scope (``metadata`` apart: that needs a stage)."""
    found = exp.select(*map(fixed, columns), copy=False).from_(exp.to_table("events"), copy=False)
    restrictions = (
        ("organization = $organization", "organization", scope.organization),
        ("subject IN (SELECT UNNEST($subjects))", "subjects", scope.subjects),
        ("name IN (SELECT UNNEST($names))", "names", scope.names),
        ("source IN (SELECT UNNEST($sources))", "sources", scope.sources),
        ("timestamp >= $since", "since", scope.since and naive(scope.since)),
        ("timestamp < $until", "until", scope.until and naive(scope.until)),
        ("timestamp > $after", "after", scope.after and naive(scope.after)),
        ("ingested_at >= $arrived_since", "arrived_since", scope.arrived_since and naive(scope.arrived_since)),
        ("ingested_at < $arrived_until", "arrived_until", scope.arrived_until and naive(scope.arrived_until)),
    )
    for restriction, name, limit in restrictions:
        if limit is not None:
            parameters.named(name, limit)
            found = found.where(fixed(restriction), copy=False)
    return found


def counted(
    scope: Scope,
    filter: Filter,
    aggregation: Aggregation,
    parameters: Parameters,
    *,
    keep: Sequence[str],
    computed: Sequence[str] = (),
    where: Sequence[str] = (),
    texts: Mapping[str, str] = {},
) -> exp.Select:
    """SELECT ``keep``, ``texts``, contribution of every event of the scope that the meter counts.

    ``computed`` are columns made of those of ``events``, for ``keep`` to name; ``where`` are conditions of fixed SQL.
    ``texts`` are columns with the text that stands at a path of the metadata, by the column's name.
    """
    stage = Stage()
    holds = [condition(filter, stage, parameters), considered(aggregation, stage)]
    holds += [_has_text(stage, key, texts, parameters) for key, texts in scope.metadata.items()]
    contribution = exp.alias_(value(aggregation, stage), CONTRIBUTION.name, copy=False)
    read = [exp.alias_(stage.text(path), name, copy=False) for name, path in texts.items()]
    source = events_in(scope, parameters, "*", *computed).where(*before_reading(filter, parameters), copy=False)
    source = source.where(*map(fixed, where), copy=False)
    return _selected(stage, source, holds, [*read, contribution], keep, parameters)


def uncounted(
    scope: Scope,
    filter: Filter,
    aggregation: Aggregation,
    parameters: Parameters,
    *,
    keep: Sequence[str],
    after: int | None = None,
) -> exp.Select:
    """SELECT ``keep``, stated of every event that the filter lets through and that adds nothing to the value.

    ``stated`` is the JSON text of the property, NULL where the event has none. With ``after``, only events with a
    higher sequence number are read.
    """
    stage = Stage()
    holds = [condition(filter, stage, parameters), passed_over(aggregation, stage)]
    column = exp.alias_(stated(aggregation, stage), "stated", copy=False)
    source = events_in(scope, parameters, "*").where(*before_reading(filter, parameters), copy=False)
    if after is not None:
        parameters.named("after_seq", after)
        source = source.where(fixed("seq > $after_seq"), copy=False)
    return _selected(stage, source, holds, [column], keep, parameters)


def _selected(
    stage: Stage, source: exp.Select, holds: Sequence[exp.Expr], columns: Sequence[exp.Expr], keep: Sequence[str],
    parameters: Parameters,
) -> exp.Select:
    staged = stage.select(source.subquery("source", copy=False), keep, parameters)
    found = exp.select(*map(exp.column, keep), *columns, copy=False).where(*holds, copy=False)
    if stage.parses:
        found = found.with_("stage", as_=staged, materialized=True, copy=False)
        return found.from_(exp.to_table("stage"), copy=False)
    return found.from_(staged.subquery("stage", copy=False), copy=False)


_SAME = """
    SELECT UNNEST(CAST($further AS INTEGER[])) AS subject, UNNEST(CAST($first AS INTEGER[])) AS other
"""


def by_customer(events: exp.Select, scope: Scope, parameters: Parameters, *keep: str) -> exp.Select:
    """SELECT ``keep``, subject of events, where the subject is the one number that stands for the customer."""
    if not scope.same:
        return events
    parameters.named("further", list(scope.same))
    parameters.named("first", list(scope.same.values()))
    found = exp.select(*map(exp.column, keep), fixed("COALESCE(other, subject) AS subject"), copy=False)
    found = found.from_(events.subquery("named", copy=False), copy=False)
    return found.join(fixed(_SAME), using="subject", join_type="left", join_alias="same", copy=False)


def _has_text(stage: Stage, key: str, texts: Collection[str], parameters: Parameters) -> exp.Expr:
    return exp.In(this=stage.text_at(key), expressions=[parameters.add(text) for text in texts])


# Time buckets.
#
# Python computes the buckets, because its calendar is exact, and passes them as lists of quarter hours. Ranges begin
# in 2023 at the earliest. Since then the hours of every time zone begin on a quarter hour (Antarctica/Casey was the
# last exception, in October 2022). So a plain join finds an event's bucket in any zone and across clock changes.

Bounds = tuple[datetime, datetime]
"""A half-open bucket, which begins and ends on quarter hours."""

QUARTER_COLUMN = "TIME_BUCKET(INTERVAL '15 minutes', timestamp) AS quarter"
"""The column of events that ``in_buckets`` needs."""

_QUARTERS = """
    SELECT starts, UNNEST(GENERATE_SERIES(starts, ends - INTERVAL '15 minutes', INTERVAL '15 minutes')) AS quarter
    FROM (SELECT UNNEST($starts) AS starts, UNNEST($ends) AS ends)
"""


def in_buckets(
    events: exp.Select, buckets: Sequence[Bounds], columns: Sequence[exp.Expr], parameters: Parameters
) -> exp.Select:
    """SELECT starts, ``columns`` of the events (with a ``quarter``) that fall into a bucket; ``starts`` names it."""
    parameters.named("starts", [naive(starts) for starts, _ in buckets])
    parameters.named("ends", [naive(ends) for _, ends in buckets])
    query = exp.select(exp.column("starts"), *columns, copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    return query.join(fixed(_QUARTERS), using="quarter", join_alias="quarters", copy=False)
