"""Times of many events at once.

Nearly every sender writes ``2026-03-01T10:00:00.123456Z``, with some number of digits behind the point, and Arrow reads
a column of such texts in one call instead of one object each. Digits finer than a microsecond, of which .NET writes one
and Go three, are cut before. Whatever looks different is read one by one by ``meters.timestamp``, whose result Arrow's
way equals; so is everything where one does not exist in the calendar, which the gateway lets nobody send.
"""

from collections.abc import Sequence
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from meters.timestamp import UNREADABLE, microseconds_of, parse_timestamp

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
