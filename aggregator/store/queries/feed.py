"""Queries for the feed: stored events in the order of the log, from a position on, and rollups of them.

``page`` returns events behind a position; ``backlog`` and ``customers`` describe what is behind it. ``rollup`` adds
usage up by meter, customer and window of time; ``traffic`` and ``windows`` estimate how much a rollup would save.

The table ``events`` serves as the outbox, without a table of its own: a row is written by the transaction that counts
the event, and names its place in the log. So an event is in the feed if and only if it was counted, and a reader
needs to keep only one place per partition. Within a partition the feed has the log's order, and all events of one
customer are in one partition.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import duckdb
import msgspec
from sqlglot import exp

from aggregator.store.meter_sql import Measured, Parameters, fixed, measures, statement
from aggregator.store.queries.scope import CONTRIBUTION, Scope, aware, counted, events_in, naive
from meters.aggregation import Aggregation
from meters.event import halves
from meters.filters import EVERYTHING, Filter
from meters.log import USAGE_EVENTS, FeedPlace, witness_of
from meters.timestamps import microseconds_of

# Events of the feed.

SPAN_MIN = 64  # records looked at first; doubled until the page is full, so little is read in vain
RECORDS_MAX = 2_000_000  # looked at for one page: a selective filter gets a page that is not full, and goes on
PAGE_BYTES_MAX = 12_000_000  # of metadata: a full request to Polar, and not much more memory

_FROM = "log_partition = $partition", "log_offset >= $offset", "(log_offset > $offset OR line >= $line)"
_WHOLE = """
    SELECT e.log_offset, e.line, e.name, e.timestamp, e.ingested_at, s.kind, s.text, e.external_id, e.parent,
           e.member_id, e.external_member_id, e.metadata
    FROM events e LEFT JOIN subjects s ON s.number = e.subject
    WHERE e.seq BETWEEN $low AND $high AND e.seq IN (SELECT UNNEST($seqs)) ORDER BY e.log_offset, e.line
"""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which events: those of the scope that the filter lets through and the aggregation considers."""

    scope: Scope
    filter: Filter = EVERYTHING
    aggregation: Aggregation = Aggregation("count")


class FeedEvent(msgspec.Struct, frozen=True):
    """An event as it was counted. ``kind`` says by which of its names (``who``) the customer was named."""

    partition: int
    offset: int
    line: int
    name: str
    timestamp: datetime
    ingested_at: datetime
    kind: str | None
    who: str | None
    external_id: str
    parent: str | None
    member_id: str | None
    external_member_id: str | None
    metadata: str


class FeedPage(NamedTuple):
    """Events, and the places before which nothing else is wanted."""

    events: list[FeedEvent]
    position: dict[int, FeedPlace]


