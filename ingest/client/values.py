"""Values as applications have them, made into values that metadata may hold.

Where the meaning is clear a value is converted: None and the empty string say nothing and are left out, decimals keep
their digits, instants become ISO 8601, whatever counts as an integer becomes one, enumerations their value. Where
it is not clear (NaN, an instant without zone, anything nested) the event is refused, at the line that captured it.

``_cost.amount`` is in cents and is rounded half to even at 12 decimals, because ``0.1 + 0.2`` has 17.
"""

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal, DecimalException
from enum import Enum
from math import isfinite
from operator import index
from typing import Any
from uuid import UUID

from meters.amount import amount_text, round_amount
from meters.refusal import COST_INTEGER_DIGITS_MAX, STRING_LENGTH_MAX, Reason

COST = "_cost"
LLM = "_llm"

_INTEGER_MAX = 1 << 63
"""Integers below this are written natively; larger ones as decimals."""

_DOUBLE_DIGITS = 15
"""Decimal digits that survive a double: a longer amount is sent as text, which no reader bends."""

_COUNTS = ("input_tokens", "output_tokens", "total_tokens")
_LLM_KEYS = frozenset({"vendor", "model", *_COUNTS, "cached_input_tokens", "prompt", "response"})
_NOT_FINITE = ("finite_number", "Input should be a finite number")


class Unacceptable(Exception):
    """The event cannot be sent as it is: ``type``, ``loc`` and ``msg`` are the rejection's."""

    def __init__(self, reason: Reason | tuple[str, str], *loc: str) -> None:
        self.type, self.msg = reason.value if isinstance(reason, Reason) else reason
        self.loc = loc
        super().__init__(self.msg)


def clean(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that can be encoded and will be taken. Raises Unacceptable."""
    cleaned = {}
    for key, value in metadata.items():
        kind = type(value)
        if kind is str:
            if not value:
                continue
            if len(value) > STRING_LENGTH_MAX:
                raise Unacceptable(Reason.STRING_TOO_LONG, "metadata", key)
        elif kind is float:
            if not isfinite(value):
                raise Unacceptable(_NOT_FINITE, "metadata", key)
        elif kind is not bool and not (kind is int and -_INTEGER_MAX < value < _INTEGER_MAX):
            value = _converted(key, value)
            if value is None:
                continue
        cleaned[key] = value
    for key in (COST, LLM):
        if key in cleaned and not isinstance(cleaned[key], dict):
            raise Unacceptable(Reason.DICT_TYPE, "metadata", key)
    return cleaned


def _converted(key: str, value: Any) -> Any:
    if value is None:
        return None
    if key == COST:
        return _cost(value)
    if key == LLM:
        return _llm(value)
    return _ordinary(value, ("metadata", key))


def _ordinary(value: Any, loc: tuple[str, ...]) -> Any:
    if isinstance(value, Enum):
        return clean({loc[-1]: value.value}).get(loc[-1])
    if isinstance(value, str):
        return clean({loc[-1]: str.__str__(value)}).get(loc[-1])
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise Unacceptable(Reason.TIMEZONE_AWARE, *loc)
        return value.isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return _number(value, loc, Reason.METADATA_VALUE)


def _number(value: Any, loc: tuple[str, ...], otherwise: Reason) -> Decimal:
    """An exact number from a decimal, a float (as it is displayed) or whatever counts as an integer."""
    number = _as_decimal(value, loc, otherwise)
    if round_amount(number) is None:
        raise Unacceptable(Reason.NUMBER_TOO_LARGE, *loc)
    return number


def _as_decimal(value: Any, loc: tuple[str, ...], otherwise: Reason) -> Decimal:
    if isinstance(value, Decimal):
        number = value
    elif isinstance(value, float):
        number = Decimal(float.__repr__(value))
    else:
        try:
            number = Decimal(index(value))
        except TypeError:
            raise Unacceptable(otherwise, *loc) from None
    if not number.is_finite():
        raise Unacceptable(_NOT_FINITE, *loc)
    return number


def _cost(value: Any) -> dict[str, Any]:
    loc = ("metadata", COST)
    if not isinstance(value, Mapping):
        raise Unacceptable(Reason.DICT_TYPE, *loc)
    for name in ("amount", "currency"):
        if value.get(name) is None:
            raise Unacceptable(Reason.MISSING, *loc, name)
    currency = value["currency"]
    if not isinstance(currency, str) or "usd" not in currency:
        raise Unacceptable(Reason.CURRENCY, *loc, "currency")
    return {"amount": _cost_amount(value["amount"], (*loc, "amount")), "currency": currency}


def _cost_amount(value: Any, loc: tuple[str, ...]) -> Decimal | str:
    """Cents, rounded; in text where a double could not hold the digits."""
    if isinstance(value, bool):
        raise Unacceptable(Reason.DECIMAL_TYPE, *loc)
    try:
        stated = Decimal(value) if isinstance(value, str) else value
    except DecimalException:
        raise Unacceptable(Reason.DECIMAL_TYPE, *loc) from None
    amount = round_amount(_as_decimal(stated, loc, Reason.DECIMAL_TYPE))
    if amount is None or amount.adjusted() >= COST_INTEGER_DIGITS_MAX:
        raise Unacceptable(Reason.DECIMAL_WHOLE_DIGITS, *loc)
    text = amount_text(amount)
    return text if len(text) > _DOUBLE_DIGITS and len(_significant(text)) > _DOUBLE_DIGITS else Decimal(text)


def _significant(text: str) -> str:
    return text.replace(".", "").strip("-0")


def _llm(value: Any) -> dict[str, Any]:
    loc = ("metadata", LLM)
    if not isinstance(value, Mapping):
        raise Unacceptable(Reason.DICT_TYPE, *loc)
    told = {name: part for name, part in value.items() if part is not None}
    for name in ("vendor", "model", *_COUNTS):
        if name not in told:
            raise Unacceptable(Reason.MISSING, *loc, name)
    told = {name: part for name, part in told.items() if name in _LLM_KEYS}  # the server does not look at others
    for name, part in told.items():
        if name in _COUNTS or name == "cached_input_tokens":
            if type(part) is int and -_INTEGER_MAX < part < _INTEGER_MAX:
                continue
            number = _number(part, (*loc, name), Reason.INT_TYPE)
            if number != int(number):
                raise Unacceptable(Reason.INT_FROM_FLOAT, *loc, name)
            told[name] = int(number)
        elif not isinstance(part, str):
            raise Unacceptable(Reason.STRING_TYPE, *loc, name)
    return told


def clipped(words: str, length: int) -> str:
    """As much of a text as is kept."""
    return words if len(words) <= length else words[: length - 1] + "…"


def sendable(words: str) -> str:
    """A text as JSON can carry it: halves of a surrogate pair are put together or replaced, NUL is left out."""
    whole = words if words.isascii() else words.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "")
