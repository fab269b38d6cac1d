"""Events at capture: what is converted, what is refused, and that nothing passes which the server would refuse."""

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.client import Event
from ingest.client.event import Unacceptable, seal
from meters.event import Event as MeteredEvent
from meters.event import check_event
from meters.exact import decode

NOW = datetime(2026, 3, 1, 10, tzinfo=UTC)
LATER = NOW + timedelta(days=400_000)


class Plan(StrEnum):
    """A value as applications have them."""

    PRO = "pro"


class Level(Enum):
    """Another."""

    HIGH = 3


class Count:
    """Counts as an integer, as numbers of other libraries do."""

    def __index__(self) -> int:
        return 7


def line(metadata: Any, **fields: Any) -> Any:
    """The sealed event, read exactly."""
    event = {"name": "call", "external_customer_id": "u", "metadata": metadata} | fields
    return decode(seal(event, NOW).line)


@pytest.mark.parametrize(("value", "sent"), [
    ("a", "a"), (1, 1), (True, True), (1.5, Decimal("1.5")), (0.1, Decimal("0.1")),
    (Decimal("0.1234567890123456789"), Decimal("0.1234567890123456789")), (Decimal("1E+3"), Decimal("1E+3")),
    (1 << 70, 1 << 70), (-(1 << 64), -(1 << 64)), (Plan.PRO, "pro"), (Level.HIGH, 3), (Count(), 7),
    (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), "2026-01-02T03:04:05.000006+00:00"),
    (datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2))), "2026-01-02T00:00:00+02:00"),
    (date(2026, 1, 2), "2026-01-02"),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"), ("x" * 500, "x" * 500),
])  # fmt: skip
def test_a_value_keeps_its_meaning(value: object, sent: object) -> None:
    """What an application has is sent as what it says, digit by digit."""
    assert line({"key": value})["metadata"] == {"key": sent}


@pytest.mark.parametrize("nothing", [None, ""])
def test_what_says_nothing_is_left_out(nothing: object) -> None:
    """None and the empty string are refused by servers; an event does not fail for them."""
    assert line({"key": nothing, "other": 1})["metadata"] == {"other": 1}


@pytest.mark.parametrize(("amount", "sent"), [
    (0.1 + 0.2, Decimal("0.3")), (3 * 0.1, Decimal("0.3")), ("0.0425", Decimal("0.0425")), (2, 2),
    (Decimal("0.0000000000005"), 0), (Decimal("0.0000000000015"), Decimal("2E-12")),
    (Decimal("12345.123456789012"), "12345.123456789012"), (-1, -1), (0, 0),
])  # fmt: skip
def test_a_cost_is_rounded_to_12_decimals(amount: object, sent: object) -> None:
    """Half to even; an amount with more digits than a double holds travels as text."""
    assert line({"_cost": {"amount": amount, "currency": "usd"}})["metadata"]["_cost"]["amount"] == sent


LLM = {"vendor": "v", "model": "m", "input_tokens": 1, "output_tokens": 2, "total_tokens": 3}


@pytest.mark.parametrize(("fields", "type", "loc"), [
    ({"metadata": {"k": float("nan")}}, "finite_number", ("metadata", "k")),
    ({"metadata": {"k": float("inf")}}, "finite_number", ("metadata", "k")),
    ({"metadata": {"k": Decimal("NaN")}}, "finite_number", ("metadata", "k")),
    ({"metadata": {"k": [1]}}, "metadata_value_type", ("metadata", "k")),
    ({"metadata": {"k": {"a": 1}}}, "metadata_value_type", ("metadata", "k")),
    ({"metadata": {"k": b"a"}}, "metadata_value_type", ("metadata", "k")),
    ({"metadata": {"k": "x" * 501}}, "string_too_long", ("metadata", "k")),
    ({"metadata": {"k": "a\0"}}, "value_error", ()),
    ({"metadata": {"k": "\ud800"}}, "string_unicode", ()),
    ({"metadata": {"k": 10**26}}, "number_too_large", ("metadata", "k")),
    ({"metadata": {"k": datetime(2026, 1, 1)}}, "timezone_aware", ("metadata", "k")),  # noqa: DTZ001
    ({"metadata": {None: 1}}, "metadata_value_type", ()),
    ({"metadata": [1]}, "dict_type", ("metadata",)),
    ({"metadata": {"_cost": 5}}, "dict_type", ("metadata", "_cost")),
    ({"metadata": {"_cost": {"amount": 5}}}, "missing", ("metadata", "_cost", "currency")),
    ({"metadata": {"_cost": {"amount": 5, "currency": "eur"}}}, "string_pattern_mismatch",
     ("metadata", "_cost", "currency")),
    ({"metadata": {"_cost": {"amount": 123456, "currency": "usd"}}}, "decimal_whole_digits",
     ("metadata", "_cost", "amount")),
    ({"metadata": {"_cost": {"amount": "much", "currency": "usd"}}}, "decimal_type", ("metadata", "_cost", "amount")),
    ({"metadata": {"_cost": {"amount": True, "currency": "usd"}}}, "decimal_type", ("metadata", "_cost", "amount")),
    ({"metadata": {"_llm": LLM | {"model": None}}}, "missing", ("metadata", "_llm", "model")),
    ({"metadata": {"_llm": LLM | {"input_tokens": 1.5}}}, "int_from_float", ("metadata", "_llm", "input_tokens")),
    ({"metadata": {"_llm": LLM | {"input_tokens": "1"}}}, "int_type", ("metadata", "_llm", "input_tokens")),
    ({"metadata": {"_llm": LLM | {"prompt": 1}}}, "string_type", ("metadata", "_llm", "prompt")),
    ({"name": "x" * 129}, "string_too_long", ("name",)),
    ({"name": None}, "missing", ("name",)),
    ({"name": 5}, "string_type", ("name",)),
    ({"external_customer_id": None}, "missing", ("external_customer_id",)),
    ({"external_customer_id": ["u"]}, "string_type", ("external_customer_id",)),
    ({"timestamp": datetime(2026, 1, 1)}, "timezone_aware", ("timestamp",)),  # noqa: DTZ001
    ({"timestamp": [1]}, "datetime_type", ("timestamp",)),
])  # fmt: skip
def test_what_has_no_clear_meaning_is_refused_at_capture(fields: dict[str, Any], type: str, loc: tuple[str]) -> None:
    """With the server's own word for it, and the place."""
    with pytest.raises(Unacceptable) as refused:
        seal({"name": "call", "external_customer_id": "u"} | fields)

    assert (refused.value.type, refused.value.loc) == (type, loc)


