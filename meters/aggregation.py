"""Aggregate the events that a meter counts into one exact value.

``evaluate`` computes an ``Aggregation`` over the ``Facts`` of events. ``count`` counts every event; ``sum``, ``avg``,
``min`` and ``max`` read the events whose property is a JSON number and skip the rest; ``unique`` counts distinct
values. The value of no events is 0. ``combine`` applies a function to amounts, such as the values of customers.
``parse_aggregation`` reads the aggregation in a request.

For ``unique``, two values are equal when they have the same type and the same value: 1 and 1.0 are one value; 1, "1"
and true are three. Objects, arrays and null have no such identity and are skipped.
"""

from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Literal, get_args

import msgspec

from meters.errors import Detail, detail
from meters.event_values import TIMESTAMP, Facts, Number, epoch_seconds, is_built_in, lookup, parse_property
from meters.exact import EXACT, QUANTUM

Function = Literal["count", "sum", "avg", "min", "max", "unique"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)


class Aggregation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function, and the property it reads (None for ``count`` alone)."""

    func: Function
    property: str | None = None


SUMMABLE = ("count", "sum")
"""Functions whose values of disjoint parts may be added."""


def is_summable(aggregation: Aggregation) -> bool:
    """Whether values of disjoint parts may be added."""
    return aggregation.func in SUMMABLE


def unique_token(value: Any) -> tuple[str, str | bool | Decimal] | None:
    """What tells one value from another for ``unique``; None for what is passed over."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, Number):
        return ("number", value.amount)
    return ("string", value) if isinstance(value, str) else None


def amount_of(facts: Facts, property: str) -> Decimal | None:
    """The number that the event states for the property; ``timestamp`` is whole seconds since 1970."""
    if property == TIMESTAMP:
        return Decimal(epoch_seconds(facts.timestamp))
    if is_built_in(property):
        return None
    value = lookup(facts.metadata, property)
    return value.amount if isinstance(value, Number) else None


def considers(aggregation: Aggregation, facts: Facts) -> bool:
    """Whether an event takes part: a numeric function takes the events that state a number."""
    if aggregation.func in ("count", "unique"):
        return True
    return amount_of(facts, aggregation.property or "") is not None


def evaluate(aggregation: Aggregation, events: Iterable[Facts]) -> Decimal:
    """The value over events that the meter's filter let through."""
    if aggregation.func == "count":
        return Decimal(sum(1 for _ in events))
    name = aggregation.property or ""
    if aggregation.func == "unique":
        tokens = {unique_token(lookup(event.metadata, name)) for event in events}
        return Decimal(len(tokens - {None}))
    amounts = [amount for event in events if (amount := amount_of(event, name)) is not None]
    return combine(aggregation.func, amounts)


def combine(function: Function, amounts: list[Decimal]) -> Decimal:
    """A function over amounts; ``avg`` is rounded half to even at 12 decimals. Of no amounts it is 0."""
    if function == "count":
        return Decimal(len(amounts))
    if function == "unique":
        return Decimal(len(set(amounts)))
    if not amounts:
        return Decimal(0)
    if function in ("min", "max"):
        return min(amounts) if function == "min" else max(amounts)
    total = exact_sum(amounts)
    return total if function == "sum" else mean(total, len(amounts))


def exact_sum(amounts: Iterable[Decimal]) -> Decimal:
    """The sum to the last digit; the ambient decimal context takes no part."""
    total = Decimal(0)
    for amount in amounts:
        total = EXACT.add(total, amount)
    return total


def mean(total: Decimal, count: int) -> Decimal:
    """``total / count``, half to even at 12 decimals; 0 where there is nothing to divide by."""
    if not count:
        return Decimal(0)
    return EXACT.divide(total, Decimal(count)).quantize(QUANTUM, context=EXACT)


def parse_aggregation(value: object, loc: tuple[str | int, ...]) -> Aggregation | list[Detail]:
    """An aggregation from decoded JSON, or why it is none. A ``property`` beside ``count`` is dropped."""
    if not isinstance(value, dict):
        return [detail("model_attributes_type", loc, "Input should be a valid dictionary or object", value)]
    function = value.get("func")
    if function not in FUNCTIONS:
        kind = "union_tag_not_found" if function is None else "union_tag_invalid"
        return [detail(kind, loc, f"'func' should be one of {', '.join(FUNCTIONS)}", value)]
    if function == "count":
        return Aggregation("count")
    where = (*loc, function, "property")
    if "property" not in value:
        return [detail("missing", where, "Field required", value)]
    property = parse_property(value["property"], where)
    return Aggregation(function, property) if isinstance(property, str) else [property]
