"""What a clause means, by the JSON type that an event has at the property."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meters import exact
from meters.errors import COMPLAINTS_MAX
from meters.event_values import Facts, epoch_seconds, number
from meters.filters import (
    EVERYTHING,
    NESTING_MAX,
    Clause,
    Filter,
    Operator,
    Scalar,
    filter_json,
    holds,
    matches,
    parse_filter,
)

WHEN = datetime(2024, 1, 10, 12, 0, 0, 500_000, tzinfo=UTC)  # 1704888000.5

STORED: dict[str, Any] = {
    "nothing": None,
    '"5"': "5",
    '"10"': "10",
    '"abc"': "abc",
    '"t"': "t",
    '"true"': "true",
    "5": number("5"),
    "5.0": number("5.0"),
    "10": number("10"),
    "1": number("1"),
    "0": number("0"),
    "true": True,
    "false": False,
    "{}": {"a": "5"},
    "[]": ["5"],
}
ALL_TEXTS = {'"5"', '"10"', '"abc"', '"t"', '"true"'}


def matching(operator: str, value: Any) -> set[str]:
    """Which of the stored values a clause holds of."""
    clause = Clause("k", Operator(operator), value)
    return {name for name, stored in STORED.items() if holds(clause, Facts("event", WHEN, {"k": stored}))}


@pytest.mark.parametrize(
    ("operator", "value", "matched"),
    [
        # text: the order of UTF-8 bytes, and nothing but text
        ("eq", "5", {'"5"'}),
        ("eq", "true", {'"true"'}),
        ("ne", "5", ALL_TEXTS - {'"5"'}),
        ("gt", "5", {'"abc"', '"t"', '"true"'}),
        ("gte", "5", ALL_TEXTS - {'"10"'}),
        ("lt", "5", {'"10"'}),
        ("lte", "5", {'"10"', '"5"'}),
        # numbers: numbers by value, text as text, booleans not at all
        ("eq", 5, {"5", "5.0", '"5"'}),
        ("eq", 1, {"1"}),
        ("ne", 5, {"10", "1", "0"} | ALL_TEXTS - {'"5"'}),
        ("gt", 5, {"10", '"abc"', '"t"', '"true"'}),
        ("gte", 5, {"5", "5.0", "10"} | ALL_TEXTS - {'"10"'}),
        ("lt", 5, {"1", "0", '"10"'}),
        ("lte", Decimal("5.0"), {"5", "5.0", "1", "0", '"10"', '"5"'}),
        ("gt", Decimal("4.999999999999"), {"5", "5.0", "10", '"5"', '"abc"', '"t"', '"true"'}),
        ("lt", 10**40, {"5", "5.0", "10", "1", "0", '"10"'}),
        # booleans: 1 and 0 for numbers, t and f for text
        ("eq", True, {"true", "1", '"t"'}),
        ("eq", False, {"false", "0"}),
        ("ne", True, {"false", "0", "5", "5.0", "10"} | ALL_TEXTS - {'"t"'}),
        # like: the text of whatever has one
        ("like", "5", {'"5"', "5", "5.0"}),
        ("like", ".0", {"5.0"}),
        ("like", 0, {'"10"', "5.0", "10", "0"}),
        ("like", True, {'"t"', '"true"', "true"}),
        ("like", "", ALL_TEXTS | {"5", "5.0", "10", "1", "0", "true", "false"}),
        ("not_like", "5", {'"10"', '"abc"', '"t"', '"true"', "10", "1", "0", "true", "false"}),
        ("not_like", "", set()),
        # additions
        ("in", [5, "abc", True], {"5", "5.0", '"5"', '"abc"', "true", "1", '"t"'}),
        ("in", [], set()),
        ("exists", True, set(STORED) - {"nothing"}),
        ("exists", False, {"nothing"}),
    ],
)
def test_a_clause_by_the_type_of_what_is_stored(operator: str, value: Any, matched: set[str]) -> None:
    """The table of the module, line by line. What has no value matches nothing, ``ne`` and ``not_like`` included."""
    assert matching(operator, value) == matched


@pytest.mark.parametrize(
    ("property", "operator", "value", "held"),
    [
        ("name", "eq", "chat", True),
        ("name", "ne", "chat", False),
        ("name", "gt", "Chat", True),
        ("name", "like", "ha", True),
        ("name", "not_like", "HA", True),
        ("name", "in", ["x", "chat"], True),
        ("name", "ne", 5, False),
        ("name", "ne", True, False),
        ("name", "not_like", 5, False),
        ("name", "exists", True, True),
        ("name", "exists", False, False),
        ("source", "eq", "user", True),
        ("timestamp", "eq", 1704888001, True),  # half a second is rounded up
        ("timestamp", "gte", 1704888001, True),
        ("timestamp", "lt", 1704888001, False),
        ("timestamp", "like", 8800, True),
        ("timestamp", "not_like", 8801, True),
        ("timestamp", "in", [1704888001, "x"], True),
        ("timestamp", "eq", "1704888001", False),
        ("timestamp", "ne", "x", False),
        ("timestamp", "ne", True, False),
        ("timestamp", "ne", Decimal("1.5"), False),
    ],
)
def test_built_in_properties(property: str, operator: str, value: Any, held: bool) -> None:
    """Name and source know text alone, the timestamp whole seconds alone; the rest is legal and false."""
    facts = Facts("chat", WHEN, {"name": "shadow", "source": "shadow", "timestamp": "shadow"})
    assert holds(Clause(property, Operator(operator), value), facts) is held


@pytest.mark.parametrize(
    ("microseconds", "seconds"),
    [(499_999, 0), (500_000, 1), (-499_999, 0), (-500_000, -1), (-1_500_000, -2), (1_500_000, 2)],
)
def test_seconds_are_rounded_half_away_from_zero(microseconds: int, seconds: int) -> None:
    """As PostgreSQL rounds a numeric."""
    instant = datetime(1970, 1, 1, tzinfo=UTC) + microseconds * (datetime.resolution)
    assert epoch_seconds(instant) == seconds


@pytest.mark.parametrize(
    ("metadata", "property", "found"),
    [
        ({"_llm": {"model": "x"}}, "_llm.model", True),
        ({"_llm": "x"}, "_llm.model", False),
        ({"_llm.model": "x"}, "_llm.model", False),
        ({"": "x"}, "", True),
        ({"a": ["x"]}, "a.0", False),
    ],
)
def test_a_dot_means_nesting(metadata: dict[str, Any], property: str, found: bool) -> None:
    """And nothing else, so a key with a dot in it cannot be reached."""
    assert holds(Clause(property, Operator.EXISTS, True), Facts("event", WHEN, metadata)) is found


TRUE, FALSE = Clause("name", Operator.EQ, "event"), Clause("missing", Operator.NE, "x")


@pytest.mark.parametrize(
    ("filter", "matched"),
    [
        (Filter("and", []), True),
        (Filter("or", []), True),
        (Filter("and", [TRUE, FALSE]), False),
        (Filter("or", [TRUE, FALSE]), True),
        (Filter("or", [FALSE, FALSE]), False),
        (Filter("and", [TRUE, Filter("or", [FALSE, TRUE])]), True),
        (Filter("and", [TRUE, Filter("or", [])]), True),
        (Filter("or", [FALSE, Filter("and", [])]), True),
    ],
)
def test_conjunctions(filter: Filter, matched: bool) -> None:
    """All or one; without clauses a filter lets everything through, also inside another."""
    assert matches(filter, Facts("event", WHEN)) is matched


def clause(**fields: Any) -> dict[str, Any]:
    """A filter of one clause, as JSON."""
    return {"conjunction": "and", "clauses": [{"property": "k", "operator": "eq", "value": 1} | fields]}


NESTED: dict[str, Any] = {"conjunction": "and", "clauses": []}
for _ in range(NESTING_MAX):
    NESTED = {"conjunction": "and", "clauses": [NESTED]}


@pytest.mark.parametrize(
    ("value", "type", "place"),
    [
        (None, "model_attributes_type", ()),
        ({"clauses": []}, "missing", ("conjunction",)),
        ({"conjunction": "and"}, "missing", ("clauses",)),
        ({"conjunction": "AND", "clauses": []}, "enum", ("conjunction",)),
        ({"conjunction": [], "clauses": []}, "enum", ("conjunction",)),
        ({"conjunction": "and", "clauses": {}}, "list_type", ("clauses",)),
        ({"conjunction": "and", "clauses": [5]}, "model_attributes_type", ("clauses", 0)),
        ({"conjunction": "and", "clauses": [{"clauses": []}]}, "missing", ("clauses", 0, "conjunction")),
        ({"conjunction": "and", "clauses": [{"operator": "eq", "value": 1}]}, "missing", ("clauses", 0, "property")),
        (clause(property=5), "string_type", ("clauses", 0, "property")),
        (clause(property="x" * 1001), "string_too_long", ("clauses", 0, "property")),
        (clause(operator="between"), "enum", ("clauses", 0, "operator")),
        (clause(operator=["eq"]), "enum", ("clauses", 0, "operator")),
        (clause(value=None), "filter_value_type", ("clauses", 0, "value")),
        (clause(value={}), "filter_value_type", ("clauses", 0, "value")),
        (clause(value=[1]), "filter_value_type", ("clauses", 0, "value")),
        (clause(value="x" * 1001), "string_too_long", ("clauses", 0, "value")),
        (clause(value=10**1000), "decimal_max_digits", ("clauses", 0, "value")),
        (clause(value=Decimal(f"{10**26}.5")), "decimal_whole_digits", ("clauses", 0, "value")),
        (clause(operator="gt", value=True), "value_error", ("clauses", 0, "value")),
        (clause(operator="in", value=1), "list_type", ("clauses", 0, "value")),
        (clause(operator="in", value=[1, None]), "filter_value_type", ("clauses", 0, "value", 1)),
        (clause(operator="in", value=[1] * 1001), "too_long", ("clauses", 0, "value")),
        (clause(operator="exists", value=1), "bool_type", ("clauses", 0, "value")),
        ({"conjunction": "or", "clauses": clause()["clauses"] * 101}, "too_long", ("clauses",)),
        (
            {"conjunction": "or", "clauses": [{"conjunction": "or", "clauses": clause()["clauses"] * 51}] * 2},
            "too_long",
            (),
        ),
        ({"conjunction": "or", "clauses": [clause(operator="in", value=[1] * 501)] * 2}, "too_long", ()),
        (NESTED, "recursion_loop", ("clauses", 0) * NESTING_MAX),
    ],
)
def test_what_is_no_filter_is_refused_at_its_place(value: Any, type: str, place: tuple[str | int, ...]) -> None:
    """Each refusal has a type, the place and words."""
    complaints = parse_filter(value, ("body", "filter"))
    assert isinstance(complaints, list)
    assert [(complaint["type"], tuple(complaint["loc"])) for complaint in complaints] == [
        (type, ("body", "filter", *place))
    ]
    assert complaints[0]["msg"]


@pytest.mark.parametrize(
    "value",
    [
        {"conjunction": "or", "clauses": clause()["clauses"] * 100},
        {"conjunction": "or", "clauses": [{"conjunction": "or", "clauses": clause()["clauses"] * 50}] * 2},
        clause(operator="in", value=[1] * 1000),
        {"conjunction": "or", "clauses": [clause(operator="in", value=[1] * 500)] * 2},
        NESTED["clauses"][0],
        clause(property="x" * 1000),
    ],
)
def test_a_filter_at_its_limits_is_taken(value: Any) -> None:
    """A hundred clauses at all levels, a thousand values of ``in``, twenty levels, a thousand characters."""
    assert isinstance(parse_filter(value), Filter)


def test_every_mistake_is_reported() -> None:
    """An author mends a filter in one go."""
    complaints = parse_filter({"conjunction": "xor", "clauses": [{"property": 1, "operator": "x", "value": 1}, 5]})
    assert isinstance(complaints, list)
    assert [complaint["loc"][2:] for complaint in complaints] == [
        ["conjunction"],
        ["clauses", 0, "property"],
        ["clauses", 0, "operator"],
        ["clauses", 1],
    ]


@pytest.mark.parametrize(
    ("inner", "first"),
    [
        ([{}] * 100, "missing"),
        ([5] * 100, "model_attributes_type"),
        ([{"property": "p", "operator": "in", "value": [None] * 1000}] * 100, "filter_value_type"),
        (clause(operator="in", value=["x"] * 100)["clauses"] * 100, "too_long"),
        ([{"conjunction": "or", "clauses": []}] * 100, "too_long"),
    ],
)
def test_reading_ends_with_a_hundred_mistakes(inner: list[Any], first: str) -> None:
    """However many clauses are hidden in lists of lists, complaints are few, and what follows is not even looked at."""
    nested = {"conjunction": "and", "clauses": inner}
    for _ in range(3):  # a hundred million clauses, if anybody read them
        nested = {"conjunction": "and", "clauses": [nested] * 100}
    complaints = parse_filter(nested)
    assert isinstance(complaints, list)
    assert len(complaints) <= COMPLAINTS_MAX
    assert complaints[0]["type"] == first


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ('"metadata.a"', "a"),
        ('"metadata.metadata.a"', "metadata.a"),
        ('"metadata.name"', "name"),
        ('"_llm.model"', "_llm.model"),
        ('"metadata.metadata.metadata.a"', "metadata.metadata.a"),
    ],
)
def test_one_leading_metadata_is_taken_off(sent: str, kept: str) -> None:
    """Once, and for good: it is not taken off again when what was written is read."""
    parsed = parse_filter(clause(property=json.loads(sent)))
    assert isinstance(parsed, Filter)
    assert isinstance(parsed.clauses[0], Clause)
    assert parsed.clauses[0].property == kept
    assert parse_filter(filter_json(parsed)) == parsed


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("1.0", "1"), ("1e2", "100"), ("1.50", "1.5"), ("-0.0", "0"), ("2147483648", "2147483648"), ("0.1", "0.1"),
     ("0.30000000000000004", "0.3"), ("1e-30", "0"), ("0.9999999999999", "1"), (f"{10**40}", f"{10**40}")],
)  # fmt: skip
def test_numbers_are_kept_exactly_and_plainly(sent: str, kept: str) -> None:
    """An integral fraction is an integer; trailing zeros say nothing; what is finer than an amount is rounded."""
    parsed = parse_filter(exact.decode(json.dumps(clause()).replace('"value": 1', f'"value": {sent}')))
    assert isinstance(parsed, Filter)
    assert exact.encode(filter_json(parsed)["clauses"][0]["value"]).decode() == kept


def test_a_double_is_a_programming_error() -> None:
    """Its digits are gone already: whoever decodes has to decode exactly."""
    with pytest.raises(TypeError, match="has lost its digits"):
        parse_filter(clause(value=1.5))


scalars: st.SearchStrategy[Scalar] = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(1, 10**12 - 1).map(lambda numerator: Decimal(numerator).scaleb(-12).normalize())
)
properties = st.text(st.characters(exclude_categories=["Cs"]), max_size=10) | st.sampled_from(
    ["metadata", "metadata.plan", "metadata.metadata.plan"]
)
clauses = (
    st.builds(Clause, properties, st.sampled_from([Operator.EQ, Operator.NE, Operator.LIKE]), scalars)
    | st.builds(Clause, properties, st.just(Operator.IN), st.lists(scalars, max_size=3))
    | st.builds(Clause, properties, st.just(Operator.EXISTS), st.booleans())
)
filters = st.recursive(
    st.just(EVERYTHING),
    lambda parts: st.builds(Filter, st.sampled_from(["and", "or"]), st.lists(clauses | parts, max_size=3)),
    max_leaves=8,
)


@given(filters)
def test_a_filter_survives_its_json(filter: Filter) -> None:
    """Written in Polar's shape and read again, it is the same filter, digit by digit."""
    text = exact.encode(filter_json(filter))
    again = parse_filter(exact.decode(text))
    assert again == filter
    assert isinstance(again, Filter)
    assert exact.encode(filter_json(again)) == text
