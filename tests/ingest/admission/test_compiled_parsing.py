"""Bodies that compiled loops read are what they are without: the same lines, ids, refusals, prints and records."""

import json
from collections.abc import Iterator
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.admission import intake
from ingest.admission.duplicates import Fingerprints
from ingest.admission.intake import Quick
from ingest.admission.kernels import BodyReader
from ingest.admission.partitioner import Spread
from ingest.admission.validate import Admitted, admit
from meters.event import check_event
from tests.support.admission import CATALOGUE, NOW, ORGANIZATION, tenant, written
from tests.support.json_events import EVENTS, Pairs, repeats_a_key
from tests.support.servers.gateway import RunningGateway, event

MARKS = [bytes([byte]) for byte in b'"\\{}[]:,0129-+.eEtrufalsn \t\n\r\0\x7f'] + ["é".encode(), b"\xc3", b""]
PARTITIONS = 12


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A request of a few events, in which something small may be wrong."""
    events = draw(st.lists(EVENTS, min_size=1, max_size=4))
    body = draw(st.sampled_from(['{"events":[%s]}', '{"events": [%s]}', ' { "events" :[ %s ] } ']))
    found = (body % draw(st.sampled_from([",", ", ", " ,"])).join(events)).encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        place, cut = draw(st.integers(0, len(found))), draw(st.integers(0, 2))
        found = found[:place] + draw(st.sampled_from(MARKS)) + found[place + cut :]
    return found


def both(body: bytes, *, lenient: bool = False) -> tuple[object, object]:
    """What admission says of a body with loops and without."""
    swift = msgspec.structs.replace(tenant(), compiled=Quick(BodyReader()))
    return admit(body, swift, NOW, lenient=lenient), admit(body, tenant(), NOW, lenient=lenient)


@settings(max_examples=600, deadline=None)
@given(bodies(), st.booleans())
def test_loops_change_nothing_but_the_time_it_takes(body: bytes, lenient: bool) -> None:
    """What they take is good, no key in it comes twice, and all that is made of it is the same."""
    found, usual = both(body, lenient=lenient)
    if not isinstance(found, Admitted) or not isinstance(usual, Admitted):
        assert found == usual
        return
    assert found.value == usual.value
    assert [bytes(line) for line in found.lines] == [bytes(line) for line in usual.lines]
    assert list(found.external_ids) == list(usual.external_ids)
    assert (found.named, list(found.indexes), found.refusals) == (usual.named, list(usual.indexes), usual.refusals)
    where = ORGANIZATION, CATALOGUE, PARTITIONS
    records, wanted = Spread().entries(found, *where), Spread().entries(usual, *where)
    assert [(record.partition, record.value) for record in records] == [(one.partition, one.value) for one in wanted]
    if found.compiled is not None:
        prints = Fingerprints.of(ORGANIZATION, usual.external_ids, map(bytes, usual.lines))
        assert [list(numbers) for numbers in (found.compiled.keys, found.compiled.contents)] == [*prints]
        assert not any(isinstance(check_event(line, now=NOW), list) for line in found.lines)
        assert not any(repeats_a_key(json.loads(line, object_pairs_hook=Pairs)) for line in found.lines)


COST = {"amount": 0.0425, "currency": "usd"}
LLM = {"vendor": "v", "model": "m:0", "input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
METADATA = {"model": "m", "tokens": 812, "cached": False, "ok": True, "ms": -12.5, "text": "a:b, {c} [d]"}


def is_read(event: str) -> bool:
    """Whether loops read a body in which the event is the second of three."""
    body = f'{{"events":[{written()},{event},{written()}]}}'.encode()
    found, usual = both(body)
    assert not isinstance(found, Admitted) or not isinstance(usual, Admitted) or found.value == usual.value
    return isinstance(found, Admitted) and found.compiled is not None


@pytest.mark.parametrize("event", [
    written(),
    written(external_id="x", metadata={"u": "u"}).replace('"u"', '"é"'),
    written(metadata={}),
    written(metadata=METADATA, timestamp="2026-01-01T00:00:00.123456Z"),
    written(metadata=METADATA | {"_cost": COST, "_llm": LLM}),
    written(metadata={"_llm": LLM | {"cached_input_tokens": 0}}, parent_id="p", external_member_id=None),
    written(customer_id="any", member_id=None, timestamp="2026-01-01 00:00:00+02:00"),
    json.dumps(json.loads(written(metadata=METADATA | {"_cost": COST}))),
])  # fmt: skip
def test_what_programs_really_send_is_ordinary(event: str) -> None:
    """Events of the usual kinds, compact or with blanks."""
    assert is_read(event)


KNOWN = written(metadata={"a": 1, "b": "x", "_cost": COST, "_llm": LLM}, timestamp="2026-01-01T00:00:00Z")


@pytest.mark.parametrize(("old", "new"), [
    ('"a":1', '"a":1,"a":2'),
    ('"a":1', '"a":1e2'),
    ('"a":1', '"a":01'),
    ('"a":1', '"a":1.'),
    ('"a":1', '"a":' + "9" * 19),
    ('"a":1', '"a":null'),
    ('"a":1', '"a":[1]'),
    ('"a":1', '"a":{}'),
    ('"a":1', '"a":tru'),
    ('"a":1,', '"a":1,,'),
    ('"a":1', "\n\"a\":1"),
    ('"b":"x"', '"b":"\\u0078"'),
    ('"b":"x"', '"b":""'),
    ('"b":"x"', f'"b":"{"x" * 501}"'),
    ('"b":"x"', ",".join(f'"{key}":1' for key in range(40))),
    ('"amount":0.0425', '"amount":100000'),
    ('"amount":0.0425', '"amount":"0.0425"'),
    ('"amount":0.0425', '"more":0.0425'),
    ('"amount":0.0425,', ""),
    ('"currency":"usd"', '"currency":"eur"'),
    ('"currency":"usd"', '"currency":"usd","amount":1'),
    ('"input_tokens":1', '"input_tokens":1.0'),
    ('"name":"call"', f'"name":"{"n" * 129}"'),
    ('"name":"call"', '"name":null'),
    ('"external_id":"x"', '"external_id":null'),
    ('"external_id":"x"', '"external_id":""'),
    ('"external_id":"x",', ""),
    ('"external_customer_id":"u"', '"external_customer_id":"u","external_customer_id":"v"'),
    ('"external_customer_id":"u"', '"customer_id":"u"'),
    ('"external_customer_id":"u"', '"external_customer_id":"u","organization_id":null'),
    ("2026-01-01T00:00:00Z", "2026-11-21T12:02:00Z"),
    ("2026-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
    ("2026-01-01T00:00:00Z", "2026-02-29T00:00:00Z"),
    ("2026-01-01T00:00:00Z", "2026-01-01"),
])  # fmt: skip
def test_one_event_that_differs_is_looked_at_closely(old: str, new: str) -> None:
    """Whether it is good or not: that is for others to say."""
    assert old in KNOWN
    assert is_read(KNOWN)
    assert not is_read(KNOWN.replace(old, new))


@pytest.fixture
def at_once() -> Iterator[None]:
    """Loops are loaded by the first body."""
    with patch.object(intake, "LOAD_AFTER_BYTES", 0):
        yield


@pytest.mark.usefixtures("at_once")
def test_a_repetition_is_known_whichever_way_it_came_before() -> None:
    """What was read without loops is remembered when they are there, and the other way round."""
    gateway = RunningGateway()
    with gateway:
        first, later = event(external_id="a"), event(external_id="b")
        escaped = json.dumps({"events": [later | {"metadata": {"a": "\n"}}]})
        assert gateway.ingest({"events": [first]}).json() == {"inserted": 1, "duplicates": 0}
        gateway.gateway.endpoint.intake._quick.loader.thread.join()
        assert gateway.ingest({"events": [first]}).json() == {"inserted": 0, "duplicates": 1}
        assert gateway.ingest({"events": [later]}).json() == {"inserted": 1, "duplicates": 0}
        assert gateway.ingest(json.loads(escaped)).json() == {"inserted": 0, "duplicates": 1}


@pytest.mark.usefixtures("at_once")
def test_without_a_compiler_all_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Where loops cannot be loaded that is said once."""
    swift = Quick()
    with patch.dict("sys.modules", {"ingest.admission.kernels": None}):
        assert swift.read([b"{}"], 0, 1, ORGANIZATION) is None
        swift.loader.thread.join()
        assert swift.read([b"{}"], 0, 1, ORGANIZATION) is None
    assert caplog.text.count("without compiled loops") == 1


