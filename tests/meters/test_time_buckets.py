"""Buckets and series, where clocks are set back and forward too."""

from datetime import UTC, date, datetime, timedelta
from importlib.resources import files
from zoneinfo import reset_tzpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meters.timestamps import Interval, bucket, day_start, parse_timestamp, range_refusal, series, zone, zone_names

MICROSECOND = timedelta(microseconds=1)


def instants(first_year: int, last_year: int) -> st.SearchStrategy[datetime]:
    """Any instant between the beginnings of two years."""
    first, last = datetime(first_year, 1, 1, tzinfo=UTC), datetime(last_year, 1, 1, tzinfo=UTC)
    return st.integers(0, (last - first) // MICROSECOND).map(lambda passed: first + passed * MICROSECOND)


# Zones whose clocks do what clocks should not: half hours, midnights skipped or shown twice, a day left out.
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "America/Havana",
    "America/St_Johns",
    "America/Sao_Paulo",
    "Asia/Beirut",
    "Pacific/Apia",
    "Africa/Cairo",
    "Asia/Kathmandu",
    "Antarctica/Troll",
)


def utc(text: str) -> datetime:
    """``2026-03-29 01:00`` as an instant."""
    instant = parse_timestamp(text + "Z")
    assert isinstance(instant, datetime), text
    return instant


@pytest.mark.parametrize(
    ("instant", "interval", "timezone", "start", "end"),
    [
        ("2026-03-01 10:30", "hour", "UTC", "2026-03-01 10:00", "2026-03-01 11:00"),
        ("2026-03-01 10:30", "day", "UTC", "2026-03-01 00:00", "2026-03-02 00:00"),
        ("2026-03-01 10:30", "week", "UTC", "2026-02-23 00:00", "2026-03-02 00:00"),  # from Monday
        ("2026-03-01 10:30", "month", "UTC", "2026-03-01 00:00", "2026-04-01 00:00"),
        ("2026-12-31 23:59", "year", "UTC", "2026-01-01 00:00", "2027-01-01 00:00"),
        ("2026-03-01 00:15", "hour", "Asia/Kolkata", "2026-02-28 23:30", "2026-03-01 00:30"),
        ("2026-03-29 12:00", "day", "Europe/Berlin", "2026-03-28 23:00", "2026-03-29 22:00"),  # 23 hours
        ("2026-10-25 12:00", "day", "Europe/Berlin", "2026-10-24 22:00", "2026-10-25 23:00"),  # 25 hours
        ("2026-10-25 00:30", "hour", "Europe/Berlin", "2026-10-25 00:00", "2026-10-25 01:00"),  # 02:30, first
        ("2026-10-25 01:30", "hour", "Europe/Berlin", "2026-10-25 01:00", "2026-10-25 02:00"),  # 02:30, second
        ("2026-03-29 12:00", "month", "Europe/Berlin", "2026-02-28 23:00", "2026-03-31 22:00"),
        ("2026-04-04 14:45", "hour", "Australia/Lord_Howe", "2026-04-04 14:00", "2026-04-04 15:00"),
        ("2026-04-04 15:15", "hour", "Australia/Lord_Howe", "2026-04-04 15:00", "2026-04-04 15:30"),  # half of it
        ("2026-03-29 00:00", "day", "Asia/Beirut", "2026-03-28 22:00", "2026-03-29 21:00"),  # no midnight: from 01:00
        ("2026-11-01 04:30", "day", "America/Havana", "2026-11-01 04:00", "2026-11-02 05:00"),  # two midnights
        ("2011-12-31 00:00", "day", "Pacific/Apia", "2011-12-30 10:00", "2011-12-31 10:00"),  # the 30th never was
    ],
)
def test_the_bucket_that_holds_an_instant(instant: str, interval: str, timezone: str, start: str, end: str) -> None:
    """A calendar unit of the zone, as two instants in UTC, the second not in it."""
    assert bucket(utc(instant), Interval(interval), timezone) == (utc(start), utc(end))


@given(
    instants(1950, 2100),
    st.sampled_from(Interval),
    st.sampled_from(ZONES) | st.sampled_from(sorted(zone_names())),
)
def test_buckets_partition_time(instant: datetime, interval: Interval, timezone: str) -> None:
    """Every instant is in exactly one bucket, in every zone there is."""
    assert_partition(instant, interval, timezone)


