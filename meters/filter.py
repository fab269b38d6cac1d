"""Which events a meter counts.

A filter is a tree of clauses under ``and`` and ``or``; one without clauses lets everything through. There is no
negation of a tree, so a clause that cannot be decided is simply false. What a clause means depends on the JSON type
that the event has at the property:

    event has     eq ne gt gte lt lte           with a number            with a boolean (eq and ne alone)
                  with a string value           value                    value
    nothing, null false, ``ne`` too             false                    false
    string        order of UTF-8 bytes          as text: "10" < "5"      compared with the text t or f
    number        false, ``ne`` too             exact order              compared with 1 or 0
    boolean       false, ``ne`` too             false                    compared
    object, array false                         false                    false

``like`` looks for the value's text (t or f for a boolean) within the event's text, minding case; ``not_like`` is true
where there is a text without it. ``in`` is ``eq`` with any value of a list, ``exists`` asks whether there is a value
other than null. ``name`` and ``source`` are compared with strings alone, ``timestamp`` (seconds since 1970) with
integers alone; any other value is legal there and false.
"""

from collections.abc import Callable
from decimal import Decimal
from enum import StrEnum
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Literal

import msgspec

from meters.amount import amount_text
from meters.facts import Facts, Number, epoch_seconds, lookup, text_of
from meters.property import NAME, SOURCE, TIMESTAMP, is_built_in

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
