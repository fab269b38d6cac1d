"""Bodies of one shape: read as ``ingest.plain`` would, taken by the careful reading, and learned within limits."""

import json
from datetime import datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import shape
from ingest.admission import Admitted, admit
from ingest.shape import Shapes
from meters.event import check_event
from tests.support.admission import NOW, tenant, written
from tests.support.json_events import EVENTS, Pairs, repeats_a_key


def body_of(*events: str) -> bytes:
    """The request of events that are written out."""
    return ('{"events":[' + ",".join(events) + "]}").encode()


def learned(*bodies: bytes) -> Shapes:
    """Shapes that have met each of the bodies often enough, however short it is."""
    shapes = Shapes(body_bytes_min=0)
    for body in bodies:
        for _ in range(shape.SIGHTINGS_MIN):
            shapes.read(body)
    return shapes


@settings(max_examples=600, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=4), st.integers(1, 3))
def test_a_shape_changes_nothing_but_the_time_it_takes(events: list[str], times: int) -> None:
    """With shapes a body has the same lines, ids and refusals; what they take is good, and no key in it comes twice."""
    events = events * times  # else hardly any two of them would have the same keys
    body = body_of(*events)
    shapes = learned(body)
    found, usual = admit(body, msgspec.structs.replace(tenant(), shapes=shapes), NOW), admit(body, tenant(), NOW)
    if not isinstance(found, Admitted) or not isinstance(usual, Admitted):
        assert found == usual
        return
    assert found.value == usual.value
    assert found.external_ids == usual.external_ids
    assert (found.named, list(found.indexes), found.refusals) == (usual.named, list(usual.indexes), usual.refusals)
    if shapes.read(body) is not None:
        assert not any(isinstance(check_event(event.encode(), now=NOW), list) for event in events)
        assert not any(repeats_a_key(json.loads(event, object_pairs_hook=Pairs)) for event in events)


