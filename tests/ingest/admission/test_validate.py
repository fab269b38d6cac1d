"""Which bodies are taken, what is written of them, and why the others are refused."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from ingest.admission.validate import ECHO_BYTES_MAX, Admitted, RefusedBody, admit, admit_quickly
from ingest.limits import (
    BODY_VALUES_MAX,
    CAREFUL_EVENTS_MAX,
    CAREFUL_VALUES_MAX,
    DETAILS_MAX,
    HURRIED_VALUES_MAX,
    REFUSALS_MAX,
    REFUSALS_OF_EVENT_MAX,
)
from tests.support.admission import (
    CUSTOMER,
    NOW,
    ORGANIZATION,
    OTHERS_CUSTOMER,
    UNKNOWN,
    admit_text,
    admitted,
    refused,
    tenant,
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
    assert isinstance(found, RefusedBody)
    assert found.error == "RequestValidationError"
    assert [entry["type"] for entry in found.detail] == types
    assert [list(entry["loc"])[:3] for entry in found.detail] == [["body", "events", 1]] * len(types)
    expected = [1 if place == 0 else place for place in places]  # a whole line's place ends with its index
    assert [entry["loc"][-1] for entry in found.detail] == expected


@pytest.mark.parametrize(("event", "types", "places"), [row[1:] for row in BUSINESS], ids=[row[0] for row in BUSINESS])
def test_names_that_mean_nothing_refuse_the_request(event: str, types: list[str], places: list[Any]) -> None:
    """What an event names must exist in the organization; Polar has another error name for this."""
    found = admit_text(GOOD, event)
    assert isinstance(found, RefusedBody)
    assert found.error == "PolarRequestValidationError"
    assert [entry["type"] for entry in found.detail] == types
    assert [entry["loc"] for entry in found.detail] == [["body", "events", 1, place] for place in places]


def test_names_are_looked_up_only_when_every_event_is_well_made() -> None:
    """One ill-made event hides what the others name wrongly, as with Polar."""
    found = admit_text(BUSINESS[1][1], REFUSALS[0][1])
    assert isinstance(found, RefusedBody)
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
    found = admit(json.dumps({"events": events}, indent=2).replace("\n", "\r\n").encode(), tenant(), NOW)
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


MANY_MISTAKES = written(metadata=dict.fromkeys(map(str, range(100))))


def test_a_lenient_request_hears_of_ten_mistakes_in_an_event() -> None:
    """Whatever else is wrong with it is not told, and not looked for; the events after it are taken."""
    found = admitted(GOOD, MANY_MISTAKES, REFUSALS[0][1], written(external_id="y"), lenient=True)
    assert found.external_ids == ["x", "y"]
    assert [refusal.index for refusal in found.refusals] == [1] * REFUSALS_OF_EVENT_MAX + [2]


@pytest.mark.parametrize(
    ("event", "told"), [(MANY_MISTAKES, REFUSALS_OF_EVENT_MAX), (REFUSALS[0][1], 1), (BUSINESS[1][1], 1)]
)
def test_a_lenient_request_with_too_many_mistakes_is_refused(event: str, told: int) -> None:
    """It has to be sent in smaller parts; the answer says so first, then what is wrong with the first events."""
    found = admit_text(*[event] * (REFUSALS_MAX // told + 1), lenient=True)
    assert isinstance(found, RefusedBody)
    assert [entry["loc"][:3] for entry in found.detail[:2]] == [("body", "events"), ["body", "events", 0]]
    assert found.detail[0]["type"] == "too_long"
    assert len(found.detail) == DETAILS_MAX


def test_ten_thousand_mistakes_are_told_to_a_lenient_request() -> None:
    """As many as there may be are told, and what is good is kept."""
    found = admitted(*[REFUSALS[0][1]] * REFUSALS_MAX, GOOD, lenient=True)
    assert len(found.refusals) == REFUSALS_MAX
    assert found.external_ids == ["x"]


# an event that is read with care, with room for keys: because of its time, because of what its name may hide
UNUSUAL = ['{"name":"n","external_customer_id":"u","timestamp":1,"metadata":{%s}}',
           '{"name":"\\u005f","external_customer_id":"u","metadata":{%s}}']  # fmt: skip


@pytest.mark.parametrize("event", UNUSUAL)
def test_events_with_more_values_than_can_be_read_one_by_one_are_refused(event: str) -> None:
    """A million values in unusual events are too many, whether or not their types are plain."""
    values = ",".join(f'"{number}":1' for number in range(1000))
    found = admit_text(*[event % values] * (CAREFUL_VALUES_MAX // 1000))
    assert isinstance(found, RefusedBody)
    assert [entry["type"] for entry in found.detail] == ["too_long"]
    assert isinstance(admit_text(*[event % values] * 3), Admitted)


@pytest.mark.parametrize("event", UNUSUAL)
def test_many_values_in_an_unusual_event_are_not_read_while_everybody_waits(event: str) -> None:
    """A small body with some thousand of them is for the thread; one with fewer is not."""

    def quickly(keys: int) -> object:
        values = ",".join(f'"{number}":1' for number in range(keys))
        return admit_quickly(b'{"events":[%s]}' % (event % values).encode(), tenant(), NOW)

    assert quickly(HURRIED_VALUES_MAX + 1) is None
    assert isinstance(quickly(HURRIED_VALUES_MAX // 2), Admitted)


def test_what_go_escapes_is_not_unusual() -> None:
    """Go writes & < and > as escapes, in texts and keys: such events have no limit but their bytes."""
    event = written(name="R\x00D", metadata={"url": "/?a=1\x00b=<2>", "a\x00b": 1}).replace("\\u0000", "\\u0026")
    found = admitted(*[event] * (CAREFUL_EVENTS_MAX + 1))
    assert found.plains is not None
    assert bytes(found.lines[0]) == event.encode()


def test_unusual_events_have_a_limit() -> None:
    """One more than are read one by one is refused as a whole, and so many are not."""
    event = written(timestamp="x")
    assert "Too many unusual events" not in str(refused(_events([event] * CAREFUL_EVENTS_MAX)))
    [detail] = refused(_events([event] * (CAREFUL_EVENTS_MAX + 1))).detail
    assert (detail["type"], detail["loc"]) == ("too_long", ("body", "events"))
    assert detail["msg"] == "Too many unusual events to look at one by one; send fewer events"


def test_values_of_a_body_that_is_not_plain_have_a_limit() -> None:
    """One more comma, and the body is refused before it is cut into values; else it is cut, and they are counted."""
    bodies = [_events(["0"] * (commas + 1)) for commas in (BODY_VALUES_MAX, BODY_VALUES_MAX + 1)]
    whats = [refused(body).detail[0]["msg"] for body in bodies]
    assert [what.partition(" to look at")[0] for what in whats] == ["Too many unusual events", "Too many values"]


@pytest.mark.parametrize("over", [0, 1])
def test_a_long_body_is_not_repeated_in_the_answer(over: int) -> None:
    """What was sent instead of events stands in a refusal up to a length, as a body and as a field of it."""
    body = b"[%s]" % (b" " * (ECHO_BYTES_MAX + over - 2))
    assert [entry["input"] for entry in refused(body).detail] == [None if over else msgspec.Raw(body)]
    events = b"{%s}" % (b" " * (ECHO_BYTES_MAX + over - 2))
    [detail] = refused(b'{"events":%s}' % events).detail
    assert (detail["type"], detail["input"]) == ("list_type", None if over else msgspec.Raw(events))


def _events(events: Sequence[str]) -> bytes:
    return ('{"events":[' + ",".join(events) + "]}").encode()


def test_an_empty_list_of_events_is_taken() -> None:
    """No events are no lines, and no error."""
    assert list(admitted().lines) == []
