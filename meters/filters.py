"""Filters: conditions on events, and their JSON form.

A ``Filter`` is a tree of ``Clause`` under ``and`` and ``or``. ``matches`` decides whether the ``Facts`` of an event
pass a filter. ``parse_filter`` reads the JSON of a request and reports every complaint at its place; ``filter_json``
writes a filter back unchanged.
"""

from collections.abc import Callable
from decimal import Decimal
from enum import StrEnum
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Literal, cast

import msgspec

from meters.errors import COMPLAINTS_MAX, Detail, detail
from meters.event_values import (
    NAME,
    SOURCE,
    TIMESTAMP,
    Facts,
    Number,
    epoch_seconds,
    is_built_in,
    lookup,
    parse_property,
    text_of,
    written,
)
from meters.exact import INTEGER_DIGITS_MAX, amount_text, round_amount

# Meaning. A filter without clauses lets every event through. A tree cannot be negated, so a clause that cannot be
# decided is false. What a clause means depends on the JSON type that the event has at the property:
#
#     event has     eq ne gt gte lt lte           with a number            with a boolean (eq and ne alone)
#                   with a string value           value                    value
#     nothing, null false, ``ne`` too             false                    false
#     string        order of UTF-8 bytes          as text: "10" < "5"      compared with the text t or f
#     number        false, ``ne`` too             exact order              compared with 1 or 0
#     boolean       false, ``ne`` too             false                    compared
#     object, array false                         false                    false
#
# ``like`` searches the value's text (t or f for a boolean) in the event's text, case-sensitively; ``not_like`` is
# true where there is a text without it. ``in`` is ``eq`` with any value of a list; ``exists`` is true for a value
# other than null. ``name`` and ``source`` are compared with strings only, ``timestamp`` (seconds since 1970) with
# integers only; any other value is allowed there and false.

Scalar = str | bool | int | Decimal
Value = Scalar | list[Scalar]
Conjunction = Literal["and", "or"]


class Operator(StrEnum):
    """What a clause asks; ``in`` and ``exists`` are additions to Polar's eight."""

    EQ = "eq"
    NE = "ne"
    GT = "gt"
    GTE = "gte"
    LT = "lt"
    LTE = "lte"
    LIKE = "like"
    NOT_LIKE = "not_like"
    IN = "in"
    EXISTS = "exists"


ORDERING = frozenset({Operator.GT, Operator.GTE, Operator.LT, Operator.LTE})

COMPARE: dict[Operator, Callable[[Any, Any], bool]] = {
    Operator.EQ: eq,
    Operator.NE: ne,
    Operator.GT: gt,
    Operator.GTE: ge,
    Operator.LT: lt,
    Operator.LTE: le,
}
"""What the operators that compare ask of two values."""


class Clause(msgspec.Struct, frozen=True):
    """One question to an event. ``property`` has no ``metadata.`` in front any more."""

    property: str
    operator: Operator
    value: Value


class Filter(msgspec.Struct, frozen=True):
    """Clauses and filters, of which all or one must hold."""

    conjunction: Conjunction
    clauses: list["Clause | Filter"]


EVERYTHING = Filter("and", [])


def holds(clause: Clause, facts: Facts) -> bool:
    """Whether one clause holds of an event."""
    stored = _stored(clause.property, facts)
    if clause.operator is Operator.EXISTS:
        return (stored is not None) is clause.value
    if stored is None:
        return False
    test = _built_in_holds if is_built_in(clause.property) else _holds
    if clause.operator is Operator.IN:
        values = clause.value if isinstance(clause.value, list) else []
        return any(test(stored, Operator.EQ, value) for value in values)
    return not isinstance(clause.value, list) and test(stored, clause.operator, clause.value)


def matches(filter: Filter, facts: Facts, holds: Callable[[Clause, Facts], bool] = holds) -> bool:
    """Whether the filter lets the event through; ``holds`` says whether a clause does."""
    if not filter.clauses:
        return True
    parts = filter.clauses
    results = (matches(part, facts, holds) if isinstance(part, Filter) else holds(part, facts) for part in parts)
    return all(results) if filter.conjunction == "and" else any(results)


def _stored(property: str, facts: Facts) -> Any:
    built_ins = {NAME: facts.name, SOURCE: facts.source}
    if property in built_ins:
        return built_ins[property]
    if property == TIMESTAMP:
        return epoch_seconds(facts.timestamp)
    return lookup(facts.metadata, property)


def _built_in_holds(stored: str | int, operator: Operator, value: Scalar) -> bool:
    """Text against text, whole seconds against an integer; all else is false."""
    if isinstance(value, bool) or type(stored) is not type(value):
        return False
    if operator in (Operator.LIKE, Operator.NOT_LIKE):
        return (str(value) in str(stored)) is (operator is Operator.LIKE)
    return COMPARE[operator](stored, value)


