"""Timestamps as senders write them, and calendar buckets.

``parse_timestamp`` reads the timestamp of an event. ``bucket`` returns the calendar unit (hour, day, week, month,
year) around an instant, ``units`` those that a range touches, and ``series`` the points of one of Polar's answers; all
work in a time zone and return UTC. ``microseconds_of`` and ``instant_of`` convert.
"""

import re
from calendar import monthrange
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import ROUND_FLOOR, Decimal, DecimalException
from enum import StrEnum
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

from meters.errors import Reason
from meters.exact import EXACT, Token

# Timestamps. ISO 8601 with an offset, or seconds since 1970 as a number or text; a number above 20 thousand million
# is milliseconds (the year 2603 in seconds, 1970 in milliseconds). These are pydantic's rules, on which Polar's
# senders rely. Digits below a microsecond are cut, never rounded into the future.

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


def utc_text(instant: datetime) -> str:
    """Write an instant in UTC as our answers and requests have it: a ``Z``, and a fraction only where there is one."""
    return instant.isoformat().replace("+00:00", "Z")


def sortable_text(instant: datetime) -> str:
    """Write an instant in UTC so that texts sort as the instants do: always with six digits of a fraction."""
    return instant.isoformat(timespec="microseconds")


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


# Calendar, half-open and in UTC. A *bucket* is one calendar unit of a time zone (weeks begin on Monday); every
# instant lies in exactly one, also where clocks are set back or forward. A *series* is the start and one interval
# after another up to and including the end. A point is not cut to its bucket; it stands for the whole bucket that
# contains it.
#
# Steps of a day and more keep the local time of day. A local time that the clock skips is read with the offset before
# the change, one that it shows twice with the offset after it, as PostgreSQL does. A step starts from the point
# before it, so a series that had to move (31 January, 29 February) stays there (29 March).

class Interval(StrEnum):
    """The calendar units that usage is shown by. A week begins on Monday."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


START_MIN = datetime(2023, 1, 1, tzinfo=UTC)
"""The earliest start of a range (Polar's limit)."""

KEPT_FROM = START_MIN.replace(year=START_MIN.year - 1)
"""The start of the first quarter hour that is kept in memory, a year before START_MIN. A chart by the year shows whole
local years, and west of Greenwich START_MIN lies in the year before. This limits memory to 35,000 quarter hours a
year."""

END_MAX = datetime(9000, 1, 1, tzinfo=UTC)
"""The latest end of a range: the calendar ends with the year 9999, and every bucket has to end before it."""

RANGE_DAYS_MAX = {
    Interval.HOUR: 7,
    Interval.DAY: 366,
    Interval.WEEK: 371,
    Interval.MONTH: 1460,
    Interval.YEAR: 3650,
}
"""Days between start and end (Polar's limits): they bound the points of an answer."""

_ZERO = timedelta()
_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)
_NO_ZONES = {"localtime", "posixrules", "Factory"}  # the server's own clock, a copy of New York's, none chosen


@lru_cache(maxsize=1)
def zone_names() -> frozenset[str]:
    """Of the system and of the package tzdata; without ``posix/`` and ``right/``, whose clock counts leap seconds.

    To look costs some 20 ms, once, because every file of the system's is opened.
    """
    return frozenset(available_timezones() - _NO_ZONES)


@lru_cache(maxsize=1024)
def zone(name: str) -> ZoneInfo | None:
    """The time zone of an IANA name, which minds case; None where there is none of that name."""
    return ZoneInfo(name) if name in zone_names() else None


def range_refusal(
    start: datetime, end: datetime, interval: Interval, names: tuple[str, str] = ("start_timestamp", "end_timestamp")
) -> str | None:
    """Why a range cannot be shown, or None. Days are counted between calendar dates, each in its own offset.

    ``names`` are those of the parameters that the range was given by.
    """
    if start < START_MIN:
        return f"{names[0]} should be {START_MIN.date()} or later"
    if end > END_MAX:
        return f"{names[1]} should be {END_MAX.date()} or earlier"
    if start > end:
        return f"{names[0]} should be before {names[1]}"
    days_max = RANGE_DAYS_MAX[interval]
    if (end.date() - start.date()).days > days_max:
        return f"The interval is too small for the given range: by the {interval} it may have {days_max} days."
    return None