CHANGES = (
    ("America/St_Johns", "2010-11-07 02:31"),  # 00:01 becomes 23:01 of the day before
    ("America/St_Johns", "2011-03-13 03:31"),  # 00:01 becomes 01:01
    ("America/Toronto", "1919-03-31 04:30"),  # 23:30 becomes 00:30: midnight is skipped
    ("America/Havana", "2026-11-01 05:00"),  # 01:00 becomes 00:00
    ("America/Sao_Paulo", "2018-11-04 03:00"),  # 00:00 becomes 01:00
    ("America/Sao_Paulo", "2018-02-18 02:00"),  # 00:00 becomes 23:00
    ("Antarctica/Troll", "2026-03-29 01:00"),  # two hours at once
    ("Australia/Lord_Howe", "2026-04-04 15:00"),  # half an hour
    ("Pacific/Apia", "2011-12-30 10:00"),  # a whole day
    ("Africa/Monrovia", "1972-01-07 00:44"),  # 44 minutes and a half
)


@given(st.sampled_from(CHANGES), st.integers(-(3 * 3600), 3 * 3600), st.integers(-1, 1), st.sampled_from(Interval))
def test_buckets_partition_time_where_clocks_change(
    change: tuple[str, str], seconds: int, microseconds: int, interval: Interval
) -> None:
    """The same, in the hours around the oddest changes of the last hundred years."""
    timezone, text = change
    instant = utc(text) + timedelta(seconds=seconds, microseconds=microseconds)
    assert_partition(instant, interval, timezone)


def assert_partition(instant: datetime, interval: Interval, timezone: str) -> None:
    """The instant is in its bucket, so is all of the bucket, and its neighbors touch it."""
    start, end = bucket(instant, interval, timezone)
    assert start <= instant < end
    assert bucket(start, interval, timezone) == (start, end)
    assert bucket(end - MICROSECOND, interval, timezone) == (start, end)
    assert bucket(end, interval, timezone)[0] == end
    assert bucket(start - MICROSECOND, interval, timezone)[1] == start


@given(
    st.sampled_from(ZONES),
    st.dates(date(1950, 1, 1), date(2100, 1, 1)),
)
def test_a_day_starts_when_the_calendar_first_shows_it(timezone: str, day: date) -> None:
    """At its midnight, or at the first moment after it where the clock skips midnight."""
    tz = zone(timezone)
    assert tz is not None
    start = day_start(day, tz)
    assert start.astimezone(tz).date() >= day
    assert (start - MICROSECOND).astimezone(tz).date() < day


@pytest.mark.parametrize(
    ("start", "end", "interval", "timezone", "points"),
    [
        ("2026-03-01 12:00", "2026-03-03 11:00", "day", "UTC", ["2026-03-01 12:00", "2026-03-02 12:00"]),
        ("2026-03-01 00:00", "2026-03-02 00:00", "day", "UTC", ["2026-03-01 00:00", "2026-03-02 00:00"]),
        ("2026-03-01 00:00", "2026-03-01 00:00", "year", "UTC", ["2026-03-01 00:00"]),
        ("2026-03-02 00:00", "2026-03-01 00:00", "day", "UTC", []),
        (
            "2024-01-31 00:00",
            "2024-05-01 00:00",
            "month",
            "UTC",
            ["2024-01-31 00:00", "2024-02-29 00:00", "2024-03-29 00:00", "2024-04-29 00:00"],
        ),
        (
            "2024-02-29 00:00",
            "2026-03-01 00:00",
            "year",
            "UTC",
            ["2024-02-29 00:00", "2025-02-28 00:00", "2026-02-28 00:00"],
        ),
        (  # noon stays noon
            "2026-03-28 11:00",
            "2026-03-30 11:00",
            "day",
            "Europe/Berlin",
            ["2026-03-28 11:00", "2026-03-29 10:00", "2026-03-30 10:00"],
        ),
        (  # 02:30 does not exist on the 29th and is 03:30; from there on it stays
            "2026-03-28 01:30",
            "2026-03-31 00:00",
            "day",
            "Europe/Berlin",
            ["2026-03-28 01:30", "2026-03-29 01:30", "2026-03-30 01:30"],
        ),
        (  # 02:30 exists twice on the 25th: the second counts
            "2026-10-24 00:30",
            "2026-10-26 01:30",
            "day",
            "Europe/Berlin",
            ["2026-10-24 00:30", "2026-10-25 01:30", "2026-10-26 01:30"],
        ),
        (  # hours are hours
            "2026-10-24 23:00",
            "2026-10-25 02:00",
            "hour",
            "Europe/Berlin",
            ["2026-10-24 23:00", "2026-10-25 00:00", "2026-10-25 01:00", "2026-10-25 02:00"],
        ),
        (
            "2026-01-01 00:00",
            "2026-01-15 00:00",
            "week",
            "UTC",
            ["2026-01-01 00:00", "2026-01-08 00:00", "2026-01-15 00:00"],
        ),
    ],
)
def test_the_points_of_a_series(start: str, end: str, interval: str, timezone: str, points: list[str]) -> None:
    """From the start, by the local calendar, up to and including the end."""
    assert series(utc(start), utc(end), Interval(interval), timezone) == [utc(point) for point in points]


