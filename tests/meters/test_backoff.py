"""Backoff with jitter, and what ``Retry-After`` asks for."""

from datetime import UTC, datetime

import pytest

from meters.backoff import RETRY_AFTER_S_MAX, Backoff, retry_after_s

NOW_US = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()) * 1_000_000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("", None), ("soon", None), ("0", 0.0), (" 17 ", 17.0), ("99999999", RETRY_AFTER_S_MAX),
        ("9" * 5_000, RETRY_AFTER_S_MAX), ("\u00b2", None), ("-5", None), ("1.5", None),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0), ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0), ("Mon, 02 Mar 2026 12:00:00 GMT", RETRY_AFTER_S_MAX),
        ("Mon, 01 Jan 99999999999999 00:00:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after_has_two_forms(header: str | None, seconds: float | None) -> None:
    """Seconds or a date; what is neither is as if it were not there, and nobody makes us wait for hours."""
    assert retry_after_s(header, NOW_US) == seconds


def test_pauses_grow_and_are_bounded() -> None:
    """They double from the first one to the longest, drawn from the upper half."""
    backoff = Backoff(0.5, 60.0)
    shortest = [backoff.pause_s(failures, 0.0) for failures in range(1, 12)]
    longest = [backoff.pause_s(failures, 0.999_999) for failures in range(1, 12)]
    assert shortest == sorted(shortest)
    assert shortest[:3] == [0.25, 0.5, 1.0]
    assert all(2 * low == pytest.approx(high, rel=1e-3) for low, high in zip(shortest, longest, strict=True))
    assert shortest[-1] == 30.0 < longest[-1] < 60.0


def test_failures_without_end_are_counted() -> None:
    """No number of them is too large for the power."""
    assert Backoff(0.5, 60.0).pause_s(1_000_000, 0.0) == 30.0


def test_jitter_may_only_lengthen() -> None:
    """Where a pause is promised, it is drawn from above it."""
    backoff = Backoff(2.0, 1_000.0, jitter=(1.0, 1.1))
    assert [backoff.pause_s(failures, 0.0) for failures in (1, 2, 3)] == [2.0, 4.0, 8.0]
    assert backoff.pause_s(1, 0.5) == pytest.approx(2.1)
