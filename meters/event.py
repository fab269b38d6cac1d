"""The fact: one thing that a customer used, once.

An event is never changed and never taken back; whoever erred sends another. Its identity is the organization's id
and the external id that its sender gave it, hashed to 128 bits. The public id of an event *is* that identity, so a
log read again gives every event the id it had before. An event without external id gets one before it is logged.

Values in metadata stay the tokens that were sent (``msgspec.Raw``), since a double would bend their digits.
"""

from datetime import datetime
from enum import Enum
from functools import lru_cache
from typing import Any
from uuid import UUID

import msgspec
from xxhash import xxh3_128_intdigest

NAME_LENGTH_MAX = 128
"""Characters of an event's name (Polar's limit)."""

STRING_LENGTH_MAX = 500
"""Characters of an ordinary string in metadata (Polar's limit); at least one."""

DEPTH_MAX = 8
"""Objects and arrays within one another. An event needs three; more is not read, so that nobody's stack is spent."""

COST_INTEGER_DIGITS_MAX = 5
"""Digits before the point of ``_cost.amount``, in cents (Polar's limit: $999.99)."""

USER = "user"
SYSTEM = "system"


class Event(msgspec.Struct, frozen=True, gc=False):
    """An event as its sender states it. Times are UTC; a missing timestamp means the time of ingestion.

    An event for an external customer has no ``customer_id`` and no ``member_id``, whatever was sent.
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


class Refusal(msgspec.Struct, frozen=True):
    """Why the event at ``index`` was refused: an entry of Polar's ``detail`` list, and the index."""

    index: int
    type: str
    loc: list[str | int]
    msg: str
    input: Any = None


class Reason(Enum):
    """Why an event is refused. The list is closed, and in the order in which the reasons are looked for.

    The reasons up to LONE_SURROGATE concern the line as a whole: the first that holds is the only one reported.
    The rest concern a field each, and all that hold are reported. Those from ORGANIZATION_TOKEN on are known only
    to whoever knows the organization's tokens and customers.
    """

    MALFORMED = ("json_invalid", "JSON decode error")
    NOT_AN_OBJECT = ("model_attributes_type", "Input should be a valid dictionary or object")
    TOO_DEEP = ("value_error", f"Value error, nesting is limited to {DEPTH_MAX} levels")
    NUL_CHARACTER = ("value_error", "Value error, text must not contain the character U+0000")
    LONE_SURROGATE = ("string_unicode", "Input should be valid unicode: it has half of a surrogate pair")

    MISSING = ("missing", "Field required")
    STRING_TYPE = ("string_type", "Input should be a valid string")
    NAME_TOO_LONG = ("string_too_long", f"String should have at most {NAME_LENGTH_MAX} characters")
    UUID_TYPE = ("uuid_type", "UUID input should be a string")
    UUID_PARSING = ("uuid_parsing", "Input should be a valid UUID")
    UUID_VERSION = ("uuid_version", "UUID version 4 expected")
    DATETIME_TYPE = ("datetime_type", "Input should be a valid datetime")
    DATETIME_PARSING = ("datetime_parsing", "Input should be a valid datetime with an offset, or seconds since 1970")
    TIMEZONE_AWARE = ("timezone_aware", "Input should have timezone info")
    FUTURE = ("value_error", "Value error, Timestamp must be in the past.")
    METADATA_TYPE = ("dict_type", "Input should be a valid dictionary")
    METADATA_VALUE = ("metadata_value_type", "Input should be a string, an integer, a number or a boolean")
    STRING_TOO_SHORT = ("string_too_short", "String should have at least 1 character")
    STRING_TOO_LONG = ("string_too_long", f"String should have at most {STRING_LENGTH_MAX} characters")
    NUMBER_TOO_LARGE = ("number_too_large", "Number should have at most 26 digits before the decimal point")
    RESERVED_TYPE = ("dict_type", "Input should be a valid dictionary")
    DUPLICATE_KEY = ("duplicate_key", "This key is given twice")
    DECIMAL_TYPE = ("decimal_type", "Input should be a number or a string with one")
    DECIMAL_WHOLE_DIGITS = ("decimal_whole_digits", "Number should have at most 5 digits before the decimal point")
    CURRENCY = ("string_pattern_mismatch", "String should match pattern 'usd'")
    INT_TYPE = ("int_type", "Input should be a valid integer")
    INT_FROM_FLOAT = ("int_from_float", "Input should be a valid integer, got a number with a fractional part")

    ORGANIZATION_TOKEN = (
        "organization_token",
        "Setting organization_id is disallowed when using an organization token.",
    )
    ORGANIZATION_MISSING = ("missing", "organization_id is required")
    ORGANIZATION_UNKNOWN = ("organization_id", "Organization not found.")
    CUSTOMER_UNKNOWN = ("customer_id", "Customer not found.")
    MEMBER_UNKNOWN = ("member_id", "Member not found.")

    def at(self, index: int, *loc: str | int, input: Any = None) -> Refusal:
        """The refusal of event ``index``, at ``loc`` within it."""
        kind, message = self.value
        return Refusal(index, kind, ["body", "events", index, *loc], message, input)


@lru_cache(maxsize=4096)
def _organization_bytes(organization_id: str) -> bytes:
    return UUID(organization_id).bytes


def identity(organization_id: str, external_id: str) -> tuple[int, int]:
    """The 128 bits that an event is counted once by, as two unsigned 64-bit halves, high first.

    XXH3-128 of the organization's 16 bytes and the external id in UTF-8. Two ids meet by chance once in 10^19
    pairs of a million million events; the store still compares contents, so a meeting would be seen.
    """
    digest = xxh3_128_intdigest(_organization_bytes(organization_id) + external_id.encode())
    return digest >> 64, digest & 0xFFFF_FFFF_FFFF_FFFF


def event_id(hi: int, lo: int) -> str:
    """The public id of an event: its identity, written as a UUID."""
    return str(UUID(int=hi << 64 | lo))


def parse_event_id(text: str) -> tuple[int, int] | None:
    """The identity that a public id states, or None where the text is no UUID."""
    try:
        number = UUID(text).int
    except ValueError:
        return None
    return number >> 64, number & 0xFFFF_FFFF_FFFF_FFFF
