"""JSON whose numbers keep their digits.

``decode`` reads what operators send (meters, customers) and what the control stream holds. A fraction becomes a
``Decimal``, so that 0.1 comes back as 0.1; ``encode`` writes it as the same number. NaN, Infinity, half surrogate
pairs and everything else that is not JSON raise ValueError.
"""

import json
from collections import Counter
from decimal import Decimal, DecimalException
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec

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
