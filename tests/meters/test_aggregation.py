"""What a meter makes of the events it counts."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from meters.aggregation import Aggregation, Function, considers, evaluate, parse_aggregation
from meters.event import Event
from meters.event_values import Facts, facts, lookup

WHEN = datetime(2024, 1, 10, 12, 0, 0, 500_000, tzinfo=UTC)


def events(*tokens: str | None, key: str = "k") -> list[Facts]:
    """Events with these JSON tokens at one key; None has no such key."""
    return [facts(Event("event", {} if token is None else {key: msgspec.Raw(token)}), WHEN) for token in tokens]


MIXED = ("3", '"100"', "true", None, "-1.5", "null")


@pytest.mark.parametrize(
    ("func", "tokens", "value"),
    [
        ("count", MIXED, "6"),
        ("sum", MIXED, "1.5"),
        ("avg", MIXED, "0.75"),
        ("min", MIXED, "-1.5"),
        ("max", MIXED, "3"),
        ("unique", MIXED, "4"),
        ("sum", ("0.1",) * 10, "1"),
        ("sum", ("9007199254740993", "1"), "9007199254740994"),
        ("sum", ("99999999999999999999999999", "0.000000000001"), "99999999999999999999999999.000000000001"),
        ("avg", ("1", "1", "0"), "0.666666666667"),
        ("avg", ("0.000000000001", "0"), "0"),  # half to even
        ("avg", ("0.000000000003", "0"), "0.000000000002"),
        ("unique", ("1", "1.0", "1e0", '"1"', "true", '"true"', "false"), "5"),
        ("unique", ('"é"', '"\\u00e9"'), "1"),
        *((func, (), "0") for func in ("count", "sum", "avg", "min", "max", "unique")),
        *((func, (None, '"x"', "true"), "0") for func in ("sum", "avg", "min", "max")),
    ],
)
def test_values(func: Function, tokens: tuple[str | None, ...], value: str) -> None:
    """Numbers are added, compared and averaged exactly; what is no number is passed over."""
    assert evaluate(Aggregation(func, "k"), events(*tokens)) == Decimal(value)


@pytest.mark.parametrize(
    ("func", "property", "value"),
    [
        ("max", "timestamp", "1704888001"),
        ("sum", "name", "0"),
        ("avg", "source", "0"),
        ("unique", "name", "0"),
        ("unique", "timestamp", "0"),
    ],
)
def test_built_in_properties(func: Function, property: str, value: str) -> None:
    """The timestamp is a number of seconds; unique reads metadata alone."""
    assert evaluate(Aggregation(func, property), events("1", "2")) == Decimal(value)


def test_unique_on_a_built_in_name_reads_the_metadata_key() -> None:
    """As Polar does: a key called name is counted."""
    assert evaluate(Aggregation("unique", "name"), events('"a"', '"b"', key="name")) == 2


@pytest.mark.parametrize(
    ("func", "token", "considered"),
    [("sum", "1", True), ("sum", '"1"', False), ("max", None, False), ("unique", None, True), ("count", None, True)],
)
def test_which_events_take_part(func: Function, token: str | None, considered: bool) -> None:
    """A numeric function takes events with a number; the others take all."""
    assert considers(Aggregation(func, "k"), events(token)[0]) is considered


@pytest.mark.parametrize(
    ("key", "token", "path", "value"),
    [
        ("_cost", '{"amount":"0.10","currency":"usd"}', "_cost.amount", "0.1"),
        ("_cost", '{"amount":1e-1,"currency":"usd"}', "_cost.amount", "0.1"),
        ("_cost", '{"amount":0.30000000000000004,"currency":"usd"}', "_cost.amount", "0.3"),
        ("_cost", '{"amount":1,"currency":"usd","more":2}', "_cost.more", "0"),
        ("_llm", '{"total_tokens":"12","more":1}', "_llm.total_tokens", "12"),
        ("_llm", '{"total_tokens":12.0}', "_llm.total_tokens", "12"),
        ("_llm", '{"vendor":"5"}', "_llm.vendor", "0"),
        ("_llm", '{"more":1}', "_llm.more", "0"),
        ("other", '{"amount":"1"}', "other.amount", "0"),
    ],
)
def test_reserved_metadata(key: str, token: str, path: str, value: str) -> None:
    """Its numbers are numbers also as text; keys outside the known set do not exist."""
    assert evaluate(Aggregation("sum", path), events(token, key=key)) == Decimal(value)


def test_reserved_keys_that_are_not_known_cannot_be_seen() -> None:
    """Not by filters either."""
    (event,) = events('{"amount":1,"currency":"usd","more":2}', key="_cost")
    assert lookup(event.metadata, "_cost.more") is None
    assert lookup(event.metadata, "_cost.currency") == "usd"


def test_facts_of_an_event_without_timestamp_are_as_of_its_ingestion() -> None:
    """An event's own time goes first."""
    earlier = datetime(2024, 1, 1, tzinfo=UTC)
    assert facts(Event("a"), WHEN).timestamp == WHEN
    assert facts(Event("a", timestamp=earlier), WHEN).timestamp == earlier


def test_a_number_that_no_event_can_carry_is_a_programming_error() -> None:
    """Facts are made of admitted events."""
    with pytest.raises(ValueError, match="26 integer digits"):
        events("1e26")


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ({"func": "count"}, Aggregation("count")),
        ({"func": "count", "property": "dropped"}, Aggregation("count")),
        ({"func": "sum", "property": "metadata.tokens"}, Aggregation("sum", "tokens")),
        ({"func": "unique", "property": ""}, Aggregation("unique", "")),
    ],
)
def test_aggregations_are_read(value: Any, parsed: Aggregation) -> None:
    """One leading ``metadata.`` is taken off."""
    assert parse_aggregation(value, ()) == parsed


@pytest.mark.parametrize(
    ("value", "type", "place"),
    [
        (None, "model_attributes_type", ()),
        ({}, "union_tag_not_found", ()),
        ({"func": "median", "property": "k"}, "union_tag_invalid", ()),
        ({"func": ["sum"], "property": "k"}, "union_tag_invalid", ()),
        ({"func": "sum"}, "missing", ("sum", "property")),
        ({"func": "sum", "property": 5}, "string_type", ("sum", "property")),
        ({"func": "sum", "property": "x" * 1001}, "string_too_long", ("sum", "property")),
    ],
)
def test_what_is_no_aggregation_is_refused(value: Any, type: str, place: tuple[str, ...]) -> None:
    """With the type and place that Polar's clients know."""
    complaints = parse_aggregation(value, ("body", "aggregation"))
    assert isinstance(complaints, list)
    assert [(c["type"], tuple(c["loc"])) for c in complaints] == [(type, ("body", "aggregation", *place))]
