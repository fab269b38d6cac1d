"""What a round makes true: which rows are new, which repeat, which contradict. Pure.

First write wins, for ever. A row whose identity is new is stored. A row whose identity is known and whose bytes are
the same is a duplicate: counted, nothing else. Other bytes may still say the same (keys in another order, another
spelling of a time); only when the meaning differs is it a conflict: kept as a dead letter with its bytes, counted,
never billed. So is another external id that meets a stored one in all 128 bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.apply import Batch, Chunk, DeadLetter
from aggregator.run import Words
from aggregator.seen import Keys, repeats
from meters.exact_json import decode_tokens

CONFLICT = "conflict"
_COMPARED = ("external_id", "name", "subject", "timestamp", "parent", "member_id", "external_member_id")
Identity = tuple[int, int]


class Tally(NamedTuple):
    """Lines of one partition by what became of them. Their sum is the number of lines read."""

    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    dead: int = 0


class Needs(NamedTuple):
    """The batch as one table with its identities, and what the index says of them."""

    table: pa.Table
    keys: Keys
    new: npt.NDArray[np.bool_]
    first: npt.NDArray[np.intp]  # for each row the first row of the same identity in this batch
    suspects: npt.NDArray[np.intp]  # rows of known identity whose bytes differ
    stored_elsewhere: list[Identity]  # identities of suspects whose first write is in the store, not in this batch


class Changes(NamedTuple):
    """What one transaction writes, besides the numbers and control records of the batch."""

    rows: pa.Table
    keys: Keys
    dead: list[DeadLetter]
    tallies: dict[int, Tally]


def join(batch: Batch) -> tuple[pa.Table, Keys]:
    """The chunks of a batch as one table (a chunk stays a chunk) and one set of identities."""
    table = pa.Table.from_batches([chunk.rows for chunk in batch.chunks])
    columns = zip(*(chunk.keys for chunk in batch.chunks), strict=True)
    return table, Keys(*(np.concatenate(column) for column in columns))


def judge(table: pa.Table, keys: Keys, found: npt.NDArray[np.bool_], content: Words) -> Needs:
    """Sort the rows into new, duplicate and suspect. ``found`` and ``content`` come from the index of the seen."""
    inside = repeats(keys.hi, keys.lo)
    new = inside.first & ~found
    expected = np.where(found, content, keys.content[inside.of])
    suspects = np.flatnonzero(~new & (keys.content != expected))
    elsewhere = sorted({(int(keys.hi[row]), int(keys.lo[row])) for row in suspects if found[row]})
    return Needs(table, keys, new, inside.of, suspects, elsewhere)


def step(batch: Batch, needs: Needs, stored: Mapping[Identity, dict[str, Any]]) -> Changes:
    """Decide. ``stored`` holds the stored rows of ``needs.stored_elsewhere``, by identity."""
    conflicts = [row for row in needs.suspects.tolist() if not _same(batch, needs, row, stored)]
    dead = batch.dead + [_conflict(batch.chunks, needs, row) for row in conflicts]
    rows = needs.table if needs.new.all() else needs.table.filter(pa.array(needs.new))
    keys = needs.keys if needs.new.all() else needs.keys.take(np.flatnonzero(needs.new))
    return Changes(rows, keys, dead, _tallies(needs, conflicts, batch.dead))


def nothing(batch: Batch) -> Changes:
    """The changes of a batch without a single countable row."""
    keys = Keys(*(np.zeros(0, np.uint64) for _ in range(3)))
    return Changes(pa.table({}), keys, batch.dead, _with_dead({}, batch.dead))


def _same(batch: Batch, needs: Needs, row: int, stored: Mapping[Identity, dict[str, Any]]) -> bool:
    """Whether a suspect row says what the stored one says, in other bytes."""
    identity = (int(needs.keys.hi[row]), int(needs.keys.lo[row]))
    ours = needs.table.slice(row, 1).to_pylist()[0]
    theirs = stored.get(identity) or needs.table.slice(int(needs.first[row]), 1).to_pylist()[0]
    chunk, place = _place(batch.chunks, row)
    fields = [name for name in _COMPARED if name != "timestamp" or chunk.stamped[place]]
    return all(ours[name] == theirs[name] for name in fields) and _meaning(ours) == _meaning(theirs)


def _meaning(row: dict[str, Any]) -> object:
    """With every number as it was sent: 0.10 and 0.1 are told apart, the sender changed it; so are 0.1 and "0.1"."""
    return decode_tokens(row["metadata"].encode())


def _place(chunks: Sequence[Chunk], row: int) -> tuple[Chunk, int]:
    for chunk in chunks:
        if row < len(chunk.raws):
            return chunk, row
        row -= len(chunk.raws)
    raise AssertionError("a row outside its batch")


def _conflict(chunks: Sequence[Chunk], needs: Needs, row: int) -> DeadLetter:
    chunk, place = _place(chunks, row)
    columns = needs.table.slice(row, 1).to_pylist()[0]
    detail = f"external_id {columns['external_id']!r} was taken before with other content; the first one counts"
    return DeadLetter(
        columns["log_partition"],
        columns["log_offset"],
        columns["line"],
        chunk.organization_id,
        CONFLICT,
        detail,
        chunk.raws[place],
        int(needs.table.column("ingested_at")[row].value),
    )


def _tallies(needs: Needs, conflicts: list[int], dead: list[DeadLetter]) -> dict[int, Tally]:
    partitions = needs.table.column("log_partition").to_numpy()
    in_conflict = np.zeros(len(partitions), np.bool_)
    in_conflict[conflicts] = True
    tallies: dict[int, Tally] = {}
    for partition in np.unique(partitions).tolist():
        here = partitions == partition
        stored = int((here & needs.new).sum())
        contrary = int((here & in_conflict).sum())
        tallies[partition] = Tally(stored, int(here.sum()) - stored - contrary, contrary, 0)
    return _with_dead(tallies, dead)


def _with_dead(tallies: dict[int, Tally], dead: list[DeadLetter]) -> dict[int, Tally]:
    for letter in dead:
        tally = tallies.get(letter.partition, Tally())
        tallies[letter.partition] = tally._replace(dead=tally.dead + 1)
    return tallies
