"""How a refused batch is taken apart, what waits, and what an event looks like to Polar."""

import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.forward.feed_client import Entry, item_of
from aggregator.forward.planner import (
    ALONE_MAX,
    Accepted,
    Bad,
    Item,
    Later,
    Reached,
    Slice,
    Stop,
    isolate,
    judge,
    park,
    probing,
    take,
)
from aggregator.forward.polar_client import Answer

NOW_US = 1_800_000_000_000_000
NUMBERS = st.integers(0, 59)


def item(number: int, who: str = "e:ann", timestamp_us: int = 0, size: int = 2) -> Item:
    """An item whose place is its number."""
    return Item(
        lane="raw", external_id=str(number), who=who, timestamp_us=timestamp_us, ingested_us=0, body=b"x" * size,
        offset=number,
    )  # fmt: skip


def refusing(poison: set[str], is_named: bool, sent: list[Item]) -> Bad | None:
    """What Polar says of a request."""
    bad = {index: f"bad {one.external_id}" for index, one in enumerate(sent) if one.external_id in poison}
    return Bad("some of these are bad", bad if is_named else {}, False) if bad else None


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 60), poison=st.sets(NUMBERS), is_named=st.booleans(), parked=st.sets(NUMBERS))
def test_poison_is_isolated_in_order(size: int, poison: set[int], is_named: bool, parked: set[int]) -> None:
    """Exactly the poison is condemned; everything is done exactly once and in order; not more requests than halving."""
    whole = Slice("raw", [item(number) for number in range(size)])
    for number in parked & set(range(size)):
        whole.items[number].due_us = NOW_US
    expected = {str(number) for number in poison - parked if number < size}
    stack, done, requests = [whole], [], 0
    while stack:
        some = stack.pop()
        sent = some.sent
        requests += bool(sent)
        bad = refusing({str(number) for number in poison}, is_named, sent)
        if bad is None:
            done += some.items
        else:
            stack += reversed(isolate(some, bad))
    assert [one.offset for one in done] == list(range(size))
    assert {one.external_id for one in done if one.condemned} == expected
    assert requests <= 2 + 2 * len(expected) * (size.bit_length() + 1)
    if is_named:
        assert requests <= 2 + 2 * ALONE_MAX + 1


def test_what_the_parts_of_a_slice_leave_behind_is_where_it_stood() -> None:
    """Only the last part moves the reader past what was not wanted."""
    behind = Reached({0: (9, 0)}, {})
    whole = Slice("raw", [item(number) for number in range(5)], behind)
    assert [(len(part.items), part.behind) for part in whole.cut(1, 3)] == [(1, None), (2, None), (2, behind)]
    assert [len(part.items) for part in probing(whole, 2)] == [2, 3]
    assert probing(whole, 5) == [whole]


@given(sizes=st.lists(st.integers(1, 50), max_size=30), events_max=st.integers(1, 10), bytes_max=st.integers(20, 200))
def test_a_request_keeps_to_events_and_bytes(sizes: list[int], events_max: int, bytes_max: int) -> None:
    """As many as fit, at least one; no request is larger than allowed unless one event alone is."""
    items = [item(number, size=size) for number, size in enumerate(sizes)]
    while items:
        count = take(items, events_max, bytes_max)
        some = Slice("raw", items[:count])
        assert 1 <= count <= events_max
        assert count == 1 or len(some.body()) <= bytes_max
        items = items[count:]


def test_what_waits_is_followed_by_its_customer() -> None:
    """An event of the future holds back the later ones of its customer and nobody else's."""
    items = [item(0, "e:ann", NOW_US - 1), item(1, "e:ann", NOW_US + 50), item(2, "e:bob", NOW_US), item(3, "e:ann", 5)]
    waiting = {"e:cid": NOW_US + 7}
    items.append(item(4, "e:cid", 5))
    park(items, NOW_US, 0, waiting)
    assert [one.due_us for one in items] == [0, NOW_US + 50, 0, NOW_US + 50, NOW_US + 7]
    behind = [item(0, "e:bob", NOW_US - 3)]
    park(behind, NOW_US, 10, {})
    assert behind[0].due_us == NOW_US + 7
    overdue = [item(0, "e:ann", 5), item(1, "e:bob", 5)]
    park(overdue, NOW_US, 0, {"e:ann": NOW_US - 7})  # could be sent by now, and was not
    assert [one.due_us for one in overdue] == [NOW_US - 7, 0]


DETAIL = {"detail": [
    {"type": "x", "loc": ["body", "events", 1, "EventCreateCustomer", "customer_id"], "msg": "Field required"},
    {"type": "x", "loc": ["body", "events", 1, "EventCreateExternalCustomer", "name"], "msg": "Field required"},
    {"type": "y", "loc": ["body", "events", 3, "timestamp"], "msg": "Value error, Timestamp must be in the past."},
]}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "headers", "body", "verdict"),
    [
        (200, {}, {"inserted": 2, "duplicates": 3}, Accepted(2, 3)),
        (200, {}, {"inserted": 5}, Accepted(5, 0)),
        (200, {}, {"inserted": 2, "duplicates": 1}, Later("an answer for 3 of 5 events")),
        (200, {}, [], Later("an answer that cannot be read")),
        (429, {"retry-after": "7"}, None, Later("status 429", "7")),
        (500, {}, {"detail": "Oops"}, Later("status 500", fault="status 500: Oops")),
        (504, {}, None, Later("status 504", is_slow=True, fault="status 504: status 504")),
        (413, {}, {"error": "RequestBodyTooLarge", "detail": "too large"}, Bad("too large", {}, False)),
    ],
)
def test_answers_are_judged(status: int, headers: dict[str, str], body: object, verdict: object) -> None:
    """Done, wrong, later; an answer that does not account for every event counts as none."""
    content = b"" if body is None else json.dumps(body).encode()
    assert judge(Answer(status, headers, content), 5) == verdict


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405, 411])
def test_what_nobody_but_a_person_can_mend_stops(status: int) -> None:
    """Trying again would give the same for ever, and could look like an attack."""
    assert isinstance(judge(Answer(status, {}, b"no"), 5), Stop)


