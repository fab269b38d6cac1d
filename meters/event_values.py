"""The values of an event that filters and aggregations read, and the property names that select them.

``facts`` turns an ``Event`` into ``Facts``; ``lookup`` returns the value of a property, and ``text_of`` that value as
text. The six JSON types become ``str``, ``Number``, ``bool``, ``dict``, ``list`` and ``None``. ``parse_property``
checks a property name of a meter and ``written`` returns the form that is shown.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec

from meters.errors import Detail, detail
from meters.event import USER, Event
from meters.exact import number_text, parse_amount
from meters.timestamps import microseconds_of

# Property names. A property is a dotted path into the metadata, except for three built-in names. ``parse_property``
# removes one leading ``metadata.``. ``written`` adds the prefix only if the path itself begins with a key
# ``metadata``: without it, reading the shown name again would select another value.
#
# A key in double quotes is taken literally, so that a key with a dot in it, or one that equals a built-in name, can be
# selected: ``"gen_ai.usage.input_tokens"`` is one key, ``_llm."a.b"`` two; a quote in such a key is doubled. Quotes
# that do not enclose a whole key are part of it. Every reader of paths uses ``steps``.

PREFIX = "metadata."
NAME = "name"
SOURCE = "source"
TIMESTAMP = "timestamp"
BUILT_INS = frozenset({NAME, SOURCE, TIMESTAMP})

_QUOTED_KEY = re.compile(r'"((?:[^"]|"")*+)"(?=\.|\Z)')
_PATHS_REMEMBERED = 4096  # of a thousand organizations, a few each; a path that is read again costs no parsing

PROPERTY_LENGTH_MAX = 1000
"""Characters of a property: as long as a filter's text value may be; no key that anyone sends comes near."""


def parse_property(name: object, loc: tuple[str | int, ...]) -> str | Detail:
    """A property from decoded JSON, without one leading ``metadata.``, or why it is none."""
    if not isinstance(name, str):
        return detail("string_type", loc, "Input should be a valid string", name)
    if len(name) > PROPERTY_LENGTH_MAX:
        message = f"String should have at most {PROPERTY_LENGTH_MAX} characters"
        return detail("string_too_long", loc, message, name)
    return name.removeprefix(PREFIX)


def written(property: str) -> str:
    """The inverse of ``parse_property``."""
    return PREFIX + property if property.startswith(PREFIX) else property


@lru_cache(_PATHS_REMEMBERED)
def steps(path: str) -> tuple[str, ...]:
    """The keys of a path, from the outermost on. Every text is a path of at least one key."""
    found: list[str] = []
    at = 0
    while at <= len(path):
        quoted = _QUOTED_KEY.match(path, at)
        end = quoted.end() if quoted else path.find(".", at)
        end = len(path) if end < 0 else end
        found.append(quoted[1].replace('""', '"') if quoted else path[at:end])
        at = end + 1
    return tuple(found)


def path_of(keys: Sequence[str]) -> str:
    """A path that ``steps`` reads as these keys, with quotes where they are needed."""
    quoted = ['"' + key.replace('"', '""') + '"' for key in keys]
    plain = ".".join(keys)
    has_other_meaning = is_built_in(plain) or plain.startswith(PREFIX) or steps(plain) != tuple(keys)
    return ".".join(quoted) if has_other_meaning else plain


def is_built_in(name: str) -> bool:
    """Whether the property is a column of the event and not in its metadata."""
    return name in BUILT_INS


# Values. Reserved metadata gets its known shape here and nowhere else: unknown keys of ``_cost`` and ``_llm`` are
# dropped, and their numbers are numbers also when they were sent as text.

COST_NUMBERS = frozenset({"amount"})
COST_KEYS = frozenset({"amount", "currency"})
LLM_NUMBERS = frozenset({"input_tokens", "output_tokens", "total_tokens", "cached_input_tokens"})
LLM_KEYS = LLM_NUMBERS | {"vendor", "model", "prompt", "response"}
RESERVED: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "_cost": (COST_KEYS, COST_NUMBERS),
    "_llm": (LLM_KEYS, LLM_NUMBERS),
}
"""Reserved key: its known keys, and those of them that are numbers."""

MICROSECONDS_PER_SECOND = 1_000_000


class Number(msgspec.Struct, frozen=True, gc=False):
    """A JSON number: the token as it was sent, and the amount it states."""

    token: str
    amount: Decimal

    @property
    def text(self) -> str:
        """The form that ``like`` reads."""
        return number_text(self.token)


class Facts(msgspec.Struct, frozen=True):
    """An event as a meter reads it. ``timestamp`` is when it happened, in UTC."""

    name: str
    timestamp: datetime
    metadata: dict[str, Any] = {}
    source: str = USER
    customer_id: str | None = None
    external_customer_id: str | None = None


def number(token: str) -> Number:
    """A token as a number. Raises ValueError for one that no admitted event can carry."""
    amount = parse_amount(token)
    if amount is None:
        raise ValueError("more than 26 integer digits")
    return Number(token, amount)


def number_token(raw: bytes) -> bytes:
    """The digits of a reserved number, which may have been sent as text, and that with JSON's escapes."""
    return msgspec.json.decode(raw, type=str).encode() if raw.startswith(b'"') else raw


def facts(event: Event, ingested_at: datetime, source: str = USER) -> Facts:
    """The facts of an admitted event; its time is the time of ingestion where it states none."""
    return Facts(
        name=event.name,
        timestamp=event.timestamp or ingested_at,
        metadata={key: _value(key, bytes(raw)) for key, raw in event.metadata.items()},
        source=source,
        customer_id=event.customer_id,
        external_customer_id=event.external_customer_id,
    )


def _value(key: str, token: bytes) -> Any:
    if key not in RESERVED:
        return json.loads(token, parse_int=number, parse_float=number)
    value = json.loads(token, parse_int=_known_number, parse_float=_known_number)
    if isinstance(value, dict):
        known, numbers = RESERVED[key]
        return {name: _reserved(name in numbers, value[name]) for name in known if name in value}
    return value


def _known_number(token: str) -> Number | None:
    """None for what only a key can hold that is not known, and goes."""
    amount = parse_amount(token)
    return None if amount is None else Number(token, amount)


def _reserved(is_number: bool, value: Any) -> Any:
    return number(value) if is_number and isinstance(value, str) else value


def lookup(metadata: Mapping[str, Any], path: str) -> Any:
    """The value at a path of keys; None where there is nothing, or JSON null, or an array on the way."""
    value: Any = metadata
    for step in steps(path):
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value


def text_of(value: Any) -> str | None:
    """The text of a string, number or boolean; None for anything else, which has no text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number):
        return value.text
    return value if isinstance(value, str) else None


def epoch_seconds(instant: datetime) -> int:
    """Whole seconds since 1970, rounded half away from zero: the built-in property ``timestamp``."""
    microseconds = microseconds_of(instant)
    whole, rest = divmod(abs(microseconds), MICROSECONDS_PER_SECOND)
    seconds = whole + (2 * rest >= MICROSECONDS_PER_SECOND)
    return seconds if microseconds >= 0 else -seconds
