"""The client's events: values, limits, rejections, and sealing into bytes.

``seal`` turns an event of the application into a ``Sealed`` one: it sets the time and the id if none was given,
converts values (``clean``), checks what the server would refuse, and makes the bytes. Retries and restarts never
change id or bytes. ``EventRefused`` and ``SpoolFull`` are the exceptions that a caller may see; ``Rejection``
describes an event that is not sent or not accepted; ``Limits`` bounds the client.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal, DecimalException
from enum import Enum
from math import isfinite
from operator import index
from os import urandom
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal
from uuid import UUID

import msgspec

from meters.errors import COST_INTEGER_DIGITS_MAX, NAME_LENGTH_MAX, STRING_LENGTH_MAX, Reason
from meters.exact import amount_text, round_amount

# Limits, each with its reason.

MEBIBYTE = 1 << 20


def _state_directory() -> Path:
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError:  # a user without a home, as in containers
        return Path(gettempdir())


DEFAULT_SPOOL = _state_directory() / "meterstream"
"""Where what is not yet acknowledged is kept unless a directory is named: the place for the state of programs."""

MEMORY_EVENTS_MAX = 20_000
"""Events held in memory when a spool holds them, too: some ten megabytes; what is beyond is read back from it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Every bound of a client. The defaults suit a web application; each can be changed alone."""

    batch_events_max: int = 1000
    """Events of a request: its cost is spread over enough of them, and a refused one is soon isolated."""

    batch_bytes_max: int = MEBIBYTE
    """Bytes of a request before compression: a tenth of what servers take, sent in a second on a slow line."""

    linger_s: float = 0.5
    """Seconds that an event waits for others to share its request."""

    in_flight_max: int = 4
    """Requests at once: enough that a round trip of 20 ms still lets 200,000 events a second through."""

    held_bytes_max: int = 256 * MEBIBYTE
    """Bytes of events not yet acknowledged, on disk (or in memory where there is no spool): half a million to a
    million events, hours of a busy application without its server. The journal adds at most 16 MiB to it."""

    block_s_max: float = 1.0
    """The longest that capturing an event may wait for room, when that is what a full spool shall do. Who comes after
    one that waited in vain is refused at once, until room appears."""

    close_s_max: float = 5.0
    """Seconds to send the rest at the end; orchestrators kill after ten or thirty."""

    request_s_max: float = 30.0
    """Seconds until an unanswered request counts as failed."""

    backoff_s: float = 0.25
    """The first pause after a failure; it doubles with each."""

    backoff_s_max: float = 30.0
    """The longest pause, unless the server asks for a longer one."""

    retry_after_s_max: float = 600.0
    """The longest pause that a server may ask for: whoever says next year is mistaken."""

    adopt_every_s: float = 30.0
    """Seconds between two looks for what processes that are gone have left in the spool."""


# Rejections. A rejection carries the server's words (``type``, ``loc``, ``msg``), whether the client found the error
# at capture or the server answered 422, so that one handler reads both.

By = Literal["capture", "server", "spool"]


class Rejection(msgspec.Struct, frozen=True):
    """One event that does not count, and why.

    ``event`` is what the caller gave, or, when the server refused it, what was sent. ``by`` is who refused: the
    checks at ``capture``, the ``server``, or the ``spool``, which had no room.
    """

    event: Any
    external_id: str | None
    type: str
    loc: tuple[str | int, ...]
    msg: str
    by: By


class EventRefused(ValueError):
    """Raised in strict mode: change the event. ``rejection`` says what is wrong with it."""

    def __init__(self, rejection: Rejection) -> None:
        place = ".".join(str(part) for part in rejection.loc)
        super().__init__(f"{place}: {rejection.msg}" if place else rejection.msg)
        self.rejection = rejection


class SpoolFull(Exception):
    """Raised when the caller chose it: send fewer events, or wait until the server has taken some."""


# Values. Where the meaning is clear a value is converted: None and the empty string are left out, decimals keep their
# digits, instants become ISO 8601, integer-like objects become integers, enumerations become their value. Where the
# meaning is not clear (NaN, an instant without zone, anything nested) the event is refused where it is captured.
#
# ``_cost.amount`` is in cents and is rounded half to even at 12 decimals, because ``0.1 + 0.2`` has 17.

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


# Events and sealing. Sealing happens once, at capture; from then on only bytes travel.

EVENT_BYTES_MAX = 4 << 20
"""Bytes of one sealed event: prompts may be long, and a request takes ten mebibytes."""

_ID_BYTES = 16  # random: no two events in the world share an id, not even those of a cloned machine

_BACKSLASH = ord("\\")  # a byte is found ten times as fast as a word, and most events have none

_TEXTS = frozenset({
    "external_id", "external_customer_id", "customer_id", "external_member_id", "member_id", "parent_id",
    "organization_id",
})  # fmt: skip

_encoder = msgspec.json.Encoder(decimal_format="number", enc_hook=lambda value: _plain(value))


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a customer used. A dict with the same keys does as well.

    Either ``external_customer_id`` (yours) or ``customer_id`` (the server's). Without a timestamp it happened now;
    without an ``external_id`` it gets one.
    """

    name: str
    external_customer_id: str | None = None
    customer_id: str | None = None
    metadata: Mapping[str, Any] = {}
    timestamp: datetime | str | None = None
    external_id: str | None = None
    parent_id: str | None = None
    external_member_id: str | None = None
    member_id: str | None = None
    organization_id: str | None = None


