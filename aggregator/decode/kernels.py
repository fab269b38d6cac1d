"""Compiled loops over the bytes of event lines (Numba). They run without the interpreter's lock.

``Reader`` makes a chunk of whole records if all of their lines are ordinary. It is at least as strict as msgspec: an
escape, a tab between tokens, a field of an unexpected type, or a line without a name or external id is odd, and the
decoders of ``decode.py`` read records with such a line. A property test compares the rows of both. Lines are scanned by
``meters.compiled``; the loops here hash lines and texts, look numbers up and gather columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import boolean, int32, int64, uint8, uint32, uint64, void

from aggregator.decode.columns import Chunk, Microseconds, Span, Texts, metadata, of_records, parse_times, places
from aggregator.decode.directory import Directory, Organization
from aggregator.decode.identities import Keys, Search, Words
from meters.compiled import (
    CUSTOMER_ID,
    EXTERNAL_CUSTOMER_ID,
    EXTERNAL_ID,
    EXTERNAL_MEMBER_ID,
    FIELDS,
    MEMBER_ID,
    METADATA,
    MISSING,
    NAME,
    NEWLINE,
    ODD,
    PARENT_ID,
    TIMESTAMP,
    Bytes,
    Spans,
    after_blanks,
    after_event,
    copy_bytes,
    hash_64,
    hash_128,
    kernel,
    read_time,
    text_at,
)
from meters.log import Pieces
from meters.timestamps import UNREADABLE

BYTES_MAX = 64 * 1024 * 1024
"""Of a chunk, ten times a round: places are 32-bit numbers."""

SLOTS_MIN = 256
_UNKNOWN = -1  # the number of a customer who has none yet
_EMPTY = np.frombuffer(b"{}", np.uint8)
_NO_KEYS = np.empty((0, 2), np.int32)

FieldSpans = int32[:, :, ::1]  # by line and field: where its text begins and ends
Integers = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@kernel(int64(Bytes, FieldSpans, Spans, Spans))
def _scan(joined: Any, spans: Any, lines: Any, no_keys: Any) -> Any:
    """Read as many lines as ``spans`` has rows; how many were read before the first that is odd."""
    at, end, text = 0, len(joined), text_at(uint64(joined.ctypes.data))
    for row in range(len(spans)):
        lines[row, 0] = at
        at = after_event(text, after_blanks(text, at), True, no_keys, spans[row], end)
        if at == ODD or spans[row, NAME, 1] == MISSING or spans[row, EXTERNAL_ID, 1] == MISSING:
            return row
        if spans[row, EXTERNAL_ID, 1] == spans[row, EXTERNAL_ID, 0]:  # empty, which is as good as none
            return row
        lines[row, 1] = at
        is_last = row + 1 == len(spans)
        if is_last != (at == end) or not (is_last or text[at] == NEWLINE):
            return row
        at += 1
    return len(spans)


@kernel(void(Bytes, FieldSpans, int64, int32[::1], uint8[::1]))
def _gather(text: Any, spans: Any, field: Any, offsets: Any, out: Any) -> Any:
    """The texts of a field end to end, and where each begins; ``{}`` where there is no metadata."""
    at, source, target = np.uint64(0), uint64(text.ctypes.data), uint64(out.ctypes.data)
    for row in range(len(spans)):
        offsets[row] = at
        if spans[row, field, 1] == MISSING:
            if field == METADATA:
                for byte in _EMPTY:
                    out[at] = byte
                    at += np.uint64(1)
            continue
        begin = np.uint64(spans[row, field, 0])
        length = np.uint64(spans[row, field, 1]) - begin
        copy_bytes(target + at, source + begin, length)
        at += length
    offsets[len(spans)] = at


@kernel(void(Bytes, Spans, uint64[::1]))
def _hash_lines(text: Any, lines: Any, out: Any) -> Any:
    """XXH3 of each line, 64 bits."""
    base = text.ctypes.data
    for row in range(len(lines)):
        out[row] = hash_64(base + lines[row, 0], lines[row, 1] - lines[row, 0])


@kernel(void(Bytes, FieldSpans, int64, uint8[::1], int64, uint64[::1], uint64[::1]))
def _hash_texts(text: Any, spans: Any, field: Any, room: Any, prefix_bytes: Any, hi: Any, lo: Any) -> Any:
    """XXH3 of what ``room`` begins with and a field's text behind it, 128 bits; rows without the field are left."""
    base = room.ctypes.data
    for row in range(len(spans)):
        begin, end = spans[row, field]
        if end != MISSING:
            for place in range(end - begin):
                room[prefix_bytes + place] = text[begin + place]
            hi[row], lo[row] = hash_128(uint64(base), uint64(prefix_bytes + end - begin))


