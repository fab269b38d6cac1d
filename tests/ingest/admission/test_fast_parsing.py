"""The fast ways of reading a body against the careful one: nowhere wider, and the same external ids."""

import json
import random
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.admission import validate
from ingest.admission.validate import find_suspects, read_plain
from meters.catalogue.access import reference_refusals
from meters.event import CLOCK_SKEW, check_event
from tests.support.admission import CATALOGUE, CUSTOMER, NOW, ORGANIZATION, admitted, written
from tests.support.json_events import BY_ID, EVENTS, METADATA, NAMES, Pairs, objects, repeats_a_key


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
@given(st.lists(st.one_of(EVENTS, BY_ID), min_size=1, max_size=6))
def test_what_the_fast_path_calls_plain_the_careful_reading_takes(events: list[str]) -> None:
    """The fast path is nowhere wider than the careful one, and reads the same external id."""
    for event, fast, slow in agreements(events):
        assert fast == slow, event


@settings(max_examples=400, deadline=None)
@given(st.lists(objects({"name": NAMES, "external_customer_id": st.just('"u"'), "metadata": METADATA}), min_size=1,
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
        written(metadata={"text": "x"}).replace('"x"}', '"\\u003cx\\u003e \\u0026"}'),  # as Go writes < > and &
        written(metadata={"_cost": {"amount": 0.0425, "currency": "usd"}}),
        written(metadata={"_llm": {"vendor": "v", "model": "meta.llama:0", "input_tokens": 1, "output_tokens": 2,
                                   "cached_input_tokens": 0, "total_tokens": 3}}),
    ]  # fmt: skip
    random.Random(1).shuffle(usual)
    assert len(list(agreements(usual))) == len(usual)


def test_what_is_nothing_by_any_power_of_ten_is_nothing() -> None:
    """A zero with an exponent that no decimal holds is a double like any other, and an amount."""
    (agreement,) = agreements(['{"name":"n","external_customer_id":"u","metadata":{"k":0e9999999999999999999}}'])
    assert agreement[1] == agreement[2]


def test_a_year_that_began_before_time_is_read_with_care() -> None:
    """With its offset the first hour of all lies in no calendar."""
    usual, odd = written(), written(timestamp="0001-01-01T00:30:00+01:00")
    assert [event for event, _, _ in agreements([usual, odd])] == [usual]


def test_one_odd_event_does_not_make_the_others_suspects() -> None:
    """In a body that does not fit as a whole, only the events that do not fit are read with care."""
    lines = [msgspec.Raw(text.encode()) for text in (written(), "5", written(metadata={"k": {}}), written())]
    body = b'{"events":[' + b",".join(lines) + b"]}"
    _, suspects, _ = validate.find_suspects(body, lines, ORGANIZATION, CATALOGUE, NOW, read_plain(body))
    assert suspects == {1, 2}
