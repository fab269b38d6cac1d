"""What the events between two places of the feed add up to, and how much comes in.

A rollup ends at a time of ingestion, or at the event before which it has read or found as much as one answer may take;
the next one goes on there. What it covers depends on nothing but the two places. Sums are exact, like those of the
meters themselves.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

import duckdb
import msgspec
from sqlglot import exp

from aggregator.place import FeedPlace
from aggregator.store.queries.feed import Part, Wanted, ends_of, first
from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted, events_in, naive
from aggregator.store.sql import Measured, measures, statement
from aggregator.store.stage import Parameters, fixed

ROLLUP_EVENTS_MAX = 1_000_000  # looked at for one answer: a second or two of DuckDB's time
ROLLUP_READS_MAX = 4_000_000  # the same times the meters, because each reads them
ROLLUP_GROUPS_MAX = 100_000  # sums of one answer: 14 MB, and three seconds of Python's time
_LINES = 1 << 24  # more than a record has (``meters.refusal.LINES_MAX``), so that a place is one number
_NUMBER = f"CAST(log_offset AS HUGEINT) * {_LINES} + line"
_BEFORE = "(log_offset < $until_offset OR (log_offset = $until_offset AND line < $until_line))"
_WINDOW = "TIME_BUCKET(TO_SECONDS($window_s), timestamp)"
_STARTS = f"{_WINDOW} AS starts"
_ARRIVED = "TIME_BUCKET(TO_SECONDS($window_s), ingested_at) AS arrived"


class Group(msgspec.Struct, frozen=True):
    """What one customer used of one meter in one window of time, as far as it stands between two places."""

    meter: int
    kind: str | None
    who: str | None
    starts: datetime
    count: int
    sum: Decimal


def rollup(
    connection: duckdb.DuckDBPyConnection, meters: Sequence[Wanted], position: Mapping[int, FeedPlace],
    before: datetime, window_s: int,
) -> tuple[list[Group], dict[int, FeedPlace]]:
    """Every meter by customer and window, over the events from ``position`` on that were ingested ``before``.

    Ends early where that is more than one answer may take; the places say where.
    """
    reached = dict(position)
    groups: list[Group] = []
    ends = ends_of(connection)
    for partition, end in ends.items():
        part, place = Part(meters[0], partition, end), position.get(partition, (0, 0))
        until = _until(connection, part, place, before, _Room.of(len(meters), len(ends), window_s))
        if until <= place:
            continue
        for number, wanted in enumerate(meters):
            groups += _groups(connection, Part(wanted, partition, end), place, until, (number, window_s))
        reached[partition] = until
    return groups, reached


class _Room(NamedTuple):
    """What is taken of one partition: so many events, of so many customers and windows."""

    events: int
    pairs: int
    window_s: int

    @classmethod
    def of(cls, meters: int, partitions: int, window_s: int) -> "_Room":
        """Each meter may have a sum for every customer and window, in every partition."""
        events = min(ROLLUP_EVENTS_MAX, ROLLUP_READS_MAX // meters) // partitions
        return cls(max(1, events), max(1, ROLLUP_GROUPS_MAX // meters // partitions), window_s)


def _until(
    connection: duckdb.DuckDBPyConnection, part: Part, place: FeedPlace, before: datetime, room: _Room
) -> FeedPlace:
    anybody = Part(Wanted(scope=Scope(organization=part.wanted.scope.organization)), part.partition, part.end)
    newer = ("ingested_at >= $before", naive(before))
    first_newer = first(connection, anybody, place, "MIN(log_offset)", before=newer)
    until = part.end if first_newer is None else int(first_newer), 0
    inside = ("log_offset < $until_offset", until[0])
    events = first(connection, anybody, place, "COUNT(*)", until_offset=inside)
    if events > room.events:
        until = _place_behind(connection, anybody, place, until, room.events)
    if min(events, room.events) > room.pairs:
        until = _place_behind(connection, anybody, place, until, room.pairs, window_s=room.window_s)
    return until


def _place_behind(
    connection: duckdb.DuckDBPyConnection, part: Part, place: FeedPlace, until: FeedPlace, taken: int,
    window_s: int | None = None,
) -> FeedPlace:  # fmt: skip
    """Of the event behind so many; or behind those of so many customers and windows. ``until`` where there is none."""
    parameters = Parameters()
    where = (*part.where(parameters, place), _before(parameters, until))
    if window_s is None:
        query = events_in(part.wanted.scope, parameters, f"{_NUMBER} AS place")
    else:
        parameters.named("window_s", window_s)
        query = events_in(part.wanted.scope, parameters, f"MIN({_NUMBER}) AS place")
        query = query.group_by("subject", fixed(_WINDOW), copy=False)
    query = query.where(*map(fixed, where), copy=False).order_by("place", copy=False)
    query = query.limit(1, copy=False).offset(taken, copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    return divmod(int(rows[0][0]), _LINES) if rows else until


def _before(parameters: Parameters, until: FeedPlace) -> str:
    parameters.named("until_offset", until[0])
    parameters.named("until_line", until[1])
    return _BEFORE


def _groups(
    connection: duckdb.DuckDBPyConnection, part: Part, place: FeedPlace, until: FeedPlace, how: tuple[int, int]
) -> list[Group]:
    number, window_s = how
    parameters = Parameters()
    parameters.named("window_s", window_s)
    where = (*part.where(parameters, place), _before(parameters, until))
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
