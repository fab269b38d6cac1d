"""Queries for single events: pages of events, event names, parents and children, and dead letters.

``page`` and ``one`` return events, ``names`` their names, ``descendant_counts`` and ``sums_below`` facts about an
event's descendants, and ``dead_letter_page`` and ``dead_letter`` the lines that could not be counted.
"""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import duckdb
import msgspec
from sqlglot import exp

from aggregator.decode.dedup import PART_BYTES, LetterPlace
from aggregator.store.meter_sql import Measured, Parameters, Stage, fixed, measures, statement
from aggregator.store.queries.scope import Scope, aware, counted, events_in
from meters.aggregation import Aggregation
from meters.filters import EVERYTHING, Filter

# Descendants of events.
#
# ``hierarchy`` has a row for every event whose chain of ancestors is complete. Walking down from an event reads only
# the rows with the same root, so the work is bounded by the size of the trace.

Identity = tuple[int, int]

# The casts are needed: DuckDB would otherwise choose a column type that is too narrow for the next, larger numbers.
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


# Pages of events.
#
# An event whose chain of ancestors is incomplete is hidden, unless the list shows what a meter counts. A page is
# found in two steps: first the sequence numbers, from the few columns that the conditions need, then the whole rows.

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


# Dead letters: listed with their reason and bytes until someone replays or dismisses them.

_COLUMNS = "log_partition, log_offset, line, organization_id, reason, detail, raw, raw_bytes, ingested_at, replayed_at"
_NOBODYS = "(organization_id IS NULL OR NOT list_contains($known, organization_id))"
_ITS = f"(organization_id = $organization OR ($first AND {_NOBODYS}))"
_OPEN = f"{_ITS} AND ($replayed OR replayed_at IS NULL)"
_DEAD_LETTERS_PAGE = f"""SELECT {_COLUMNS} FROM dead_letters WHERE number IN (
    SELECT number FROM dead_letters WHERE {_OPEN} ORDER BY number DESC LIMIT $limit OFFSET $offset
) ORDER BY number DESC"""  # noqa: S608 - fixed text
_DEAD_LETTERS_COUNT = f"SELECT COUNT(*) FROM dead_letters WHERE {_OPEN}"  # noqa: S608 - fixed text
_HERE = "log_partition = $partition AND log_offset = $offset AND line = $line"
_ONE = f"SELECT {_COLUMNS} FROM dead_letters WHERE {_ITS} AND {_HERE}"  # noqa: S608 - fixed text
_RESTS = f"SELECT raw FROM dead_rests WHERE {_HERE} ORDER BY part"  # noqa: S608 - fixed text


class DeadLetter(msgspec.Struct, frozen=True):
    """A line of the log and why it was not counted. ``organization_id`` is what its record named, if anything."""

    log_partition: int
    log_offset: int
    line: int
    organization_id: str | None
    reason: str
    detail: str
    raw: bytes  # or their beginning, in a page
    raw_bytes: int
    ingested_at: datetime
    replayed_at: datetime | None


class Letters(NamedTuple):
    """Some dead letters, newest first, and how many there are."""

    letters: list[DeadLetter]
    total: int


class Whose(NamedTuple):
    """The organization that asks. If it is the ``first``, letters that name none of the ``known`` ones are its, too."""

    organization: str
    first: bool
    known: list[str]


def dead_letter_page(
    connection: duckdb.DuckDBPyConnection, whose: Whose, *, replayed: bool, limit: int, offset: int
) -> Letters:
    """The organization's dead letters; those taken care of only if ``replayed``.

    Of each the first PART_BYTES: a hundred whole ones may be gigabytes.
    """
    which: dict[str, object] = whose._asdict() | {"replayed": replayed}
    ((total,),) = connection.execute(_DEAD_LETTERS_COUNT, which).fetchall()
    bounds = {"limit": limit, "offset": min(offset, OFFSET_MAX)}
    rows = connection.execute(_DEAD_LETTERS_PAGE, which | bounds).fetchall()
    return Letters([_letter(row) for row in rows], total)


def dead_letter(connection: duckdb.DuckDBPyConnection, whose: Whose, place: LetterPlace) -> DeadLetter | None:
    """The organization's dead letter of this place."""
    where = dict(zip(("partition", "offset", "line"), place, strict=True))
    rows = connection.execute(_ONE, whose._asdict() | where).fetchall()
    if not rows:
        return None
    letter = _letter(rows[0])
    rests = connection.execute(_RESTS, where).fetchall() if letter.raw_bytes > PART_BYTES else []
    return msgspec.structs.replace(letter, raw=b"".join([letter.raw, *(raw for (raw,) in rests)]))


def _letter(row: tuple[Any, ...]) -> DeadLetter:
    *fields, ingested_at, replayed_at = row
    return DeadLetter(*(*fields, aware(ingested_at), replayed_at and aware(replayed_at)))
