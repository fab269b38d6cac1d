"""Exact decimal amounts, and JSON that keeps every digit.

``parse_amount`` reads a JSON number as a ``Decimal`` or ``int`` and ``amount_text`` writes it. ``decode`` and
``encode`` are JSON with exact fractions, for requests of operators and the control stream. ``decode_tokens`` keeps
each number as it was written. No number passes through a float.
"""

import json
import re
from collections import Counter
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal, DecimalException, InvalidOperation
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec

# Amounts. An amount has at most 26 digits before the point and 12 after it, which is what a DECIMAL(38, 12) column
# holds, so every engine can store it without loss. It is read from the digits that were sent: ten times 0.1 is 1, and
# 9007199254740993 + 1 is 9007199254740994. More than 12 decimals are rounded half to even. More than 26 integer
# digits cannot be counted, and the event with them is refused.

DECIMALS = 12
"""Decimals of an amount: a millionth of a millionth. Token prices in cents need nine."""

INTEGER_DIGITS_MAX = 26
"""Digits before the point: what remains of a 38-digit decimal, the widest that a store adds natively."""

QUANTUM = Decimal(1).scaleb(-DECIMALS)

is_number_text = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch
"""Of a text: what is a number in JSON, too. ``Decimal`` reads ``1_0`` as ten, and the digits of every script."""

EXACT = Context(prec=50, rounding=ROUND_HALF_EVEN, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[InvalidOperation])
"""Wide enough for the sum of 10^12 of the largest amounts; a mean is taken in it before it is rounded."""


def parse_amount(token: str | bytes) -> Decimal | None:
    """The amount that a JSON number token states, or None when it has more than 26 integer digits."""
    text = token if isinstance(token, str) else token.decode("ascii")
    try:
        return round_amount(Decimal(text))
    except DecimalException:  # an exponent of more than 18 digits
        digits, _, exponent = text.lower().partition("e")
        return Decimal(0) if exponent.startswith("-") or (exponent and not digits.strip("-.0")) else None


def round_amount(number: Decimal) -> Decimal | None:
    """Half to even at 12 decimals; None when more than 26 integer digits remain."""
    if not number or number.adjusted() < -DECIMALS - 1:
        return Decimal(0)
    if number.adjusted() >= INTEGER_DIGITS_MAX:
        return None
    rounded = number.quantize(QUANTUM, context=EXACT)
    return None if rounded.adjusted() >= INTEGER_DIGITS_MAX else rounded


def amount_text(amount: Decimal) -> str:
    """Plain notation without exponent or trailing zeros: ``812``, ``0.0425``, ``-1.5``; zero is ``0``."""
    text = format(amount, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def decimal_text(amount: Decimal) -> str:
    """The same with at least one decimal, as a double is written: ``812.0``, ``0.0425``; zero is ``0.0``."""
    text = amount_text(amount)
    return text if "." in text else f"{text}.0"


def number_text(token: str | bytes) -> str:
    """The text of a JSON number, for ``like`` and for comparison with text.

    An integer token is its own text (``-0`` is ``0``). Any other is the amount with at least one decimal, so that
    5 and 5.0 stay apart as they do for the sender: ``5.0``, ``0.1``, ``100000.0``.
    """
    text = token if isinstance(token, str) else token.decode("ascii")
    if not any(mark in text for mark in ".eE"):
        return "0" if text == "-0" else text
    amount = parse_amount(text)
    return text if amount is None else decimal_text(amount)


# JSON. A fraction becomes a ``Decimal``, so 0.1 comes back as 0.1. NaN, Infinity, half surrogate pairs and everything
# else that is not JSON raise ValueError.

Kind = TypeVar("Kind")

_encoder = msgspec.json.Encoder(decimal_format="number")


def _fraction(token: str) -> Decimal:
    try:
        return Decimal(token)
    except DecimalException as error:
        raise ValueError(f"number out of range: {token[:40]}") from error


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def decode(text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError; too deep a nesting is a ValueError, too."""
    try:
        document = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(document, parse_float=_fraction, parse_constant=_constant)
        if "\\ud" in document.lower():
            _encoder.encode(value)  # refuses half of a surrogate pair
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def decoder(kind: type[Kind]) -> msgspec.json.Decoder[Kind]:
    """Reads structs several times as fast as ``decode``, for texts that ``encode`` wrote."""
    return msgspec.json.Decoder(kind, float_hook=_fraction)


def encode(value: Any) -> bytes:
    """Compact JSON of structs, dicts, lists, datetimes and decimals; decimals are numbers."""
    return _encoder.encode(value)


class Token(NamedTuple):
    """A JSON number as it was sent."""

    text: str

    def __repr__(self) -> str:
        return self.text


class Object(dict[str, Any]):
    """A JSON object; of a repeated key the last value holds, and ``repeated`` names it."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        times = Counter(name for name, _ in pairs) if len(pairs) > len(self) else {}
        self.repeated = sorted(name for name, count in times.items() if count > 1)


def decode_tokens(text: bytes) -> Any:
    """Like ``decode``, with every number as a ``Token`` and every object as an ``Object``.

    Raises ValueError for what is not JSON in UTF-8, RecursionError for thousands of levels. Half surrogate pairs pass.
    """
    return json.loads(
        text.decode("utf-8"), parse_int=Token, parse_float=Token, parse_constant=_constant, object_pairs_hook=Object
    )


def echo(value: Any) -> Any:
    """What was decoded as tokens, in a form that every JSON encoder of msgspec writes as it was sent."""
    if isinstance(value, Token):
        return msgspec.Raw(value.text)
    if isinstance(value, dict):
        return {key: echo(item) for key, item in value.items()}
    return [echo(item) for item in value] if isinstance(value, list) else value