@kernel(uint64(uint64[::1], uint64[::1], int32[::1], uint64, uint64))
def _slot(hi: Any, lo: Any, numbers: Any, own_hi: Any, own_lo: Any) -> Any:
    """Where a hash is, or belongs, in a table with open addresses: a power of two slots, some free (_UNKNOWN)."""
    mask = np.uint64(len(numbers) - 1)
    slot = own_lo & mask
    while numbers[slot] != _UNKNOWN and not (lo[slot] == own_lo and hi[slot] == own_hi):
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel(void(uint64[::1], uint64[::1], int32[::1], uint64[::1], uint64[::1], int32[::1]))
def _find_numbers(hi: Any, lo: Any, numbers: Any, his: Any, los: Any, found: Any) -> Any:
    """Look hashes up in such a table."""
    for row in range(len(his)):
        found[row] = numbers[_slot(hi, lo, numbers, his[row], los[row])]


@kernel(void(uint64[::1], uint64[::1], int32[::1], uint64[::1], uint64[::1], int32[::1]))
def _put_numbers(hi: Any, lo: Any, numbers: Any, his: Any, los: Any, put: Any) -> Any:
    """Put hashes with their numbers into such a table; it must have room for them."""
    for row in range(len(his)):
        slot = _slot(hi, lo, numbers, his[row], los[row])
        hi[slot], lo[slot], numbers[slot] = his[row], los[row], put[row]


@kernel(void(uint64[::1], uint32[::1], uint64, uint64[::1], int64[::1]))
def search(words: Any, begins: Any, shift: Any, asked: Any, found: Any) -> Any:
    """For each word asked for, the first row of the ordered words that is not less; index: ``identities.Prefixes``."""
    for row in range(len(asked)):
        entry = asked[row] >> shift
        low, high = uint64(begins[entry]), uint64(begins[entry + np.uint64(1)])
        while low < high:
            middle = (low + high) >> np.uint64(1)
            if words[middle] < asked[row]:
                low = middle + np.uint64(1)
            else:
                high = middle
        found[row] = low


@kernel(boolean(Bytes, FieldSpans, int64[::1]))
def _read_times(joined: Any, spans: Any, times: Any) -> Any:
    """The times of the lines that say one; whether none was UNREADABLE."""
    all_read, text = True, text_at(uint64(joined.ctypes.data))
    for row in range(len(spans)):
        begin, end = spans[row, TIMESTAMP]
        if end != MISSING:
            times[row] = read_time(text, begin, end)
            all_read &= times[row] != UNREADABLE
    return all_read


class _Lines(NamedTuple):
    """The lines of records, and where their fields are."""

    joined: bytes
    text: npt.NDArray[np.uint8]
    spans: Integers
    lines: Integers

    @classmethod
    def of(cls, joined: bytes, lines: int) -> "_Lines | None":
        """Scan so many lines; None if one of them is odd."""
        if not joined.isascii():
            try:
                joined.decode()
            except UnicodeDecodeError:
                return None
        text = np.frombuffer(joined, np.uint8)
        spans, bounds = np.empty((lines, FIELDS, 2), np.int32), np.empty((lines, 2), np.int32)
        if _scan(text, spans, bounds, _NO_KEYS) != lines:  # fewer where a text has a line break
            return None
        return cls(joined, text, spans, bounds)

    def has(self, field: int) -> Flags:
        """Which lines say something there."""
        said: Flags = self.spans[:, field, 1] != MISSING
        return said

    def one(self, row: int, field: int) -> str:
        """The text of a field."""
        begin, end = self.spans[row, field]
        return self.joined[begin:end].decode()

    def sparse(self, field: int, where: Flags | None = None) -> pa.Array:
        """The column of a field that few lines have; of those ``where`` it counts."""
        here = self.has(field) if where is None else self.has(field) & where
        if not here.any():
            return pa.nulls(len(here), pa.string())
        found = [self.one(row, field) if there else None for row, there in enumerate(here.tolist())]
        return pa.array(found, pa.string())

    def texts(self, field: int) -> Texts:
        """A field of all lines."""
        room = int(np.maximum(self.spans[:, field, 1] - self.spans[:, field, 0], 2).sum())
        offsets, joined = np.empty(len(self.spans) + 1, np.int32), np.empty(room, np.uint8)
        _gather(self.text, self.spans, field, offsets, joined)
        return Texts(joined[: offsets[-1]], offsets)

    def hashes(self, field: int, prefix: bytes) -> tuple[Words, Words]:
        """The high and low halves of hashes of a prefix and a field."""
        longest = int((self.spans[:, field, 1] - self.spans[:, field, 0]).max())
        room = np.empty(len(prefix) + max(longest, 0), np.uint8)
        room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
        hi, lo = np.empty(len(self.spans), np.uint64), np.empty(len(self.spans), np.uint64)
        _hash_texts(self.text, self.spans, field, room, len(prefix), hi, lo)
        return hi, lo

    def contents(self) -> Words:
        """A hash of each line."""
        found = np.empty(len(self.lines), np.uint64)
        _hash_lines(self.text, self.lines, found)
        return found

    def stamps(self, ingested: Microseconds) -> Microseconds:
        """What each line says of its time; where its spelling is unusual, ``timestamps`` reads it."""
        stamps = ingested.copy()
        if not _read_times(self.text, self.spans, stamps):
            rows = np.flatnonzero(stamps == UNREADABLE)
            stamps[rows] = parse_times([self.one(row, TIMESTAMP) for row in rows.tolist()], stamps[rows])
        return stamps


