"""The event: its fields, identity, metadata rules and full validation.

``check_line`` and ``check_event`` read one event with every rule and return an ``Event`` or every ``Refusal``.
``complaints`` checks metadata alone. ``identity`` hashes the organization's id and the external id to 128 bits; the
public id of an event is that identity, so a log that is read again gives every event the same id.

This module is the definition of a valid event. The fast parsers (``ingest.admission.validate`` and the compiled
loops) accept only input that this module would accept, and leave everything else to it.
"""

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from xxhash import xxh3_128_intdigest

from meters.errors import (
    COMPLAINTS_MAX,
    COST_INTEGER_DIGITS_MAX,
    DEPTH_MAX,
    NAME_LENGTH_MAX,
    STRING_LENGTH_MAX,
    Reason,
    Refusal,
)
from meters.exact import INTEGER_DIGITS_MAX, Object, Token, decode_tokens, echo, parse_amount
from meters.timestamps import parse_timestamp

# Metadata. An ordinary value is a string of 1 to 500 characters, a number or a boolean; the last value of a repeated
# key counts. Two keys are reserved: ``_cost`` (``amount`` in cents and ``currency``) and ``_llm`` (the model call and
# its tokens). A repeated key in either is refused, because the intended amount would be unknown; unknown keys in them
# are accepted and ignored.
#
# Deliberate differences from Polar: an amount with more than 12 decimals is rounded and not refused, because adding
# cents in JavaScript makes such amounts; numbers in text must be JSON numbers; a number with more than 26 integer
# digits is refused.

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


# The event. An event is never changed and never deleted; a correction is another event. An event without an external
# id gets one before it is logged. Values in metadata stay the tokens that were sent (``msgspec.Raw``), since a double
# would change their digits.

CLOCK_SKEW = timedelta(seconds=60)
"""How far ahead of ours a sender's clock may be. Polar grants nothing, which loses the usage of machines whose clock
is a second fast; a minute is what unsynchronized ones drift between corrections, and moves no event out of its hour
for long."""

_HYPHENATED = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_UUID_FORMS = re.compile(rf"({_HYPHENATED})|([0-9a-f]{{32}})|\{{({_HYPHENATED})\}}|urn:uuid:({_HYPHENATED})")
_VERSION = 12  # the hex digit that says the version
_VARIANT = 16  # the hex digit that says the variant

USER = "user"
SYSTEM = "system"


class Event(msgspec.Struct, frozen=True, gc=False):
    """An event as its sender states it. Times are UTC; a missing timestamp means the time of ingestion.

    An event for an external customer has no ``customer_id`` and no ``member_id``, whatever was sent. An empty
    ``external_id`` is None.
    """

    name: str
    metadata: dict[str, msgspec.Raw] = {}
    timestamp: datetime | None = None
    external_id: str | None = None
    customer_id: str | None = None
    external_customer_id: str | None = None
    member_id: str | None = None
    external_member_id: str | None = None
    parent_id: str | None = None
    organization_id: str | None = None


@lru_cache(maxsize=4096)
def _organization_bytes(organization_id: str) -> bytes:
    return UUID(organization_id).bytes


def identity(organization_id: str, external_id: str) -> tuple[int, int]:
    """The 128 bits that an event is counted once by, as two unsigned 64-bit halves, high first.

    XXH3-128 of the organization's 16 bytes and the external id in UTF-8. Among a million million events the chance
    that any two ids meet is 10^-15; the store still compares contents, so a meeting would be seen.
    """
    return halves(xxh3_128_intdigest(_organization_bytes(organization_id) + external_id.encode()))


def place_key(place: str) -> str:
    """What ``identity`` is made of for an event without external id: its place in the log.

    No external id contains the character in front, so a place and an external id never make one identity.
    """
    return f"\0{place}"


def halves(number: int) -> tuple[int, int]:
    """128 bits as two unsigned 64-bit halves, high first."""
    return number >> 64, number & 0xFFFF_FFFF_FFFF_FFFF


def event_id(hi: int, lo: int) -> str:
    """The public id of an event: its identity, written as a UUID."""
    return _hyphenated(f"{hi:016x}{lo:016x}")