class Sealed(msgspec.Struct, frozen=True, gc=False):
    """An event's id and its bytes: a JSON object on one line."""

    external_id: str
    line: bytes


def as_mapping(event: Event | Mapping[str, Any]) -> Mapping[str, Any]:
    """The event's fields. Raises Unacceptable for anything else."""
    if isinstance(event, Mapping):
        return event
    if isinstance(event, Event):
        return {name: getattr(event, name) for name in event.__struct_fields__}
    raise Unacceptable(Reason.NOT_AN_OBJECT)


def seal(event: Event | Mapping[str, Any], now: datetime | None = None) -> Sealed:
    """Give the event its id, its time and its bytes. Raises Unacceptable. The event given is not changed."""
    record: dict[str, Any] = {}
    for key, value in (event if type(event) is dict else as_mapping(event)).items():
        if value is None:
            continue
        if key in _TEXTS and not isinstance(value, str):
            value = _as_text(key, value)
        record[key] = value
    _check_name(record)
    if "external_customer_id" not in record and "customer_id" not in record:
        raise Unacceptable(Reason.MISSING, "external_customer_id")
    metadata = record.get("metadata")
    if metadata is not None:
        if type(metadata) is not dict and not isinstance(metadata, Mapping):
            raise Unacceptable(Reason.DICT_TYPE, "metadata")
        record["metadata"] = clean(metadata)
    external_id: str = record.get("external_id") or urandom(_ID_BYTES).hex()  # an empty one names nothing
    record["external_id"] = external_id
    record["timestamp"] = _timestamp(record["timestamp"]) if "timestamp" in record else now or datetime.now(UTC)
    return Sealed(external_id, _encoded(record))


def _as_text(key: str, value: Any) -> str:
    """UUIDs and numbers name things well enough."""
    if isinstance(value, bool | float | bytes | list | dict | set | tuple):
        raise Unacceptable(Reason.STRING_TYPE, key)
    return str(value)


def _plain(value: Any) -> str:
    """What the encoder refuses: kinds of texts and times of other libraries."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, datetime):
        return datetime.isoformat(value)
    raise TypeError


def _check_name(record: dict[str, Any]) -> None:
    name = record.get("name")
    if not isinstance(name, str):
        raise Unacceptable(Reason.MISSING if name is None else Reason.STRING_TYPE, "name")
    if len(name) > NAME_LENGTH_MAX:
        raise Unacceptable(Reason.NAME_TOO_LONG, "name")


def _timestamp(value: Any) -> Any:
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise Unacceptable(Reason.TIMEZONE_AWARE, "timestamp")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unacceptable(Reason.DATETIME_TYPE, "timestamp")
    return value


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        line = _encoder.encode(record)
    except UnicodeError:
        raise Unacceptable(Reason.LONE_SURROGATE) from None
    except (TypeError, ValueError, OverflowError):
        raise Unacceptable(Reason.METADATA_VALUE) from None
    if len(line) > EVENT_BYTES_MAX:
        raise Unacceptable(("too_large", f"An event may have at most {EVENT_BYTES_MAX} bytes"))
    if _BACKSLASH in line and b"\\u0000" in line and _has_nul(msgspec.json.decode(line)):
        raise Unacceptable(Reason.NUL_CHARACTER)
    return line


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_nul(key) or _has_nul(part) for key, part in value.items())
    return isinstance(value, str) and "\0" in value
