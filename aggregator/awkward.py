"""Numbers that DuckDB's JSON functions would bend, found early and kept as exact text beside the JSON.

DuckDB reads a JSON number as a 64-bit integer or as a double. Up to 15 significant digits a double gives back the
digits it was given; past that it does not, and nothing says so. Money must not depend on that, so every number
whose exact value could get lost is written into the column ``awkward``: a JSON object from JSON pointer to plain
decimal text, NULL for nearly all events. The SQL looks there first.

Looking at every number of every event would cost more than all the rest of the work, so the texts of many are looked at
as a whole, and only where digits and points fill eight neighboring places, or an ``e`` follows one, does anybody look
closer, first at each text: there the sign is a run of 15. A reserved number that was sent as text may be written with
escapes, so that its digits do not show: a text with both is looked at, too.
"""

import re
from collections.abc import Sequence

import msgspec
import numpy as np

from meters.amount import DECIMALS, number_text
from meters.facts import RESERVED, number_token

EXACT_DIGITS = 15  # any decimal of so many digits survives the way through a double and back
_FILLED = np.uint64(0x0101_0101_0101_0101)  # eight times True
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789.eE", b"0000000000ee")
_SIGNS = (b"0" * EXACT_DIGITS, b"0e")
_RESERVED_BEGINS = re.compile(rb'"(?:_|\\u005[fF])')
_ENCODE = msgspec.json.Encoder().encode
_NO_KEYS: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
_NESTED = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def any_suspicious(texts: bytes) -> bool:
    """Whether any of the joined JSON texts may hold an awkward number. Never wrong when it says no.

    Of 15 places in a row, eight fill an aligned word.
    """
    characters = np.frombuffer(texts, np.uint8)
    numeric = (characters - np.uint8(ord("0")) < 10) | (characters == ord("."))
    if (numeric[: len(numeric) // 8 * 8].view(np.uint64) == _FILLED).any():
        return True
    return bool((((characters[1:] | 0x20) == ord("e")) & numeric[:-1]).any()) or _may_hide_digits(texts)


def suspicious(text: bytes) -> bool:
    """Whether one JSON text may hold an awkward number. Never wrong when it says no."""
    zeros = text.translate(_DIGITS_TO_ZERO)
    return any(sign in zeros for sign in _SIGNS) or _may_hide_digits(text)


def _may_hide_digits(text: bytes) -> bool:
    """Whether there is a key like a reserved one, and an escape of what numbers are written with."""
    return b"\\" in text and b"\\u00" in text and _RESERVED_BEGINS.search(text) is not None


def awkward_numbers(metadata: dict[str, msgspec.Raw]) -> str | None:
    """The awkward numbers of one event's metadata, as a JSON object {pointer: exact text}, or None."""
    found: dict[str, str] = {}
    for key, raw in metadata.items():
        token = bytes(raw)
        if token[:1] == b"{":
            _, numbers = RESERVED.get(key, _NO_KEYS)
            for inner, inner_raw in _NESTED(token).items():
                exact = number_token(bytes(inner_raw)) if inner in numbers else bytes(inner_raw)
                _keep(found, (key, inner), exact)
        else:
            _keep(found, (key,), token)
    return _ENCODE(found).decode() if found else None


def pointer(steps: Sequence[str]) -> str:
    """The JSON pointer (RFC 6901) of a path, whatever its keys contain."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)


def _keep(found: dict[str, str], steps: Sequence[str], token: bytes) -> None:
    if _is_awkward(token):
        found[pointer(steps)] = number_text(token)


def _is_awkward(token: bytes) -> bool:
    if not (token.isascii() and (token[:1].isdigit() or token[:1] == b"-")):
        return False
    if b"e" in token or b"E" in token:
        return True
    _, _, decimals = token.partition(b".")
    return len(token.strip(b"-")) > EXACT_DIGITS or len(decimals) > DECIMALS
