"""The meter: which events count, and what is made of them.

A meter belongs to an organization and is never deleted, only archived. Its unit is for display and changes no number.
What it counts may change as well, since nothing bills here, so that a change rewrites no invoice.
"""

import re
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, get_args

import msgspec

from meters.aggregation import Aggregation, parse_aggregation
from meters.detail import Detail, detail
from meters.filter import Filter
from meters.filter_json import parse_filter
from meters.resource_metadata import parse_metadata

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

Loc = tuple[str | int, ...]
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
    """The meter that a decoded request body (``exact_json.decode``) asks for, or every complaint about it."""
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
