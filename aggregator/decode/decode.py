"""Decode log records into a batch of columns; a line that cannot be counted becomes a dead letter.

``decode`` handles each record in the fastest of three ways that accepts it, all with the same result:

* ``Quick.read`` scans lines with compiled loops (``kernels.py``) and creates no object for a line. It is used once
  enough lines have arrived to make loading the compiler worthwhile.
* ``_fast`` decodes a whole record in one msgspec call. It is for records that the gateway validated.
* ``_careful`` validates line by line, as the gateway does. It handles records of other producers and everything that
  the other two refuse. A line that it cannot count becomes a dead letter with its bytes, its place and the reason.

No line is dropped, and a bad line does not stop its partition. The rows keep the order of the log. New organizations
and customers are numbered in the ``Directory`` on the way. Decoding uses no store, no clock and no event loop.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import structlog
import xxhash

from aggregator.decode.columns import (
    Batch,
    Chunk,
    Microseconds,
    Span,
    Texts,
    metadata,
    of_records,
    parse_times,
    places,
    sparse,
)
from aggregator.decode.dedup import DeadLetter, Letters
from aggregator.decode.directory import Directory, Organization
from aggregator.decode.identities import Keys, Search
from meters.errors import Reason, Refusal
from meters.event import CUSTOMER_VARIANT, EXTERNAL_VARIANT, Event, check_line, parse_uuid4, place_key
from meters.loader import Loader
from meters.log import LATEST_US, Record, has_too_many_lines, lines_of
from meters.timestamps import UNREADABLE, instant_of

# The compiled decoder (``kernels``) is loaded once there is enough to read. Until then, and where it cannot be loaded,
# the other decoders read every line.

if TYPE_CHECKING:
    from aggregator.decode.kernels import Reader

LINES_MIN = 200
"""Fewer take longer than one by one."""

CHUNK_LINES = 4_000
"""Twice CHUNK_EVENTS: a line holds the interpreter for less than half as long."""

LOAD_AFTER_LINES = 10_000
"""Lines that could have been read quickly, before that is made ready: a server with few events has no use for it."""

logger = structlog.get_logger("aggregator")


class Quick:
    """For one engine: ``read`` is for its reader alone."""

    def __init__(self, reader: "Reader | None" = None) -> None:
        """With a ``reader`` it is used from the first line on."""
        self.loader = Loader(_load, _failed, LOAD_AFTER_LINES, threading.Thread, reader)

    @property
    def search(self) -> Search | None:
        """The compiled search in runs of identities, as soon as it is loaded."""
        return None if self.loader.loops is None else self.loader.loops.search

    def pays(self, lines: int) -> bool:
        """Whether to ``read`` so many; where that would pay and is not ready, it will be."""
        if lines < LINES_MIN:
            return False
        self.loader.add_work(lines)
        return self.loader.loops is not None

    def read(self, spans: Sequence[Span], directory: Directory) -> Chunk | None:
        """The lines of whole records of one organization, which say that no key is given twice; None if any is odd."""
        return None if self.loader.loops is None else self.loader.loops.read(spans, directory)


def _load() -> "Reader":
    from aggregator.decode.kernels import Reader

    return Reader()


def _failed(error: Exception) -> None:
    effect = "lines are read one by one, at half the speed"
    logger.warning("quick_reading_off", reason=str(error), effect=effect)


# The decoders that create one object for a line, and ``decode``, which chooses.
#
# Chunks are small enough that no step holds the interpreter's lock for long, and large enough that Python's overhead
# is shared by thousands of events.

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


class _Rows:
    """Lines of one organization on their way into a chunk."""

    def __init__(self, organization_id: str) -> None:
        self.organization_id = organization_id
        self.events: list[Event | Line] = []
        self.raws: list[bytes] = []
        self.spans: list[Span] = []

    def add(self, record: Record, first_line: int, events: Sequence[Event | Line], raws: list[bytes]) -> None:
        self.events += events
        self.raws += raws
        self.spans.append(Span(record, first_line, len(events)))


def _texts(events: Sequence[Event | Line]) -> Texts:
    """The metadata of lines: of a plain line as it stands, of any other written anew with each key once."""
    texts = [event.metadata if type(event) is PlainLine else _ENCODE(event.metadata) for event in events]
    offsets = np.zeros(len(texts) + 1, np.int32)
    offsets[1:] = np.cumsum(np.fromiter(map(len, texts), np.int32, len(texts)))
    return Texts(b"".join(texts), offsets)


def _no_objects(texts: Texts) -> npt.NDArray[np.intp]:
    """The rows whose text is another kind of JSON value."""
    return np.flatnonzero(np.frombuffer(texts.joined, np.uint8)[texts.offsets[:-1]] != ord("{"))


class _Decoding:
    """One reading of the log under way: closes a chunk when it is full or the tenant changes."""

    def __init__(self, directory: Directory, quick: Quick) -> None:
        self.directory = directory
        self._quick = quick
        self._plain: list[Span] = []  # of records that may be read quickly, behind those of ``_rows``
        self._plain_lines = 0
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

    def add_plain(self, record: Record) -> None:
        """Take a record whose lines the gateway admitted, and which give no key twice."""
        is_another = bool(self._plain) and self._plain[0].record.organization_id != record.organization_id
        if is_another or self._plain_lines >= CHUNK_LINES:
            self.read_plain()
        lines = record.value.count(b"\n") + 1
        self._plain.append(Span(record, 0, lines))
        self._plain_lines += lines

    def read_plain(self) -> None:
        """Read what was taken, at once or record by record."""
        spans, self._plain, lines, self._plain_lines = self._plain, [], self._plain_lines, 0
        if self._quick.pays(lines):
            self.close_chunk()  # what comes before
            chunk = self._quick.read(spans, self.directory)
            if chunk is not None:
                self.chunks.append(chunk)
                self.lines += lines
                return
        for span in spans:
            if not _fast(span.record, self):
                _careful(span.record, self)

    def close_chunk(self) -> None:
        rows, self._rows = self._rows, _Rows("")
        if not rows.events:
            return
        # Only a producer that claims to be the gateway has a line that is taken out here.
        texts = _texts(rows.events)
        if len(odd := _no_objects(texts)):
            rows = self._without(rows, set(odd.tolist()), Reason.DICT_TYPE.at(0, "metadata"))
            texts = _texts(rows.events)
        stamps = _stamps(rows)
        if len(odd := np.flatnonzero(stamps == UNREADABLE)):
            rows = self._without(rows, set(odd.tolist()), Reason.DATETIME_PARSING.at(0, "timestamp"))
            texts, stamps = _texts(rows.events), _stamps(rows)
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


def decode(records: Sequence[Record], directory: Directory, quick: Quick | None = None) -> Batch:
    """Turn records into rows and dead letters. Numbers new customers in ``directory``."""
    decoding = _Decoding(directory, quick or Quick())
    last = {record.partition: record for record in records}
    for record in records:
        if record.timestamp_us >= LATEST_US:
            _bury(record, Reason.RECORD_TIME.at(0), decoding)
            continue
        organization = record.organization_id
        if organization is not None and organization not in directory.organizations:
            named = parse_uuid4(organization)
            if not isinstance(named, str):
                _bury(record, Reason.ORGANIZATION_UNKNOWN.at(0, "organization_id", input=organization), decoding)
                continue
            record = msgspec.structs.replace(record, organization_id=named)
        if has_too_many_lines(record.value):
            _bury(record, Reason.RECORD_LINES.at(0), decoding)
            continue
        if record.admitted and record.distinct_keys and record.organization_id:
            decoding.add_plain(record)
            continue
        decoding.read_plain()
        if not _fast(record, decoding):
            _careful(record, decoding)
    decoding.read_plain()
    decoding.close_chunk()
    organizations, subjects = directory.take_fresh()
    dead = decoding.dead.table()
    positions = {partition: record.offset + 1 for partition, record in last.items()}
    return Batch(decoding.chunks, dead, positions, last, decoding.lines + dead.num_rows, organizations, subjects)


def _fast(record: Record, decoding: _Decoding) -> bool:
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
    decoding.add(record.organization_id, record, 0, events, raws)
    return True


def _careful(record: Record, decoding: _Decoding) -> None:
    now = instant_of(record.timestamp_us)
    for number, raw in enumerate(record.value.split(b"\n")):
        if not raw.strip():
            continue
        checked = check_line(raw, organization_id=record.organization_id, now=now)
        if isinstance(checked, Event):
            tenant = record.organization_id or checked.organization_id or ""
            decoding.add(tenant, record, number, [checked], [raw])
        else:
            decoding.dead.add(_dead_letter(record, number, raw, checked))


def _bury(record: Record, refusal: Refusal, decoding: _Decoding) -> None:
    """Every line of a record that says nothing as a whole: only a producer that skips the gateway gets here."""
    for number, raw in enumerate(lines_of(record.value)):
        if raw.strip():
            decoding.dead.add(_dead_letter(record, number, raw, refusal))


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
    parts = [str(part) for part in refusal.loc[3:] if part not in (CUSTOMER_VARIANT, EXTERNAL_VARIANT)]
    field = ".".join(parts)[:FIELD_SHOWN_MAX].encode(errors="replace").decode()
    return f"{field}: {refusal.msg}" if field else refusal.msg


def _stamps(rows: _Rows) -> Microseconds:
    ingested = of_records(rows.spans, lambda record: record.timestamp_us, np.int64)
    return parse_times([event.timestamp for event in rows.events], ingested)


def _chunk(rows: _Rows, stamps: Microseconds, texts: Texts, directory: Directory) -> Chunk:
    organization = directory.organization(rows.organization_id)
    events, raws = rows.events, rows.raws
    external_ids, identified_by = _external_ids(rows)
    ingested = of_records(rows.spans, lambda record: record.timestamp_us, np.int64)
    keys = _keys(organization.id_bytes, identified_by, raws)
    columns = {
        **places(rows.spans),
        "id_hi": keys.hi,
        "id_lo": keys.lo,
        "content": keys.content,
        "organization": np.full(len(events), organization.number, np.int32),
        "subject": _subjects(events, organization, directory),
        "name": pa.array([event.name for event in events], pa.string()),
        "timestamp": pa.array(stamps).cast(pa.timestamp("us")),
        "ingested_at": pa.array(ingested).cast(pa.timestamp("us")),
        "external_id": pa.array(external_ids, pa.string()),
        "parent": sparse([event.parent_id for event in events]),
        "member_id": _members(events),
        "external_member_id": _external_members(events),
        **metadata(texts),
    }
    stamped = np.array([event.timestamp is not None for event in events])
    return Chunk(pa.RecordBatch.from_pydict(columns), keys, raws, stamped, rows.organization_id)


def _external_ids(rows: _Rows) -> tuple[list[str], list[str]]:
    """The external ids, and what identities are made of: the same, unless a line has none.

    Such a line, from a producer that skips the gateway, is called by its place and known by it.
    """
    ids = [event.external_id for event in rows.events]
    if None not in ids and "" not in ids:
        return ids, ids  # type: ignore[return-value]  # there is no None
    places = [
        f"{span.record.partition}:{span.record.offset}:{span.first_line + line}"
        for span in rows.spans
        for line in range(span.lines)
    ]
    shown = [id or place for id, place in zip(ids, places, strict=True)]
    return shown, [id or place_key(place) for id, place in zip(ids, places, strict=True)]


def _keys(organization: bytes, identified_by: list[str], raws: list[bytes]) -> Keys:
    """Identities as ``meters.event.identity`` makes them, for a whole chunk at once."""
    digest = xxhash.xxh3_128_digest
    joined = b"".join([digest(organization + text.encode()) for text in identified_by])
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


def _members(events: Sequence[Event | Line]) -> pa.Array:
    """A member belongs to a ``customer_id``; beside an external customer it says nothing.

    ``kernels.Reader`` states this rule as a mask over columns, which these objects are not; a property test holds the
    two together.
    """
    members = [event.member_id for event in events]
    if members.count(None) < len(members):
        members = [event.member_id if event.external_customer_id is None else None for event in events]
    return sparse(members)


def _external_members(events: Sequence[Event | Line]) -> pa.Array:
    """The other way round."""
    members = [event.external_member_id for event in events]
    if members.count(None) < len(members):
        members = [event.external_member_id if event.external_customer_id is not None else None for event in events]
    return sparse(members)


def _subject(event: Event | Line, organization: Organization, directory: Directory) -> int:
    external = event.external_customer_id
    if external is not None:
        return directory.number_of(organization, external, is_external=True)
    return directory.number_of(organization, str(event.customer_id), is_external=False)
