"""Read log lines and stored events for comparison, independently of the code that fills the store.

``LineReader`` turns log records into ``Lines``: columns with a fingerprint for each line. ``StoreSide`` is the port
for questions to a store; ``StoppedStore`` asks the file of a stopped server. ``sort_out`` compares both sides as
arrays and returns ``Heaps`` of the rows that need a closer look. ``HourSums`` keeps counts and checksums by hour.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import duckdb
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from aggregator.decode.columns import awkward_numbers
from aggregator.store import database
from aggregator.store.queries.audit import put
from meters.event import place_key
from meters.log import Record, lines_of

# Questions to a store.
#
# The questions (``store.queries.audit``) are the same for a stopped and a running server. ``StoppedStore`` opens the
# file read-only; a running aggregator answers over its socket (``aggregator.api.audit``).

# Blocks are read once or twice, so a larger cache gains little. Work that needs more memory spills to disk.
STORE_MEMORY_LIMIT = "192MB"


class StoreSide(Protocol):
    """A store, as reconciliation sees it."""

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """The answer to one of ``QUESTIONS``."""
        ...


class Foreign(Exception):
    """The file cannot be reconciled by this program. The message says why and what to do."""


class StoppedStore:
    """The file of a server that does not run, opened so that nothing in it can change."""

    def __init__(self, path: Path) -> None:
        """Raises Foreign."""
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": STORE_MEMORY_LIMIT, "threads": 2, "temp_directory": f"{path}.reconcile.tmp"
        }
        try:
            self.connection = duckdb.connect(str(path), read_only=True, config=settings)
        except duckdb.Error as error:
            raise Foreign(f"{path} cannot be read ({str(error).splitlines()[0]}): run meterstream doctor") from error
        version = self.connection.execute("SELECT version FROM about").fetchone()
        if version != (database.VERSION,):
            self.connection.close()
            raise Foreign(f"{path} has layout {version}, this program has {database.VERSION}: run meterstream rebuild")

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """The answer to one of ``QUESTIONS``."""
        with contextlib.closing(self.connection.cursor()) as cursor:
            return put(cursor, question, asked, parameters)


# Log lines with fingerprints.
#
# The store's rows were made by ``aggregator.decode.decode`` with one parser. Here another parser (DuckDB's JSON)
# reads the same bytes, so a bug in either one shows as a difference. This parser must be fast and need not be
# careful: a line that looks different is read again by ``meters.event`` before it counts as a difference. It must be
# right in one direction only: two lines of different meaning must not get the same fingerprint.
#
# A fingerprint is DuckDB's hash over everything that the store keeps of an event. A sum of fingerprints does not
# depend on the order of rows, so it serves as the checksum of any group of rows.

LINE_BITS = 24
"""Lines of one record are numbered below 2^24: there are at most 2^20 (``meters.errors.LINES_MAX``)."""

HOUR_US = 3_600_000_000
LINES_MEMORY_LIMIT = "128MB"  # a stretch of the log at a time, eight megabytes of it
_WORD = np.dtype(">u8")
_NO_ORGANIZATION = bytes(16)
_FIELDS = (
    "name", "external_id", "external_customer_id", "customer_id", "timestamp", "parent_id", "member_id",
    "external_member_id", "organization_id",
)  # fmt: skip
_READ = """
    SELECT f[1] AS name, f[2] AS external_id, f[3] AS external_customer_id, f[4] AS customer_id, f[5] AS timestamp,
        f[6] AS parent, f[7] AS member_id, f[8] AS external_member_id, f[9] AS organization_id, metadata,
        regexp_matches(metadata, '[0-9.]{15}|[0-9.][eE]') AS suspicious
    FROM (
        SELECT json_extract_string(raw, $fields) AS f, CAST(json_extract(raw, '/metadata') AS VARCHAR) AS metadata
        FROM (SELECT CASE WHEN json_valid(raw) THEN raw ELSE '{}' END AS raw FROM lines)
    )
