"""Which events are taken, and what is said of those that are not."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import UUID4, TypeAdapter, ValidationError
from xxhash import xxh3_128_digest

from meters.errors import DEPTH_MAX, Reason, Refusal
from meters.event import CLOCK_SKEW, Event, check_event, check_line, event_id, halves, identity, parse_uuid4

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ORGANIZATION = "1db1e1a0-0000-4000-8000-000000000000"
CUSTOMER = "992fae2a-2a17-4b7a-8d9e-e287cf90131b"
LLM = {"vendor": "acme", "model": "m-1", "input_tokens": 700, "output_tokens": 112, "total_tokens": 812}


def line(**fields: Any) -> bytes:
    """An event for an external customer, with these fields."""
    return json.dumps({"name": "chat", "external_customer_id": "u"} | fields).encode()


def taken(text: bytes) -> Event:
    """The event, which is not refused."""
    event = check_event(text, now=NOW)
    assert isinstance(event, Event), event
    return event


def refused(text: bytes) -> list[Refusal]:
    """The refusals, of which there is at least one."""
    refusals = check_event(text, index=3, now=NOW)
    assert isinstance(refusals, list), refusals
    assert refusals
    assert all(refusal.index == 3 for refusal in refusals)
    return refusals


def complaints(text: bytes) -> list[tuple[str, tuple[str | int, ...]]]:
    """Type and place of each refusal, below the kind of event."""
    return [(refusal.type, tuple(refusal.loc[4:])) for refusal in refused(text)]


def test_an_event_with_everything_is_taken_as_sent() -> None:
    """Every field arrives; metadata values are the very tokens."""
    text = (
        b'{"name":"chat","external_customer_id":"u","external_member_id":"seat","external_id":"r-1","parent_id":"t-1",'
        b'"timestamp":"2026-03-01T10:00:00.123456+02:00","unknown":[1],'
        b'"metadata":{"n":1.50,"big":12345678901234567890123.123456789012,"b":true,"s":"x"}}'
    )
    event = taken(text)
    assert event.timestamp == datetime(2026, 3, 1, 8, 0, 0, 123456, tzinfo=UTC)
    assert (event.name, event.external_customer_id, event.external_member_id) == ("chat", "u", "seat")
    assert (event.external_id, event.parent_id, event.customer_id) == ("r-1", "t-1", None)
    assert {key: bytes(raw) for key, raw in event.metadata.items()} == {
        "n": b"1.50",
        "big": b"12345678901234567890123.123456789012",
        "b": b"true",
        "s": b'"x"',
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "x" * 128},
        {"name": "😀" * 128},
        {"external_customer_id": ""},
        {"external_id": ""},
        {"external_id": None, "parent_id": None, "organization_id": None, "external_member_id": None},
        {"customer_id": None},
        {"customer_id": "not a UUID", "member_id": 5},  # not read beside an external customer
        {"timestamp": "2026-03-01T12:00:00Z"},
        {"timestamp": 1767225600},
        {"timestamp": "0001-01-01T00:00:00Z"},
        {"metadata": {}},
        {"metadata": {"": "x", "k" * 5000: 1}},
        {"metadata": {str(key): key for key in range(1000)}},
        {"metadata": {"s": "x" * 500, "n": -1, "f": 1.0, "b": False}},
        {"metadata": {"n": int("9" * 26)}},
        {"metadata": {"_cost": {"amount": 0.0425, "currency": "usd"}}},
        {"metadata": {"_cost": {"amount": "-99999.999999999999", "currency": "xusdx", "more": [1]}}},
        {"metadata": {"_cost": {"amount": 0.30000000000000004, "currency": "usd"}}},
        {"metadata": {"_cost": {"amount": "1E-12", "currency": "usd"}}},
        {"metadata": {"_llm": LLM}},
        {
            "metadata": {
                "_llm": LLM | {"input_tokens": "12", "output_tokens": 12.0, "cached_input_tokens": 1, "more": {}}
            }
        },
        {"metadata": {"_llm": LLM | {"prompt": "x" * 5000, "response": None}}},
        {"unknown": {"deep": [[[[["x"]]]]]}},
    ],
)
def test_what_polar_takes_is_taken(fields: dict[str, Any]) -> None:
    """The limits themselves, and what looks wrong but is not."""
    taken(line(**fields))


@pytest.mark.parametrize(
    ("fields", "type", "place"),
    [
        ({"name": None}, "string_type", ("name",)),
        ({"name": 5}, "string_type", ("name",)),
        ({"name": "x" * 129}, "string_too_long", ("name",)),
        ({"external_id": 5}, "string_type", ("external_id",)),
        ({"parent_id": {}}, "string_type", ("parent_id",)),
        ({"external_member_id": 5}, "string_type", ("external_member_id",)),
        ({"external_customer_id": None}, "string_type", ("external_customer_id",)),
        ({"external_customer_id": 5}, "string_type", ("external_customer_id",)),
        ({"organization_id": "x"}, "uuid_parsing", ("organization_id",)),
        ({"organization_id": 5}, "uuid_type", ("organization_id",)),
        ({"organization_id": ORGANIZATION.replace("-4", "-1")}, "uuid_version", ("organization_id",)),
        ({"timestamp": None}, "datetime_type", ("timestamp",)),
        ({"timestamp": "2026-03-01T10:00:00"}, "timezone_aware", ("timestamp",)),
        ({"timestamp": "2026-03-01"}, "timezone_aware", ("timestamp",)),
        ({"timestamp": "noon"}, "datetime_parsing", ("timestamp",)),
        ({"timestamp": "2026-03-01T12:01:01Z"}, "value_error", ("timestamp",)),
        ({"metadata": None}, "dict_type", ("metadata",)),
        ({"metadata": []}, "dict_type", ("metadata",)),
        ({"metadata": {"k": None}}, "metadata_value_type", ("metadata", "k")),
        ({"metadata": {"k": []}}, "metadata_value_type", ("metadata", "k")),
        ({"metadata": {"k": {}}}, "metadata_value_type", ("metadata", "k")),
        ({"metadata": {"k": ""}}, "string_too_short", ("metadata", "k")),
        ({"metadata": {"k": "x" * 501}}, "string_too_long", ("metadata", "k")),
        ({"metadata": {"k": 10**26}}, "number_too_large", ("metadata", "k")),
        ({"metadata": {"_cost": None}}, "dict_type", ("metadata", "_cost")),
        ({"metadata": {"_cost": {"currency": "usd"}}}, "missing", ("metadata", "_cost", "amount")),
        ({"metadata": {"_cost": {"amount": 1}}}, "missing", ("metadata", "_cost", "currency")),
        ({"metadata": {"_cost": {"amount": True, "currency": "usd"}}}, "decimal_type", ("metadata", "_cost", "amount")),
        ({"metadata": {"_cost": {"amount": "x", "currency": "usd"}}}, "decimal_type", ("metadata", "_cost", "amount")),
        (
            {"metadata": {"_cost": {"amount": 100000, "currency": "usd"}}},
            "decimal_whole_digits",
            ("metadata", "_cost", "amount"),
        ),
        (
            {"metadata": {"_cost": {"amount": 1, "currency": "USD"}}},
            "string_pattern_mismatch",
            ("metadata", "_cost", "currency"),
        ),
        ({"metadata": {"_llm": "m-1"}}, "dict_type", ("metadata", "_llm")),
        ({"metadata": {"_llm": LLM | {"vendor": None}}}, "string_type", ("metadata", "_llm", "vendor")),
        ({"metadata": {"_llm": LLM | {"input_tokens": 1.5}}}, "int_from_float", ("metadata", "_llm", "input_tokens")),
        ({"metadata": {"_llm": LLM | {"input_tokens": "x"}}}, "int_type", ("metadata", "_llm", "input_tokens")),
        ({"metadata": {"_llm": LLM | {"input_tokens": True}}}, "int_type", ("metadata", "_llm", "input_tokens")),
        ({"metadata": {"_llm": LLM | {"prompt": 5}}}, "string_type", ("metadata", "_llm", "prompt")),
        (
            {"metadata": {"_llm": LLM | {"cached_input_tokens": None}}},
            "int_type",
            ("metadata", "_llm", "cached_input_tokens"),
        ),
    ],
)
def test_one_wrong_field_is_one_refusal(fields: dict[str, Any], type: str, place: tuple[str, ...]) -> None:
    """Of Polar's type, at Polar's place, with the offending value, and without the noise of the other kind."""
    assert complaints(line(**fields)) == [(type, place)]
    refusal = refused(line(**fields))[0]
    assert refusal.loc[:4] == ["body", "events", 3, "EventCreateExternalCustomer"]
    assert refusal.msg


def test_every_wrong_field_is_reported() -> None:
    """A sender mends an event in one go."""
    text = line(name=5, external_id=5, timestamp="noon", metadata={"a": None, "b": "", "c": 1})
    assert complaints(text) == [
        ("string_type", ("name",)),
        ("datetime_parsing", ("timestamp",)),
        ("string_type", ("external_id",)),
        ("metadata_value_type", ("metadata", "a")),
        ("string_too_short", ("metadata", "b")),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Reason.MALFORMED),
        (b"{", Reason.MALFORMED),
        (b'{"name":"a"} {}', Reason.MALFORMED),
        (b'\xef\xbb\xbf{"name":"a"}', Reason.MALFORMED),
        (b'{"name":"\xff"}', Reason.MALFORMED),
        (b'{"name":"\xed\xa0\x80"}', Reason.MALFORMED),
        (b'{"name":"a\nb"}', Reason.MALFORMED),
        (b'{"name":"a","x":NaN}', Reason.MALFORMED),
        (b'{"name":"a","x":-Infinity}', Reason.MALFORMED),
        (b'{"name":"a","x":01}', Reason.MALFORMED),
        (b"[]", Reason.NOT_AN_OBJECT),
        (b"null", Reason.NOT_AN_OBJECT),
        (b'{"x":' + b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"}", Reason.TOO_DEEP),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", Reason.TOO_DEEP),
        (b'{"name":"a\\u0000"}', Reason.NUL_CHARACTER),
        (b'{"ignored":["a\\u0000"]}', Reason.NUL_CHARACTER),
        (b'{"\\u0000":1}', Reason.NUL_CHARACTER),
        (b'{"name":"\\ud800"}', Reason.LONE_SURROGATE),
        (b'{"ignored":{"\\uDC00x":1}}', Reason.LONE_SURROGATE),
        (b'{"name":"\\ud800\\u0000"}', Reason.NUL_CHARACTER),
    ],
)
def test_what_no_line_may_be_is_the_only_refusal(text: bytes, reason: Reason) -> None:
    """Whatever else is wrong with it, and wherever it hides, also in fields that nobody reads."""
    refusals = refused(text)
    assert [(refusal.type, refusal.msg) for refusal in refusals] == [reason.value]
    assert refusals[0].loc == ["body", "events", 3]


def test_escapes_that_are_not_what_they_look_like_are_taken() -> None:
    """A backslash before u0000 is text; a whole surrogate pair is one character."""
    event = taken(b'{"name":"\\\\u0000 \\ud83d\\ude00","external_customer_id":"u"}')
    assert event.name == "\\u0000 😀"


def test_of_a_repeated_key_in_metadata_the_last_value_holds() -> None:
    """As in every JSON reader that Polar's events pass through; an earlier wrong value does not matter."""
    event = taken(b'{"name":"a","external_customer_id":"u","metadata":{"k":null,"k":2}}')
    assert bytes(event.metadata["k"]) == b"2"


