"""Which bodies are taken, what is written of them, and why the others are refused."""

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import plain
from ingest.admission import Admitted, Refused, admit
from ingest.plain import find_suspects, read_plain
from meters.event import CLOCK_SKEW, check_event
from meters.references import reference_refusals
from tests.ingest.admitting import (
    CATALOGUE,
    CUSTOMER,
    NOW,
    ORGANIZATION,
    OTHERS_CUSTOMER,
    UNKNOWN,
    admit_text,
    admitted,
    refused,
    sender,
    written,
)

GOOD = written()

# name of the case | the event | types of the entries | the last places of their locs
REFUSALS: list[tuple[str, str, list[str], list[Any]]] = [
    ("no name", '{"external_customer_id":"u"}', ["missing"], ["name"]),
    ("no customer", '{"name":"n"}', ["missing"], ["external_customer_id"]),
    ("long name", written(name="n" * 129), ["string_too_long"], ["name"]),
    ("name of another type", written(name=5), ["string_type"], ["name"]),
    ("external id of another type", written(external_id=5), ["string_type"], ["external_id"]),
    ("metadata null", written(metadata=None), ["dict_type"], ["metadata"]),
    ("null value", written(metadata={"k": None}), ["metadata_value_type"], ["k"]),
    ("nested object", written(metadata={"k": {"a": 1}}), ["metadata_value_type"], ["k"]),
    ("array", written(metadata={"k": [1]}), ["metadata_value_type"], ["k"]),
    ("empty text", written(metadata={"k": ""}), ["string_too_short"], ["k"]),
    ("long text", written(metadata={"k": "a" * 501}), ["string_too_long"], ["k"]),
    ("NUL", written(metadata={"k": "a\0b"}), ["value_error"], [0]),
    ("NUL in a field that nobody reads", written(note="\0"), ["value_error"], [0]),
    ("27 digits", GOOD.replace("}", ',"metadata":{"k":' + "9" * 27 + "}}"), ["number_too_large"], ["k"]),
    ("5000 digits", GOOD.replace("}", ',"metadata":{"k":' + "9" * 5000 + "}}"), ["number_too_large"], ["k"]),
    ("1e26", GOOD.replace("}", ',"metadata":{"k":1e26}}'), ["number_too_large"], ["k"]),
    ("1e999", GOOD.replace("}", ',"metadata":{"k":1e999}}'), ["number_too_large"], ["k"]),
    ("too deep", written(note=[[[[[[[[]]]]]]]]), ["value_error"], [0]),
    ("not an object", "5", ["model_attributes_type"], [0]),
    ("a time to come", written(timestamp="2026-11-21T12:01:01Z"), ["value_error"], ["timestamp"]),
    ("a time without zone", written(timestamp="2026-01-01T00:00:00"), ["timezone_aware"], ["timestamp"]),
    ("time null", written(timestamp=None), ["datetime_type"], ["timestamp"]),
    ("cost without currency", written(metadata={"_cost": {"amount": 1}}), ["missing"], ["currency"]),
    ("cost in capitals", written(metadata={"_cost": {"amount": 1, "currency": "USD"}}),
     ["string_pattern_mismatch"], ["currency"]),
    ("cost of six digits", written(metadata={"_cost": {"amount": 100000, "currency": "usd"}}),
     ["decimal_whole_digits"], ["amount"]),
    ("cost that is no object", written(metadata={"_cost": 5}), ["dict_type"], ["_cost"]),
    ("amount given twice", GOOD[:-1] + ',"metadata":{"_cost":{"amount":1,"currency":"usd","amount":2}}}',
     ["duplicate_key"], ["amount"]),
    ("tokens given twice", GOOD[:-1] + ',"metadata":{"_llm":{"vendor":"v","model":"m:1","input_tokens":1,'
     '"output_tokens":1,"total_tokens" :1,"input_tokens" : 2}}}', ["duplicate_key"], ["input_tokens"]),
    ("reserved key in disguise", GOOD[:-1] + ',"metadata":{"\\u005fcost":5}}', ["dict_type"], ["_cost"]),
    ("tokens with a fraction", written(metadata={"_llm": {
        "vendor": "v", "model": "m", "input_tokens": 1.5, "output_tokens": 1, "total_tokens": 1}}),
     ["int_from_float"], ["input_tokens"]),
    ("no UUID", '{"name":"n","customer_id":"c"}', ["uuid_parsing"], ["customer_id"]),
    ("UUID of another version", '{"name":"n","customer_id":"11111111-1111-1111-8111-111111111111"}',
     ["uuid_version"], ["customer_id"]),
]  # fmt: skip

