"""Events, one by one: lists, single events, and the names they go by.

An event whose chain of parents is incomplete is not shown, unless a list is of what counts: there it is like any other.
A list is found in two steps: the sequence numbers of the page, from the few columns that its conditions need, then
those rows whole.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import duckdb
import msgspec
from sqlglot import exp

from aggregator.store.queries.family import Identity, with_descendants
from aggregator.store.queries.scope import Scope, aware, counted, events_in
from aggregator.store.sql import statement
from aggregator.store.stage import Parameters, fixed
from meters.aggregation import Aggregation
from meters.filter import EVERYTHING, Filter

VISIBLE = "NOT EXISTS (SELECT 1 FROM pending WHERE pending.id_hi = events.id_hi AND pending.id_lo = events.id_lo)"
_CHILD = """EXISTS (SELECT 1 FROM hierarchy WHERE hierarchy.id_hi = events.id_hi AND hierarchy.id_lo = events.id_lo
    AND hierarchy.parent_hi = $parent_hi AND hierarchy.parent_lo = $parent_lo)"""
_BELOW = "(id_hi, id_lo) IN (SELECT id_hi, id_lo FROM descendants WHERE level BETWEEN 1 AND $depth)"
_SHALLOW = """NOT EXISTS (SELECT 1 FROM hierarchy WHERE hierarchy.id_hi = events.id_hi
    AND hierarchy.id_lo = events.id_lo AND hierarchy.depth > $depth)"""  # a root has no row there
_UNESCAPED = r"CASE WHEN CONTAINS(metadata, '\u') THEN COALESCE(TRY(JSON(metadata)), metadata) ELSE metadata END"
_MENTIONS = f"""CONTAINS(LOWER(name), LOWER($search)) OR CONTAINS(LOWER(source), LOWER($search))
    OR CONTAINS(LOWER({_UNESCAPED}), LOWER($search)) OR subject IN (SELECT UNNEST($searched))"""
_COUNT = "SELECT COUNT(*) FROM matched"
_PAGE = """
    SELECT LIST(seq ORDER BY timestamp, seq) AS seqs
    FROM (SELECT seq, timestamp FROM matched ORDER BY timestamp, seq LIMIT $limit OFFSET $offset)
"""
_WHOLE = """
    SELECT e.seq, e.id_hi, e.id_lo, e.name, e.source, e.timestamp, s.kind, s.text AS who,
           e.member_id, e.external_member_id, e.metadata, h.parent_hi, h.parent_lo
    FROM events e
    LEFT JOIN subjects s ON s.number = e.subject
    LEFT JOIN hierarchy h ON h.id_hi = e.id_hi AND h.id_lo = e.id_lo
    WHERE e.seq IN (SELECT UNNEST($seqs))
"""
OFFSET_MAX = 2**62
"""Rows to skip at most: beyond any store, and within the engine's integers."""


class StoredEvent(msgspec.Struct, frozen=True):
    """An event as it is kept. ``kind`` says by which of its names (``who``) the customer was named."""

    seq: int
    id_hi: int
    id_lo: int
    name: str
    source: str
    timestamp: datetime
    kind: str | None
    who: str | None
    member_id: str | None
    external_member_id: str | None
    metadata: str
    parent: Identity | None

    @property
    def identity(self) -> Identity:
        """The 128 bits of its id."""
        return self.id_hi, self.id_lo


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """Which events, in which order. ``searched`` are the numbers of customers that ``search`` also means.

    ``shows_pending``: those that wait for their parent, too.
    """

    scope: Scope
    filter: Filter = EVERYTHING
    aggregation: Aggregation = Aggregation("count")
    search: str | None = None
    searched: list[int] = []
    parent: Identity | None = None
    depth: int | None = None
    ascending: bool = False
    limit: int = 10
    offset: int = 0
    is_counted: bool = True
    shows_pending: bool = False


class Page(NamedTuple):
    """Some of the events found, how many there are (0 where nobody wants them counted), and whether more follow."""

    events: list[StoredEvent]
    total: int
    has_more: bool


def page(connection: duckdb.DuckDBPyConnection, listing: Listing) -> Page:
    """One page of a listing. What has to be parsed is parsed once; what has not is scanned twice rather than kept."""
    parameters = Parameters()
    where = _conditions(listing, parameters)
    matched = counted(
        listing.scope, listing.filter, listing.aggregation, parameters, keep=("seq", "timestamp"), where=where
    )
    parameters.named("limit", listing.limit + 1)
    parameters.named("offset", min(listing.offset, OFFSET_MAX))
    query = _directed(_select(_PAGE), listing.ascending)
    if listing.is_counted:
        query = query.select(fixed(f"({_COUNT}) AS total"), copy=False)
    walks = listing.parent is not None and listing.depth is not None
    if listing.parent is not None and walks:
        query = with_descendants(query, [listing.parent], parameters)
    parses_once = bool(matched.ctes) and listing.is_counted
    query = query.with_("matched", as_=matched, materialized=parses_once, recursive=walks, copy=False)
    ((seqs, *total),) = connection.execute(*statement(query, parameters)).fetchall()
    seqs = seqs or []
    return Page(_whole(connection, seqs[: listing.limit]), sum(total), len(seqs) > listing.limit)


