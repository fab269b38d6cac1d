"""The two sides of an upstream comparison, and the stretches of time that are asked about."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from aggregator.reconcile.pairing import Seen
from meters.meter import Meter
from meters.timestamp import EPOCH, MICROSECOND

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
POINTS_AT_ONCE = 366  # the longest range of days that one request may ask for; of hours no more than a day is asked for
Interval = Literal["day", "hour"]
STEP: Mapping[Interval, timedelta] = {"day": DAY, "hour": HOUR}
Series = dict[datetime, Decimal]
"""Quantities by when their day or hour begins."""
ROUNDING = Decimal("1e-9")  # of a quantity: a double has 15 digits, and adding a million of them costs six


class Reader(Protocol):
    """One side's API, with decimals exact."""

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of an answer."""
        ...

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list."""
        ...


class Forwarded(msgspec.Struct, frozen=True):
    """Which of our events go there at all: those that parameters of the feed select, from a place of the log on.

    ``began`` is when that place was the log's end; what happened before may have gone there some other way.
    """

    selection: Mapping[str, Any] = {}
    begin: str = ""
    began: datetime | None = None

    @property
    def is_all(self) -> bool:
        """Whether every event is."""
        return not self.selection and not self.begin


class Both(NamedTuple):
    """A meter here, and the id of its namesake over there; ``is_rolled``: which counts sums that are sent there."""

    here: Meter
    there: str
    is_rolled: bool = False


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared: events of ``since`` up to ``until``, as they happened.

    One that arrived here at ``arrived_before`` or later may still be on its way: that it is missing is no difference.

    ``raw`` is forwarded event by event, ``rolled`` as sums of a ``window``. ``doubt`` says why nothing may be mended
    over there by what is found, where that is so.
    """

    organization_id: str
    since: datetime
    until: datetime
    arrived_before: datetime
    settles: bool = False  # whether anything may be on its way at all
    raw: Forwarded = Forwarded()
    rolled: Forwarded = Forwarded()
    window: timedelta = MICROSECOND
    doubt: str = ""
    refused: Mapping[str, str] = {}  # external ids that Polar refuses for good, and its words
    is_pending: Callable[[Seen], bool] = lambda _: False  # whether an event of ours is not sent yet

    def forwarded(self, both: Both) -> Forwarded:
        """How a meter's usage gets there."""
        return self.rolled if both.is_rolled else self.raw

    def usage_before(self, both: Both) -> datetime:
        """What arrived here then or later may still be on its way: a sum is sent when its window is over."""
        open_for = (self.arrived_before - EPOCH) % self.window if both.is_rolled else timedelta(0)
        return self.arrived_before - open_for


class Part(NamedTuple):
    """A half-open stretch of time."""

    since: datetime
    until: datetime

    def __str__(self) -> str:
        return f"{self.since:%Y-%m-%d %H:%M} to {self.until:%Y-%m-%d %H:%M} UTC"


def asked(
    side: Reader, meter_id: str, part: Part, interval: Interval, who: str | None = None
) -> tuple[Series, Decimal]:
    """A meter's quantities of whole days or hours, of one customer or of all; and its own total."""
    found: Series = {}
    total, start, step = Decimal(0), part.since, STEP[interval]
    while start < part.until:
        end = min(start + (POINTS_AT_ONCE - 1) * step, part.until - step)
        given = {"start_timestamp": text(start), "end_timestamp": text(end), "interval": interval}
        answer = side.get(f"/v1/meters/{meter_id}/quantities", **given, external_customer_id=who)
        for point in answer["quantities"]:
            found[datetime.fromisoformat(point["timestamp"])] = Decimal(str(point["quantity"]))
        total, start = total + Decimal(str(answer["total"])), end + step
    return found, total


def since(series: Series, began: datetime | None) -> Series:
    """The quantities of days or hours that lie wholly behind the instant; without one, all of them."""
    return series if began is None else {at: amount for at, amount in series.items() if at >= began}


def near(one: Decimal, other: Decimal, without_signs: Decimal = Decimal(0)) -> bool:
    """Whether two quantities are the same but for the digits of doubles. What cancels out has the errors of its parts,
    which are more than it: ``without_signs`` is what these add up to, where anybody knows."""
    return abs(one - other) <= ROUNDING * max(abs(one), abs(other), without_signs, Decimal(1))


def days(part: Part) -> Iterator[Part]:
    """The part, cut at every midnight UTC."""
    start = part.since
    while start < part.until:
        end = min(midnight(start) + DAY, part.until)
        yield Part(start, end)
        start = end


def day_of(instant: datetime) -> Part:
    """The whole day of the instant."""
    return Part(midnight(instant), midnight(instant) + DAY)


def halves(part: Part) -> tuple[Part, Part]:
    """The part in two, at a whole hour where there is one: a meter's quantities are known by the hour."""
    middle = part.since + (part.until - part.since) / 2
    middle = hour(middle) if hour(middle) > part.since else middle
    return Part(part.since, middle), Part(middle, part.until)


def hours_of(part: Part) -> Part:
    """The whole hours that the part lies in."""
    return Part(hour(part.since), hour(part.until - MICROSECOND) + HOUR)


def midnight(instant: datetime) -> datetime:
    """Where the day of the instant begins."""
    return instant.replace(hour=0, minute=0, second=0, microsecond=0)


def hour(instant: datetime) -> datetime:
    """Where the hour of the instant begins."""
    return instant.replace(minute=0, second=0, microsecond=0)


def exclusive(part: Part) -> dict[str, str]:
    """The part as a list of events takes it: exclusive on both sides."""
    return {"start_timestamp": text(part.since - MICROSECOND), "end_timestamp": text(part.until)}


def text(instant: datetime) -> str:
    """As a query parameter."""
    return instant.isoformat().replace("+00:00", "Z")