BUSINESS: list[tuple[str, str, list[str], list[Any]]] = [
    ("organization named", written(organization_id=ORGANIZATION), ["organization_token"], ["organization_id"]),
    ("unknown customer", json.dumps({"name": "n", "customer_id": UNKNOWN}), ["customer_id"], ["customer_id"]),
    ("another's customer", json.dumps({"name": "n", "customer_id": OTHERS_CUSTOMER}), ["customer_id"], ["customer_id"]),
    ("unknown member", json.dumps({"name": "n", "customer_id": CUSTOMER, "member_id": UNKNOWN}),
     ["member_id"], ["member_id"]),
]  # fmt: skip


@pytest.mark.parametrize(("event", "types", "places"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_an_ill_made_event_refuses_the_request(event: str, types: list[str], places: list[Any]) -> None:
    """What is wrong with the form of an event is told with its type and its place, and nothing is taken."""
    found = admit_text(GOOD, event, GOOD)
    assert isinstance(found, Refused)
    assert found.error == "RequestValidationError"
    assert [entry["type"] for entry in found.detail] == types
    assert [list(entry["loc"])[:3] for entry in found.detail] == [["body", "events", 1]] * len(types)
    expected = [1 if place == 0 else place for place in places]  # a whole line's place ends with its index
    assert [entry["loc"][-1] for entry in found.detail] == expected


@pytest.mark.parametrize(("event", "types", "places"), [row[1:] for row in BUSINESS], ids=[row[0] for row in BUSINESS])
def test_names_that_mean_nothing_refuse_the_request(event: str, types: list[str], places: list[Any]) -> None:
    """What an event names must exist in the organization; Polar has another error name for this."""
    found = admit_text(GOOD, event)
    assert isinstance(found, Refused)
    assert found.error == "PolarRequestValidationError"
    assert [entry["type"] for entry in found.detail] == types
    assert [entry["loc"] for entry in found.detail] == [["body", "events", 1, place] for place in places]


def test_names_are_looked_up_only_when_every_event_is_well_made() -> None:
    """One ill-made event hides what the others name wrongly, as with Polar."""
    found = admit_text(BUSINESS[1][1], REFUSALS[0][1])
    assert isinstance(found, Refused)
    assert [entry["type"] for entry in found.detail] == ["missing"]


# what the body is | the type, the place
BODIES = [
    (b"", "missing", ("body",)),
    (b"{", "json_invalid", ("body", 1)),
    (b"null", "model_attributes_type", ("body",)),
    (b"[]", "model_attributes_type", ("body",)),
    (b"{}", "missing", ("body", "events")),
    (b'{"events":5}', "list_type", ("body", "events")),
    (b'{"events":null}', "list_type", ("body", "events")),
    (b'{"events":[]}x', "json_invalid", ("body", 14)),
    (b'{"events":[],}', "json_invalid", ("body", 13)),
    (b'\xef\xbb\xbf{"events":[]}', "json_invalid", ("body", 0)),
    (b'{"events":[],"note":"\xff"}', "json_invalid", ("body", 21)),
    (b'{"events":[],"note":"\xc0\xaf"}', "json_invalid", ("body", 21)),
    (b'{"events":[{"name":"\xed\xa0\x80"}]}', "json_invalid", ("body", 20)),
    (b'{"events":' + b"[" * 100_000, "value_error", ("body",)),
    (b'{"events":[' + b'{"a":' * 100_000, "value_error", ("body",)),
    (b'{"events":[{"name":"\\ud800"}]}', "json_invalid", ("body", 30)),
    (b'{"events":[NaN]}', "json_invalid", ("body", 11)),
]


@pytest.mark.parametrize(("body", "kind", "loc"), BODIES, ids=[repr(body[:30]) for body, _, _ in BODIES])
def test_a_body_that_is_no_list_of_events_is_refused(body: bytes, kind: str, loc: tuple[Any, ...]) -> None:
    """What is wrong with the body as a whole is told with the offset where it matters."""
    found = refused(body)
    assert found.error == "RequestValidationError"
    assert [(entry["type"], entry["loc"]) for entry in found.detail] == [(kind, loc)]


def test_a_million_values_that_are_no_events_are_not_looked_at_one_by_one() -> None:
    """A body of nothing but commas is refused before it is cut into ten million pieces."""
    found = refused(b'{"events":[' + b"0," * 2_000_000 + b"0]}")
    assert [entry["type"] for entry in found.detail] == ["too_long"]


def test_a_long_list_of_complaints_is_cut() -> None:
    """A whole refused request answers with a hundred entries at the most."""
    assert len(refused(b'{"events":[' + b",".join([b"{}"] * 1000) + b"]}").detail) == 100


ACCEPTED = [
    written(),
    written(name=""),
    written(external_customer_id=""),
    written(external_id=""),
    json.dumps({"name": "n", "customer_id": CUSTOMER}),
    json.dumps({"name": "n", "customer_id": CUSTOMER.upper()}),
    json.dumps({"name": "n", "customer_id": None, "external_customer_id": "u"}),
    written(customer_id=UNKNOWN, member_id=UNKNOWN),
    written(customer_id="no uuid"),
    written(timestamp="2026-11-21T12:00:59Z"),
    written(timestamp="2026-11-21T13:00:00+01:00"),
    written(timestamp="1970-01-01T00:00:00Z"),
    written(timestamp=1767225600),
    written(timestamp="1767225600"),
    written(metadata={}),
    written(metadata={"": 1, "k" * 5000: True, "é": "…", "s": "a" * 500, "f": 1.5, "n": -3}),
    written(metadata={f"key{number}": number for number in range(1000)}),
    written(metadata={"text": 'with {"braces"} and [brackets]'}),
    written(metadata={"escaped": "\u0001", "pair": "\U0001f600"}),
    written(metadata={"_cost": {"amount": 0.1 + 0.2, "currency": "usd"}}),
    written(metadata={"_cost": {"amount": "99999.99", "currency": "xusdx", "more": 1}}),
    written(metadata={"_llm": {"vendor": "v:1", "model": "m", "input_tokens": 1, "output_tokens": 1,
                               "total_tokens": 2, "cached_input_tokens": 0, "prompt": None}}),
    written(unknown={"nested": [1, {"a": None}]}),
    GOOD[:-1] + ',"metadata":{"a":1,"a":2}}',
]  # fmt: skip


@pytest.mark.parametrize("event", ACCEPTED, ids=range(len(ACCEPTED)))
def test_a_good_event_is_written_as_it_was_sent(event: str) -> None:
    """Every form that Polar takes is taken, and the log has the sender's own bytes."""
    found = admitted(event, GOOD)
    line = bytes(found.lines[0])
    expected = json.loads(event)
    assert line.startswith(event.encode()[:-1])
    assert json.loads(line) == expected | {"external_id": found.external_ids[0]}


def test_an_event_without_a_name_of_its_own_gets_one() -> None:
    """A missing or null external id is made up, and stands last in the line, where it counts."""
    found = admitted('{"name":"n","external_customer_id":"u"}', GOOD, written(external_id=None))
    assert found.external_ids == ["made-0", "x", "made-1"]
    assert found.value.split(b"\n") == [
        b'{"name":"n","external_customer_id":"u","external_id":"made-0"}',
        GOOD.encode(),
        b'{"name":"call","external_customer_id":"u","external_id":null,"external_id":"made-1"}',
    ]
    assert found.named
    assert not admitted(written(external_id=None)).named


def test_an_event_is_one_line_however_it_was_laid_out() -> None:
    """Newlines between tokens become spaces; newlines within texts are escaped and stay."""
    events = [{"name": "a\nb", "external_customer_id": "u", "external_id": "x", "metadata": {"k": 1}}] * 3
    found = admit(json.dumps({"events": events}, indent=2).replace("\n", "\r\n").encode(), sender(), NOW)
    assert isinstance(found, Admitted)
    assert [json.loads(line) for line in found.value.split(b"\n")] == events


def test_a_lenient_request_keeps_the_good_events() -> None:
    """With handling=lenient every refusal is told, form and names alike, and the others are taken."""
    found = admitted(GOOD, REFUSALS[0][1], BUSINESS[1][1], "null", written(external_id="y"), lenient=True)
    assert found.external_ids == ["x", "y"]
    assert list(found.indexes) == [0, 4]
    assert [(refusal.index, refusal.type) for refusal in found.refusals] == [
        (1, "missing"), (2, "customer_id"), (3, "model_attributes_type"),
    ]  # fmt: skip


def test_an_empty_list_of_events_is_taken() -> None:
    """No events are no lines, and no error."""
    assert list(admitted().lines) == []


# ---- the fast path against the careful one

Text = st.SearchStrategy[str]  # a JSON value, written out


def mostly(good: list[str], odd: list[str]) -> Text:
    """A good value fifteen times out of sixteen, so that some whole events are plain."""
    return st.integers(0, 15).flatmap(lambda number: st.sampled_from(good if number else odd))


_wild = [*map(json.dumps, ["", "é", "a:b", "{", "[", '"', "\\", "\0", "\U0001f600", "x" * 129, "x" * 501]),
         "0", "1.5", "1e26", "null", "true", "{}", "[]", '{"a":{}}', "[[1]]", '"\\ud800"']  # fmt: skip
_spaces = mostly([""], [" ", "\n", "\r\n\t"])
_names = mostly(['"n"', '""'], [*_wild, json.dumps("n" * 129)])
_times = mostly(
    ['"2026-01-01T00:00:00Z"', '"2026-01-01 00:00:00+01:00"', '"2026-11-21T12:00:30Z"'],
    ['"2026-11-21T12:02:00Z"', '"2026-01-01T00:00:00"', '"2026-01-01"', '"2026-02-30T00:00:00Z"', "5", "null",
     '"2026-01-01t00:00:00.123456789z"', '"2026-01-01T24:00:00Z"', '"2026-01-01T00:00:60Z"', '"20260101T000000Z"',
     '"2026-01-01T00:00:00-23:59"', '"9999-12-31T23:59:59Z"', '"2026-01-01T00:00:00+24:00"', '"1767225600"'],
)  # fmt: skip
_ids = mostly([json.dumps(CUSTOMER)], [json.dumps(text) for text in (CUSTOMER.upper(), UNKNOWN, OTHERS_CUSTOMER, "c")])
_values = mostly(["5", "1.5", '"text"', "true", '"a:b"', "-0", "1e5"], [*_wild, "9" * 27])
_counts = mostly(["1", "0", "12"], [*_wild, "1.0", '"5"', "9" * 27, "-1"])
_words = mostly(['"v"', '"a:b"', '""'], _wild)


@st.composite
def _objects(draw: st.DrawFn, known: dict[str, Text]) -> str:
    """A JSON object in text: nearly always the known keys; sometimes one twice, disguised, missing or unknown."""
    pairs = [(json.dumps(key), draw(values)) for key, values in known.items() if draw(st.integers(0, 15))]
    if not draw(st.integers(0, 9)):
        key = draw(st.sampled_from(["k", *known]))
        disguised = "".join(f"\\u{ord(letter):04x}" for letter in key)
        name = draw(st.sampled_from([key, key, disguised]))
        value = draw(known[key] if key in known and draw(st.booleans()) else st.sampled_from(_wild))
        pairs.insert(draw(st.integers(0, len(pairs))), (f'"{name}"', value))
    space = draw(_spaces)
    return "{" + ",".join(f"{space}{key}{space}:{space}{value}" for key, value in pairs) + space + "}"


_cost = _objects({
    "amount": mostly(["0", "-5", "0.0425", "99999", "99999.99"], [*_wild, "100000", "99999.9999999999999", '"5"']),
    "currency": mostly(['"usd"'], ['"USD"', '"xusd:"', *_wild]),
})  # fmt: skip
_llm = _objects({
    "vendor": _words, "model": _words, "input_tokens": _counts, "output_tokens": _counts, "total_tokens": _counts,
    "cached_input_tokens": _counts,
})  # fmt: skip
_plain_metadata = _objects({"a": _values, "b": _values})
_rich_metadata = _objects({"a": _values, "_cost": _cost, "_llm": _llm})
_metadata = st.one_of(_plain_metadata, _objects({"_cost": _cost}), _rich_metadata)
_events = _objects({
    "name": _names, "external_customer_id": mostly(['"u"'], _wild), "timestamp": _times, "metadata": _metadata,
    "external_id": mostly(['"x"', '""', "null"], _wild), "parent_id": mostly(['"p"', "null"], _wild),
})  # fmt: skip
_by_id = _objects({
    "name": _names, "customer_id": _ids, "metadata": _metadata, "organization_id": mostly(["null"], _wild),
})  # fmt: skip


def careful(line: bytes) -> tuple[bool, str | None]:
    """Whether the careful reading takes the line, and its external id."""
    event = check_event(line, now=NOW)
    if isinstance(event, list):
        return False, None
    refusals = reference_refusals(event, CATALOGUE, token_organization_id=ORGANIZATION)
    return not refusals, event.external_id


def agreements(events: list[str]) -> Iterator[tuple[str, tuple[bool, str | None], tuple[bool, str | None]]]:
    """Each event that the fast path calls plain, with both opinions."""
    body = ('{"events":[' + ",".join(events) + "]}").encode()
    try:
        lines = msgspec.json.decode(body, type=dict[str, list[msgspec.Raw]])["events"]
    except msgspec.DecodeError:
        return  # a body that is refused as a whole
    ids, suspects, _ = find_suspects(body, lines, ORGANIZATION, CATALOGUE, NOW + CLOCK_SKEW, read_plain(body))
    for index, (line, external_id) in enumerate(zip(lines, ids, strict=True)):
        if index not in suspects:
            yield events[index], (True, external_id), careful(bytes(line))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(_events, _by_id), min_size=1, max_size=6))
