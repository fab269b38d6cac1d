"""The two sides of an upstream comparison, and the stretches of time that are asked about."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

import msgspec

from meters.timestamp import MICROSECOND

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
ROUNDING = Decimal("1e-9")  # of a quantity: a double has 15 digits, and adding a million of them costs six


class Reader(Protocol):
    """One side's API, with decimals exact."""

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of an answer."""
        ...

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list."""
        ...


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared: events of ``since`` up to ``until``, as they happened.

    One that arrived here at ``arrived_before`` or later may still be on its way: that it is missing is no difference.

    ``selection`` are the parameters of the feed that say what is forwarded at all.
    """

    organization_id: str
    since: datetime
    until: datetime
    arrived_before: datetime
    settles: bool = False  # whether anything may be on its way at all
    selection: Mapping[str, Any] = {}
    refused: Mapping[str, str] = {}  # external ids that Polar refuses for good, and its words
    is_pending: Callable[[str], bool] = lambda _: False  # whether the event at this place of the feed is not sent yet


class Part(NamedTuple):
    """A half-open stretch of time."""

    since: datetime
    until: datetime

    def __str__(self) -> str:
        return f"{self.since:%Y-%m-%d %H:%M} to {self.until:%Y-%m-%d %H:%M} UTC"


def near(one: Decimal, other: Decimal) -> bool:
    """Whether two quantities are the same but for the digits of doubles."""
    return abs(one - other) <= ROUNDING * max(abs(one), abs(other))


def days(part: Part) -> Iterator[Part]:
    """The part, cut at every midnight UTC."""
    start = part.since
    while start < part.until:
        end = min(midnight(start) + DAY, part.until)
        yield Part(start, end)
        start = end


def midnight(instant: datetime) -> datetime:
    """Where the day of the instant begins."""
    return instant.replace(hour=0, minute=0, second=0, microsecond=0)


def exclusive(part: Part) -> dict[str, str]:
    """The part as a list of events takes it: exclusive on both sides."""
    return {"start_timestamp": text(part.since - MICROSECOND), "end_timestamp": text(part.until)}


def text(instant: datetime) -> str:
    """As a query parameter."""
    return instant.isoformat().replace("+00:00", "Z")