def test_a_gateway_with_few_events_loads_nothing() -> None:
    """Two mebibytes of bodies are the limit."""
    swift = Quick()
    swift.read([b" " * intake.LOAD_AFTER_BYTES], 0, 1, ORGANIZATION)
    assert swift.loader.thread is None


def test_nothing_but_bytes_is_read() -> None:
    """Loops end at the 0 that Python keeps behind them, and behind other buffers need not."""
    body = f'{{"events":[{written()}]}}'.encode()
    assert BodyReader().read([body], -(2**62), 2**62, 1) is not None
    assert BodyReader().read([memoryview(body)], -(2**62), 2**62, 1) is None


@pytest.mark.parametrize("rest", ["x", "}", ',"a":1}', '{"events":[]}', "]", ",", "\\x00", '"'])
def test_what_stands_behind_a_body_is_not_passed_over(rest: str) -> None:
    """The reader takes nothing behind the last bracket, of a body alone and of one in front of another."""
    body = f'{{"events":[{written()}]}}'.encode()
    times, reader = (-(2**62), 2**62, 1), BodyReader()
    assert reader.read([body], *times) is not None
    assert reader.read([body + rest.encode()], *times) is None
    together = reader.read([body, body + rest.encode(), body], *times)
    assert together is not None
    assert together.rows == [1]


def test_pieces_can_be_asked_for_one_by_one() -> None:
    """As a list of lines and ids can."""
    found, _ = both(f'{{"events":[{written()},{written(external_id="€").replace(chr(92) + "u20ac", "é")}]}}'.encode())
    assert isinstance(found, Admitted)
    assert (len(found.lines), len(found.external_ids)) == (2, 2)
    assert (bytes(found.lines[0]).decode(), found.external_ids[1]) == (written(), "é")