@pytest.mark.parametrize("key", ["amount", "currency", "other"])
def test_a_repeated_key_in_reserved_metadata_is_refused(key: str) -> None:
    """Nobody could tell which amount of money was meant."""
    cost = b'{"amount":1,"currency":"usd","other":1,"%s":"usd 1"}' % key.encode()
    text = b'{"name":"a","external_customer_id":"u","metadata":{"_cost":' + cost + b"}}"
    assert ("duplicate_key", ("metadata", "_cost", key)) in complaints(text)


@pytest.mark.parametrize(
    ("fields", "customer_id", "external_customer_id", "member_id"),
    [
        ({"external_customer_id": "u"}, None, "u", None),
        ({"customer_id": CUSTOMER, "member_id": CUSTOMER}, CUSTOMER, None, CUSTOMER),
        ({"customer_id": CUSTOMER, "member_id": CUSTOMER, "external_customer_id": "u"}, None, "u", None),
        ({"customer_id": CUSTOMER, "external_customer_id": None}, CUSTOMER, None, None),
        ({"customer_id": CUSTOMER, "external_customer_id": 5}, CUSTOMER, None, None),
        ({"customer_id": CUSTOMER, "external_customer_id": "u", "external_member_id": 5}, CUSTOMER, None, None),
        ({"customer_id": "{" + CUSTOMER.upper() + "}"}, CUSTOMER, None, None),
        ({"customer_id": CUSTOMER.replace("-", "")}, CUSTOMER, None, None),
    ],
)
def test_an_external_customer_goes_first(
    fields: dict[str, Any], customer_id: str | None, external_customer_id: str | None, member_id: str | None
) -> None:
    """A valid external id decides; ids are kept in lower case with hyphens."""
    event = taken(json.dumps({"name": "chat"} | fields).encode())
    assert event.customer_id == customer_id
    assert event.external_customer_id == external_customer_id
    assert event.member_id == member_id


