"""Lines that are read quickly are what they are one by one: the same rows, identities, numbers and dead letters."""

from collections.abc import Iterator, Sequence
from unittest.mock import patch

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.decode import decode as decoding
from aggregator.decode import kernels
from aggregator.decode.columns import Batch, Chunk, Span
from aggregator.decode.decode import Quick, decode
from aggregator.decode.directory import Directory
from meters.compiled import FIELDS, TIMESTAMP
from meters.log import Pieces, Record
from meters.timestamps import UNREADABLE
from tests.aggregator.decode.test_timestamps import alone, anything
from tests.support.random_events import metadata_texts
from tests.support.records import ORGANIZATION, OTHER_ORGANIZATION, record

CUSTOMERS = ["c", "customer 2", "é" * 40, ""]
CUSTOMERS += ["0b4a7a1e-5d1c-4a57-9c38-0d3a3c3f0001", "0B4A7A1E5D1C4A579C380D3A3C3F0001"]  # one customer
MARKS = [bytes([byte]) for byte in b'"\\{}[]:,0129-+.eEtrufalsn \t\n\r\0\x7f'] + ["é".encode(), b"\xc3", b""]


@pytest.fixture(autouse=True)
def from_one_line_on() -> Iterator[None]:
    """However few lines, they are read quickly."""
    with patch.object(decoding, "LINES_MIN", 1):
        yield


def rows(batch: Batch) -> pa.Table:
    """All rows of a batch."""
    return pa.Table.from_batches([chunk.rows for chunk in batch.chunks])


def assert_same(found: Batch, wanted: Batch) -> None:
    """Two batches say the same, however they are cut into chunks."""
    assert (found.lines, found.positions, found.subjects, found.organizations) == (
        wanted.lines, wanted.positions, wanted.subjects, wanted.organizations
    )  # fmt: skip
    assert letters(found) == letters(wanted)
    assert [raw for chunk in found.chunks for raw in chunk.raws] == [
        raw for chunk in wanted.chunks for raw in chunk.raws
    ]
    if wanted.chunks:
        assert rows(found).equals(rows(wanted))
        for column in range(3):
            assert joined([chunk.keys[column] for chunk in found.chunks]) == joined(
                [chunk.keys[column] for chunk in wanted.chunks]
            )
        assert joined([chunk.stamped for chunk in found.chunks]) == joined([chunk.stamped for chunk in wanted.chunks])


def letters(batch: Batch) -> list[dict[str, object]]:
    """Its dead letters. A batch has them in no order."""
    return sorted(batch.dead.to_pylist(), key=lambda letter: (letter["log_offset"], letter["line"]))


def joined(columns: Sequence[np.ndarray]) -> list[object]:
    """Columns end to end."""
    found: list[object] = np.concatenate(columns).tolist()
    return found


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """An event as any program may write it: with or without blanks, fields in any order, some null, some unknown."""
    said = {
        "name": st.sampled_from(["chat", "é", ""]), "external_id": st.text("abc-é", max_size=40),
        "external_customer_id": st.sampled_from(CUSTOMERS),
    }  # fmt: skip
    may_say = {
        "timestamp": anything.filter(lambda time: time is None or isinstance(time, str)),
        "customer_id": st.sampled_from([*CUSTOMERS, None]), "member_id": st.just("m"),
        "external_member_id": st.just("e"), "parent_id": st.none() | st.just("p"),
        "more": st.sampled_from([None, 1, -0.5e-3, True, [], [[{}], {"name": [1, 2]}], {"metadata": {"name": "x"}}]),
    }  # fmt: skip
    fields = {key: msgspec.json.encode(draw(value)).decode() for key, value in said.items()}
    fields |= {key: msgspec.json.encode(draw(value)).decode() for key, value in may_say.items() if draw(st.booleans())}
    if draw(st.booleans()):
        fields["metadata"] = draw(metadata_texts())
    if draw(st.integers(0, 9)) == 0:
        fields.pop(draw(st.sampled_from(sorted(fields))))
    blank = draw(st.sampled_from(["", " "]))
    order = draw(st.permutations(sorted(fields)))
    return ("{" + f",{blank}".join(f'"{key}":{blank}{fields[key]}' for key in order) + blank + "}").encode()


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A line in which something small is wrong, or not even that."""
    line = draw(whole)
    for _ in range(draw(st.integers(0, 2))):
        place, cut = draw(st.integers(0, len(line))), draw(st.integers(0, 2))
        line = line[:place] + draw(st.sampled_from(MARKS)) + line[place + cut :]
    return line


def records(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[Record]]:
    """Records that claim to be the gateway's, of two organizations; some of lines whose keys nobody compared."""
    sizes = st.lists(lines, min_size=1, max_size=4)
    who = st.sampled_from([ORGANIZATION, ORGANIZATION, OTHER_ORGANIZATION])
    one = st.builds(
        lambda some, organization, distinct: msgspec.structs.replace(
            record(*some, organization_id=organization), distinct_keys=distinct
        ),
        sizes, who, st.sampled_from([True, True, True, False]),
    )
    return st.lists(one, min_size=1, max_size=4).map(
        lambda made: [msgspec.structs.replace(each, offset=offset) for offset, each in enumerate(made)]
    )


