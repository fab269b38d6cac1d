"""Filters as a person types them."""

from decimal import Decimal

import pytest

from deploy.console import parse_clause, parse_filter
from deploy.errors import USAGE, GiveUp


@pytest.mark.parametrize(
    ("text", "property", "operator", "value"),
    [
        ("model=gpt-4", "model", "eq", "gpt-4"),
        ("model = gpt-4 turbo", "model", "eq", "gpt-4 turbo"),
        ("tier!=free", "tier", "ne", "free"),
        ("tokens>=100", "tokens", "gte", 100),
        ("tokens<-1", "tokens", "lt", -1),
        ("price>0.10", "price", "gt", Decimal("0.10")),
        ("tokens>=1e3", "tokens", "gte", Decimal("1e3")),
        ("size~1e3", "size", "like", "1e3"),
        ("phone~+49", "phone", "like", "+49"),
        ('phone="+49"', "phone", "eq", "+49"),
        ("cached=true", "cached", "eq", True),
        ('zip="00123"', "zip", "eq", "00123"),
        ("zip=00123", "zip", "eq", "00123"),
        ("path~/v1/", "path", "like", "/v1/"),
        ("path!~a=b", "path", "not_like", "a=b"),
        ("note=", "note", "eq", ""),
        ("_llm.model<=m", "_llm.model", "lte", "m"),
    ],
)
def test_a_clause_reads_as_it_is_typed(text: str, property: str, operator: str, value: object) -> None:
    """The first operator splits a clause; a value that reads as a number or boolean is one, quotes make it text."""
    clause = parse_clause(text)

    assert clause == {"property": property, "operator": operator, "value": value}
    assert type(clause["value"]) is type(value)


@pytest.mark.parametrize(("filter", "where"), [
    (None, ["nonsense"]), ("[]", []), ("{", []), ("{}", ["a=b"]), ('{"a":1e9999999999999999999}', []),
])  # fmt: skip
def test_what_is_no_filter_is_wrong_usage(filter: str | None, where: list[str]) -> None:
    """A filter that cannot be read is the person's to mend, before anything is sent."""
    with pytest.raises(GiveUp) as raised:
        parse_filter(filter, where)

    assert raised.value.exit_code == USAGE


@pytest.mark.parametrize("value", ["5.", "+5", ".5", "-.5", "00.5", "+1e3"])
def test_what_only_looks_like_a_number_is_wrong_usage(value: str) -> None:
    """It would be compared as a text, letter by letter, and nobody would see why it counts nothing."""
    with pytest.raises(GiveUp, match="is no number for JSON") as raised:
        parse_clause(f"tokens>={value}")

    assert raised.value.exit_code == USAGE


def test_clauses_must_all_hold() -> None:
    """Several clauses are joined with and; none matches everything."""
    assert parse_filter(None, ["a=1", "b=2"])["conjunction"] == "and"
    assert parse_filter(None, []) == {"conjunction": "and", "clauses": []}
