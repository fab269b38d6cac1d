"""Reasons for refusing input, and the error details that an API answers with.

``Refusal`` is one reason why an event is refused: a ``Reason`` from a closed list, with the place in the event.
``detail`` makes a ``Detail``, an entry of the ``detail`` list in a 422: what is wrong, where, and with which input.
"""

from enum import Enum, unique
from typing import Any, TypedDict

import msgspec

from meters.exact import INTEGER_DIGITS_MAX

# Refusals of events.

NAME_LENGTH_MAX = 128
"""Characters of an event's name (Polar's limit)."""

STRING_LENGTH_MAX = 500
"""Characters of an ordinary string in metadata (Polar's limit); at least one."""

DEPTH_MAX = 8
"""Objects and arrays within one another. An event needs three; more is not read, so that nobody's stack is spent."""

LINES_MAX = 1 << 20
"""Lines of a record. Its 24 MiB have no room for so many events: a record of more lines, which only a producer that
skips the gateway can write, is taken for a single line that cannot be counted. Each of its lines kept apart, with its
reason, would be the memory of the machine."""

COST_INTEGER_DIGITS_MAX = 5
"""Digits before the point of ``_cost.amount``, in cents (Polar's limit: $999.99)."""


class Refusal(msgspec.Struct, frozen=True):
    """Why the event at ``index`` was refused: an entry of Polar's ``detail`` list, and the index."""

    index: int
    type: str
    loc: list[str | int]
    msg: str
    input: Any = None


def _at_most_digits(digits: int) -> str:
    return f"Number should have at most {digits} digits before the decimal point"


@unique
class Reason(Enum):
    """Why an event is refused. The list is closed, and in the order in which the reasons are looked for.

    The reasons up to LONE_SURROGATE concern the line as a whole: the first that holds is the only one reported.
    The rest concern a field each; every field reports the first that holds of it. Those from ORGANIZATION_TOKEN on
    are for whoever knows the organization's tokens and customers to find.
    """

    RECORD_TIME = ("record_time", "The record's time in the log is in no calendar: its producer's clock is wrong")
    RECORD_LINES = ("record_lines", f"The record has more than {LINES_MAX} lines, and is kept as one that is no event")
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
    DICT_TYPE = ("dict_type", "Input should be a valid dictionary")
    METADATA_VALUE = ("metadata_value_type", "Input should be a string, an integer, a number or a boolean")
    STRING_TOO_SHORT = ("string_too_short", "String should have at least 1 character")
    STRING_TOO_LONG = ("string_too_long", f"String should have at most {STRING_LENGTH_MAX} characters")
    NUMBER_TOO_LARGE = ("number_too_large", _at_most_digits(INTEGER_DIGITS_MAX))
    DUPLICATE_KEY = ("duplicate_key", "This key is given twice")
    DECIMAL_TYPE = ("decimal_type", "Input should be a number or a JSON number in a string")
    DECIMAL_WHOLE_DIGITS = ("decimal_whole_digits", _at_most_digits(COST_INTEGER_DIGITS_MAX))
    CURRENCY = ("string_pattern_mismatch", "String should match pattern 'usd'")
    INT_TYPE = ("int_type", "Input should be a valid integer or a JSON integer in a string")
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


# Details of a 422.

COMPLAINTS_MAX = 100
"""Complaints about one thing that somebody made, and entries of one answer: what is wrong is refused in any case, and
nobody reads more. A body of a megabyte holds some hundred thousand mistakes."""


class Detail(TypedDict):
    """One complaint, in the shape that Polar's clients read."""

    type: str
    loc: list[str | int]
    msg: str
    input: object


def detail(type: str, loc: tuple[str | int, ...], msg: str, input: object = None) -> Detail:
    """One complaint at ``loc``."""
    return {"type": type, "loc": list(loc), "msg": msg, "input": input}