NESTED = b"[" * 100_000


@pytest.mark.parametrize("body", [
    b'{"inserted":Infinity}', b'{"inserted":1e999999999}', b'{"inserted":1e9999999999999999999}', b'{"inserted":true}',
    b'{"inserted":"5"}', b'{"inserted":null}', b"[5]", NESTED, b"\xff",
])  # fmt: skip
def test_a_success_without_whole_counts_is_none(body: bytes) -> None:
    """Whatever is in the place of a number, the events are sent again, after a pause."""
    assert judge(Answer(200, {}, body), 5) == Later("an answer that cannot be read")


@pytest.mark.parametrize("body", [b'{"detail":[{"loc":5,"msg":"x"},{"loc":"body","msg":"x"},7]}', NESTED, b"\xff\xfe"])
def test_a_refusal_in_odd_words_names_nobody(body: bytes) -> None:
    """The batch is taken apart as if Polar had said no more than no; the same words with a server's error are kept."""
    verdict = judge(Answer(422, {}, body), 5)
    assert isinstance(verdict, Bad)
    assert verdict.accused == {}
    assert verdict.words
    assert judge(Answer(500, {}, body), 5) == Later("status 500", fault=f"status 500: {verdict.words}")


def test_a_refusal_names_its_events() -> None:
    """Both variants' complaints are kept; a complaint about the future is told from the others."""
    verdict = judge(Answer(422, {}, json.dumps(DETAIL).encode()), 5)
    assert isinstance(verdict, Bad)
    assert set(verdict.accused) == {1, 3}
    assert verdict.accused[1].count("Field required") == 2
    assert verdict.is_future


def test_another_complaint_about_a_time_is_none_about_the_future() -> None:
    """Waiting mends none but the latter."""
    entry = {"type": "x", "loc": ["body", "events", 0, "timestamp"], "msg": "Input should be a valid datetime"}
    verdict = judge(Answer(422, {}, json.dumps({"detail": [entry]}).encode()), 5)
    assert isinstance(verdict, Bad)
    assert set(verdict.accused) == {0}
    assert not verdict.is_future


def polars(metadata: str) -> Any:
    """The metadata of an event as it is sent."""
    event = '{"name":"call","timestamp":"2026-03-01T12:00:00.000001Z","external_id":"e1","external_customer_id":"ann",'
    raw = msgspec.Raw((event + f'"metadata":{metadata}}}').encode())
    entry = msgspec.json.decode(
        b'{"place":"0:7:2","ingested_at":"2026-03-01T12:00:01Z","event":' + bytes(raw) + b"}", type=Entry
    )
    made = item_of(entry, "raw")
    assert (made.who, made.timestamp_us % 10, made.ingested_us - made.timestamp_us) == ("e:ann", 1, 999_999)
    assert (made.partition, made.offset, made.line) == (0, 7, 2)
    return json.loads(made.body, parse_float=Decimal)["metadata"]


def test_costs_and_token_counts_are_sent_as_they_were_counted() -> None:
    """At most 12 decimals and as text, whole numbers of tokens, and no key that Polar does not know."""
    assert polars('{"a":1.50,"_cost":{"amount":0.30000000000000004,"currency":"usd","x":1}}') == {
        "a": Decimal("1.50"), "_cost": {"amount": "0.3", "currency": "usd"},
    }  # fmt: skip
    llm = '{"vendor":"v","model":"m","input_tokens":"7","output_tokens":2.0,"total_tokens":9e0,"prompt":null,"y":{}}'
    assert polars(f'{{"_llm":{llm}}}') == {
        "_llm": {"vendor": "v", "model": "m", "input_tokens": 7, "output_tokens": 2, "total_tokens": 9, "prompt": None}
    }


def test_escapes_in_numbers_are_read() -> None:
    """A number that was sent as text is the same number however that text is written."""
    cost = r'{"amount":"\u0031.0000000000005","currency":"usd"}'
    assert polars(rf'{{"_cost":{cost},"_llm":{{"input_tokens":"1E\u002B3"}}}}') == {
        "_cost": {"amount": "1", "currency": "usd"}, "_llm": {"input_tokens": 1000},
    }  # fmt: skip


def test_all_else_is_sent_as_it_was_received() -> None:
    """Digits, keys and texts, byte by byte."""
    text = '{"a":1.10,"b":12345678901234567890,"_c":"\\u00e4"}'
    assert polars(text) == json.loads(text, parse_float=Decimal)
