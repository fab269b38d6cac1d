"""Admitted records to columns without an object for a line: in half of the time, and half of that without a lock.

What ``kernels`` takes for ordinary becomes a chunk; whatever else, and everything until they are loaded, is for
``apply``. Both make the same rows, which a property test shows.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import structlog

from aggregator.batch import Chunk
from aggregator.columns import Span, Texts, metadata, of_records, places
from aggregator.directory import Directory, Organization
from aggregator.run import Search, Words
from aggregator.seen import Keys
from aggregator.timestamps import Microseconds, parse_times
from meters.log import Pieces
from meters.timestamp import UNREADABLE

LINES_MIN = 200
"""Fewer take longer than one by one."""

CHUNK_LINES = 4_000
"""Twice as many as ``apply`` takes at a time: a line holds the interpreter for less than half as long."""

LOAD_AFTER_LINES = 10_000
"""Lines that could have been read quickly, before that is made ready: a server with few events has no use for it."""

BYTES_MAX = 64 * 1024 * 1024
"""Of a chunk, ten times a round: places are 32-bit numbers, and each byte takes four more while quotes are found."""

SLOTS_MIN = 256
Numbers32 = npt.NDArray[np.int32]

logger = structlog.get_logger("aggregator")


class _Numbers:
    """The numbers of customers by a 128-bit hash of what names them: a table with open addresses, at most half full."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._count = 0
        self._table = self._free(SLOTS_MIN)

    def _free(self, slots: int) -> tuple[Words, Words, Numbers32]:
        return np.zeros(slots, np.uint64), np.zeros(slots, np.uint64), np.full(slots, self._kernels.UNKNOWN, np.int32)

    def find(self, hi: Words, lo: Words) -> Numbers32:
        found = np.empty(len(hi), np.int32)
        self._kernels.find_numbers(*self._table, hi, lo, found)
        return found

    def put(self, hi: Words, lo: Words, numbers: Numbers32) -> None:
        numbers, rows = np.unique(numbers, return_index=True)  # a customer who is new may have many lines
        hi, lo = hi[rows], lo[rows]
        self._count += len(numbers)
        if 2 * self._count > len(self._table[2]):
            old = self._table
            here = old[2] != self._kernels.UNKNOWN
            self._table = self._free(1 << (2 * self._count).bit_length())
            self._kernels.put_numbers(*self._table, *(column[here] for column in old))
        self._kernels.put_numbers(*self._table, hi, lo, numbers)


class _Read(NamedTuple):
    """Lines as ``kernels.scan`` found them."""

    kernels: Any
    joined: bytes
    text: npt.NDArray[np.uint8]
    spans: npt.NDArray[np.int32]
    lines: Numbers32

    @classmethod
    def of(cls, kernels: Any, joined: bytes, lines: int) -> "_Read | None":
        if not joined.isascii():
            try:
                joined.decode()
            except UnicodeDecodeError:
                return None
        text = np.frombuffer(joined, np.uint8)
        quotes = np.empty(len(text) + 1, np.int32)
        count = kernels.find_quotes(text, quotes)
        if count == kernels.ODD:
            return None
        spans, bounds = np.empty((lines, kernels.FIELDS, 2), np.int32), np.empty((lines, 2), np.int32)
        if kernels.scan(text, quotes, count, spans, bounds) != lines:  # fewer where a text has a line break
            return None
        return cls(kernels, joined, text, spans, bounds)

    def has(self, field: int) -> npt.NDArray[np.bool_]:
        """Which lines say something there."""
        said: npt.NDArray[np.bool_] = self.spans[:, field, 1] != self.kernels.MISSING
        return said

    def one(self, row: int, field: int) -> str:
        begin, end = self.spans[row, field]
        return self.joined[begin:end].decode()

    def sparse(self, field: int, where: npt.NDArray[np.bool_] | None = None) -> pa.Array:
        """The column of a field that few lines have; of those ``where`` it counts."""
        here = self.has(field) if where is None else self.has(field) & where
        if not here.any():
            return pa.nulls(len(here), pa.string())
        found = [self.one(row, field) if there else None for row, there in enumerate(here.tolist())]
        return pa.array(found, pa.string())

    def texts(self, field: int) -> Texts:
        room = int(np.maximum(self.spans[:, field, 1] - self.spans[:, field, 0], 2).sum())
        offsets, joined = np.empty(len(self.spans) + 1, np.int32), np.empty(room, np.uint8)
        self.kernels.gather(self.text, self.spans, field, offsets, joined)
        return Texts(joined[: offsets[-1]], offsets)

    def hashes(self, field: int, prefix: bytes) -> tuple[Words, Words]:
        longest = int((self.spans[:, field, 1] - self.spans[:, field, 0]).max())
        room = np.empty(len(prefix) + max(longest, 0), np.uint8)
        room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
        hi, lo = np.empty(len(self.spans), np.uint64), np.empty(len(self.spans), np.uint64)
        self.kernels.hash_texts(self.text, self.spans, field, room, len(prefix), hi, lo)
        return hi, lo

    def contents(self) -> Words:
        found = np.empty(len(self.lines), np.uint64)
        self.kernels.hash_lines(self.text, self.lines, found)
        return found

    def stamps(self, ingested: Microseconds) -> Microseconds:
        """What each line says of its time; where its spelling is unusual, ``timestamps`` reads it."""
        stamps = ingested.copy()
        if not self.kernels.read_times(self.text, self.spans, stamps):
            rows = np.flatnonzero(stamps == UNREADABLE)
            stamps[rows] = parse_times([self.one(row, self.kernels.TIMESTAMP) for row in rows.tolist()], stamps[rows])
        return stamps