@pytest.mark.parametrize(
    ("fields", "kind", "type", "key"),
    [
        ({}, "EventCreateExternalCustomer", "missing", "external_customer_id"),
        ({"customer_id": None}, "EventCreateExternalCustomer", "missing", "external_customer_id"),
        ({"customer_id": "x"}, "EventCreateCustomer", "uuid_parsing", "customer_id"),
        ({"customer_id": CUSTOMER, "member_id": "x"}, "EventCreateCustomer", "uuid_parsing", "member_id"),
        ({"customer_id": CUSTOMER, "timestamp": None}, "EventCreateCustomer", "datetime_type", "timestamp"),
    ],
)
def test_a_refusal_names_the_kind_of_event_that_was_meant(
    fields: dict[str, Any], kind: str, type: str, key: str
) -> None:
    """One kind, the one that the sender's fields point to."""
    refusals = refused(json.dumps({"name": "chat"} | fields).encode())
    assert [(refusal.type, refusal.loc[3:]) for refusal in refusals] == [(type, [kind, key])]


def test_a_fast_clock_is_forgiven_a_minute() -> None:
    """Up to the tolerance and not a microsecond more."""
    edge = NOW + CLOCK_SKEW
    assert taken(line(timestamp=edge.isoformat())).timestamp == edge
    beyond = edge + timedelta(microseconds=1)
    assert [refusal.msg for refusal in refused(line(timestamp=beyond.isoformat()))] == [
        "Value error, Timestamp must be in the past."
    ]


