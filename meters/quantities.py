"""The answer to "how much, by when": the reference that every engine is tested against.

For each point of the series the meter's aggregation over the whole bucket of that point. The total of count and sum
is the sum of the quantities; of min and max the least and greatest over buckets that have events (the 0 shown for an
empty bucket never wins); of avg and unique one aggregate over the events of the buckets shown. In this the last
differs from Polar, whose total reads every event there ever was.

With a function per customer, each bucket first aggregates by customer and then applies that function to the results.
Totals follow the same rules, save that avg and unique totals do not know customers.
"""

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from decimal import Decimal

import msgspec

from meters.aggregation import Aggregation, Function, combine, considers, evaluate, exact_sum
from meters.facts import Facts, text_of
from meters.filter import matches
from meters.meter import Meter
from meters.window import Interval, bucket, series


class Quantity(msgspec.Struct, frozen=True):
    """What was used in the bucket that holds ``timestamp``."""

    timestamp: datetime
    quantity: Decimal


class Quantities(msgspec.Struct, frozen=True):
    """The series, in order of time, and its total."""

    quantities: list[Quantity]
    total: Decimal


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Whose usage is asked for. None asks for everyone's; two sets ask for either (``Catalogue.identifiers``).

    ``metadata`` keeps events whose value at each top-level key has one of the texts given.
    """

    customer_ids: frozenset[str] | None = None
    external_customer_ids: frozenset[str] | None = None
    metadata: Mapping[str, Collection[str]] = {}


EVERYONE = Selection()


def selects(selection: Selection, facts: Facts) -> bool:
    """Whether the event is among those asked for."""
    asked = selection.customer_ids is not None or selection.external_customer_ids is not None
    if asked and not (
        facts.customer_id in (selection.customer_ids or ())
        or facts.external_customer_id in (selection.external_customer_ids or ())
    ):
        return False
    return all(text_of(facts.metadata.get(key)) in texts for key, texts in selection.metadata.items())


def quantities(
    meter: Meter,
    events: Iterable[Facts],
    *,
    start: datetime,
    end: datetime,
    interval: Interval,
    timezone: str = "UTC",
    selection: Selection = EVERYONE,
    per_customer: Function | None = None,
) -> Quantities:
    """The meter's answer over all of its organization's events."""
    counted = [event for event in events if _counts(meter, selection, event)]
    points = series(start, end, interval, timezone)
    buckets = [_within(counted, bucket(point, interval, timezone)) for point in points]
    values = [_value(meter.aggregation, held, per_customer) for held in buckets]
    return Quantities(
        [Quantity(point, value) for point, value in zip(points, values, strict=True)],
        _total(meter.aggregation, buckets, values),
    )


def _counts(meter: Meter, selection: Selection, event: Facts) -> bool:
    return considers(meter.aggregation, event) and matches(meter.filter, event) and selects(selection, event)


def _within(events: list[Facts], bounds: tuple[datetime, datetime]) -> list[Facts]:
    first, last = bounds
    return [event for event in events if first <= event.timestamp < last]


def _value(aggregation: Aggregation, events: list[Facts], per_customer: Function | None) -> Decimal:
    if per_customer is None:
        return evaluate(aggregation, events)
    by_customer: dict[tuple[str | None, str | None], list[Facts]] = {}
    for event in events:
        name = (event.customer_id, None) if event.customer_id else (None, event.external_customer_id)
        by_customer.setdefault(name, []).append(event)
    return combine(per_customer, [evaluate(aggregation, group) for group in by_customer.values()])


def _total(aggregation: Aggregation, buckets: list[list[Facts]], values: list[Decimal]) -> Decimal:
    if aggregation.func in ("avg", "unique"):
        return evaluate(aggregation, [event for events in buckets for event in events])
    if aggregation.func in ("min", "max"):
        shown = [value for value, events in zip(values, buckets, strict=True) if events]
        return combine(aggregation.func, shown)
    return exact_sum(values)