@given(
    instants(2023, 2040),
    st.integers(0, 7),
    st.sampled_from([Interval.DAY, Interval.WEEK, Interval.MONTH, Interval.YEAR]),
    st.sampled_from(ZONES),
)
def test_points_stand_for_buckets_of_their_own(start: datetime, steps: int, interval: Interval, timezone: str) -> None:
    """No bucket of a day and more is counted twice in one series."""
    days = {Interval.DAY: 1, Interval.WEEK: 7, Interval.MONTH: 30, Interval.YEAR: 366}[interval]
    points = series(start, start + timedelta(days=days * steps), interval, timezone)
    buckets = [bucket(point, interval, timezone) for point in points]
    assert points[0] == start
    assert len(set(buckets)) == len(points) == len(set(points))


@pytest.mark.parametrize(
    "timezone",
    [
        *("utc", "Europe/Nowhere", "", "../UTC", "/etc/passwd", "a\0b", "Europe", "zone.tab"),
        *("localtime", "posixrules", "Factory", "posix/Europe/Berlin", "right/Europe/Berlin", "right/UTC"),
    ],
)
def test_what_is_no_time_zone_is_none(timezone: str) -> None:
    """Names mind case; neither the server's own clock nor one that counts leap seconds is a time zone's."""
    assert zone(timezone) is None
    with pytest.raises(ValueError, match="no such time zone"):
        series(utc("2026-03-01 00:00"), utc("2026-03-02 00:00"), Interval.DAY, timezone)


@pytest.mark.parametrize("path", [(), None], ids=["of the package", "of the system"])
def test_zones_are_those_of_the_package_where_the_system_has_none(path: tuple[str, ...] | None) -> None:
    """Every zone of the package is known, with files of the system and without."""
    names = (files("tzdata") / "zones").read_text("ascii").split()
    reset_tzpath(path)
    zone_names.cache_clear()
    try:
        assert zone_names() >= {*names} - {"Factory"}
        assert zone_names().isdisjoint({"Factory", "localtime", "posixrules"})
    finally:
        reset_tzpath()
        zone_names.cache_clear()


@pytest.mark.parametrize(
    ("interval", "days"), [("hour", 7), ("day", 366), ("week", 371), ("month", 1460), ("year", 3650)]
)
def test_a_range_has_at_most_so_many_days(interval: str, days: int) -> None:
    """Counted from date to date; the time of day does not matter."""
    start = utc("2023-01-01 23:59")
    last = utc("2023-01-01 23:59") + timedelta(days=days)
    assert range_refusal(start, last, Interval(interval)) is None
    assert range_refusal(start, last + timedelta(minutes=1), Interval(interval)) is not None


def test_days_are_counted_in_the_offsets_that_were_sent() -> None:
    """Polar subtracts the dates as they are written."""
    start = datetime.fromisoformat("2024-01-01T23:30:00+00:00")
    end = datetime.fromisoformat("2024-01-09T00:30:00+02:00")
    assert range_refusal(start, end, Interval.HOUR) is not None
    assert range_refusal(start, end.astimezone(UTC), Interval.HOUR) is None


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2022-12-31 23:59", "2023-01-02 00:00"),
        ("2024-01-02 00:00", "2024-01-01 00:00"),
        ("8999-12-31 00:00", "9000-01-02 00:00"),
    ],
)
def test_ranges_that_cannot_be_shown(start: str, end: str) -> None:
    """Before 2023, backwards, or at the end of the calendar."""
    assert range_refusal(utc(start), utc(end), Interval.DAY)
