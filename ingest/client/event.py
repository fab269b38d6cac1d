"""An event as an application states it, and sealed: with its id and its bytes, which no retry and no restart changes.

Sealing happens once, where the event is captured. It stamps the time if none was given, makes the id if none was
given, converts values and checks what the server would refuse. From then on only bytes travel.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from os import urandom
from typing import Any

import msgspec

from ingest.client.values import Unacceptable, clean
from meters.refusal import NAME_LENGTH_MAX, Reason

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
    external_id: str = record.setdefault("external_id", urandom(_ID_BYTES).hex())
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
