"""Queries for what a meter passes over: matching events that add nothing, and names and keys that no event has.

``unmatched`` counts events that the filter lets through and that have no usable value at the aggregation's property.
``seen`` collects the names and metadata keys of recent events, for a meter that may have a misspelled one. Both scan on
demand; the engine keeps no such counts. ``recent`` bounds them to the newest days of an organization.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import duckdb
from sqlglot import exp

from aggregator.store.meter_sql import Parameters, before_reading, fixed, statement
from aggregator.store.queries.scope import Scope, aware, events_in, organization_number, uncounted
from aggregator.store.queries.usage import Question
from meters.catalogue.catalogue import Catalogue
from meters.filters import Filter
from meters.meter import Meter

RECENT = timedelta(days=7)
"""What counts as recent: a sender that is silent over a weekend is still seen."""

NAMES_MAX = 1000
"""Names of events that are collected: an organization with more has made names of ids, and none of them is a typo."""

SAMPLE_EVENTS = 1000
"""Newest events whose keys are collected: enough for rare keys, and read in milliseconds."""

VALUE_SHOWN_MAX = 100
"""Characters of an example's value: enough to recognize it."""


class Example(NamedTuple):
    """The newest event with a value that adds nothing; ``value`` is JSON, perhaps cut."""

    id_hi: int
    id_lo: int
    name: str
    timestamp: datetime
    value: str


class Unmatched(NamedTuple):
    """Events that the filter lets through and that add nothing: with an unusable value, and without any."""

    no_number: int = 0
    absent: int = 0
    example: Example | None = None


class Seen(NamedTuple):
    """Recent events: their names with how many have each, and the metadata of the newest that may match a filter."""

    names: Mapping[str, int]
    is_every_name: bool
    metadata: Sequence[str]


_ORGANIZATIONS = """SELECT number, id FROM organizations
    WHERE number IN (SELECT organization FROM events WHERE seq > ?) ORDER BY number"""
_KEPT = ("seq", "id_hi", "id_lo", "name", "timestamp")
_UNUSABLE = "FILTER (WHERE stated IS NOT NULL)"
_COUNTS = (f"COUNT(*) {_UNUSABLE}", "COUNT(*) FILTER (WHERE stated IS NULL)")
_EXAMPLE = tuple(f"ARG_MAX({column}, seq) {_UNUSABLE}" for column in ("id_hi", "id_lo", "name", "timestamp", "stated"))


def recent(connection: duckdb.DuckDBPyConnection, organization: int) -> datetime | None:
    """The beginning of the organization's newest days, by the arrival of its events; None where it has none."""
    parameters = Parameters()
    query = events_in(Scope(organization=organization), parameters, "MAX(ingested_at)")
    ((newest,),) = connection.execute(*statement(query, parameters)).fetchall()
    return newest and aware(newest) - RECENT


def unmatched(connection: duckdb.DuckDBPyConnection, question: Question, after: int | None = None) -> Unmatched:
    """What the meter passes over in the question's scope, of events stored ``after`` a sequence number if one is given.

    A meter that counts events passes over none.
    """
    if question.aggregation.func == "count":
        return Unmatched()
    parameters = Parameters()
    events = uncounted(question.scope, question.filter, question.aggregation, parameters, keep=_KEPT, after=after)
    query = exp.select(*map(fixed, (*_COUNTS, *_EXAMPLE))).from_(events.subquery("events", copy=False))
    ((no_number, absent, *found),) = connection.execute(*statement(query, parameters)).fetchall()
    if not no_number:
        return Unmatched(0, absent)
    id_hi, id_lo, name, timestamp, value = found
    return Unmatched(no_number, absent, Example(id_hi, id_lo, name, aware(timestamp), value[:VALUE_SHOWN_MAX]))


def of_meters(connection: duckdb.DuckDBPyConnection, meters: Iterable[Meter]) -> Iterator[tuple[Meter, Unmatched]]:
    """What each meter passes over in the newest days of its organization."""
    numbers: dict[str, int] = {}
    for meter in meters:
        if meter.organization_id not in numbers:
            numbers[meter.organization_id] = organization_number(connection, meter.organization_id)
        number = numbers[meter.organization_id]
        since = recent(connection, number)
        scope = Scope(organization=number, arrived_since=since)
        question = Question(filter=meter.filter, aggregation=meter.aggregation, scope=scope)
        yield meter, unmatched(connection, question) if since else Unmatched()


def in_newest(connection: duckdb.DuckDBPyConnection, catalogue: Catalogue, meters_max: int) -> dict[str, int]:
    """Matching events without a usable value among the newest SAMPLE_EVENTS of all organizations, by meter id.

    Meters that pass over none are left out. At most ``meters_max`` meters are looked at.
    """
    ((newest,),) = connection.execute("SELECT MAX(seq) FROM events").fetchall()
    after = (newest or 0) - SAMPLE_EVENTS
    rows = connection.execute(_ORGANIZATIONS, [after]).fetchall()
    meters = [(number, meter) for number, id in rows for meter in catalogue.meters_of(id) if meter.archived_at is None]
    found: dict[str, int] = {}
    for number, meter in meters[:meters_max]:
        question = Question(
            filter=meter.filter, aggregation=meter.aggregation, scope=Scope(organization=number)
        )
        if no_number := unmatched(connection, question, after=after).no_number:
            found[meter.id] = no_number
    return found


def seen(connection: duckdb.DuckDBPyConnection, scope: Scope, filter: Filter) -> Seen:
    """Names and metadata in the scope; metadata of events that the filter's conditions on columns let through."""
    parameters = Parameters()
    names = events_in(scope, parameters, "name", "COUNT(*) AS events").group_by("name")
    names = names.order_by(fixed("events").desc(), "name").limit(NAMES_MAX + 1)
    found = connection.execute(*statement(names, parameters)).fetchall()
    parameters = Parameters()
    newest = events_in(scope, parameters, "seq").where(*before_reading(filter, parameters), copy=False)
    newest = newest.order_by(fixed("seq").desc()).limit(SAMPLE_EVENTS)
    sample = exp.select("metadata").from_("events").where(exp.column("seq").isin(query=newest, copy=False))
    rows = connection.execute(*statement(sample, parameters)).fetchall()
    return Seen(dict(found[:NAMES_MAX]), len(found) <= NAMES_MAX, [metadata for (metadata,) in rows])
