"""The two other ways in which Polar reads a meter's filter. Pure.

Quantities and balances go by one reading, which is ours (``meters.filter``). What is invoiced is matched in another
program with plain comparisons of its language, and event lists and cost metrics are read from a copy with typed
columns. Where types are mixed the three disagree, and then an invoice may count what a balance does not. Knowing how
the others read tells such a difference from a lost event.
"""

from collections.abc import Callable, Iterable
from decimal import Decimal
from operator import ge, gt, le, lt
from typing import Any

from meters.aggregation import considers, evaluate
from meters.amount import parse_amount
from meters.facts import Facts, Number, lookup
from meters.filter import Clause, Filter, Operator, Scalar, holds, matches
from meters.meter import Meter
from meters.property import TIMESTAMP, is_built_in
from meters.timestamp import EPOCH

Reading = Callable[[Filter, Facts], bool]

_ORDER = {Operator.GT: gt, Operator.GTE: ge, Operator.LT: lt, Operator.LTE: le}


def billing(filter: Filter, facts: Facts) -> bool:
    """Whether an invoice would count the event: true is 1, a number is never a text, other types are not ordered."""
    return matches(filter, facts, _billing_holds)


def analytics(filter: Filter, facts: Facts) -> bool:
    """Whether an event list would show the event: what is no string reads as "", what is no number as 0."""
    return matches(filter, facts, _analytics_holds)


OTHERS: dict[str, Reading] = {"invoices": billing, "event lists": analytics}


def value(meter: Meter, events: Iterable[Facts], reading: Reading = matches) -> Decimal:
    """The meter's value over events, its filter read in the way given."""
    taken = [facts for facts in events if reading(meter.filter, facts) and considers(meter.aggregation, facts)]
    return evaluate(meter.aggregation, taken)


def _billing_holds(clause: Clause, facts: Facts) -> bool:
    if clause.property == TIMESTAMP:
        whole = (facts.timestamp - EPOCH).total_seconds() // 1
        stored: Any = Decimal(int(whole))
    elif is_built_in(clause.property):
        return holds(clause, facts)
    else:
        stored = _plain(lookup(facts.metadata, clause.property))
    if clause.operator is Operator.EXISTS:
        return (stored is not None) is clause.value
    if stored is None:
        return False
    values = clause.value if isinstance(clause.value, list) else [clause.value]
    operator = Operator.EQ if clause.operator is Operator.IN else clause.operator
    return any(_compare(operator, stored, one) for one in values)


def _compare(operator: Operator, stored: Any, value: Scalar) -> bool:
    if operator in (Operator.LIKE, Operator.NOT_LIKE):
        return (str(value) in str(stored)) is (operator is Operator.LIKE)
    if operator is Operator.EQ:
        return bool(stored == value)
    if operator is Operator.NE:
        return bool(stored != value)
    try:
        return bool(_ORDER[operator](stored, value))
    except TypeError:
        return False


def _analytics_holds(clause: Clause, facts: Facts) -> bool:
    if is_built_in(clause.property) or clause.operator is Operator.EXISTS:
        return holds(clause, facts)
    stored = _plain(lookup(facts.metadata, clause.property))
    values = clause.value if isinstance(clause.value, list) else [clause.value]
    operator = Operator.EQ if clause.operator is Operator.IN else clause.operator
    return any(_compare(operator, _column(operator, stored, one), one) for one in values)


def _column(operator: Operator, stored: Any, value: Scalar) -> Any:
    """The column that the copy reads: a string, or else a number."""
    if isinstance(value, str) or operator in (Operator.LIKE, Operator.NOT_LIKE):
        return stored if isinstance(stored, str) else ""
    if isinstance(stored, str):
        return _number_in(stored)
    return stored if isinstance(stored, Decimal) else Decimal(0)


def _number_in(text: str) -> Decimal:
    try:
        return parse_amount(text) or Decimal(0)
    except ValueError:
        return Decimal(0)


def _plain(stored: Any) -> Any:
    return stored.amount if isinstance(stored, Number) else stored
