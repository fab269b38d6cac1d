"""When an event happened, as senders write it.

ISO 8601 with an offset, or seconds since 1970 as a number or in text; a number beyond 20 thousand million is
milliseconds (the year 2603 in the one reading, 1970 in the other). These are pydantic's rules, which Polar's senders
rely on. Whatever is finer than a microsecond is cut, never rounded into the future.
"""

import re
from datetime import UTC, datetime, timedelta, timezone
from decimal import ROUND_FLOOR, Decimal, DecimalException

from meters.amount import EXACT
from meters.exact_json import Token
from meters.refusal import Reason

WATERSHED = Decimal(20_000_000_000)
"""Beyond this a number counts milliseconds."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
UNREADABLE = -(2**63)
"""Stands for microseconds since 1970 where there is no instant."""
_NUMBER_LENGTH_MAX = 1000  # characters of a number in text; a million digits take tens of milliseconds
_MAGNITUDE_MAX = 20  # decimal digits; the last microsecond of the year 9999 has 18
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)  # one way to match: a long text takes no long time
_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[Tt _](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?(Z|z|[+-]\d\d:?\d\d)?)?", re.ASCII
)


def microseconds_of(instant: datetime) -> int:
    """Microseconds since 1970."""
    return (instant - EPOCH) // MICROSECOND


def instant_of(microseconds: int) -> datetime:
    """The instant in UTC that is so many microseconds after the beginning of 1970."""
    return EPOCH + timedelta(microseconds=microseconds)


def parse_timestamp(value: object) -> datetime | Reason:
    """The instant in UTC, or the reason why there is none."""
    if isinstance(value, Token):
        return _from_epoch(value.text)
    if not isinstance(value, str):
        return Reason.DATETIME_TYPE
    if len(value) <= _NUMBER_LENGTH_MAX and _NUMBER.fullmatch(value):
        return _from_epoch(value)
    parts = _ISO.fullmatch(value)
    return _from_calendar(parts) if parts else Reason.DATETIME_PARSING


def _from_epoch(text: str) -> datetime | Reason:
    try:
        seconds = Decimal(text)
        if seconds.adjusted() > _MAGNITUDE_MAX:
            return Reason.DATETIME_PARSING
        scale = 3 if abs(seconds) > WATERSHED else 6
        microseconds = EXACT.scaleb(seconds, scale).to_integral_value(ROUND_FLOOR)
        return instant_of(int(microseconds))
    except (DecimalException, OverflowError):
        return Reason.DATETIME_PARSING


def _from_calendar(parts: re.Match[str]) -> datetime | Reason:
    year, month, day, hour, minute, second, fraction, offset = parts.groups()
    microsecond = int((fraction or "")[:6].ljust(6, "0"))
    try:
        local = datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0), microsecond, UTC
        )
        return local - _offset(offset) if offset else Reason.TIMEZONE_AWARE
    except (ValueError, OverflowError):
        return Reason.DATETIME_PARSING


def _offset(text: str) -> timedelta:
    """East of Greenwich is positive. Raises ValueError beyond 23:59, as ``timezone`` does."""
    if text in ("Z", "z"):
        return timedelta()
    hours, minutes = int(text[1:3]), int(text[-2:])
    if minutes > 59:
        raise ValueError("an hour has 60 minutes")
    offset = timedelta(hours=hours, minutes=minutes)
    return timezone(offset if text[0] == "+" else -offset).utcoffset(None)
