"""From records to rows: decide in memory what a round will write. Pure: no store, no clock, no event loop.

A record holds a line per event. Reading it has a fast way and a careful way with one result. The fast way decodes a
whole record in one call and is for lines the gateway admitted; whatever it stumbles over, and every line of a foreign
producer, goes the careful way, line by line, where a line that cannot be counted becomes a dead letter with its
bytes, its place and the reason. Nothing is dropped and nothing stalls the partition.

Rows come out as Arrow columns, in chunks: small enough that no step holds the interpreter for long, large enough
that Python's cost is shared by thousands of events. The order of rows is the order of the log.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from aggregator.awkward import any_suspicious, awkward_numbers, suspicious
from aggregator.directory import Directory, Organization
from aggregator.letters import DeadLetter, Letters
from aggregator.seen import Keys
from aggregator.timestamps import UNREADABLE, Microseconds, parse_times
from meters.event import CUSTOMER, EXTERNAL, Event, check_line, parse_uuid4
from meters.log import LATEST_US, Record, has_too_many_lines, lines_of
from meters.refusal import Reason, Refusal
from meters.timestamp import instant_of

CHUNK_EVENTS = 2_000  # about 5 ms of work, so that a reader of the API never waits long for the interpreter
FIELD_SHOWN_MAX = 200  # characters of where in an event it is
_ENCODE = msgspec.json.Encoder().encode
_WORD = np.dtype(">u8")


class Line(msgspec.Struct, gc=False):
    """An admitted event as the fast way reads it: times stay text, because texts are read many at once."""

    name: str
    metadata: dict[str, msgspec.Raw] = {}
    timestamp: str | None = None
    external_id: str | None = None
    customer_id: str | None = None
    external_customer_id: str | None = None
    member_id: str | None = None
    external_member_id: str | None = None
    parent_id: str | None = None


class PlainLine(Line, gc=False):
    """The same of a record whose lines give no key of their metadata twice: the text of it is taken as it stands."""

    metadata: msgspec.Raw = msgspec.Raw(b"{}")  # type: ignore[assignment]


_DECODE_LINES = msgspec.json.Decoder(Line).decode_lines
_DECODE_PLAIN_LINES = msgspec.json.Decoder(PlainLine).decode_lines
_DECODE_METADATA = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Chunk(NamedTuple):
    """Rows of one organization, as columns."""

    rows: pa.RecordBatch
    keys: Keys
    raws: list[bytes]
    stamped: list[bool]  # whether the line carried its own timestamp
    organization_id: str


class Batch(NamedTuple):
    """What one reading of the log says. ``positions`` are the next offsets after it, for the partitions it moved, and
    ``last`` the records before those.
    """

    chunks: list[Chunk]
    dead: pa.Table  # of ``aggregator.letters``
    positions: dict[int, int]
    last: dict[int, Record]
    lines: int
    organizations: list[tuple[int, str]]
    subjects: list[tuple[int, int, str, str]]


class _Span(NamedTuple):
    """Consecutive lines of one record."""

    record: Record
    first_line: int
    lines: int


class _Rows:
    """Lines of one organization on their way into a chunk."""

    def __init__(self, organization_id: str) -> None:
        self.organization_id = organization_id
        self.events: list[Event | Line] = []
        self.raws: list[bytes] = []
        self.spans: list[_Span] = []

    def add(self, record: Record, first_line: int, events: Sequence[Event | Line], raws: list[bytes]) -> None:
        self.events += events
        self.raws += raws
        self.spans.append(_Span(record, first_line, len(events)))

    def column(self, of_record: Callable[[Record], int], dtype: type[np.signedinteger]) -> np.ndarray:
        values = np.array([of_record(span.record) for span in self.spans], dtype)
        return np.repeat(values, [span.lines for span in self.spans])

    def line_numbers(self) -> np.ndarray:
        return np.concatenate([np.arange(s.first_line, s.first_line + s.lines, dtype=np.int32) for s in self.spans])


class _Texts(NamedTuple):
    """The metadata of lines as JSON, end to end, and where each begins; one more offset says where the last ends."""

    joined: bytes
    offsets: npt.NDArray[np.int32]

    @classmethod
    def of(cls, events: Sequence[Event | Line]) -> "_Texts":
        """The text of a plain line as it stands, of any other written anew with each key once."""
        texts = [event.metadata if type(event) is PlainLine else _ENCODE(event.metadata) for event in events]
        offsets = np.zeros(len(texts) + 1, np.int32)
        offsets[1:] = np.cumsum(np.fromiter(map(len, texts), np.int32, len(texts)))
        return cls(b"".join(texts), offsets)

    def no_objects(self) -> npt.NDArray[np.intp]:
        """The rows whose text is another kind of JSON value."""
        return np.flatnonzero(np.frombuffer(self.joined, np.uint8)[self.offsets[:-1]] != ord("{"))


class _Reading:
    """One reading of the log under way: closes a chunk when it is full or the tenant changes."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.chunks: list[Chunk] = []
        self.dead = Letters()
        self.lines = 0
        self._rows = _Rows("")

    def add(
        self, organization_id: str, record: Record, first_line: int, events: Sequence[Event | Line], raws: list[bytes]
    ) -> None:
        rows = self._rows
        if rows.events and (rows.organization_id != organization_id or len(rows.events) >= CHUNK_EVENTS):
            self.close_chunk()
        if not self._rows.events:
            self._rows = _Rows(organization_id)
        self._rows.add(record, first_line, events, raws)
        self.lines += len(events)

    def close_chunk(self) -> None:
        rows, self._rows = self._rows, _Rows("")
        if not rows.events:
            return
        # Only a producer that claims to be the gateway has a line that is taken out here.
        texts = _Texts.of(rows.events)
        if len(odd := texts.no_objects()):
            rows = self._without(rows, set(odd.tolist()), Reason.DICT_TYPE.at(0, "metadata"))
            texts = _Texts.of(rows.events)
        stamps = _stamps(rows)
        if len(odd := np.flatnonzero(stamps == UNREADABLE)):
            rows = self._without(rows, set(odd.tolist()), Reason.DATETIME_PARSING.at(0, "timestamp"))
            texts, stamps = _Texts.of(rows.events), _stamps(rows)
        if rows.events:
            self.chunks.append(_chunk(rows, stamps, texts, self.directory))

    def _without(self, rows: _Rows, odd: set[int], refusal: Refusal) -> _Rows:
        kept = _Rows(rows.organization_id)
        places = [(span.record, span.first_line + line) for span in rows.spans for line in range(span.lines)]
        for row, (record, number) in enumerate(places):
            if row in odd:
                self.dead.add(_dead_letter(record, number, rows.raws[row], refusal))
            else:
                kept.add(record, number, [rows.events[row]], [rows.raws[row]])
        self.lines -= len(odd)
        return kept