LLM = {"vendor": "v", "model": "meta.llama:0", "input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
METADATA = {"model": "m", "tokens": 812, "cached": False, "ms": 12.5, "text": "a:b, {c} [d]", "with space": "é"}


@pytest.mark.parametrize("event", [
    written(),
    written(metadata={}),
    written(metadata=METADATA, timestamp="2026-01-01T00:00:00.123456Z"),
    written(metadata=METADATA | {"_cost": {"amount": 0.0425, "currency": "usd"}, "_llm": LLM}),
    written(metadata={"_llm": LLM | {"cached_input_tokens": 0}}, parent_id="p", external_member_id=None),
    written(metadata=METADATA, timestamp="2026-01-01T00:00:00+00:00"),
    json.dumps(json.loads(written(metadata=METADATA))),
    json.dumps(json.loads(written(metadata=METADATA)), indent=2),
    written(metadata={"text": "a line\nand a \"quote\""}),
    '{"name":"n","external_customer_id":"u","metadata":{"a":1}}',
    '{"name":"n","external_customer_id":"u","metadata":{"":1,"é":2,"class":3,"field_0":4,"__init__":5}}',
])  # fmt: skip
def test_what_programs_really_send_has_a_shape(event: str) -> None:
    """Events of the usual kinds, compact or laid out, with times, costs, texts and without ids, are read by it."""
    body = body_of(event, event, event)
    found = learned(body).read(body)
    assert found is not None, event
    assert [each.name for each in found.events] == [json.loads(event)["name"]] * 3


KNOWN = written(metadata={"a": 1, "b": "x"}, timestamp="2026-01-01T00:00:00Z")


@pytest.mark.parametrize(("old", "new"), [
    ('"a":1', '"a":1,"a":2'),
    ('"a":1', '"a" :1,"a":1'),
    ('"a":1', '"\\u0061":1,"a":1'),
    ('"a":1', '"a":{}'),
    ('"a":1', '"a":{"amount":1}'),
    ('"a":1', '"a":[1]'),
    ('"a":1', '"a":null'),
    ('"a":1', '"c":1'),
    ('"a":1,', ""),
    ('"a":1', '"a":1,"_cost":{"amount":1,"currency":"usd"}'),
    ('"b":"x"', '"b":""'),
    ('"b":"x"', '"b":"\\u0000"'),
    ('"b":"x"', '"b":"\\ud800"'),
    ('"external_customer_id":"u"', '"external_customer_id":null'),
    ('"external_id":"x"', '"external_id":null'),
    ('"external_id":"x"', '"external_id":"x","unknown":1'),
    ('"name":"call"', '"name":"call","name":"other"'),
    ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00"),
    ('"metadata":{"a":1,"b":"x"}', '"metadata":{"a":1,"b":"x"},"metadata":{"a":1,"b":"x"}'),
])  # fmt: skip
def test_one_event_that_differs_is_looked_at_closely(old: str, new: str) -> None:
    """A known shape does not read a body in which an event is not exactly of it."""
    assert old in KNOWN
    body = body_of(KNOWN, KNOWN.replace(old, new), KNOWN)
    assert learned(body_of(KNOWN, KNOWN)).read(body) is None


def test_a_key_that_comes_twice_is_not_hidden_by_a_text_or_a_blank() -> None:
    """A text that begins with a colon, or blanks before one, cannot make up for a key that is there once too often."""
    known = body_of(KNOWN, KNOWN)
    assert learned(known).read(body_of(KNOWN, KNOWN.replace('"b":"x"', '"b":":x"'))) is None
    repeated = KNOWN.replace('"a":1', '"a":2,"a":1')
    for blank in (" ", "\n", "\t", "\r"):
        apart = repeated.replace('"b":', f'"b"{blank}:').replace("00:00Z", "00:00+00:00")
        assert learned(known).read(body_of(KNOWN, apart)) is None


def test_a_key_that_comes_twice_is_not_hidden_by_an_escaped_colon() -> None:
    """Colons are counted: a time that has one as an escape cannot make up for a key that is there once too often."""
    escaped = KNOWN.replace("T00:", "T00\\u003a")
    for known in (KNOWN, escaped):
        repeated = escaped.replace('"a":1', '"a":2,"a":1')
        assert learned(body_of(known, known)).read(body_of(KNOWN, repeated)) is None


def test_what_go_escapes_is_of_a_shape() -> None:
    """Go writes & < and > as escapes, in texts and keys; that hides nothing."""
    event = KNOWN.replace('"b":"x"', '"b":"\\u003cx\\u003e \\u0026"')
    found = learned(body_of(event, event)).read(body_of(event, event))
    assert found is not None
    assert found.events[1].metadata.field_1 == "<x> &"


def test_what_stands_beside_the_list_of_events_is_looked_at_closely() -> None:
    """An envelope with another key, or with two lists, is not of a shape."""
    shapes, known = learned(body_of(KNOWN, KNOWN)), body_of(KNOWN, KNOWN)
    assert shapes.read(known) is not None
    assert shapes.read(known[:-1] + b',"x":1}') is None
    assert shapes.read(b'{"events":[],' + known[1:]) is None


def test_a_time_to_come_is_refused_in_a_known_shape() -> None:
    """What only the whole event tells is told: the admission looks at the times that a shape read."""
    late = written(timestamp="2026-11-21T12:02:00Z")
    shapes = learned(body_of(late, late))
    found = admit(body_of(late, late), msgspec.structs.replace(tenant(), shapes=shapes), NOW)
    assert found == admit(body_of(late, late), tenant(), NOW)
    assert not isinstance(found, Admitted)


def test_a_shape_tells_times_and_ids() -> None:
    """Records, ids and times run in step."""
    other = KNOWN.replace('"external_id":"x"', '"external_id":"y"')
    found = learned(body_of(KNOWN, KNOWN)).read(body_of(KNOWN, other))
    assert found is not None
    assert found.external_ids == ["x", "y"]
    assert found.times == [datetime.fromisoformat("2026-01-01T00:00:00Z")] * 2


def test_shapes_are_learned_within_limits() -> None:
    """Any number of kinds of events take no more memory than the limit, and old kinds make room in time."""
    shapes = Shapes(body_bytes_min=0)

    def meet(number: int, times: int = shape.SIGHTINGS_MIN + 1) -> bool:
        event = written(metadata={f"key {number}": 1})
        return [shapes.read(body_of(event, event)) for _ in range(times)][-1] is not None

    for number in range(2 * shape.SHAPES_MAX):
        assert not meet(-number - 1, times=1)  # what comes once keeps nobody else from being learned
    kinds = shape.SHAPES_MAX + 1
    assert [meet(number) for number in range(kinds)] == [True] * (kinds - 1) + [False]
    for _ in range(shape.FORGET_BODIES // (shape.SIGHTINGS_MIN + 1)):
        meet(kinds)
    assert meet(kinds)


def test_a_shape_that_is_decoded_in_vain_is_given_up() -> None:
    """Bodies that begin as a known kind and go on as another cost a second decoding only so often."""
    shapes, mixed = learned(body_of(KNOWN, KNOWN)), body_of(KNOWN, written())
    for _ in range(shape.MISSES_MAX):
        assert shapes.read(mixed) is None
    assert shapes.read(body_of(KNOWN, KNOWN)) is not None  # it still has a chance
    for _ in range(shape.MISSES_MAX):
        shapes.read(mixed)
    assert shapes.read(body_of(KNOWN, KNOWN)) is None


@pytest.mark.parametrize("event", [
    written(metadata={"x" * shape.FIRST_BYTES_MAX: 1}),
    written(metadata=dict.fromkeys(map(str, range(shape.KEYS_MAX)), 1)),
    written(metadata={"_cost": {"amount": 1}}),
    written(metadata={"_cost": 5}),
    written(unknown=1),
    written(metadata={'a "quoted" key': 1}),
    written(metadata={"a\\b": 1}),
    written(metadata={"a\nb": 1}),
    '{"name":"n","customer_id":"c"}',
    "5",
])  # fmt: skip
def test_some_events_have_no_shape(event: str) -> None:
    """Events that are too long, have too many keys, or whose keys are not plain are never read by shape."""
    body = body_of(event, event)
    assert learned(body).read(body) is None