def page(
    connection: duckdb.DuckDBPyConnection, wanted: Wanted, position: Mapping[int, FeedPlace], limit: int
) -> FeedPage:
    """The next events from ``position`` on, at most ``limit``; a partition's in the order of the log."""
    ends = ends_of(connection)
    events: list[FeedEvent] = []
    reached = dict(position)
    for partition, end in ends.items():
        part = Part(wanted, partition, end)
        found, place = _search(connection, part, position.get(partition, (0, 0)), max(1, limit // len(ends)))
        taken, place = _read(connection, partition, found, place)
        events += taken
        reached[partition] = place
    return FeedPage(events, reached)


class Part(NamedTuple):
    """What is wanted of one partition, which is counted up to ``end``."""

    wanted: Wanted
    partition: int
    end: int

    def where(self, parameters: Parameters, place: FeedPlace) -> tuple[str, ...]:
        """Conditions, in fixed SQL: of this partition, from the place on."""
        parameters.named("partition", self.partition)
        parameters.named("offset", place[0])
        parameters.named("line", place[1])
        return _FROM


_Found = tuple[int, int, int]  # seq, offset, line


def _search(
    connection: duckdb.DuckDBPyConnection, part: Part, place: FeedPlace, limit: int
) -> tuple[list[_Found], FeedPlace]:
    """Up to ``limit`` events from the place on, and the place behind what was looked at."""
    first_offset = first(connection, part, place, "MIN(log_offset)")
    if first_offset is None:
        return [], max(place, (part.end, 0))
    place = max(place, (first_offset, 0))
    found: list[_Found] = []
    span, last = SPAN_MIN, min(part.end, first_offset + RECORDS_MAX)
    while len(found) < limit and place[0] < last:
        until = min(place[0] + span, last)
        found += _span(connection, part, place, until, limit - len(found))
        place, span = (until, 0), 2 * span
    if len(found) >= limit:
        return found, (found[-1][1], found[-1][2] + 1)
    return found, place


def first(
    connection: duckdb.DuckDBPyConnection, part: Part, place: FeedPlace, column: str, **limits: tuple[str, object]
) -> Any:
    """An aggregate over the columns of what is wanted from the place on, without looking at metadata."""
    parameters = Parameters()
    query = events_in(part.wanted.scope, parameters, column)
    for name, (condition, limit) in limits.items():
        parameters.named(name, limit)
        query = query.where(fixed(condition), copy=False)
    query = query.where(*map(fixed, part.where(parameters, place)), copy=False)
    ((value,),) = connection.execute(*statement(query, parameters)).fetchall()
    return value


def _span(
    connection: duckdb.DuckDBPyConnection, part: Part, place: FeedPlace, until: int, limit: int
) -> list[_Found]:
    parameters = Parameters()
    parameters.named("until_offset", until)
    where = (*part.where(parameters, place), "log_offset < $until_offset")
    keep = ("seq", "log_offset", "line")
    wanted = part.wanted
    query = counted(wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=keep, where=where)
    query = query.order_by("log_offset", "line", copy=False).limit(limit, copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    return [(seq, offset, line) for seq, offset, line, _ in rows]


def _read(
    connection: duckdb.DuckDBPyConnection, partition: int, found: Sequence[_Found], place: FeedPlace
) -> tuple[list[FeedEvent], FeedPlace]:
    """The events whole, as many as PAGE_BYTES_MAX allows (at least one), and the place behind the last."""
    if not found:
        return [], place
    seqs = [seq for seq, _, _ in found]
    rows = connection.execute(_WHOLE, {"low": min(seqs), "high": max(seqs), "seqs": seqs})
    events: list[FeedEvent] = []
    size = 0
    while some := rows.fetchmany(500):
        for offset, line, name, timestamp, ingested_at, *rest in some:
            size += len(rest[-1])
            if events and size > PAGE_BYTES_MAX:
                return events, (events[-1].offset, events[-1].line + 1)
            events.append(FeedEvent(partition, offset, line, name, aware(timestamp), aware(ingested_at), *rest))
    return events, place


def ends_of(connection: duckdb.DuckDBPyConnection) -> dict[int, int]:
    """{partition: offset before which everything is counted}."""
    sql = "SELECT log_partition, next_offset FROM positions WHERE stream = ? ORDER BY log_partition"
    return dict(connection.execute(sql, [USAGE_EVENTS]).fetchall())


_LAST_BEFORE = """
    SELECT log_offset, line, ingested_at, external_id FROM events
    WHERE log_partition = $partition AND log_offset >= $low
    AND (log_offset < $offset OR (log_offset = $offset AND line < $line))
    ORDER BY log_offset DESC, line DESC LIMIT 1
"""


def witnesses(connection: duckdb.DuckDBPyConnection, position: Mapping[int, FeedPlace]) -> dict[int, str]:
    """{partition: witness} of the last event before each place, whoever's it is; a partition without one is missing."""
    found: dict[int, str] = {}
    for partition, (offset, line) in position.items():
        span = SPAN_MIN
        while partition not in found:
            asked = {"partition": partition, "low": max(0, offset - span), "offset": offset, "line": line}
            row = connection.execute(_LAST_BEFORE, asked).fetchone()
            if row is not None:
                found[partition] = witness_of((row[0], row[1]), microseconds_of(aware(row[2])), row[3])
            span *= SPAN_MIN
            if asked["low"] == 0:
                break
    return found


def places_since(connection: duckdb.DuckDBPyConnection, since: datetime) -> dict[int, FeedPlace]:
    """Where the events begin that came in since the instant; the end of a partition that has none."""
    sql = "SELECT log_partition, MIN(log_offset) FROM events WHERE ingested_at >= $since GROUP BY log_partition"
    begins = dict(connection.execute(sql, {"since": naive(since)}).fetchall())
    return {partition: (begins.get(partition, end), 0) for partition, end in ends_of(connection).items()}


def newest_before(
    connection: duckdb.DuckDBPyConnection, wanted: Wanted, position: Mapping[int, FeedPlace]
) -> datetime | None:
    """When the newest of the wanted events before the places came in."""
    newest = None
    for partition, (offset, line) in position.items():
        parameters = Parameters()
        query = events_in(wanted.scope, parameters, "MAX(ingested_at)")
        parameters.named("partition", partition)
        conditions = "log_partition = $partition", _before(parameters, (offset, line))
        query = query.where(*map(fixed, conditions), copy=False)
        ((found,),) = connection.execute(*statement(query, parameters)).fetchall()
        newest = max(filter(None, (newest, found)), default=None)
    return newest and aware(newest)


def parents(connection: duckdb.DuckDBPyConnection, organization: int, ids: Sequence[int]) -> dict[int, str]:
    """{128-bit id: external id} of those that are public ids of the organization's events."""
    if not ids:
        return {}
    split = [halves(id) for id in ids]
    parameters = {"organization": organization, "his": [hi for hi, _ in split], "los": [lo for _, lo in split]}
    sql = """SELECT id_hi, id_lo, external_id FROM events WHERE organization = $organization
             AND id_hi IN (SELECT UNNEST($his)::UBIGINT) AND id_lo IN (SELECT UNNEST($los)::UBIGINT)"""
    rows = connection.execute(sql, parameters).fetchall()
    return {hi << 64 | lo: external_id for hi, lo, external_id in rows}


class Backlog(NamedTuple):
    """How many events stand behind a place, and when the oldest of them came in."""

    events: int
    oldest: datetime | None


def backlog(connection: duckdb.DuckDBPyConnection, wanted: Wanted, position: Mapping[int, FeedPlace]) -> Backlog:
    """What is wanted from ``position`` on."""
    total, oldest = 0, None
    for partition, end in ends_of(connection).items():
        parameters = Parameters()
        where = Part(wanted, partition, end).where(parameters, position.get(partition, (0, 0)))
        found = counted(
            wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=("ingested_at",), where=where
        )
        query = exp.select(fixed("COUNT(*)"), fixed("MIN(ingested_at)"), copy=False)
        query = query.from_(found.subquery("found", copy=False), copy=False)
        ((events, first),) = connection.execute(*statement(query, parameters)).fetchall()
        total += events
        oldest = min(filter(None, (oldest, first)), default=None)
    return Backlog(total, oldest and aware(oldest))


class Customers(NamedTuple):
    """Those with most events, most first: how each was named, and how many; and how many customers there are."""

    rows: list[tuple[str | None, str | None, int]]
    total: int


_EVENTS_AND_CUSTOMERS = "COUNT(*) AS events", "COUNT(*) OVER () AS customers"


def customers(
    connection: duckdb.DuckDBPyConnection, wanted: Wanted, position: Mapping[int, FeedPlace], limit: int
) -> Customers:
    """Whose events of what is wanted stand from ``position`` on. A customer's events are all in one partition."""
    most: list[tuple[int, int]] = []
    total = 0
    for partition, end in ends_of(connection).items():
        parameters = Parameters()
        where = Part(wanted, partition, end).where(parameters, position.get(partition, (0, 0)))
        found = counted(wanted.scope, wanted.filter, wanted.aggregation, parameters, keep=("subject",), where=where)
        query = exp.select("subject", *map(fixed, _EVENTS_AND_CUSTOMERS), copy=False)
        query = query.from_(found.subquery("found", copy=False), copy=False).group_by("subject", copy=False)
        query = query.order_by("events DESC", "subject", copy=False).limit(limit, copy=False)
        rows = connection.execute(*statement(query, parameters)).fetchall()
        most += [(events, subject) for subject, events, _ in rows]
        total += rows[0][2] if rows else 0
    most = sorted(most, key=lambda row: (-row[0], row[1]))[:limit]
    return Customers(_named(connection, most), total)


def _named(
    connection: duckdb.DuckDBPyConnection, rows: Sequence[tuple[int, int]]
) -> list[tuple[str | None, str | None, int]]:
    sql = "SELECT number, kind, text FROM subjects WHERE number IN (SELECT UNNEST($numbers))"
    found = connection.execute(sql, {"numbers": [subject for _, subject in rows]}).fetchall()
    names = {number: (kind, text) for number, kind, text in found}
    return [(*names.get(subject, (None, None)), events) for events, subject in rows]


# Rollups and traffic.
#
# A rollup ends at a time of ingestion, or earlier, at the event before which it has read as many events or found as
# many groups as one answer may contain; the next rollup continues there. Its content depends only on its two places.
# Sums are exact, like those of the meters.

ROLLUP_EVENTS_MAX = 1_000_000  # looked at for one answer: a second or two of DuckDB's time
ROLLUP_READS_MAX = 4_000_000  # the same times the meters, because each reads them
ROLLUP_GROUPS_MAX = 100_000  # sums of one answer: 14 MB, and three seconds of Python's time
_LINES = 1 << 24  # more than a record has (``meters.errors.LINES_MAX``), so that a place is one number
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