def test_refusals_can_be_told() -> None:
    """The offending input goes back as it was sent, digits and all."""
    text = b'{"name":1.50,"metadata":{"k":[1e2,{"a":0.10}]},"external_customer_id":7}'
    inputs = [msgspec.json.encode(refusal.input) for refusal in refused(text)]
    assert inputs == [b"1.50", b"7", b'[1e2,{"a":0.10}]']


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_an_event_or_refused(text: bytes) -> None:
    """Never an exception, and every refusal can be written as JSON."""
    checked = check_event(text, now=NOW)
    if isinstance(checked, list):
        assert checked
        msgspec.json.encode(checked)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=5), parts, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(Event.__struct_fields__)), json_values))
def test_any_object_is_an_event_or_refused(fields: dict[str, Any]) -> None:
    """Whatever stands in whichever field."""
    checked = check_event(json.dumps(fields).encode(), now=NOW)
    assert isinstance(checked, Event) or msgspec.json.encode(checked)


def test_a_line_of_the_log_needs_a_tenant() -> None:
    """From its record or from itself, and not one against the other."""
    other = ORGANIZATION.replace("0000-4", "0001-4")
    assert isinstance(check_line(line(), organization_id=ORGANIZATION, now=NOW), Event)
    assert isinstance(check_line(line(organization_id=ORGANIZATION), organization_id=None, now=NOW), Event)
    assert isinstance(check_line(line(organization_id=ORGANIZATION), organization_id=ORGANIZATION, now=NOW), Event)
    for text, tenant in ((line(), None), (line(organization_id=other), ORGANIZATION), (line(name=5), ORGANIZATION)):
        assert isinstance(check_line(text, organization_id=tenant, now=NOW), Refusal)


def test_the_identity_is_the_hash_of_organization_and_external_id() -> None:
    """128 bits of XXH3, and the event's public id is the same bits."""
    hi, lo = identity(ORGANIZATION, "req-7f3a")
    assert hi.to_bytes(8, "big") + lo.to_bytes(8, "big") == xxh3_128_digest(UUID(ORGANIZATION).bytes + b"req-7f3a")
    assert UUID(event_id(hi, lo)).int == hi << 64 | lo
    assert halves(hi << 64 | lo) == (hi, lo)
    assert event_id(*identity(ORGANIZATION, "")) != event_id(*identity(ORGANIZATION.replace("1db", "1dc"), ""))


UUIDS = TypeAdapter(UUID4)
one_digit_off = st.builds(
    lambda place, character: CUSTOMER[:place] + character + CUSTOMER[place + 1 :],
    st.integers(0, 35),
    st.sampled_from("048acfg-{ "),
)
forms = st.sampled_from(
    [CUSTOMER, CUSTOMER.upper(), "{" + CUSTOMER + "}", "urn:uuid:" + CUSTOMER, CUSTOMER[1:], "", "x"]
)


@given(forms | one_digit_off)
def test_uuids_are_read_as_pydantic_reads_them(text: str) -> None:
    """Which texts are UUIDs of version 4, and which UUID they are."""
    try:
        theirs = str(UUIDS.validate_python(text))
    except ValidationError:
        theirs = None
    ours = parse_uuid4(text)
    assert (None if isinstance(ours, Reason) else ours) == theirs