def _hyphenated(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def parse_uuid4(value: object) -> str | Reason:
    """The UUID in lower case with hyphens, or the reason why it is none of version 4."""
    if not isinstance(value, str):
        return Reason.UUID_TYPE
    found = _UUID_FORMS.fullmatch(value.lower())
    if not found:
        return Reason.UUID_PARSING
    digits = next(form for form in found.groups() if form).replace("-", "")
    if digits[_VERSION] != "4" or digits[_VARIANT] not in "89ab":
        return Reason.UUID_VERSION
    return _hyphenated(digits)


EXTERNAL_VARIANT = "EventCreateExternalCustomer"
CUSTOMER_VARIANT = "EventCreateCustomer"
"""Polar's names for the two kinds of event; they stand in the place (``loc``) of a refusal."""


def check_event(
    line: bytes, *, index: int = 0, now: datetime, complaints_max: int = COMPLAINTS_MAX
) -> Event | list[Refusal]:
    """Read one event with care: the event, or everything that is wrong with it, in Polar's words and places.

    ``line`` is one JSON object as it was sent; ``complaints_max`` are told of its metadata, whose rest is then not read
    (each takes longer than many good values). A valid external customer id makes it an event of that kind; what the
    line says is then read as the other kind only if this one is refused and a customer id was given.
    """
    record = _read(line)
    if isinstance(record, Reason):
        return [record.at(index)]
    refused: list[Refusal] = []
    for variant in _variants(record):
        form = _Form(record, variant, index, line, complaints_max)
        event = form.event(now + CLOCK_SKEW)
        if not form.refusals:
            return event
        refused = refused or form.refusals
    return refused


def check_line(line: bytes, *, organization_id: str | None, now: datetime) -> Event | Refusal:
    """Read one line of the log with care: the event, or the first thing that is wrong with it.

    ``organization_id`` is the tenant that the record names; None where each line has to name its own.
    """
    event = check_event(line, now=now)
    if isinstance(event, list):
        return event[0]
    if organization_id is None and event.organization_id is None:
        return Reason.ORGANIZATION_MISSING.at(0, "organization_id")
    if organization_id is not None and event.organization_id not in (None, organization_id):
        return Reason.ORGANIZATION_UNKNOWN.at(0, "organization_id", input=event.organization_id)
    return event


def _read(line: bytes) -> Object | Reason:
    try:
        record = decode_tokens(line)
    except RecursionError:
        return Reason.TOO_DEEP
    except ValueError:
        return Reason.MALFORMED
    if not isinstance(record, Object):
        return Reason.NOT_AN_OBJECT
    if b"\\u" not in line and line.count(b"{") + line.count(b"[") <= DEPTH_MAX:
        return record  # nothing can hide here; most lines are such
    found = set(_structural(record, 1))
    return next((reason for reason in Reason if reason in found), record) if found else record


def _structural(value: Any, level: int) -> Iterator[Reason]:
    """What no text may hold anywhere, read or not: it could not be stored, or passed on."""
    if isinstance(value, str):
        if "\0" in value:
            yield Reason.NUL_CHARACTER
        if _has_surrogate(value):
            yield Reason.LONE_SURROGATE
    elif isinstance(value, dict | list):
        if level > DEPTH_MAX:
            yield Reason.TOO_DEEP
            return
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        for part in parts:
            yield from _structural(part, level + 1)


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def is_storable(text: str) -> bool:
    """Return true for a text that an event may hold anywhere."""
    return "\0" not in text and not _has_surrogate(text)


def _variants(record: Object) -> list[str]:
    by_id = [CUSTOMER_VARIANT] if record.get("customer_id") is not None else []
    if isinstance(record.get("external_customer_id"), str):
        return [EXTERNAL_VARIANT, *by_id]
    return by_id or [EXTERNAL_VARIANT]


class _Line(msgspec.Struct):
    metadata: dict[str, msgspec.Raw] = {}


class _Form:
    """One reading of a line as one kind of event. Every method reads a field, and notes what is wrong with it."""

    def __init__(self, record: Object, variant: str, index: int, line: bytes, complaints_max: int) -> None:
        self.refusals: list[Refusal] = []
        self._echoes: dict[int, Any] = {}  # by the identity of what is echoed
        self._record, self._variant, self._index, self._line = record, variant, index, line
        self._complaints_max = complaints_max

    def event(self, latest: datetime) -> Event:
        """The event; it means something only if there were no refusals."""
        external = self._variant == EXTERNAL_VARIANT
        return Event(
            name=self._name(),
            timestamp=self._timestamp(latest),
            external_id=self._text("external_id") or None,  # an empty one names nothing, and is as good as none
            parent_id=self._text("parent_id"),
            organization_id=self._uuid("organization_id"),
            customer_id=None if external else self._uuid("customer_id"),
            member_id=None if external else self._uuid("member_id"),
            external_customer_id=self._text("external_customer_id", required=True) if external else None,
            external_member_id=self._text("external_member_id") if external else None,
            metadata=self._metadata(),
        )

    def _refuse(self, reason: Reason, *loc: str, value: Any) -> None:
        if id(value) not in self._echoes:  # one object may lack several fields: it is repeated, and not copied
            self._echoes[id(value)] = echo(value)
        self.refusals.append(reason.at(self._index, self._variant, *loc, input=self._echoes[id(value)]))

    def _missing(self, key: str) -> None:
        self.refusals.append(Reason.MISSING.at(self._index, self._variant, key, input=msgspec.Raw(self._line)))

    def _text(self, key: str, *, required: bool = False) -> str | None:
        value = self._record.get(key)
        if isinstance(value, str):
            return value
        if key not in self._record:
            if required:
                self._missing(key)
        elif required or value is not None:
            self._refuse(Reason.STRING_TYPE, key, value=value)
        return None

    def _name(self) -> str:
        name = self._text("name", required=True) or ""
        if len(name) > NAME_LENGTH_MAX:
            self._refuse(Reason.NAME_TOO_LONG, "name", value=name)
        return name

    def _uuid(self, key: str) -> str | None:
        value = self._record.get(key)
        if value is None:
            return None
        parsed = parse_uuid4(value)
        if isinstance(parsed, Reason):
            self._refuse(parsed, key, value=value)
            return None
        return parsed

    def _timestamp(self, latest: datetime) -> datetime | None:
        if "timestamp" not in self._record:
            return None
        value = self._record["timestamp"]
        instant = parse_timestamp(value)
        if isinstance(instant, datetime) and instant <= latest:
            return instant
        self._refuse(Reason.FUTURE if isinstance(instant, datetime) else instant, "timestamp", value=value)
        return None

    def _metadata(self) -> dict[str, msgspec.Raw]:
        metadata = self._record.get("metadata", Object([]))
        if not isinstance(metadata, Object):
            self._refuse(Reason.DICT_TYPE, "metadata", value=metadata)
            return {}
        for reason, loc, value in islice(complaints(metadata), self._complaints_max):
            self._refuse(reason, "metadata", *loc, value=value)
        try:
            return msgspec.json.decode(self._line, type=_Line).metadata
        except msgspec.MsgspecError:  # a second parser's opinion: what either of them refuses is not taken
            self._refuse(Reason.MALFORMED, value=None)
            return {}
