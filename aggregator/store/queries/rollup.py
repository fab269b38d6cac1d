"""What the events between two places of the feed add up to, and how much comes in.

A rollup ends at a whole record and at a time of ingestion, so the next one goes on there; what it covers depends on
nothing but the two places. Sums are exact, like those of the meters themselves.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import duckdb
import msgspec
from sqlglot import exp

from aggregator.place import Place
from aggregator.store.queries.feed import Part, Wanted, ends_of, first
from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted, events_in, naive
from aggregator.store.sql import Measured, measures, statement
from aggregator.store.stage import Parameters, fixed

ROLLUP_EVENTS_MAX = 1_000_000  # added up at once: a second or two of DuckDB's time
_STARTS = "TIME_BUCKET(TO_SECONDS($window_s), timestamp) AS starts"
_ARRIVED = "TIME_BUCKET(TO_SECONDS($window_s), ingested_at) AS arrived"


class Group(msgspec.Struct, frozen=True):
    """What one customer used of one meter in one window of time, as far as it stands between two places."""

    meter: int
    kind: str | None
    who: str | None
    starts: datetime
    count: int
    sum: Any


def rollup(
    connection: duckdb.DuckDBPyConnection, meters: Sequence[Wanted], position: Mapping[int, Place], before: datetime,
    window_s: int,
) -> tuple[list[Group], dict[int, Place]]:
    """Every meter by customer and window, over the events from ``position`` on that were ingested ``before``.

    Ends early, at a record, when there is more than ROLLUP_EVENTS_MAX; the places say where.
    """
    reached = dict(position)
    groups: list[Group] = []
    for partition, end in ends_of(connection).items():
        part, place = Part(meters[0], partition, end), position.get(partition, (0, 0))
        until = _until(connection, part, place, before)
        if (until, 0) <= place:
            continue
        for number, wanted in enumerate(meters):
            groups += _groups(connection, Part(wanted, partition, end), place, until, (number, window_s))
        reached[partition] = until, 0
    return groups, reached


def _until(connection: duckdb.DuckDBPyConnection, part: Part, place: Place, before: datetime) -> int:
    anybody = Part(Wanted(scope=Scope(organization=part.wanted.scope.organization)), part.partition, part.end)
    newer = ("ingested_at >= $before", naive(before))
    first_newer = first(connection, anybody, place, "MIN(log_offset)", before=newer)
    until = part.end if first_newer is None else int(first_newer)
    inside = ("log_offset < $until_offset", until)
    if first(connection, anybody, place, "COUNT(*)", until_offset=inside) <= ROLLUP_EVENTS_MAX:
        return until
    return _cut(connection, anybody, place, until)


def _cut(connection: duckdb.DuckDBPyConnection, part: Part, place: Place, until: int) -> int:
    """The record before which about ROLLUP_EVENTS_MAX events stand; never the one the place is in."""
    parameters = Parameters()
    parameters.named("until_offset", until)
    query = events_in(part.wanted.scope, parameters, "log_offset")
    query = query.where(*map(fixed, (*part.where(parameters, place), "log_offset < $until_offset")), copy=False)
    query = query.order_by("log_offset", copy=False).limit(1, copy=False).offset(ROLLUP_EVENTS_MAX, copy=False)
    ((offset,),) = connection.execute(*statement(query, parameters)).fetchall()
    return max(int(offset), place[0] + 1)


def _groups(
    connection: duckdb.DuckDBPyConnection, part: Part, place: Place, until: int, how: tuple[int, int]
) -> list[Group]:
    number, window_s = how
    parameters = Parameters()
    parameters.named("until_offset", until)
    parameters.named("window_s", window_s)
    where = (*part.where(parameters, place), "log_offset < $until_offset")
    wanted = part.wanted
    found = counted(
        wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=("subject", "starts"),
        computed=(_STARTS,), where=where,
    )  # fmt: skip
    grouped = exp.select("subject", "starts", *measures(wanted.aggregation, CONTRIBUTION), copy=False)
    grouped = grouped.from_(found.subquery("found", copy=False), copy=False)
    grouped = grouped.group_by("subject", "starts", copy=False)
    query = exp.select("kind", "text", "g.starts", "g.count", "g.sum", "g.enormous", copy=False)
    query = query.from_(grouped.subquery("g", copy=False), copy=False)
    query = query.join("subjects", on="subjects.number = g.subject", join_type="left", copy=False)
    query = query.order_by("g.starts", "kind", "text", copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    return [
        Group(number, kind, who, aware(starts), count, Measured(count, sum, enormous).total)
        for kind, who, starts, count, sum, enormous in rows
    ]


class Traffic(NamedTuple):
    """A time's events, the bytes of their metadata, names and external ids, and the events of the busiest minute."""

    events: int
    metadata_bytes: int
    busiest_minute: int


def traffic(connection: duckdb.DuckDBPyConnection, wanted: Wanted, since: datetime) -> Traffic:
    """What came in since the instant."""
    parameters = Parameters()
    parameters.named("ingested_since", naive(since))
    found = counted(
        wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=("minute", "bytes"),
        computed=(
            "DATE_TRUNC('minute', ingested_at) AS minute",
            "STRLEN(metadata) + STRLEN(name) + STRLEN(external_id) AS bytes",
        ),
        where=("ingested_at >= $ingested_since",),
    )  # fmt: skip
    minutes = exp.select("minute", fixed("COUNT(*) AS n"), fixed("SUM(bytes) AS bytes"), copy=False)
    minutes = minutes.from_(found.subquery("found", copy=False), copy=False).group_by("minute", copy=False)
    query = exp.select(*map(fixed, ("COALESCE(SUM(n), 0)", "COALESCE(SUM(bytes), 0)", "COALESCE(MAX(n), 0)")))
    query = query.from_(minutes.subquery("minutes", copy=False), copy=False)
    ((events, size, busiest),) = connection.execute(*statement(query, parameters)).fetchall()
    return Traffic(int(events), int(size), int(busiest))


def windows(connection: duckdb.DuckDBPyConnection, wanted: Wanted, since: datetime, window_s: int) -> int:
    """How many customers and windows there are among what came in since the instant: the events of a rollup."""
    parameters = Parameters()
    parameters.named("ingested_since", naive(since))
    parameters.named("window_s", window_s)
    found = counted(
        wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=("subject", "starts", "arrived"),
        computed=(_STARTS, _ARRIVED), where=("ingested_at >= $ingested_since",),
    )  # fmt: skip
    query = exp.select(fixed("COUNT(DISTINCT (subject, starts, arrived))"), copy=False)
    query = query.from_(found.subquery("found", copy=False), copy=False)
    ((number,),) = connection.execute(*statement(query, parameters)).fetchall()
    return int(number)
