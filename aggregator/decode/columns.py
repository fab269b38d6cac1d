"""A batch of decoded events as columns."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from aggregator.decode.identities import Keys
from meters.event_values import RESERVED, number_token
from meters.exact import DECIMALS, number_text
from meters.log import Record
from meters.timestamps import UNREADABLE, microseconds_of, parse_timestamp

# Numbers that DuckDB's JSON functions would bend, found early and kept as exact text beside the JSON.
#
# DuckDB reads a JSON number as a 64-bit integer or as a double. Up to 15 significant digits a double gives back the
# digits it was given; past that it does not, and nothing says so. Money must not depend on that, so every number
# whose exact value could get lost is written into the column ``awkward``: a JSON object from JSON pointer to plain
# decimal text, NULL for nearly all events. The SQL looks there first.
#
# Looking at every number of every event would cost more than all the rest of the work, so the texts of many are
# looked at as a whole, and only where digits and points fill eight neighboring places, or an ``e`` follows one, does
# anybody look closer, first at each text: there the sign is a run of 15. A reserved number that was sent as text may
# be written with escapes, so that its digits do not show: a text with both is looked at, too.

EXACT_DIGITS = 15  # any decimal of so many digits survives the way through a double and back
_FILLED = np.uint64(0x0101_0101_0101_0101)  # eight times True
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789.eE", b"0000000000ee")
_SIGNS = (b"0" * EXACT_DIGITS, b"0e")
_RESERVED_BEGINS = re.compile(rb'"(?:_|\\u005[fF])')
_ENCODE = msgspec.json.Encoder().encode
_NO_KEYS: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
_NESTED = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def any_suspicious(texts: bytes) -> bool:
    """Whether any of the joined JSON texts may hold an awkward number. Never wrong when it says no.

    Of 15 places in a row, eight fill an aligned word.
    """
    characters = np.frombuffer(texts, np.uint8)
    numeric = (characters - np.uint8(ord("0")) < 10) | (characters == ord("."))
    if (numeric[: len(numeric) // 8 * 8].view(np.uint64) == _FILLED).any():
        return True
    return bool((((characters[1:] | 0x20) == ord("e")) & numeric[:-1]).any()) or _may_hide_digits(texts)


def suspicious(text: bytes) -> bool:
    """Whether one JSON text may hold an awkward number. Never wrong when it says no."""
    zeros = text.translate(_DIGITS_TO_ZERO)
    return any(sign in zeros for sign in _SIGNS) or _may_hide_digits(text)


def _may_hide_digits(text: bytes) -> bool:
    """Whether there is a key like a reserved one, and an escape of what numbers are written with."""
    return b"\\" in text and b"\\u00" in text and _RESERVED_BEGINS.search(text) is not None


def awkward_numbers(metadata: dict[str, msgspec.Raw]) -> str | None:
    """The awkward numbers of one event's metadata, as a JSON object {pointer: exact text}, or None."""
    found: dict[str, str] = {}
    for key, raw in metadata.items():
        token = bytes(raw)
        if token[:1] == b"{":
            _, numbers = RESERVED.get(key, _NO_KEYS)
            for inner, inner_raw in _NESTED(token).items():
                exact = number_token(bytes(inner_raw)) if inner in numbers else bytes(inner_raw)
                _keep(found, (key, inner), exact)
        else:
            _keep(found, (key,), token)
    return _ENCODE(found).decode() if found else None


def pointer(steps: Sequence[str]) -> str:
    """The JSON pointer (RFC 6901) of a path, whatever its keys contain."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)


def _keep(found: dict[str, str], steps: Sequence[str], token: bytes) -> None:
    if _is_awkward(token):
        found[pointer(steps)] = number_text(token)


def _is_awkward(token: bytes) -> bool:
    if not (token.isascii() and (token[:1].isdigit() or token[:1] == b"-")):
        return False
    if b"e" in token or b"E" in token:
        return True
    _, _, decimals = token.partition(b".")
    return len(token.strip(b"-")) > EXACT_DIGITS or len(decimals) > DECIMALS


# Times of many events at once.
#
# Nearly every sender writes ``2026-03-01T10:00:00.123456Z``, with some number of digits behind the point, and Arrow
# reads a column of such texts in one call instead of one object each. Digits finer than a microsecond, of which .NET
# writes one and Go three, are cut before. Whatever looks different is read one by one by ``meters.timestamps``, whose
# result Arrow's way equals; so is everything where one does not exist in the calendar, which the gateway lets nobody
# send.

Microseconds = npt.NDArray[np.int64]
_USUAL_LENGTH_MIN = len("2026-03-01T10:00:00Z")  # with less, Arrow also takes an hour alone, which is no time to us
_USUAL_LENGTH_MAX = len("2026-03-01T10:00:00.123456Z")
_USUAL = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?Z$"
_FINER = r"(\.\d{6})\d+Z$"
_YEAR_ONE = -62_135_596_800_000_000  # Arrow also takes a year 0
Stamp = str | datetime | None


def parse_times(stamps: Sequence[Stamp], default: Microseconds) -> Microseconds:
    """Microseconds since 1970, row by row; ``default`` where there is no time, UNREADABLE for a bad text."""
    result = default.copy()
    if all(stamp is None for stamp in stamps):
        return result
    texts = pa.array([stamp if isinstance(stamp, str) else None for stamp in stamps], pa.string())
    lengths = pc.binary_length(texts)
    if (pc.max(lengths).as_py() or 0) > _USUAL_LENGTH_MAX:
        texts = pc.replace_substring_regex(texts, _FINER, r"\1Z")
    usual = pc.and_(pc.ends_with(texts, "Z"), pc.greater_equal(lengths, _USUAL_LENGTH_MIN))
    if (read := _at_once(texts.filter(usual))) is None:  # to look closely takes twice as long
        usual = pc.match_substring_regex(texts, _USUAL)
        read = _at_once(texts.filter(usual))
    left = np.ones(len(stamps), np.bool_)
    if read is not None:
        left = ~usual.fill_null(False).to_numpy(zero_copy_only=False)
        result[~left] = read
    for row in np.flatnonzero(left).tolist():
        result[row] = _one(stamps[row], int(default[row]))
    return result


def _at_once(texts: pa.StringArray) -> Microseconds | None:
    """None unless every one has the usual shape and exists."""
    try:
        read: Microseconds = texts.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return None
    return None if (read < _YEAR_ONE).any() else read


def _one(stamp: Stamp, missing: int) -> int:
    if stamp is None:
        return missing
    instant = parse_timestamp(stamp) if isinstance(stamp, str) else stamp
    if not isinstance(instant, datetime):
        return UNREADABLE
    return microseconds_of(instant)


# Columns of events that both ways of reading lines make: ``apply``, object by object, and ``quick``.

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


# What one reading of the log says: rows as columns, and what could not be a row.

class Chunk(NamedTuple):
    """Rows of one organization, as columns."""

    rows: pa.RecordBatch
    keys: Keys
    raws: Sequence[bytes]
    stamped: npt.NDArray[np.bool_]  # whether the line carried its own timestamp
    organization_id: str


class Batch(NamedTuple):
    """``positions`` are the next offsets after it, for the partitions it moved, and ``last`` the records before.

    ``organizations`` and ``subjects`` are those that were numbered on the way.
    """

    chunks: list[Chunk]
    dead: pa.Table  # of ``aggregator.decode.dedup``
    positions: dict[int, int]
    last: dict[int, Record]
    lines: int
    organizations: list[tuple[int, str]]
    subjects: list[tuple[int, int, str, str]]