def decode(records: Sequence[Record], directory: Directory) -> Batch:
    """Turn records into rows and dead letters. Numbers new customers in ``directory``."""
    reading = _Reading(directory)
    last = {record.partition: record for record in records}
    for record in records:
        if record.timestamp_us >= LATEST_US:
            _bury(record, Reason.RECORD_TIME.at(0), reading)
            continue
        organization = record.organization_id
        if organization is not None and organization not in directory.organizations:
            named = parse_uuid4(organization)
            if not isinstance(named, str):
                _bury(record, Reason.ORGANIZATION_UNKNOWN.at(0, "organization_id", input=organization), reading)
                continue
            record = msgspec.structs.replace(record, organization_id=named)
        if has_too_many_lines(record.value):
            _bury(record, Reason.RECORD_LINES.at(0), reading)
            continue
        if not _fast(record, reading):
            _careful(record, reading)
    reading.close_chunk()
    organizations, subjects = directory.take_fresh()
    dead = reading.dead.table()
    positions = {partition: record.offset + 1 for partition, record in last.items()}
    return Batch(reading.chunks, dead, positions, last, reading.lines + dead.num_rows, organizations, subjects)


def _fast(record: Record, reading: _Reading) -> bool:
    if not (record.admitted and record.organization_id):
        return False
    raws = record.value.split(b"\n")
    try:
        if not record.value.isascii():
            record.value.decode()
        events = (_DECODE_PLAIN_LINES if record.distinct_keys else _DECODE_LINES)(record.value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    if len(events) != len(raws):
        return False
    reading.add(record.organization_id, record, 0, events, raws)
    return True


def _careful(record: Record, reading: _Reading) -> None:
    now = instant_of(record.timestamp_us)
    for number, raw in enumerate(record.value.split(b"\n")):
        if not raw.strip():
            continue
        checked = check_line(raw, organization_id=record.organization_id, now=now)
        if isinstance(checked, Event):
            tenant = record.organization_id or checked.organization_id or ""
            reading.add(tenant, record, number, [checked], [raw])
        else:
            reading.dead.add(_dead_letter(record, number, raw, checked))


def _bury(record: Record, refusal: Refusal, reading: _Reading) -> None:
    """Every line of a record that says nothing as a whole: only a producer that skips the gateway gets here."""
    for number, raw in enumerate(lines_of(record.value)):
        if raw.strip():
            reading.dead.add(_dead_letter(record, number, raw, refusal))


def _dead_letter(record: Record, line: int, raw: bytes, refusal: Refusal) -> DeadLetter:
    return DeadLetter(
        record.partition,
        record.offset,
        line,
        record.organization_id,
        refusal.type,
        _detail(refusal),
        raw,
        record.timestamp_us,
    )


def _detail(refusal: Refusal) -> str:
    """What is wrong, with the field. A key is a stranger's: of any length, and perhaps with half a surrogate pair."""
    parts = [str(part) for part in refusal.loc[3:] if part not in (CUSTOMER, EXTERNAL)]
    field = ".".join(parts)[:FIELD_SHOWN_MAX].encode(errors="replace").decode()
    return f"{field}: {refusal.msg}" if field else refusal.msg


def _stamps(rows: _Rows) -> Microseconds:
    ingested = rows.column(lambda record: record.timestamp_us, np.int64)
    return parse_times([event.timestamp for event in rows.events], ingested)


def _chunk(rows: _Rows, stamps: Microseconds, texts: _Texts, directory: Directory) -> Chunk:
    organization = directory.organization(rows.organization_id)
    events, raws = rows.events, rows.raws
    external_ids = _external_ids(rows)
    ingested = rows.column(lambda record: record.timestamp_us, np.int64)
    keys = _keys(organization.id_bytes, external_ids, raws)
    columns = {
        "log_partition": rows.column(lambda record: record.partition, np.int32),
        "log_offset": rows.column(lambda record: record.offset, np.int64),
        "line": rows.line_numbers(),
        "id_hi": keys.hi,
        "id_lo": keys.lo,
        "content": keys.content,
        "organization": np.full(len(events), organization.number, np.int32),
        "subject": _subjects(events, organization, directory),
        "name": pa.array([event.name for event in events], pa.string()),
        "timestamp": pa.array(stamps).cast(pa.timestamp("us")),
        "ingested_at": pa.array(ingested).cast(pa.timestamp("us")),
        "external_id": pa.array(external_ids, pa.string()),
        "parent": _texts([event.parent_id for event in events]),
        "member_id": _members(events),
        "external_member_id": _external_members(events),
        **_metadata(texts),
    }
    stamped = [event.timestamp is not None for event in events]
    return Chunk(pa.RecordBatch.from_pydict(columns), keys, raws, stamped, rows.organization_id)


def _external_ids(rows: _Rows) -> list[str]:
    """The dedupe keys. A line without one, from a producer that skips the gateway, is known by its place."""
    ids = [event.external_id for event in rows.events]
    if None in ids:
        places = [
            f"{span.record.partition}:{span.record.offset}:{span.first_line + line}"
            for span in rows.spans
            for line in range(span.lines)
        ]
        ids = [key if key is not None else place for key, place in zip(ids, places, strict=True)]
    return ids  # type: ignore[return-value]  # every None was replaced


def _keys(organization: bytes, external_ids: list[str], raws: list[bytes]) -> Keys:
    """Identities as ``meters.event.identity`` makes them, for a whole chunk at once."""
    digest = xxhash.xxh3_128_digest
    joined = b"".join([digest(organization + external_id.encode()) for external_id in external_ids])
    words = np.frombuffer(joined, _WORD).astype(np.uint64)
    content = np.fromiter(map(xxhash.xxh3_64_intdigest, raws), np.uint64, len(raws))
    return Keys(words[0::2].copy(), words[1::2].copy(), content)


def _subjects(events: Sequence[Event | Line], organization: Organization, directory: Directory) -> np.ndarray:
    external = organization.external.get
    numbers = [external(event.external_customer_id) for event in events]  # type: ignore[arg-type]
    if None in numbers:
        for row, event in enumerate(events):
            if numbers[row] is None:
                numbers[row] = _subject(event, organization, directory)
    return np.array(numbers, np.int32)


def _texts(values: list[str | None]) -> pa.Array:
    """A column that is nearly always empty."""
    if values.count(None) == len(values):
        return pa.nulls(len(values), pa.string())
    return pa.array(values, pa.string())


def _members(events: Sequence[Event | Line]) -> pa.Array:
    """A member belongs to a ``customer_id``; beside an external customer it says nothing."""
    members = [event.member_id for event in events]
    if members.count(None) < len(members):
        members = [event.member_id if event.external_customer_id is None else None for event in events]
    return _texts(members)


def _external_members(events: Sequence[Event | Line]) -> pa.Array:
    """The other way round."""
    members = [event.external_member_id for event in events]
    if members.count(None) < len(members):
        members = [event.external_member_id if event.external_customer_id is not None else None for event in events]
    return _texts(members)


def _subject(event: Event | Line, organization: Organization, directory: Directory) -> int:
    external = event.external_customer_id
    if external is not None:
        known = organization.external.get(external)
        return known if known is not None else directory.number_external(organization, external)
    customer = parse_uuid4(event.customer_id)  # upper case, braces and missing hyphens name the same customer
    customer = customer if isinstance(customer, str) else str(event.customer_id)
    known = organization.customer.get(customer)
    return known if known is not None else directory.number_customer(organization, customer)


def _metadata(texts: _Texts) -> dict[str, pa.Array]:
    """Metadata as text, one line each, keys unique, tokens as sent; and the numbers that need exact text."""
    joined, offsets = texts
    rows = len(offsets) - 1
    awkward: pa.Array = pa.nulls(rows, pa.string())
    if any_suspicious(joined):
        each = [joined[start:end] for start, end in pairwise(offsets.tolist())]
        awkward = _texts([awkward_numbers(_DECODE_METADATA(text)) if suspicious(text) else None for text in each])
    column = pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(joined))
    return {"metadata": column, "awkward": awkward}
