"""Calendar windows, half-open and in UTC."""

from enum import StrEnum


class Interval(StrEnum):
    """The calendar units that usage is shown by. A week begins on Monday."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"
