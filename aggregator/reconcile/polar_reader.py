"""Read quantities and lists of either side of a Polar comparison, and cache Polar's answers for an interrupted run.

``Reader`` is the port to one side's API. ``Scope`` and ``Part`` say which time range and which events are compared;
``asked`` requests a meter's quantities. ``Remembering`` wraps a reader and stores each answer in a file.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from aggregator.forward.polar_client import NoAnswer, pages
from aggregator.reconcile.polar_pairing import Seen
from meters import exact
from meters.meter import Meter
from meters.timestamps import EPOCH, MICROSECOND, utc_text

# Sides, ranges and quantities.

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
        given = {"start_timestamp": utc_text(start), "end_timestamp": utc_text(end), "interval": interval}
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
    return {"start_timestamp": utc_text(part.since - MICROSECOND), "end_timestamp": utc_text(part.until)}


# The cache: a run that was interrupted continues without repeating its requests.
#
# Memory holds only the position of each answer in the file. Decimals are stored as numbers with all digits, since a
# decimal stored as text would be read as another type. An answer of an unexpected shape is not stored, because it
# would then be wrong for all retries of the next hours.
#
# A run compares a range in the past, so its answers stay valid while it is retried. The file is deleted when a run
# completes, and ignored when it is a few hours old or belongs to another range or organization.

GOOD_FOR = timedelta(hours=6)


def interrupted(path: Path, key: str, now: datetime) -> datetime | None:
    """When the run with this key began that left the file, or None where there is nothing to go on with."""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
            began = datetime.fromisoformat(head["began"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return began if head["key"] == key and now - began < GOOD_FOR else None


class Remembering:
    """A reader that asks each question once. Close it with ``complete`` when the run is, else just let go of it."""

    def __init__(self, reader: Reader, path: Path, key: str, began: datetime, *, go_on: bool) -> None:
        self._reader, self._path = reader, path
        self._places: dict[str, int] = _places(path) if go_on else {}  # of an answer's line in the file
        self.asked = 0
        if not go_on:
            head = json.dumps({"key": key, "began": began.isoformat()})
            path.write_text(head + "\n", encoding="utf-8")

    def get(self, path: str, **params: Any) -> Any:
        """The answer, from the file where it has one. Raises NoAnswer where it is neither a list nor quantities."""
        question = json.dumps([path, params], sort_keys=True, default=str)
        if question in self._places:
            with self._path.open("rb") as file:
                file.seek(self._places[question])
                return exact.decode(file.readline())[1]
        found = self._reader.get(path, **params)
        self.asked += 1
        if not _is_expected(found):
            raise NoAnswer(f"{path} answered something else than was asked for")
        with self._path.open("ab") as file:
            self._places[question] = file.tell()
            file.write(exact.encode([question, found]) + b"\n")
        return found

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page."""
        return pages(self.get, path, **params)

    def complete(self) -> None:
        """Forget everything: the next run asks anew."""
        self._path.unlink(missing_ok=True)


def _is_expected(answer: Any) -> bool:
    """Whether it is what all questions here are after: items of a list and how many pages there are, or quantities."""
    match answer:
        case {"items": list(), "pagination": {"max_page": int()}} | {"quantities": list(), "total": _}:
            return True
    return False


def _places(path: Path) -> dict[str, int]:
    """Where each question's line is; one that a kill cut short is taken away, and those behind it."""
    places: dict[str, int] = {}
    with path.open("r+b") as file:
        file.readline()
        place = file.tell()
        while (line := file.readline()).endswith(b"\n"):
            try:
                question, _ = exact.decode(line)
            except ValueError:
                break
            places[question] = place
            place = file.tell()
        file.truncate(place)
    return places
