"""Timestamps are read as pydantic reads them, because that is what Polar's senders rely on."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from meters.errors import Reason
from meters.exact import Token
from meters.timestamps import parse_timestamp

PYDANTIC = TypeAdapter(AwareDatetime)


def pydantic_says(text: str) -> datetime | None:
    """The instant that pydantic reads from a JSON value; None where it refuses."""
    try:
        return PYDANTIC.validate_json(text).astimezone(UTC)
    except (ValidationError, OverflowError):
        return None


def utc(*parts: int) -> datetime:
    """An instant."""
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-03-01T10:00:00Z", utc(2026, 3, 1, 10)),
        ("2026-03-01T10:00:00." + "0" * 5_000 + "Z", utc(2026, 3, 1, 10)),  # as the plain way reads it
        ("2026-03-01T10:00:00+02:00", utc(2026, 3, 1, 8)),
        ("2026-03-01t10:00:00-0330", utc(2026, 3, 1, 13, 30)),
        ("2026-03-01 10:00z", utc(2026, 3, 1, 10)),
        ("2026-03-01_10:00:00,25Z", utc(2026, 3, 1, 10, 0, 0, 250000)),
        ("2026-03-01T10:00:00.9999999Z", utc(2026, 3, 1, 10, 0, 0, 999999)),  # cut, not rounded
        ("1767225600", utc(2026, 1, 1)),
        ("1767225600.5", utc(2026, 1, 1, 0, 0, 0, 500000)),
        ("1767225600123", utc(2026, 1, 1, 0, 0, 0, 123000)),
        ("-5", utc(1969, 12, 31, 23, 59, 55)),
        ("20000000000", utc(2603, 10, 11, 11, 33, 20)),
        ("20000000001", utc(1970, 8, 20, 11, 33, 20, 1000)),
    ],
)
def test_instants_in_text(text: str, instant: datetime) -> None:
    """Calendar time with an offset, or seconds or milliseconds since 1970; always UTC when read."""
    assert parse_timestamp(text) == instant == pydantic_says(json.dumps(text))
    assert parse_timestamp(text).tzinfo is UTC  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2026-03-01T10:00:00", Reason.TIMEZONE_AWARE),
        ("2026-03-01", Reason.TIMEZONE_AWARE),
        ("2026-02-30T00:00:00Z", Reason.DATETIME_PARSING),
        ("2026-03-01T24:00:00Z", Reason.DATETIME_PARSING),
        ("2026-03-01T10:00:60Z", Reason.DATETIME_PARSING),
        ("2026-03-01T10:00:00+24:00", Reason.DATETIME_PARSING),
        ("2026-03-01T10:00:00+01:60", Reason.DATETIME_PARSING),
        ("2026-03-01T10:00:00+08", Reason.DATETIME_PARSING),
        ("2026-03-01T10:00:00 Z", Reason.DATETIME_PARSING),
        ("0000-01-01T00:00:00Z", Reason.DATETIME_PARSING),
        ("0001-01-01T00:00:00+10:00", Reason.DATETIME_PARSING),
        ("", Reason.DATETIME_PARSING),
        ("yesterday", Reason.DATETIME_PARSING),
        ("1e3", Reason.DATETIME_PARSING),
        ("1" * 1_000_000 + "x", Reason.DATETIME_PARSING),  # read once, and not once for each way to cut it in two
        (Token("1e30"), Reason.DATETIME_PARSING),
        (Token("1e999999999999"), Reason.DATETIME_PARSING),
        (Token("1e99999999999999999999"), Reason.DATETIME_PARSING),
        (None, Reason.DATETIME_TYPE),
        (True, Reason.DATETIME_TYPE),
        ([], Reason.DATETIME_TYPE),
    ],
)
def test_what_is_no_instant_is_refused_with_its_reason(value: object, reason: Reason) -> None:
    """A local time is refused as such; anything else is no time at all."""
    assert parse_timestamp(value) is reason


@given(st.datetimes(timezones=st.timezones() | st.just(UTC)), st.sampled_from(["T", " ", "t", "_"]))
def test_every_instant_comes_back_from_iso_text(instant: datetime, separator: str) -> None:
    """Text in any zone is the instant it was made from, where its offset is one of whole minutes."""
    offset = instant.utcoffset()
    if offset is not None and offset % timedelta(minutes=1) == timedelta() and 2 <= instant.year <= 9998:
        text = instant.isoformat(separator)
        assert parse_timestamp(text) == instant.astimezone(UTC) == pydantic_says(json.dumps(text))


@given(st.integers(-(10**16), 10**16))
def test_whole_numbers_are_read_as_pydantic_reads_them(number: int) -> None:
    """Seconds up to the watershed, milliseconds beyond; refused outside of the calendar."""
    ours = parse_timestamp(Token(str(number)))
    theirs = pydantic_says(str(number))
    assert (ours if isinstance(ours, datetime) else None) == theirs


@given(st.text("0123456789-+:.,TZz _e", max_size=32))
def test_any_text_is_an_instant_or_refused_with_a_reason(text: str) -> None:
    """Never anything else, never an exception, and never more lenient than pydantic."""
    ours = parse_timestamp(text)
    assert isinstance(ours, datetime | Reason)
    if isinstance(ours, datetime):
        theirs = pydantic_says(json.dumps(text))
        assert theirs is not None
        assert abs(theirs - ours) <= timedelta(microseconds=1)