def test_what_the_fast_path_calls_plain_the_careful_reading_takes(events: list[str]) -> None:
    """The fast path is nowhere wider than the careful one, and reads the same external id."""
    for event, fast, slow in agreements(events):
        assert fast == slow, event


class Pairs(list[tuple[str, object]]):
    """A JSON object with all its keys."""


def repeats_a_key(value: object) -> bool:
    """Whether an object, or one in it, gives a key twice."""
    if not isinstance(value, Pairs):
        return False
    return len({key for key, _ in value}) < len(value) or any(repeats_a_key(inner) for _, inner in value)


@settings(max_examples=400, deadline=None)
@given(st.lists(_objects({"name": _names, "external_customer_id": st.just('"u"'), "metadata": _metadata}), min_size=1,
                max_size=4))  # fmt: skip
def test_keys_that_are_called_distinct_are_distinct(events: list[str]) -> None:
    """What the aggregator takes as it stands gives no key twice, however it is spaced or disguised."""
    body = ('{"events":[' + ",".join(events) + "]}").encode()
    try:
        lines = msgspec.json.decode(body, type=dict[str, list[msgspec.Raw]])["events"]
    except msgspec.DecodeError:
        return
    found = find_suspects(body, lines, ORGANIZATION, CATALOGUE, NOW + CLOCK_SKEW, read_plain(body))
    if found.distinct_keys:
        last = [dict(json.loads(event, object_pairs_hook=Pairs)).get("metadata") for event in events]
        assert not any(map(repeats_a_key, last))