@settings(max_examples=100, deadline=None)
@given(records(damaged(lines())))
def test_the_quick_way_is_the_others(sent: list[Record]) -> None:
    """Ordinary lines and odd ones, next to each other, read twice: the second time every customer is known."""
    swift, plain, directory = Quick(kernels.Reader()), Directory(), Directory()
    for _ in range(2):
        assert_same(decode(sent, directory, swift), decode(sent, plain))


@settings(max_examples=200, deadline=None)
@given(damaged(lines()))
def test_what_is_read_quickly_is_json(sent: bytes) -> None:
    """Nothing is taken for ordinary that a decoder refuses, or that has no name or no external id."""
    chunk = read(sent)
    if chunk is not None:
        said = [msgspec.json.decode(line) for line in sent.split(b"\n")]
        assert chunk.rows["name"].to_pylist() == [event["name"] for event in said]
        assert chunk.rows["external_id"].to_pylist() == [event["external_id"] for event in said]
        assert list(chunk.raws) == sent.split(b"\n")


def read(value: bytes) -> Chunk | None:
    """The chunk that a record's value makes when it is read quickly, if it is."""
    return Quick(kernels.Reader()).read([Span(record(value), 0, value.count(b"\n") + 1)], Directory())


@pytest.mark.parametrize(
    "line",
    [
        b'{"name":"chat","external_id":"a","external_customer_id":"c"}',
        b'{"external_id":"a","customer_id":"c","name":"chat","parent_id":null,"metadata":{}}',
        '{"name": "chat", "external_id": "a", "external_customer_id": "é", "metadata": {"a": [1, -0.5e3]}}'.encode(),
        b'{"name":"chat","external_id":"a","external_customer_id":"c","timestamp":"2026-03-01T10:00:00.1+02:00"}',
        b'{"name":"chat","external_id":"a","external_customer_id":"c","timestamp":"1772359200","b":{"name":[{}]}}',
    ],
)
def test_ordinary_lines_are_read_quickly(line: bytes) -> None:
    """Or all else here would show nothing."""
    assert read(line) is not None


@pytest.mark.parametrize("escape", [rb"\n", rb"\u00e9", rb"\"", b"\t"])
def test_an_escape_is_odd(escape: bytes) -> None:
    """Wherever it stands."""
    assert read(b'{"name":"chat","external_id":"a","external_customer_id":"c","metadata":{"x":"%s"}}' % escape) is None


@given(st.lists(anything.filter(lambda time: isinstance(time, str) and '"' not in time), min_size=1, max_size=12))
def test_times_are_what_each_is_alone(times: list[str]) -> None:
    """What the loop reads is what ``meters.timestamps`` reads; the rest it leaves to that."""
    texts = [time.encode() for time in times]
    ends = np.cumsum([len(text) for text in texts])
    spans = np.zeros((len(texts), FIELDS, 2), np.int32)
    spans[:, TIMESTAMP, 0], spans[:, TIMESTAMP, 1] = ends - [len(text) for text in texts], ends
    found = np.zeros(len(texts), np.int64)
    kernels._read_times(np.frombuffer(b"".join(texts) or b" ", np.uint8), spans, found)

    for time, microseconds in zip(times, found.tolist(), strict=True):
        assert microseconds in (alone(time, 0), UNREADABLE)


def test_customers_keep_their_numbers_while_the_table_grows() -> None:
    """Thousands of them, under both names, in rounds that repeat some."""
    swift, directory, plain = Quick(kernels.Reader()), Directory(), Directory()
    for offset in range(6):
        told = [
            b'{"name":"n","external_id":"%d-%d","%scustomer_id":"customer %d"}'
            % (offset, number, b"" if number % 3 == 0 else b"external_", number * (1 + offset % 2))
            for number in range(offset, 1500 * (1 + offset), 1 + offset)
        ]
        sent = msgspec.structs.replace(record(*told, offset=offset), distinct_keys=True)
        found = decode([sent], directory, swift)
        assert isinstance(found.chunks[0].raws, Pieces)
        assert_same(found, decode([sent], plain))


def test_the_table_grows_with_customers_not_with_their_lines() -> None:
    """A program that sends a hundred events of one customer at a time must not fill the memory."""
    swift, directory = Quick(kernels.Reader()), Directory()
    for offset in range(20):
        told = [
            b'{"name":"n","external_id":"%d-%d","external_customer_id":"%d"}'
            % (offset, number, 50 * offset + number % 50)
            for number in range(2000)
        ]
        decode([msgspec.structs.replace(record(*told, offset=offset), distinct_keys=True)], directory, swift)
    external, own = swift.loader.loops._numbers[0]

    assert (directory.subjects_count, len(external._table[2]), len(own._table[2])) == (1000, 2048, kernels.SLOTS_MIN)


def test_it_is_made_ready_when_it_pays() -> None:
    """The first lines are read one by one; then a thread loads what is compiled, and it is used."""
    with patch.object(decoding, "LOAD_AFTER_LINES", 1):
        swift = Quick()
    assert not swift.pays(1)
    assert swift.loader.thread is None
    swift.pays(1)
    swift.loader.thread.join()
    assert swift.pays(1)


def test_without_a_compiler_all_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it cannot be loaded that is said once, and lines are read one by one."""
    with patch.object(decoding, "LOAD_AFTER_LINES", 0), patch.dict("sys.modules", {"aggregator.decode.kernels": None}):
        swift = Quick()
        swift.pays(1)
        swift.loader.thread.join()
        assert not swift.pays(1)
    assert capsys.readouterr().out.count("quick_reading_off") == 1