def _conditions(listing: Listing, parameters: Parameters) -> list[str]:
    conditions = [] if listing.shows_pending else [VISIBLE]
    if listing.search is not None:
        parameters.named("search", listing.search)
        parameters.named("searched", listing.searched)
        conditions.append(_MENTIONS)
    if listing.depth is not None:
        parameters.named("depth", listing.depth)
        conditions.append(_SHALLOW if listing.parent is None else _BELOW)
    elif listing.parent is not None:
        parameters.named("parent_hi", listing.parent[0])
        parameters.named("parent_lo", listing.parent[1])
        conditions.append(_CHILD)
    return conditions


def _directed(query: exp.Select, ascending: bool) -> exp.Select:
    for ordered in query.find_all(exp.Ordered):
        ordered.set("desc", not ascending)
    return query


def _select(sql: str) -> exp.Select:
    query = fixed(sql)
    assert isinstance(query, exp.Select)
    return query


def _whole(connection: duckdb.DuckDBPyConnection, seqs: Sequence[int]) -> list[StoredEvent]:
    if not seqs:
        return []
    rows = connection.execute(_WHOLE, {"seqs": list(seqs)}).fetchall()
    found = {row[0]: _stored(row) for row in rows}
    return [found[seq] for seq in seqs]


def _stored(row: tuple[Any, ...]) -> StoredEvent:
    *fields, parent_hi, parent_lo = row
    fields[5] = aware(fields[5])
    return StoredEvent(*(*fields, None if parent_hi is None else (parent_hi, parent_lo)))


def one(connection: duckdb.DuckDBPyConnection, organization: int, identity: Identity) -> StoredEvent | None:
    """The organization's event of this id, unless it waits for its parent."""
    parameters = Parameters()
    parameters.named("id_hi", identity[0])
    parameters.named("id_lo", identity[1])
    query = events_in(Scope(organization=organization), parameters, "seq")
    query = query.where(fixed("id_hi = $id_hi"), fixed("id_lo = $id_lo"), fixed(VISIBLE), copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    found = _whole(connection, [seq for (seq,) in rows])
    return found[0] if found else None


class EventName(msgspec.Struct, frozen=True):
    """A name that events go by, and when it was seen."""

    name: str
    source: str
    occurrences: int
    first_seen: datetime
    last_seen: datetime


NAME_ORDERS = ("name", "occurrences", "first_seen", "last_seen")
_NAMED = """
    SELECT name, source, COUNT(*) AS occurrences, MIN(timestamp) AS first_seen, MAX(timestamp) AS last_seen
    FROM found GROUP BY name, source
"""
_NAMES = """
    SELECT total, name, source, occurrences, first_seen, last_seen
    FROM (SELECT COUNT(*) AS total FROM named)
    LEFT JOIN (SELECT * FROM named ORDER BY {order}, name, source LIMIT $limit OFFSET $offset) ON TRUE
    ORDER BY {order}, name, source
"""


def names(
    connection: duckdb.DuckDBPyConnection,
    scope: Scope,
    *,
    search: str | None,
    order: str,
    ascending: bool,
    limit: int,
    offset: int,
) -> tuple[list[EventName], int]:
    """The names in a scope by ``order`` (of NAME_ORDERS), a page of them and how many there are."""
    assert order in NAME_ORDERS
    parameters = Parameters()
    found = events_in(scope, parameters, "name", "source", "timestamp").where(fixed(VISIBLE), copy=False)
    if search is not None:
        parameters.named("search", search)
        found = found.where(fixed("CONTAINS(LOWER(name), LOWER($search))"), copy=False)
    named = _select(_NAMED).with_("found", as_=found, copy=False)
    query = _select(_NAMES.format(order=f"{order} {'ASC' if ascending else 'DESC'}"))
    parameters.named("limit", limit)
    parameters.named("offset", min(offset, OFFSET_MAX))
    query = query.with_("named", as_=named, materialized=True, copy=False)
    rows = connection.execute(*statement(query, parameters)).fetchall()
    shown = [EventName(*(*row[1:4], aware(row[4]), aware(row[5]))) for row in rows if row[1] is not None]
    return shown, rows[0][0]
