"""The two other ways in which Polar reads a filter, each case from its contract (sections 3.3 to 3.5)."""

from datetime import UTC, datetime
from typing import Any

import pytest

from aggregator.reconcile.polar_pairing import analytics, billing
from meters.event_values import Facts, number
from meters.filters import Clause, Filter, Operator, matches

WHEN = datetime(2026, 3, 1, 12, 0, 0, 700_000, tzinfo=UTC)


@pytest.mark.parametrize(
    ("operator", "value", "stored", "balance", "invoice", "listed"),
    [
        ("ne", "free", 3, False, True, True),  # a number is no text for a balance
        ("ne", "free", True, False, True, True),
        ("ne", "free", None, False, False, True),  # a missing key reads as ""
        ("eq", 5, "5", True, False, True),  # text against the text of the number
        ("gt", 5, "abc", True, False, False),
        ("eq", True, 1, True, True, True),
        ("eq", 1, True, False, True, False),
        ("lt", 5, None, False, False, True),  # a missing number reads as 0
        ("eq", 5, 5, True, True, True),
        ("eq", "gold", "gold", True, True, True),
        ("like", "old", "gold", True, True, True),
        ("like", "True", True, False, True, False),
    ],
)
def test_where_the_three_readings_part(
    operator: str, value: Any, stored: Any, balance: bool, invoice: bool, listed: bool
) -> None:
    """A clause over mixed types: what a balance counts, what an invoice counts, what a list shows."""
    filter = Filter("and", [Clause("tier", Operator(operator), value)])
    is_number = isinstance(stored, int) and not isinstance(stored, bool)
    held = number(str(stored)) if is_number else stored
    facts = Facts(name="call", timestamp=WHEN, metadata={} if stored is None else {"tier": held})

    assert (matches(filter, facts), billing(filter, facts), analytics(filter, facts)) == (balance, invoice, listed)


def test_an_invoice_cuts_seconds_and_a_balance_rounds_them() -> None:
    """The built-in timestamp, with a fraction above a half."""
    whole = int(WHEN.timestamp())
    facts = Facts(name="call", timestamp=WHEN)

    assert billing(Filter("and", [Clause("timestamp", Operator.EQ, whole)]), facts)
    assert matches(Filter("and", [Clause("timestamp", Operator.EQ, whole + 1)]), facts)


def test_names_and_empty_filters_are_read_alike() -> None:
    """Where types cannot differ all three agree."""
    facts = Facts(name="call", timestamp=WHEN)
    for filter in (Filter("or", []), Filter("and", [Clause("name", Operator.EQ, "call")])):
        assert matches(filter, facts) is billing(filter, facts) is analytics(filter, facts) is True