class _Numbers:
    """The numbers of customers by a 128-bit hash of what names them: a table with open addresses, at most half full.

    It remembers what ``Directory.number_of`` gave, which alone numbers customers. The directory's dictionaries would
    need a text for every line.
    """

    def __init__(self) -> None:
        self._count = 0
        self._table = self._free(SLOTS_MIN)

    def _free(self, slots: int) -> tuple[Words, Words, Integers]:
        return np.zeros(slots, np.uint64), np.zeros(slots, np.uint64), np.full(slots, _UNKNOWN, np.int32)

    def find(self, hi: Words, lo: Words) -> Integers:
        """The number of each, or _UNKNOWN."""
        found = np.empty(len(hi), np.int32)
        _find_numbers(*self._table, hi, lo, found)
        return found

    def put(self, hi: Words, lo: Words, numbers: Integers) -> None:
        """Remember customers; each may come many times."""
        numbers, rows = np.unique(numbers, return_index=True)
        hi, lo = hi[rows], lo[rows]
        self._count += len(numbers)
        if 2 * self._count > len(self._table[2]):
            old = self._table
            here = old[2] != _UNKNOWN
            self._table = self._free(1 << (2 * self._count).bit_length())
            _put_numbers(*self._table, *(column[here] for column in old))
        _put_numbers(*self._table, hi, lo, numbers)


class Reader:
    """Reads records that the gateway admitted. For one engine's reading thread."""

    search: Search = staticmethod(search)

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[_Numbers, _Numbers]] = {}

    def read(self, spans: Sequence[Span], directory: Directory) -> Chunk | None:
        """The lines of whole records of one organization, which say that no key is given twice; None if any is odd."""
        lines = sum(span.lines for span in spans)
        if sum(len(span.record.value) for span in spans) > BYTES_MAX:
            return None
        found = _Lines.of(b"\n".join([span.record.value for span in spans]), lines)
        if found is None:
            return None
        ingested = of_records(spans, lambda record: record.timestamp_us, np.int64)
        stamps, external = found.stamps(ingested), found.has(EXTERNAL_CUSTOMER_ID)
        if (stamps == UNREADABLE).any() or not (external | found.has(CUSTOMER_ID)).all():
            return None
        organization_id = spans[0].record.organization_id or ""
        organization = directory.organization(organization_id)
        keys = Keys(*found.hashes(EXTERNAL_ID, organization.id_bytes), found.contents())
        columns = {
            **places(spans),
            "id_hi": keys.hi,
            "id_lo": keys.lo,
            "content": keys.content,
            "organization": np.full(lines, organization.number, np.int32),
            "subject": self._subjects(found, external, organization, directory),
            "name": found.texts(NAME).column,
            "timestamp": pa.array(stamps).cast(pa.timestamp("us")),
            "ingested_at": pa.array(ingested).cast(pa.timestamp("us")),
            "external_id": found.texts(EXTERNAL_ID).column,
            "parent": found.sparse(PARENT_ID),
            "member_id": found.sparse(MEMBER_ID, ~external),
            "external_member_id": found.sparse(EXTERNAL_MEMBER_ID, external),
            **metadata(found.texts(METADATA)),
        }
        raws, stamped = Pieces(found.joined, found.lines), found.has(TIMESTAMP)
        return Chunk(pa.RecordBatch.from_pydict(columns), keys, raws, stamped, organization_id)

    def _subjects(
        self, found: _Lines, external: Flags, organization: Organization, directory: Directory
    ) -> Integers:
        by_external, by_id = self._numbers.setdefault(organization.number, (_Numbers(), _Numbers()))
        hashes = found.hashes(EXTERNAL_CUSTOMER_ID, b"")
        subjects = by_external.find(*hashes)
        if not external.all():
            own = found.hashes(CUSTOMER_ID, b"")
            subjects = np.where(external, subjects, by_id.find(*own))
        new = np.flatnonzero(subjects == _UNKNOWN)
        for row in new.tolist():
            field = EXTERNAL_CUSTOMER_ID if external[row] else CUSTOMER_ID
            subjects[row] = directory.number_of(organization, found.one(row, field), is_external=bool(external[row]))
        if len(new):
            rows = new[external[new]]
            by_external.put(hashes[0][rows], hashes[1][rows], subjects[rows])
            if len(rows) < len(new):
                rows = new[~external[new]]
                by_id.put(own[0][rows], own[1][rows], subjects[rows])
        return subjects
