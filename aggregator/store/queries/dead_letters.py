"""Lines of the log that could not be counted: listed with their reason and bytes until someone takes care of them."""

from datetime import datetime
from typing import Any, NamedTuple

import duckdb
import msgspec

from aggregator.letters import PART_BYTES, LetterPlace
from aggregator.store.queries.events import OFFSET_MAX
from aggregator.store.queries.scope import aware

_COLUMNS = "log_partition, log_offset, line, organization_id, reason, detail, raw, raw_bytes, ingested_at, replayed_at"
_NOBODYS = "(organization_id IS NULL OR NOT list_contains($known, organization_id))"
_ITS = f"(organization_id = $organization OR ($first AND {_NOBODYS}))"
_OPEN = f"{_ITS} AND ($replayed OR replayed_at IS NULL)"
_PAGE = f"""SELECT {_COLUMNS} FROM dead_letters WHERE number IN (
    SELECT number FROM dead_letters WHERE {_OPEN} ORDER BY number DESC LIMIT $limit OFFSET $offset
) ORDER BY number DESC"""  # noqa: S608 - fixed text
_COUNT = f"SELECT COUNT(*) FROM dead_letters WHERE {_OPEN}"  # noqa: S608 - fixed text
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


def page(
    connection: duckdb.DuckDBPyConnection, whose: Whose, *, replayed: bool, limit: int, offset: int
) -> Letters:
    """The organization's dead letters; those taken care of only if ``replayed``.

    Of each the first PART_BYTES: a hundred whole ones may be gigabytes.
    """
    which: dict[str, object] = whose._asdict() | {"replayed": replayed}
    ((total,),) = connection.execute(_COUNT, which).fetchall()
    rows = connection.execute(_PAGE, which | {"limit": limit, "offset": min(offset, OFFSET_MAX)}).fetchall()
    return Letters([_letter(row) for row in rows], total)


def one(connection: duckdb.DuckDBPyConnection, whose: Whose, place: LetterPlace) -> DeadLetter | None:
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
