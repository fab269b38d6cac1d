"""What an event's metadata may hold.

An ordinary value is a string of 1 to 500 characters, a number or a boolean; of a repeated key the last value holds.
Two keys are reserved. ``_cost`` says what the event cost its sender: ``amount`` in cents and ``currency``. ``_llm``
says what a language model did: who, and how many tokens. In both a repeated key is refused, since nobody could tell
which amount was meant; keys they do not know are let through and do not exist for anyone.

Deliberate differences: an amount of more than 12 decimals is rounded and not refused, because that is what adding
cents in JavaScript makes; numbers in text must be JSON numbers; a number of more than 26 integer digits is refused.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from meters.amount import INTEGER_DIGITS_MAX, parse_amount
from meters.exact_json import Object, Token
from meters.refusal import COST_INTEGER_DIGITS_MAX, STRING_LENGTH_MAX, Reason

JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


class Complaint(NamedTuple):
    """What is wrong, where within the metadata, and with which value."""

    reason: Reason
    loc: tuple[str, ...]
    value: Any


Check = Callable[[Any], Reason | None]


def complaints(metadata: Object) -> Iterator[Complaint]:
    """Everything that is wrong with an event's metadata, decoded as tokens."""
    for key, value in metadata.items():
        if key in _RESERVED:
            yield from _reserved_complaints(key, value)
        elif reason := _ordinary(value):
            yield Complaint(reason, (key,), value)


def _ordinary(value: Any) -> Reason | None:
    if isinstance(value, str):
        if not value:
            return Reason.STRING_TOO_SHORT
        return Reason.STRING_TOO_LONG if len(value) > STRING_LENGTH_MAX else None
    if isinstance(value, Token):
        return None if _is_short(value.text) or parse_amount(value.text) is not None else Reason.NUMBER_TOO_LARGE
    return None if isinstance(value, bool) else Reason.METADATA_VALUE


def _is_short(number: str) -> bool:
    """Whether a JSON number cannot have too many digits, as nearly every one: to work it out takes ten times longer."""
    return len(number) <= INTEGER_DIGITS_MAX and "e" not in number and "E" not in number


def _reserved_complaints(key: str, value: Any) -> Iterator[Complaint]:
    if not isinstance(value, Object):
        yield Complaint(Reason.DICT_TYPE, (key,), value)
        return
    required, optional = _RESERVED[key]
    for name in value.repeated:
        yield Complaint(Reason.DUPLICATE_KEY, (key, name), value[name])
    for name in required:
        if name not in value:
            yield Complaint(Reason.MISSING, (key, name), value)
    for name, check in (required | optional).items():
        if name in value and (reason := check(value[name])):
            yield Complaint(reason, (key, name), value[name])


def _token(value: Any) -> str | None:
    """The digits of a number, or of text that holds one."""
    if isinstance(value, Token):
        return value.text
    return value if isinstance(value, str) and JSON_NUMBER.fullmatch(value) else None


def _cost_amount(value: Any) -> Reason | None:
    token = _token(value)
    if token is None:
        return Reason.DECIMAL_TYPE
    amount = parse_amount(token)
    whole_digits_fit = amount is not None and amount.adjusted() < COST_INTEGER_DIGITS_MAX
    return None if whole_digits_fit else Reason.DECIMAL_WHOLE_DIGITS


def _token_count(value: Any) -> Reason | None:
    token = _token(value)
    if token is None:
        return Reason.INT_TYPE
    amount = parse_amount(token)
    if amount is None:
        return Reason.NUMBER_TOO_LARGE
    return None if amount == amount.to_integral_value() else Reason.INT_FROM_FLOAT


def _string(value: Any) -> Reason | None:
    return None if isinstance(value, str) else Reason.STRING_TYPE


def _string_or_null(value: Any) -> Reason | None:
    return None if value is None else _string(value)


def _currency(value: Any) -> Reason | None:
    """Polar asks only that ``usd`` occurs, in lower case."""
    return _string(value) or (None if "usd" in value else Reason.CURRENCY)


_COUNTS: dict[str, Check] = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _token_count)
_RESERVED: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "_cost": ({"amount": _cost_amount, "currency": _currency}, {}),
    "_llm": (
        {"vendor": _string, "model": _string, **_COUNTS},
        {"cached_input_tokens": _token_count, "prompt": _string_or_null, "response": _string_or_null},
    ),
}
"""Reserved key: the fields it must have and those it may have, each with its rule."""