"""
# Only a time with an offset is read here: a cast to TIMESTAMP ignores offsets, and TIMESTAMPTZ adds the local one.
_PRINT = """
    SELECT hash(
        id_hi, id_lo, content, organization, CASE WHEN external_customer_id IS NULL THEN 'customer' ELSE 'external' END,
        coalesce(external_customer_id, customer_id), name,
        CASE WHEN timestamp IS NULL THEN make_timestamp(ingested_us)
             WHEN ends_with(timestamp, 'Z') THEN TRY_CAST(timestamp AS TIMESTAMP)
             WHEN regexp_matches(timestamp, '[+-][0-9]{2}:[0-9]{2}$')
             THEN make_timestamp(epoch_us(TRY_CAST(timestamp AS TIMESTAMPTZ))) END,
        make_timestamp(ingested_us), external_id, parent,
        CASE WHEN external_customer_id IS NULL THEN member_id END,
        CASE WHEN external_customer_id IS NOT NULL THEN external_member_id END,
        coalesce(metadata, '{}'), awkward, 'user'
    ) AS print FROM read
"""
Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


class Lines(NamedTuple):
    """Lines of consecutive records of one partition, in order. ``keys`` are places: offset and line in one number."""

    keys: Integers
    prints: Words
    hi: Words
    lo: Words
    content: Words
    ingested_us: Integers
    raws: list[bytes]
    tenants: list[str | None]  # as the records name them


def key_of(offset: int, line: int) -> int:
    """A place within a partition as one number, in the order of the log."""
    return offset << LINE_BITS | line


def place_of(key: int) -> tuple[int, int]:
    """The inverse of ``key_of``: offset and line."""
    return key >> LINE_BITS, key & (1 << LINE_BITS) - 1


class _Metadata(msgspec.Struct):
    metadata: dict[str, msgspec.Raw] = {}


_DECODE = msgspec.json.Decoder(_Metadata).decode


class LineReader:
    """Turns records into ``Lines``. Has a DuckDB of its own, without a file."""

    def __init__(self) -> None:
        self._connection = duckdb.connect(config={"threads": 1, "memory_limit": LINES_MEMORY_LIMIT})

    def close(self) -> None:
        """Let go of DuckDB."""
        self._connection.close()

    def read(self, records: Sequence[Record]) -> Lines:
        """Every line that is not empty, with its fingerprint."""
        raws, keys, ingested_us, tenants = _split(records)
        if not raws:
            empty = np.zeros(0, np.uint64)
            return Lines(keys, empty, empty, empty, empty, ingested_us, raws, tenants)
        self._connection.register("lines", pa.table({"raw": _texts(raws)}))
        read = self._connection.sql(_READ, params={"fields": [f"/{field}" for field in _FIELDS]}).to_arrow_table()
        own = read["organization_id"].to_pylist()
        organizations = [tenant or named for tenant, named in zip(tenants, own, strict=True)]
        partition = records[0].partition
        named, places = read["external_id"].to_pylist(), ["{}:{}:{}".format(partition, *place_of(key)) for key in keys]
        externals = [known or place for known, place in zip(named, places, strict=True)]
        identified_by = [known or place_key(place) for known, place in zip(named, places, strict=True)]
        hi, lo = _identities(organizations, identified_by)
        content = np.array([xxhash.xxh3_64_intdigest(raw) for raw in raws], np.uint64)
        awkward = _awkward(raws, read["suspicious"])
        read = read.drop(["external_id", "organization_id", "suspicious"])
        columns = {
            "id_hi": hi, "id_lo": lo, "content": content, "ingested_us": ingested_us,
            "organization": pa.array(organizations, pa.string()), "external_id": pa.array(externals, pa.string()),
            "awkward": awkward,
        }  # fmt: skip
        for name, column in columns.items():
            read = read.append_column(name, pa.array(column))
        self._connection.register("read", read)
        prints = self._connection.sql(_PRINT).to_arrow_table()["print"].to_numpy()
        return Lines(keys, prints, hi, lo, content, ingested_us, raws, tenants)


def _split(records: Sequence[Record]) -> tuple[list[bytes], Integers, Integers, list[str | None]]:
    raws: list[bytes] = []
    keys: list[int] = []
    stamps: list[int] = []
    tenants: list[str | None] = []
    for record in records:
        lines = lines_of(record.value)
        numbers = [number for number, line in enumerate(lines) if line.strip()]
        if len(numbers) < len(lines):
            lines = [lines[number] for number in numbers]
        first = key_of(record.offset, 0)
        raws += lines
        keys += [first + number for number in numbers]
        stamps += [record.timestamp_us] * len(lines)
        tenants += [record.organization_id] * len(lines)
    return raws, np.array(keys, np.int64), np.array(stamps, np.int64), tenants


def _texts(raws: list[bytes]) -> pa.Array:
    offsets = np.zeros(len(raws) + 1, np.int32)  # a stretch has a few megabytes
    np.cumsum(np.fromiter(map(len, raws), np.int32, len(raws)), out=offsets[1:])
    texts = pa.StringArray.from_buffers(len(raws), pa.py_buffer(offsets), pa.py_buffer(b"".join(raws)))
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:  # not UTF-8 somewhere: those lines are for the careful reading
        return pa.array([_text(raw) for raw in raws], pa.string())
    return texts


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return ""


def _identities(organizations: Sequence[str | None], identified_by: Sequence[str]) -> tuple[Words, Words]:
    """As ``meters.event.identity``, for many."""
    known = {name: _organization_bytes(name) for name in set(organizations)}
    digest = xxhash.xxh3_128_digest
    joined = b"".join(
        [digest(known[name] + text.encode()) for name, text in zip(organizations, identified_by, strict=True)]
    )
    words = np.frombuffer(joined, _WORD).astype(np.uint64)
    return words[0::2].copy(), words[1::2].copy()


def _organization_bytes(organization_id: str | None) -> bytes:
    try:
        return bytes.fromhex((organization_id or "").replace("-", "")) or _NO_ORGANIZATION
    except ValueError:
        return _NO_ORGANIZATION


def _awkward(raws: list[bytes], suspicious: pa.ChunkedArray) -> pa.Array:
    """Numbers that need exact text, where the metadata may hold any."""
    rows = np.flatnonzero(suspicious.fill_null(False).to_numpy())
    if not len(rows):
        return pa.nulls(len(raws), pa.string())
    found: list[str | None] = [None] * len(raws)
    for row in rows.tolist():
        found[row] = _awkward_of(raws[row])
    return pa.array(found, pa.string())


def _awkward_of(raw: bytes) -> str | None:
    try:
        return awkward_numbers(_DECODE(raw).metadata)
    except (msgspec.MsgspecError, RecursionError):
        return None


# Comparison of places and fingerprints. Pure.
#
# Lines with the same place and fingerprint on both sides need no further work. Every other place belongs to one of
# six groups, and only those are read as rows.

Rows = npt.NDArray[np.intp]


class Heaps(NamedTuple):
    """Lines by row number in the log's arrays, rows of the store by place."""

    stored: Rows  # lines that the store has, as they are
    changed: Rows  # lines that the store has at their place, with another fingerprint
    dead: Rows  # lines that are dead letters
    elsewhere: Rows  # lines without a row at their place: repetitions, or lost
    doubled: Integers  # places that the store has more than once
    unfounded: Integers  # places of the store without a line