def _holds(stored: Any, operator: Operator, value: Scalar) -> bool:
    """The table at the head of this module."""
    if operator in (Operator.LIKE, Operator.NOT_LIKE):
        text = text_of(stored)
        return text is not None and (value_text(value) in text) is (operator is Operator.LIKE)
    compare = COMPARE[operator]
    if isinstance(stored, bool):
        return isinstance(value, bool) and compare(stored, value)
    if isinstance(stored, Number):
        return not isinstance(value, str) and compare(stored.amount, Decimal(value))
    return isinstance(stored, str) and compare(stored, value_text(value))


def value_text(value: Scalar) -> str:
    """A filter's value where text is asked for: booleans are t and f, numbers are plain decimals."""
    if isinstance(value, bool):
        return "t" if value else "f"
    return value if isinstance(value, str) else amount_text(Decimal(value))


# JSON form. Values must come from ``meters.exact.decode`` (fractions as ``Decimal``). Beyond Polar's rules, numbers
# with a fraction and integers of a thousand digits are accepted. An integral fraction such as 1.0 becomes the
# integer; a fraction of more than 12 decimals is rounded as amounts are, so a client's 0.30000000000000004 is 0.3
# here, too. Ordering by a boolean has no meaning and is refused here, so that the filter's author sees the error.

TEXT_LENGTH_MAX = 1000
"""Characters of a text value (Polar's limit), and digits of a number."""

VALUES_MAX = 1000
"""Values of one ``in``, and of all that a filter has: a list of every plan or region; longer lists belong in the
metadata as a flag. A thousand numbers take 0.3 s to compile; a hundred such lists took longer than a minute."""

CLAUSES_MAX = 100
"""Clauses of one filter, at all levels: a new meter is compiled on the thread that counts for everybody. A hundred
clauses on different properties take half a second there, and a tenth in each round; a thousand took 9 s and 2 s."""

NESTING_MAX = 20
"""Filters within filters: a hand writes three; a query planner's stack takes more than 20."""

_OPERATORS = [str(operator) for operator in Operator]

Loc = tuple[str | int, ...]


class _Reading:
    """What was found in a filter so far: complaints, clauses at all levels, values of all lists."""

    def __init__(self) -> None:
        self.complaints: list[Detail] = []
        self.clauses = 0
        self.values = 0

    @property
    def is_over(self) -> bool:
        """Whether the filter is refused, whatever else it says: to read on would only cost time and memory."""
        return self.clauses > CLAUSES_MAX or self.values > VALUES_MAX or len(self.complaints) >= COMPLAINTS_MAX


def parse_filter(value: object, loc: Loc = ("body", "filter")) -> Filter | list[Detail]:
    """A filter from decoded JSON, or what is wrong with it: everything, unless that is more than anybody reads."""
    reading = _Reading()
    filter = _filter(value, loc, reading, 1)
    complaints = reading.complaints
    if reading.clauses > CLAUSES_MAX:
        message = f"Filter should have at most {CLAUSES_MAX} clauses"
        complaints.insert(0, detail("too_long", loc, message, None))
    elif reading.values > VALUES_MAX:
        message = f"Filter should have at most {VALUES_MAX} values of 'in', all of them together"
        complaints.insert(0, detail("too_long", loc, message, None))
    return complaints[:COMPLAINTS_MAX] if complaints or filter is None else filter


def filter_json(filter: Filter) -> dict[str, Any]:
    """The filter in Polar's shape, for the wire and the control stream."""
    clauses = [filter_json(part) if isinstance(part, Filter) else _clause_json(part) for part in filter.clauses]
    return {"conjunction": filter.conjunction, "clauses": clauses}


def _clause_json(clause: Clause) -> dict[str, Any]:
    return {"property": written(clause.property), "operator": str(clause.operator), "value": clause.value}


def _filter(value: object, loc: Loc, reading: _Reading, level: int) -> Filter | None:
    complaints = reading.complaints
    if not isinstance(value, dict):
        complaints.append(detail("model_attributes_type", loc, "Input should be a valid dictionary or object", value))
        return None
    if level > NESTING_MAX:
        message = f"Filters should be nested at most {NESTING_MAX} deep"
        complaints.append(detail("recursion_loop", loc, message, None))
        return None
    conjunction = _conjunction(value, loc, complaints)
    clauses = _clauses(value, loc, reading, level)
    return Filter(conjunction, clauses) if conjunction and not complaints else None


def _conjunction(value: dict[str, Any], loc: Loc, complaints: list[Detail]) -> Conjunction | None:
    where = (*loc, "conjunction")
    if "conjunction" not in value:
        complaints.append(detail("missing", where, "Field required", value))
    elif value["conjunction"] not in ("and", "or"):
        complaints.append(detail("enum", where, "Input should be 'and' or 'or'", value["conjunction"]))
    else:
        return cast(Conjunction, value["conjunction"])
    return None


def _clauses(value: dict[str, Any], loc: Loc, reading: _Reading, level: int) -> list[Clause | Filter]:
    complaints = reading.complaints
    where = (*loc, "clauses")
    entries = value.get("clauses")
    if "clauses" not in value:
        complaints.append(detail("missing", where, "Field required", value))
    elif not isinstance(entries, list):
        complaints.append(detail("list_type", where, "Input should be a valid list", entries))
    elif len(entries) > CLAUSES_MAX:
        message = f"List should have at most {CLAUSES_MAX} items"
        complaints.append(detail("too_long", where, message, None))
    elif not entries:
        reading.clauses += 1  # a filter without clauses costs as much as one clause
    else:
        return _parts(entries, where, reading, level)
    return []


