"""The columns of a batch of decoded events, and the parsers that read one column at once.

``Batch`` is the result of one read from the log: ``Chunk`` objects (rows of one organization as Arrow columns), dead
letters and log positions. Both decoders of ``decode.py`` build their columns here. ``parse_times`` reads timestamps,
``metadata`` builds the metadata column, and ``awkward_numbers`` keeps the exact text of numbers that DuckDB would
round.
"""

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

# Exact numbers.
#
# DuckDB's JSON functions read a number as a 64-bit integer or as a double. A double keeps at most 15 significant
# digits, and DuckDB reports no loss beyond that. Amounts of money must be exact, so every number whose value could
# change is written into the column ``awkward``: a JSON object from JSON pointer to plain decimal text, NULL for
# nearly all events. The SQL of a meter looks there first.
#
# Parsing every number of every event would cost more than all other work. So the texts of many events are searched
# together for a place where digits and points fill eight neighboring bytes, or where an ``e`` follows a digit. Only
# texts around such a place are searched one by one, for 15 digits in a row. A reserved number sent as text may
# contain escapes that hide its digits, so a text with a reserved key and an escape is also examined.

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


# Timestamps of many events.
#
# Nearly every sender writes ``2026-03-01T10:00:00.123456Z`` with some number of fractional digits. Arrow reads a
# column of such texts in one call. Digits finer than a microsecond (.NET sends one, Go three) are cut off before. A
# text of any other form is read by ``meters.timestamps``, with the same result. If one text of a column names a date
# that does not exist, the whole column is read that way; the gateway accepts no such date.

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


# Columns that both decoders build: the one that makes an object for each line and the compiled one.

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


# The result of one read from the log.

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
