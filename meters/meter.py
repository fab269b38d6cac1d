"""Meters and the quantities they measure: the reference implementation.

``Meter`` says which events count (a filter) and how they are aggregated. ``new_meter`` and ``updated_meter`` turn a
request into a meter or complaints. ``quantities`` computes the series and the total of a meter over events; every
engine is tested against it. ``parse_metadata`` checks the metadata of meters and customers.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from itertools import islice
from typing import Any, Literal, get_args

import msgspec

from meters.aggregation import Aggregation, Function, combine, considers, evaluate, exact_sum, parse_aggregation
from meters.errors import COMPLAINTS_MAX, Detail, detail
from meters.event_values import Facts, text_of
from meters.filters import Filter, matches, parse_filter
from meters.timestamps import Interval, bucket, series

# Metadata of meters and customers: shown to their owner, never used for counting.

KEYS_MAX = 50
"""Keys of a resource's metadata (Polar's limit)."""

KEY_LENGTH_MAX = 40
"""Characters of a key (Polar's limit); at least one."""

STRING_LENGTH_MAX = 500
"""Characters of a value (Polar's limit); at least one."""

Loc = tuple[str | int, ...]


def parse_metadata(value: object, loc: Loc) -> dict[str, Any] | list[Detail]:
    """Metadata from decoded JSON, or every complaint about it; where keys are too many, about the first of them."""
    if not isinstance(value, dict):
        return [detail("dict_type", loc, "Input should be a valid dictionary", value)]
    complaints: list[Detail] = []
    if len(value) > KEYS_MAX:
        message = f"Dictionary should have at most {KEYS_MAX} items after validation, not {len(value)}"
        complaints.append(detail("too_long", loc, message, value))
    for key, item in islice(value.items(), KEYS_MAX):
        complaints += _item_complaints(key, item, loc)
    return complaints[:COMPLAINTS_MAX] or value


def _item_complaints(key: str, item: object, loc: Loc) -> list[Detail]:
    complaints = _length_complaints(key, KEY_LENGTH_MAX, (*loc, key, "[key]"))
    if isinstance(item, str):
        complaints += _length_complaints(item, STRING_LENGTH_MAX, (*loc, key))
    elif not isinstance(item, bool | int | Decimal):
        complaints.append(detail("string_type", (*loc, key), "Input should be a string, number or boolean", item))
    return complaints


def _length_complaints(text: str, length_max: int, loc: Loc) -> list[Detail]:
    if not text:
        return [detail("string_too_short", loc, "String should have at least 1 character", text)]
    if len(text) > length_max:
        return [detail("string_too_long", loc, f"String should have at most {length_max} characters", text)]
    return []


# The meter. A meter belongs to an organization and is never deleted, only archived. Its unit is for display. Filter
# and aggregation may change, because no invoices are made here.

Unit = Literal["scalar", "token", "custom"]
UNITS: tuple[Unit, ...] = get_args(Unit)

NAME_LENGTH_MIN = 3
"""Characters of a meter's name (Polar's limit)."""

INTEGER_LENGTH_MAX = 4300
"""Characters of an integer in text (Polar's limit, and Python's)."""

_FRACTION_MAX = 2**63  # a number with a point or an exponent, as Polar takes it: 1e400000 would fill the memory
_INTEGER = re.compile(r"([+-]?\d+(?:_\d+)*)(?:\.0+)?", re.ASCII)
_NO_INTEGER = {
    "int_type": "Input should be a valid integer",
    "int_from_float": "Input should be a valid integer, got a number with a fractional part",
    "int_parsing": "Input should be a valid integer, unable to parse string as an integer",
    "int_parsing_size": "Unable to parse input string as an integer, exceeded maximum size",
}
Fields = dict[str, Any]


class Meter(msgspec.Struct, frozen=True, kw_only=True):
    """A meter as its organization made it. Times are UTC."""

    id: str
    organization_id: str
    name: str
    filter: Filter
    aggregation: Aggregation
    created_at: datetime
    unit: Unit = "scalar"
    custom_label: str | None = None
    custom_multiplier: int | None = None
    metadata: dict[str, Any] = {}
    modified_at: datetime | None = None
    archived_at: datetime | None = None


def new_meter(body: object, *, id: str, organization_id: str, created_at: datetime) -> Meter | list[Detail]:
    """The meter that a decoded request body (``meters.exact.decode``) asks for, or every complaint about it."""
    if not isinstance(body, dict):
        return [detail("model_attributes_type", ("body",), "Input should be a valid dictionary or object", body)]
    fields, complaints = _fields(body)
    for key in ("name", "filter", "aggregation"):
        if key not in body:
            complaints.append(detail("missing", ("body", key), "Field required", body))
    if not complaints:
        complaints += _label_complaints(fields, body)
    if complaints:
        return complaints
    return Meter(id=id, organization_id=organization_id, created_at=created_at, **fields)


def updated_meter(meter: Meter, body: object, *, modified_at: datetime) -> Meter | list[Detail]:
    """The meter after a change, or every complaint.

    Sending null means "leave it", save for the label and the multiplier, which it clears. As with Polar, unit and
    label need not agree after a change.
    """
    if not isinstance(body, dict):
        return [detail("model_attributes_type", ("body",), "Input should be a valid dictionary or object", body)]
    clearable = ("custom_label", "custom_multiplier")
    fields, complaints = _fields({key: value for key, value in body.items() if value is not None or key in clearable})
    archive = body.get("is_archived")
    if archive is not None and not isinstance(archive, bool):
        complaints.append(detail("bool_type", ("body", "is_archived"), "Input should be a valid boolean", archive))
    if complaints:
        return complaints
    if archive is not None:
        fields["archived_at"] = (meter.archived_at or modified_at) if archive else None
    return msgspec.structs.replace(meter, modified_at=modified_at, **fields)


def _label_complaints(fields: Fields, body: Fields) -> list[Detail]:
    """A label is what the unit ``custom`` is called, and nothing else has one."""
    has_label = fields.get("custom_label") is not None
    if has_label is (fields.get("unit", "scalar") == "custom"):
        return []
    rule = "is required when unit is custom" if not has_label else "is allowed only when unit is custom"
    return [detail("value_error", ("body",), f"Value error, custom_label {rule}", body)]


def _fields(body: Fields) -> tuple[Fields, list[Detail]]:
    """The fields that the body gives, checked one by one."""
    fields: Fields = {}
    complaints: list[Detail] = []
    for key, parse in _PARSERS.items():
        if key not in body:
            continue
        parsed = parse(body[key], ("body", key))
        if isinstance(parsed, list):
            complaints += parsed
        else:
            fields[key] = parsed
    return fields, complaints


def _parse_name(value: object, loc: Loc) -> str | list[Detail]:
    if not isinstance(value, str):
        return [detail("string_type", loc, "Input should be a valid string", value)]
    if len(value) < NAME_LENGTH_MIN:
        return [detail("string_too_short", loc, f"String should have at least {NAME_LENGTH_MIN} characters", value)]
    return value


def _parse_unit(value: object, loc: Loc) -> str | list[Detail]:
    if value in UNITS:
        return str(value)
    return [detail("enum", loc, "Input should be 'scalar', 'token' or 'custom'", value)]


def _parse_label(value: object, loc: Loc) -> str | list[Detail] | None:
    if value is None or isinstance(value, str):
        return value
    return [detail("string_type", loc, "Input should be a valid string", value)]


def _parse_multiplier(value: object, loc: Loc) -> int | list[Detail] | None:
    if value is None:
        return None
    number = _integer(value)
    if isinstance(number, str):
        return [detail(number, loc, _NO_INTEGER[number], value)]
    return number if number > 0 else [detail("greater_than", loc, "Input should be greater than 0", value)]


def _integer(value: object) -> int | str:
    """An integer, as such, as 5.0 or in text, as Polar takes it; else which of _NO_INTEGER the value is."""
    if isinstance(value, str):
        return _integer_in(value.strip())
    if isinstance(value, Decimal):
        if value != value.to_integral_value():
            return "int_from_float"
        return int(value) if -_FRACTION_MAX < value < _FRACTION_MAX else "int_parsing_size"
    return value if isinstance(value, int) and not isinstance(value, bool) else "int_type"


def _integer_in(text: str) -> int | str:
    if len(text) > INTEGER_LENGTH_MAX:
        return "int_parsing_size"
    found = _INTEGER.fullmatch(text)
    return int(found[1]) if found else "int_parsing"


_PARSERS: dict[str, Any] = {
    "name": _parse_name,
    "unit": _parse_unit,
    "custom_label": _parse_label,
    "custom_multiplier": _parse_multiplier,
    "filter": parse_filter,
    "aggregation": parse_aggregation,
    "metadata": parse_metadata,
}


# Quantities. Each point of a series has the aggregation over its whole bucket. The total of count and sum is the sum
# of the quantities; of min and max the least and greatest over buckets that have events (the 0 of an empty bucket
# never wins); of avg and unique one aggregate over the events of the buckets shown. Polar differs in the last: its
# total reads all events ever stored.
#
# With a function per customer, each bucket first aggregates by customer and then applies that function to the
# results. Totals follow the same rules, except that avg and unique totals ignore customers.

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