@pytest.mark.parametrize(("metadata", "distinct"), [
    ('{"a":1,"b":"x"}', True),
    ('{ "a" : 1, "b": "x: y" }', True),
    ('{"_cost":{"amount":1,"currency":"usd"},"a":true}', True),
    ('{"a":1,"a":2}', False),
    ('{"a" :1,"b":1,"b":2}', False),
    ('{"a":1,"\\u0061":2}', False),
    ('{"a":"says \\": ","b":1}', False),  # not beyond doubt
])  # fmt: skip
def test_distinct_keys_go_with_the_record(metadata: str, distinct: bool) -> None:
    """One event whose metadata might give a key twice makes the record one that is read key by key."""
    event = '{"name":"n","external_customer_id":"u","metadata":%s}'
    assert admitted(event % metadata, event % '{"k":1}').distinct_keys == distinct


def test_the_fast_path_takes_what_clients_really_send() -> None:
    """Events of the usual kinds are plain, so they cost what the fast path costs."""
    usual = [
        written(),
        written(external_id=None, timestamp="2026-01-01T00:00:00.123456Z"),
        json.dumps({"name": "n", "customer_id": CUSTOMER, "metadata": {"a": 1}}, indent=1),
        written(metadata={"model": "m", "tokens": 812, "cached": False, "ms": 12.5, "text": 'say "é"\n'}),
        written(metadata={"_cost": {"amount": 0.0425, "currency": "usd"}}),
        written(metadata={"_llm": {"vendor": "v", "model": "meta.llama:0", "input_tokens": 1, "output_tokens": 2,
                                   "cached_input_tokens": 0, "total_tokens": 3}}),
    ]  # fmt: skip
    random.Random(1).shuffle(usual)
    assert len(list(agreements(usual))) == len(usual)


def test_one_odd_event_does_not_make_the_others_suspects() -> None:
    """In a body that does not fit as a whole, only the events that do not fit are read with care."""
    lines = [msgspec.Raw(text.encode()) for text in (GOOD, "5", written(metadata={"k": {}}), GOOD)]
    body = b'{"events":[' + b",".join(lines) + b"]}"
    _, suspects, _ = plain.find_suspects(body, lines, ORGANIZATION, CATALOGUE, NOW, read_plain(body))
    assert suspects == {1, 2}
