"""JSON whose numbers keep their digits.

``decode`` reads what operators send (meters, customers) and what the control stream holds. A fraction becomes a
``Decimal``, so that 0.1 comes back as 0.1; ``encode`` writes it as the same number. NaN, Infinity, half surrogate
pairs and everything else that is not JSON raise ValueError.
"""

import json
from decimal import Decimal, DecimalException
from typing import Any, NoReturn

import msgspec

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


def encode(value: Any) -> bytes:
    """Compact JSON of structs, dicts, lists, datetimes and decimals; decimals are numbers."""
    return _encoder.encode(value)