def sort_out(keys: Integers, prints: Words, row_keys: Integers, row_prints: Words, dead_keys: Integers) -> Heaps:
    """Compare. ``keys`` and ``row_keys`` are in order; only ``row_keys`` may repeat themselves."""
    nothing, no_places = np.zeros(0, np.intp), np.zeros(0, np.int64)
    if len(keys) == len(row_keys) and np.array_equal(keys, row_keys) and np.array_equal(prints, row_prints):
        return Heaps(np.arange(len(keys)), nothing, nothing, nothing, no_places, no_places)
    if len(row_keys):
        place = np.minimum(np.searchsorted(row_keys, keys), len(row_keys) - 1)
        present = row_keys[place] == keys
        same = present & (row_prints[place] == prints)
    else:
        present = same = np.zeros(len(keys), np.bool_)
    is_dead = np.isin(keys, dead_keys) & ~present
    return Heaps(
        stored=np.flatnonzero(same),
        changed=np.flatnonzero(present & ~same),
        dead=np.flatnonzero(is_dead),
        elsewhere=np.flatnonzero(~present & ~is_dead),
        doubled=np.unique(row_keys[1:][row_keys[1:] == row_keys[:-1]]),
        unfounded=np.setdiff1d(row_keys, keys),
    )


class HourSums:
    """Counts and checksums by hour. A checksum is the sum of fingerprints, modulo 2^64, so order does not matter."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sums: dict[int, int] = {}

    def add(self, ingested_us: Integers, prints: Words | None = None) -> None:
        """Add rows by their time of ingestion."""
        hours = ingested_us // HOUR_US
        found, first, counts = np.unique(hours, return_inverse=True, return_counts=True)
        sums = np.zeros(len(found), np.uint64)
        if prints is not None:
            np.add.at(sums, first, prints)
        for hour, count, sum_ in zip(found.tolist(), counts.tolist(), sums.tolist(), strict=True):
            self.counts[hour] = self.counts.get(hour, 0) + count
            self.sums[hour] = (self.sums.get(hour, 0) + sum_) % 2**64