def series(start: datetime, end: datetime, interval: Interval, timezone: str) -> list[datetime]:
    """The points from ``start`` to ``end`` inclusive, in UTC. Raises ValueError for an unknown time zone."""
    tz = _zone(timezone)
    points = []
    point, last = start.astimezone(UTC), end.astimezone(UTC)
    while point <= last:
        points.append(point)
        point = _next_point(point, interval, tz)
    return points


def units(start: datetime, end: datetime, interval: Interval, timezone: str) -> list[tuple[datetime, datetime]]:
    """The buckets, whole and in order, that ``[start, end)`` touches. Raises ValueError for an unknown time zone."""
    found = []
    instant = start.astimezone(UTC)
    while instant < end:
        starts, instant = bucket(instant, interval, timezone)
        found.append((starts, instant))
    return found


def bucket(instant: datetime, interval: Interval, timezone: str) -> tuple[datetime, datetime]:
    """The bucket ``[start, end)`` in UTC that holds the instant. Raises ValueError for an unknown time zone."""
    tz = _zone(timezone)
    if interval is Interval.HOUR:
        return _hour(instant.astimezone(UTC), tz)
    first = _first_day(instant.astimezone(tz).date(), interval)
    start, end = day_start(first, tz), day_start(_next_first_day(first, interval), tz)
    if instant >= end:  # the clock went back over midnight: the new day had begun already
        first = _next_first_day(first, interval)
        start, end = end, day_start(_next_first_day(first, interval), tz)
    return start, end


def day_start(day: date, tz: ZoneInfo) -> datetime:
    """The first instant, in UTC, at which the local calendar shows ``day`` or a later one."""
    midnight = datetime.combine(day, time(), tz)
    instant = midnight.astimezone(UTC)
    if instant.astimezone(tz).date() == day and instant.astimezone(tz).time() == time():
        return instant
    return _change(midnight.replace(fold=1).astimezone(UTC), instant, tz)  # the clock skipped midnight


def _zone(name: str) -> ZoneInfo:
    found = zone(name)
    if found is None:
        raise ValueError(f"no such time zone: {name}")
    return found


def _first_day(day: date, interval: Interval) -> date:
    if interval is Interval.WEEK:
        return day - timedelta(days=day.weekday())
    if interval is Interval.MONTH:
        return day.replace(day=1)
    return day.replace(month=1, day=1) if interval is Interval.YEAR else day


def _next_first_day(first: date, interval: Interval) -> date:
    if interval in (Interval.DAY, Interval.WEEK):
        return first + (_DAY if interval is Interval.DAY else 7 * _DAY)
    return _months_later(first, 12 if interval is Interval.YEAR else 1)


def _months_later(day: date, months: int) -> date:
    """The same day of a later month, or its last where it is shorter."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, monthrange(year, month + 1)[1]))


def _next_point(point: datetime, interval: Interval, tz: ZoneInfo) -> datetime:
    if interval is Interval.HOUR:
        return point + _HOUR
    local = point.astimezone(tz)
    day = _next_first_day(local.date(), interval)
    wall = datetime.combine(day, local.time(), tz)
    offset = min(wall.replace(fold=fold).utcoffset() or _ZERO for fold in (0, 1))
    return (wall.replace(tzinfo=UTC) - offset).replace(fold=0)


def _hour(instant: datetime, tz: ZoneInfo) -> tuple[datetime, datetime]:
    """The local clock hour, ended or begun early where the offset changes within it."""
    local = instant.astimezone(tz)
    past = timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
    start, end = instant - past, instant - past + _HOUR
    if _utc_offset(start, tz) != _utc_offset(instant, tz):
        start = _change(start, instant, tz)
    if _utc_offset(end - _MICROSECOND, tz) != _utc_offset(instant, tz):
        end = _change(instant, end, tz)
    return start, end


def _utc_offset(instant: datetime, tz: ZoneInfo) -> timedelta:
    return instant.astimezone(tz).utcoffset() or _ZERO


def _change(before: datetime, after: datetime, tz: ZoneInfo) -> datetime:
    """The instant within ``(before, after]`` at which the offset of ``before`` ends."""
    offset = _utc_offset(before, tz)
    while after - before > _MICROSECOND:
        middle = before + (after - before) // 2
        if _utc_offset(middle, tz) == offset:
            before = middle
        else:
            after = middle
    return after