class Quick:
    """For one engine: ``read`` is for its reader alone."""

    def __init__(self, kernels: Any = None) -> None:
        """With ``kernels`` they are used from the first line on."""
        self._kernels = kernels
        self._loading: threading.Thread | None = None
        self._lines = 0
        self._numbers: dict[int, tuple[_Numbers, _Numbers]] = {}

    @property
    def search(self) -> Search | None:
        """The compiled search in runs of identities, as soon as it is loaded."""
        return None if self._kernels is None else cast(Search, self._kernels.search)

    def pays(self, lines: int) -> bool:
        """Whether to ``read`` so many; where that would pay and is not ready, it will be."""
        if lines < LINES_MIN:
            return False
        self._lines += lines
        if self._kernels is None and self._loading is None and self._lines > LOAD_AFTER_LINES:
            # No daemon: a compiler that is in the way of the interpreter's end would end it with a signal.
            self._loading = threading.Thread(target=self._load, name="load-kernels")
            self._loading.start()
        return self._kernels is not None

    def read(self, spans: Sequence[Span], directory: Directory) -> Chunk | None:
        """The lines of whole records of one organization, which say that no key is given twice; None if any is odd."""
        lines = sum(span.lines for span in spans)
        if sum(len(span.record.value) for span in spans) > BYTES_MAX:
            return None
        found = _Read.of(self._kernels, b"\n".join([span.record.value for span in spans]), lines)
        if found is None:
            return None
        ingested = of_records(spans, lambda record: record.timestamp_us, np.int64)
        stamps = found.stamps(ingested)
        fields = found.kernels
        external = found.has(fields.EXTERNAL_CUSTOMER_ID)
        if (stamps == UNREADABLE).any() or not (external | found.has(fields.CUSTOMER_ID)).all():
            return None
        organization_id = spans[0].record.organization_id or ""
        organization = directory.organization(organization_id)
        keys = Keys(*found.hashes(fields.EXTERNAL_ID, organization.id_bytes), found.contents())
        columns = {
            **places(spans),
            "id_hi": keys.hi,
            "id_lo": keys.lo,
            "content": keys.content,
            "organization": np.full(lines, organization.number, np.int32),
            "subject": self._subjects(found, external, organization, directory),
            "name": found.texts(fields.NAME).column,
            "timestamp": pa.array(stamps).cast(pa.timestamp("us")),
            "ingested_at": pa.array(ingested).cast(pa.timestamp("us")),
            "external_id": found.texts(fields.EXTERNAL_ID).column,
            "parent": found.sparse(fields.PARENT_ID),
            "member_id": found.sparse(fields.MEMBER_ID, ~external),
            "external_member_id": found.sparse(fields.EXTERNAL_MEMBER_ID, external),
            **metadata(found.texts(fields.METADATA)),
        }
        raws = Pieces(found.joined, found.lines)
        stamped = found.has(fields.TIMESTAMP)
        return Chunk(pa.RecordBatch.from_pydict(columns), keys, raws, stamped, organization_id)

    def _subjects(
        self, found: _Read, external: npt.NDArray[np.bool_], organization: Organization, directory: Directory
    ) -> Numbers32:
        if organization.number not in self._numbers:
            self._numbers[organization.number] = _Numbers(self._kernels), _Numbers(self._kernels)
        by_external, by_id = self._numbers[organization.number]
        fields = found.kernels
        hashes = found.hashes(fields.EXTERNAL_CUSTOMER_ID, b"")
        subjects = by_external.find(*hashes)
        if not external.all():
            own = found.hashes(fields.CUSTOMER_ID, b"")
            subjects = np.where(external, subjects, by_id.find(*own))
        new = np.flatnonzero(subjects == fields.UNKNOWN)
        for row in new.tolist():
            field = fields.EXTERNAL_CUSTOMER_ID if external[row] else fields.CUSTOMER_ID
            subjects[row] = directory.number_of(organization, found.one(row, field), is_external=bool(external[row]))
        if len(new):
            rows = new[external[new]]
            by_external.put(hashes[0][rows], hashes[1][rows], subjects[rows])
            if len(rows) < len(new):
                rows = new[~external[new]]
                by_id.put(own[0][rows], own[1][rows], subjects[rows])
        return subjects

    def _load(self) -> None:
        try:
            import aggregator.kernels as kernels

            self._kernels = kernels
        except Exception as error:  # slower, never wrong
            effect = "lines are read one by one, at half the speed"
            logger.warning("quick_reading_off", reason=str(error), effect=effect)
