"""The metadata of meters and customers, which is theirs to show and never counts."""

from decimal import Decimal
from itertools import islice
from typing import Any

from meters.detail import COMPLAINTS_MAX, Detail, detail

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
