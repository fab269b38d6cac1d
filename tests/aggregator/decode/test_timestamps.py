"""Many times at once are what each of them is alone."""

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.decode.columns import Stamp, parse_times
from meters.timestamps import UNREADABLE, microseconds_of, parse_timestamp

USUAL = ["2026-03-01T10:00:00Z", "2026-03-01T10:00:00.5Z", "2024-02-29T23:59:59.123456Z"]
READABLE = [
    *USUAL, "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "1969-12-31T23:59:59.999999Z",
    "2026-03-01 10:00:00Z", "2026-03-01t10:00:00z", "2026-03-01T10:00:00,5Z", "2026-03-01T12:00:00+02:00",
    "2026-03-01T10:00Z", "2026-03-01T10:00:00.1234567Z", "2026-03-01T10:00:00.999999999Z",
    "1969-12-31T23:59:59.9999999Z", "2026-03-01_10:00:00Z", "1772359200", "1772359200000", "-1.5",
]
UNREAD = [
    "", "x", "é", "0000-01-01T00:00:00Z", "0000-12-31T23:59:59.999999Z", "2026-02-30T00:00:00Z", "2026-13-01T00:00:00Z",
    "2026-03-01T10:00:60Z", "2026-03-01T24:00:00Z", "2026-03-01T10Z", "2026-03-01T10:00:00", "2026-03-01T10:00:00.Z",
    "\uff12026-03-01T10:00:00Z", "2026-03-01T10:00:00Z\n", "2026-03-01T10:00:00Z\0", "2026-03-01T10:00:00\0Z",
    " 2026-03-01T10:00:00Z", "+2026-03-01T10:00:00Z", "2026-03-01  10:00:00Z", "2026-03-01T10:00:00ZZ",
    "0001-01-01T00:00:00+01:00",
]

instants = st.datetimes(timezones=st.just(UTC))
lengths = st.sampled_from([len("2026-03-01T10:00:00"), *range(len("2026-03-01T10:00:00.1"), 27)])
finer = st.builds(lambda instant, digits: f"{text(instant)}{digits}Z", instants, st.integers(0, 10**12))
written = st.builds(lambda instant, length: text(instant)[:length] + "Z", instants, lengths)
damaged = st.builds(
    lambda text, place, mark, cut: text[:place] + mark + text[place + cut :],
    written, st.integers(0, 27), st.sampled_from(["", *"0123456789 -+:.,TtZz\0\n\uff12"]), st.integers(0, 2),
)
elsewhere = st.datetimes(
    min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1), timezones=st.just(timezone(timedelta(hours=-7)))  # noqa: DTZ001
)


def text(instant: datetime) -> str:
    """With six digits behind the point, and no zone."""
    return instant.replace(tzinfo=None).isoformat(timespec="microseconds")


def alone(stamp: Stamp, missing: int) -> int:
    """What one event's time is."""
    if stamp is None:
        return missing
    instant = parse_timestamp(stamp) if isinstance(stamp, str) else stamp
    return microseconds_of(instant) if isinstance(instant, datetime) else UNREADABLE


anything = st.one_of(written, finer, damaged, elsewhere, st.none(), st.sampled_from(READABLE + UNREAD))


@given(st.lists(anything, max_size=12))
def test_many_are_read_as_each_is_alone(stamps: list[Stamp]) -> None:
    """Texts of all lengths, damaged ones, instants and none at all, in any order."""
    default = np.arange(len(stamps), dtype=np.int64)
    expected = [alone(stamp, missing) for missing, stamp in enumerate(stamps)]
    assert parse_times(stamps, default).tolist() == expected


@given(st.lists(instants, min_size=1, max_size=12), lengths)
def test_usual_texts_of_one_length_are_what_the_standard_library_reads(written: list[datetime], length: int) -> None:
    """Any instant of the calendar, with any number of digits that are not finer than a microsecond."""
    stamps = [text(instant)[:length] + "Z" for instant in written]
    expected = [microseconds_of(datetime.fromisoformat(stamp)) for stamp in stamps]
    assert parse_times(stamps, np.zeros(len(stamps), np.int64)).tolist() == expected


@pytest.mark.parametrize("stamp", READABLE)
def test_what_is_readable_is_read_among_others(stamp: str) -> None:
    """A stamp of another shape is read, and those beside it are as they would be without it."""
    default = np.array([7, 7, 7, 7], np.int64)
    first, found, none, last = parse_times([USUAL[0], stamp, None, USUAL[2]], default).tolist()
    assert (first, none, last) == (alone(USUAL[0], 0), 7, alone(USUAL[2], 0))
    assert found == alone(stamp, 0) != UNREADABLE


@pytest.mark.parametrize("stamp", UNREAD)
def test_what_is_not_spoils_no_other(stamp: str) -> None:
    """A year 0, 30 February, a leap second, a digit of another script: unreadable alone, and the others are read."""
    found = parse_times([USUAL[0], stamp, None, USUAL[2]], np.array([7, 7, 7, 7], np.int64)).tolist()
    assert found == [alone(USUAL[0], 0), UNREADABLE, 7, alone(USUAL[2], 0)]
