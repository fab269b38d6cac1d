"""Columns of events that both ways of reading lines make: ``apply``, object by object, and ``quick``."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.awkward import any_suspicious, awkward_numbers, suspicious
from meters.log import Record

_DECODE_METADATA = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Span(NamedTuple):
    """Consecutive lines of one record."""

    record: Record
    first_line: int
    lines: int


def of_records(spans: Sequence[Span], of_record: Callable[[Record], int], dtype: type[np.signedinteger]) -> np.ndarray:
    """What a record says, for each of its lines."""
    values = np.array([of_record(span.record) for span in spans], dtype)
    return np.repeat(values, [span.lines for span in spans])


def places(spans: Sequence[Span]) -> dict[str, np.ndarray]:
    """Where each line is in the log."""
    numbers = [np.arange(span.first_line, span.first_line + span.lines, dtype=np.int32) for span in spans]
    return {
        "log_partition": of_records(spans, lambda record: record.partition, np.int32),
        "log_offset": of_records(spans, lambda record: record.offset, np.int64),
        "line": np.concatenate(numbers),
    }


class Texts(NamedTuple):
    """Texts in UTF-8, end to end, and where each begins; one more offset says where the last ends."""

    joined: bytes | npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int32]

    @property
    def column(self) -> pa.StringArray:
        """The texts as Arrow has them, without a copy."""
        return pa.StringArray.from_buffers(len(self.offsets) - 1, pa.py_buffer(self.offsets), pa.py_buffer(self.joined))


def sparse(values: list[str | None]) -> pa.Array:
    """A column that is nearly always empty."""
    if values.count(None) == len(values):
        return pa.nulls(len(values), pa.string())
    return pa.array(values, pa.string())


def metadata(texts: Texts) -> dict[str, pa.Array]:
    """Metadata as text, keys unique, tokens as sent; and the numbers that need exact text."""
    joined = bytes(texts.joined)
    awkward: pa.Array = pa.nulls(len(texts.offsets) - 1, pa.string())
    if any_suspicious(joined):
        each = [joined[start:end] for start, end in pairwise(texts.offsets.tolist())]
        awkward = sparse([awkward_numbers(_DECODE_METADATA(text)) if suspicious(text) else None for text in each])
    return {"metadata": texts.column, "awkward": awkward}
