"""The event hierarchy: link child events to their parents, in whatever order they arrive.

An event may name a parent by that parent's ``external_id`` or by its event id (contract section 1.7; the external id
is tried first). ``resolve`` runs in the batch's transaction. It files each new child in ``pending``, then links every
child whose chain of ancestors reaches a root, an event without a parent: the child gets a row in ``hierarchy`` and
its own children are tried next. A pending event is counted like any other, but event lists do not show it. An event
cannot be its own parent, and a chain longer than DEPTH_MAX stays pending.

An event's id is its identity, so the parent's identity is computed from its name, without a search.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import NamedTuple
from uuid import UUID

import duckdb
import numpy as np
import pyarrow as pa

from aggregator.decode.identities import Keys, Seen, Words
from meters.event import halves, identity

DEPTH_MAX = 100  # Polar's own cap on a walk up the chain
CANDIDATES_AT_ONCE = 50_000  # events that may be linked now; some 50 MB of objects
Identity = tuple[int, int]


class Child(NamedTuple):
    """A stored event that names a parent: its identity, its tenant and the text it used."""

    id: Identity
    organization: int
    parent: str
    by_external_id: Identity
    by_event_id: Identity | None


def children(rows: pa.Table, organization_ids: dict[int, str]) -> list[Child]:
    """The rows of a round that name a parent."""
    if rows.num_rows == 0 or rows.column("parent").null_count == rows.num_rows:
        return []
    named = rows.select(["id_hi", "id_lo", "organization", "parent"]).filter(rows.column("parent").is_valid())
    return [
        Child(
            (row["id_hi"], row["id_lo"]),
            row["organization"],
            row["parent"],
            identity(organization_ids[row["organization"]], row["parent"]),
            _event_identity(row["parent"]),
        )
        for row in named.to_pylist()
    ]


def _event_identity(text: str) -> Identity | None:
    try:
        number = UUID(text).int
    except ValueError:
        return None
    return halves(number) if str(UUID(text)) == text.lower() else None


def resolve(connection: duckdb.DuckDBPyConnection, seen: Seen, arrived: Keys, named: list[Child]) -> None:
    """Inside the round's transaction: file the new children as pending, then link all that can be linked."""
    if named:
        connection.register("named", _pending_table(named))
        connection.execute("INSERT INTO pending SELECT * FROM named")
        connection.unregister("named")
    waiting = _waiting_for(connection, arrived.hi, arrived.lo)
    present = set(zip(arrived.hi.tolist(), arrived.lo.tolist(), strict=True)) if waiting.num_rows or named else set()
    fresh = {child.id for child in named}
    others = ([child for child in piece if child.id not in fresh] for piece in _pieces(waiting))
    pieces: Iterator[list[Child]] = chain([named], others)
    while linked := [_words(ids) for piece in pieces if piece and (ids := _link(connection, seen, present, piece))]:
        hi, lo = (np.concatenate(words) for words in zip(*linked, strict=True))
        pieces = _pieces(_waiting_for(connection, hi, lo))