def test_only_mappings_and_events_are_events() -> None:
    """Anything else is refused, too; a mapping need not be a dict."""
    with pytest.raises(Unacceptable):
        seal([("name", "call")])  # type: ignore[arg-type]
    fields = {"name": "call", "customer_id": uuid.UUID(int=1 << 78), "metadata": MappingProxyType({"a": None})}
    assert decode(seal(MappingProxyType(fields)).line)["customer_id"] == str(fields["customer_id"])


def test_an_event_of_the_class_is_sealed_like_a_dict() -> None:
    """The same keys, the same bytes; what is None is not sent."""
    fields = {"name": "call", "external_customer_id": "u", "metadata": {"a": 1}, "external_id": "e", "timestamp": NOW}

    assert json.loads(seal(Event(**fields)).line) == json.loads(seal(fields).line)


def test_an_event_is_stamped_and_named_where_it_is_captured() -> None:
    """Time and id are made once; what was given stays, and the caller's dict is not touched."""
    event: dict[str, Any] = {"name": "call", "external_customer_id": "u"}
    first, second = seal(event), seal(event)

    assert event == {"name": "call", "external_customer_id": "u"}
    assert first.external_id != second.external_id
    assert abs(datetime.fromisoformat(decode(first.line)["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert seal(event | {"external_id": "mine"}).external_id == "mine"


def leaves() -> st.SearchStrategy[Any]:
    """Values of every kind that Python has, good and bad."""
    return st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.decimals(), st.text(max_size=600), st.binary(),
        st.datetimes(timezones=st.none() | st.just(UTC)), st.dates(), st.uuids(), st.times(), st.lists(st.integers()),
        st.integers(10**24, 10**28), st.complex_numbers(), st.just("\ud800"), st.just("a\0b"), st.just("\\u0000"),
    )  # fmt: skip


def amounts() -> st.SearchStrategy[Any]:
    """Amounts and what may stand in their place."""
    return st.one_of(leaves(), st.floats(-1e6, 1e6), st.decimals(-10**6, 10**6).map(str))


def metadata() -> st.SearchStrategy[Any]:
    """Metadata of every kind."""
    cost = st.fixed_dictionaries({"amount": amounts(), "currency": st.sampled_from(["usd", "USD", None])})
    llm = st.fixed_dictionaries(
        {"vendor": st.text(), "model": st.text(), **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"),
                                                                  st.integers() | leaves())},
        optional={"prompt": leaves(), "cached_input_tokens": leaves(), "extra": leaves()},
    )  # fmt: skip
    reserved = st.fixed_dictionaries({}, optional={"_cost": cost | leaves(), "_llm": llm | leaves()})
    return st.builds(lambda a, b: {**a, **b}, st.dictionaries(st.text() | st.integers(), leaves()), reserved) | leaves()


TEXTS = ("external_customer_id", "external_id", "parent_id", "external_member_id")


@settings(max_examples=300)
@given(st.fixed_dictionaries(
    {"name": st.text(max_size=140), "metadata": metadata()},
    optional={name: leaves() for name in (*TEXTS, "timestamp")},
))  # fmt: skip
def test_the_server_takes_whatever_was_sealed(event: Mapping[str, Any]) -> None:
    """Whatever an application hands over, it is refused at capture or the server reads it without complaint."""
    try:
        sealed = seal(event)
    except Unacceptable:
        return
    found = check_event(sealed.line, now=LATER)
    if isinstance(found, list):
        assert {tuple(entry.loc[4:]) for entry in found} <= {("timestamp",)}  # its texts are the server's to read
    else:
        assert isinstance(found, MeteredEvent)
        assert found.external_id == sealed.external_id
    assert b"\n" not in sealed.line