def _parts(entries: list[object], loc: Loc, reading: _Reading, level: int) -> list[Clause | Filter]:
    parts: list[Clause | Filter] = []
    for place, entry in enumerate(entries):
        if reading.is_over:
            break
        part = _part(entry, (*loc, place), reading, level)
        if part is not None:
            parts.append(part)
    return parts


def _part(entry: object, loc: Loc, reading: _Reading, level: int) -> Clause | Filter | None:
    """What has ``clauses`` or ``conjunction`` and no ``property`` means to be a filter."""
    if isinstance(entry, dict) and "property" not in entry and ("clauses" in entry or "conjunction" in entry):
        return _filter(entry, loc, reading, level + 1)
    return _clause(entry, loc, reading)


def _clause(entry: object, loc: Loc, reading: _Reading) -> Clause | None:
    reading.clauses += 1
    complaints = reading.complaints
    if not isinstance(entry, dict):
        complaints.append(detail("model_attributes_type", loc, "Input should be a valid dictionary or object", entry))
        return None
    known = len(complaints)
    for key in ("property", "operator", "value"):
        if key not in entry:
            complaints.append(detail("missing", (*loc, key), "Field required", entry))
    if len(complaints) > known:
        return None
    property = parse_property(entry["property"], (*loc, "property"))
    if not isinstance(property, str):
        complaints.append(property)
    operator = _operator(entry["operator"], (*loc, "operator"), complaints)
    if not isinstance(property, str) or operator is None:
        return None
    value = _value(operator, entry["value"], (*loc, "value"), reading)
    return None if value is None else Clause(property, operator, value)


def _operator(name: object, loc: Loc, complaints: list[Detail]) -> Operator | None:
    if name in _OPERATORS:
        return Operator(name)
    known = ", ".join(f"'{operator}'" for operator in Operator)
    complaints.append(detail("enum", loc, f"Input should be one of {known}", name))
    return None


def _value(operator: Operator, value: object, loc: Loc, reading: _Reading) -> Value | None:
    complaints = reading.complaints
    if operator is Operator.IN:
        return _values(value, loc, reading)
    if operator is Operator.EXISTS and not isinstance(value, bool):
        complaints.append(detail("bool_type", loc, "Input should be a valid boolean", value))
        return None
    if operator in ORDERING and isinstance(value, bool):
        message = f"Value error, '{operator}' does not order booleans: use 'eq' or 'ne'"
        complaints.append(detail("value_error", loc, message, value))
        return None
    return _scalar(value, loc, complaints)


def _values(value: object, loc: Loc, reading: _Reading) -> list[Scalar] | None:
    complaints = reading.complaints
    if not isinstance(value, list):
        complaints.append(detail("list_type", loc, "Input should be a valid list", value))
        return None
    if len(value) > VALUES_MAX:
        complaints.append(detail("too_long", loc, f"List should have at most {VALUES_MAX} items", None))
        return None
    reading.values += len(value)
    scalars: list[Scalar] = []
    for place, item in enumerate(value):
        if reading.is_over:
            break
        scalar = _scalar(item, (*loc, place), complaints)
        if scalar is not None:
            scalars.append(scalar)
    return scalars


def _scalar(value: object, loc: Loc, complaints: list[Detail]) -> Scalar | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, loc, complaints)
    if isinstance(value, int | Decimal):
        return _number(Decimal(value), loc, complaints)
    if isinstance(value, float):
        raise TypeError("a double has lost its digits: decode with meters.exact")
    message = "Input should be a valid string, number or boolean"
    complaints.append(detail("filter_value_type", loc, message, value))
    return None


def _text(value: str, loc: Loc, complaints: list[Detail]) -> str | None:
    if len(value) <= TEXT_LENGTH_MAX:
        return value
    message = f"String should have at most {TEXT_LENGTH_MAX} characters"
    complaints.append(detail("string_too_long", loc, message, value))
    return None


def _number(value: Decimal, loc: Loc, complaints: list[Detail]) -> int | Decimal | None:
    """An integer where the number is integral; else a decimal that is rounded as amounts are, or none equals it."""
    if value and value.adjusted() >= TEXT_LENGTH_MAX:
        message = f"Number should have at most {TEXT_LENGTH_MAX} digits"
        complaints.append(detail("decimal_max_digits", loc, message, None))
        return None
    if value == value.to_integral_value():
        return int(value)
    amount = round_amount(value)
    if amount is not None:
        return int(amount) if amount == amount.to_integral_value() else Decimal(amount_text(amount))
    message = f"A fraction should have at most {INTEGER_DIGITS_MAX} digits before its point, as amounts have"
    complaints.append(detail("decimal_whole_digits", loc, message, None))
    return None