def any_pending(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether an event waits for its parent. Where none does and none is named, there is nothing to resolve."""
    return bool(connection.execute("SELECT 1 FROM pending LIMIT 1").fetchall())


def _pending_table(named: list[Child]) -> pa.Table:
    words = pa.uint64()
    other = [child.by_event_id or (None, None) for child in named]
    return pa.table(
        {
            "id_hi": pa.array([child.id[0] for child in named], words),
            "id_lo": pa.array([child.id[1] for child in named], words),
            "organization": pa.array([child.organization for child in named], pa.int32()),
            "parent": pa.array([child.parent for child in named], pa.string()),
            "parent_hi": pa.array([child.by_external_id[0] for child in named], words),
            "parent_lo": pa.array([child.by_external_id[1] for child in named], words),
            "other_hi": pa.array([hi for hi, _ in other], words),
            "other_lo": pa.array([lo for _, lo in other], words),
        }
    )


def _words(identities: Collection[Identity]) -> tuple[Words, Words]:
    return (
        np.array([hi for hi, _ in identities], np.uint64),
        np.array([lo for _, lo in identities], np.uint64),
    )


def _waiting_for(connection: duckdb.DuckDBPyConnection, hi: Words, lo: Words) -> pa.Table:
    connection.register("arrived", pa.table({"hi": hi, "lo": lo}))
    waiting = connection.execute(
        """
        SELECT p.id_hi, p.id_lo, p.organization, p.parent, p.parent_hi, p.parent_lo, p.other_hi, p.other_lo
        FROM pending p SEMI JOIN arrived a ON p.parent_hi = a.hi AND p.parent_lo = a.lo
        UNION
        SELECT p.id_hi, p.id_lo, p.organization, p.parent, p.parent_hi, p.parent_lo, p.other_hi, p.other_lo
        FROM pending p SEMI JOIN arrived a ON p.other_hi = a.hi AND p.other_lo = a.lo
        """  # two joins by hash; one with OR would compare every pair
    ).to_arrow_table()
    connection.unregister("arrived")
    return waiting


def _pieces(waiting: pa.Table) -> Iterator[list[Child]]:
    """So many at a time: a late parent may have millions of children, which as objects are more than memory holds."""
    for start in range(0, waiting.num_rows, CANDIDATES_AT_ONCE):
        columns = waiting.slice(start, CANDIDATES_AT_ONCE).to_pydict().values()
        yield [
            Child((id_hi, id_lo), organization, parent, (hi, lo), None if other_hi is None else (other_hi, other_lo))
            for id_hi, id_lo, organization, parent, hi, lo, other_hi, other_lo in zip(*columns, strict=True)
        ]


def _link(
    connection: duckdb.DuckDBPyConnection, seen: Seen, present: set[Identity], candidates: list[Child]
) -> list[Identity]:
    """Give a hierarchy row to each candidate whose parent is here and complete; return those that got one."""
    parents = _own(connection, candidates, _parents(seen, present, candidates))
    ready = _ready(connection, set(parents.values()))
    linked: list[Identity] = []
    rows = []
    for child in {child.id: child for child in candidates}.values():
        parent = parents.get(child.id)
        if parent is None or parent not in ready:
            continue
        root, depth = ready[parent]
        if depth < DEPTH_MAX:
            linked.append(child.id)
            rows.append((*child.id, *parent, *root, depth + 1))
    if rows:
        _write(connection, rows)
    return linked


def _parents(seen: Seen, present: set[Identity], candidates: list[Child]) -> dict[Identity, Identity]:
    """For each candidate the event it means, where that event is stored or arrives in this round."""
    wanted = {i for child in candidates for i in (child.by_external_id, child.by_event_id) if i is not None}
    order = sorted(wanted)
    found, _ = seen.find(*_words(order))
    here = {i for i, known in zip(order, found.tolist(), strict=True) if known} | (wanted & present)
    parents: dict[Identity, Identity] = {}
    for child in candidates:
        for meant in (child.by_external_id, child.by_event_id):
            if meant is not None and meant in here and meant != child.id:
                parents[child.id] = meant
                break
    return parents


def _own(
    connection: duckdb.DuckDBPyConnection, candidates: list[Child], parents: dict[Identity, Identity]
) -> dict[Identity, Identity]:
    """Without the parents of other tenants: an external id is hashed with its tenant, an event id is anybody's."""
    by_event_id = {
        child.id: (*child.by_event_id, child.organization)
        for child in candidates
        if child.by_event_id is not None and parents.get(child.id) == child.by_event_id
    }
    if not by_event_id:
        return parents
    hi, lo, organization = zip(*by_event_id.values(), strict=True)
    claimed = pa.table({"hi": pa.array(hi, pa.uint64()), "lo": pa.array(lo, pa.uint64()), "organization": organization})
    connection.register("claimed", claimed)
    own = set(
        connection.execute(
            """SELECT DISTINCT c.hi, c.lo, c.organization FROM claimed c
               JOIN events e ON e.id_hi = c.hi AND e.id_lo = c.lo AND e.organization = c.organization"""
        ).fetchall()
    )
    connection.unregister("claimed")
    return {child: parent for child, parent in parents.items() if child not in by_event_id or by_event_id[child] in own}


def _ready(connection: duckdb.DuckDBPyConnection, parents: set[Identity]) -> dict[Identity, tuple[Identity, int]]:
    """Of these events, the ones with a complete chain: their root and depth. A root is its own, at depth 0."""
    if not parents:
        return {}
    hi, lo = _words(parents)
    connection.register("wanted", pa.table({"hi": hi, "lo": lo}))
    pending = connection.execute(
        "SELECT w.hi, w.lo FROM wanted w JOIN pending p ON p.id_hi = w.hi AND p.id_lo = w.lo"
    ).fetchall()
    linked = connection.execute(
        """SELECT w.hi, w.lo, h.root_hi, h.root_lo, h.depth
           FROM wanted w JOIN hierarchy h ON h.id_hi = w.hi AND h.id_lo = w.lo"""
    ).fetchall()
    connection.unregister("wanted")
    ready: dict[Identity, tuple[Identity, int]] = {i: (i, 0) for i in parents - set(pending)}
    ready.update({(r[0], r[1]): ((r[2], r[3]), r[4]) for r in linked})
    return ready


def _write(connection: duckdb.DuckDBPyConnection, rows: Sequence[tuple[int, ...]]) -> None:
    names = ["id_hi", "id_lo", "parent_hi", "parent_lo", "root_hi", "root_lo"]
    columns = {name: pa.array([row[place] for row in rows], pa.uint64()) for place, name in enumerate(names)}
    columns["depth"] = pa.array([row[6] for row in rows], pa.int32())
    connection.register("links", pa.table(columns))
    connection.execute("INSERT INTO hierarchy SELECT * FROM links")
    connection.execute("DELETE FROM pending p USING links l WHERE p.id_hi = l.id_hi AND p.id_lo = l.id_lo")
    connection.unregister("links")
