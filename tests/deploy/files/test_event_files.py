"""Lines of NDJSON become events: bytes kept, ids given, lines known, whatever the encoding."""

import codecs
import gzip
import io
import json
import os
from collections.abc import Iterable

import pytest

from deploy.errors import GiveUp
from deploy.files import event_files
from deploy.files.event_files import StableIds, as_they_come, lines_of, read_ndjson, recognized_encoding
from deploy.files.sending import EVENT_BYTES_MAX, Line, Problem, batches


def test_an_event_line_is_passed_on_byte_by_byte() -> None:
    """A line with an external_id leaves as it came, digits and spaces and all; empty lines are skipped."""
    line = b'{"name" : "a", "external_id":"x", "metadata": {"n": 1.50, "big": 9007199254740993}}'

    assert list(read_ndjson(io.BytesIO(b"\n" + line + b"\n\n"))) == [Line(2, line)]


def test_a_mark_of_utf_8_is_no_part_of_the_first_line() -> None:
    """Windows writes one in front of NDJSON as of CSV."""
    line = b'{"name":"a","external_id":"x"}'

    assert list(read_ndjson(io.BytesIO(codecs.BOM_UTF8 + line + b"\n" + line))) == [Line(1, line), Line(2, line)]


@pytest.mark.parametrize(("content", "complaint"), [
    (gzip.compress(b"{}\n", mtime=0), "compressed with gzip; unpack it first"),
    (b"PK\x03\x04\x14", "a workbook or another zip archive; save the table as CSV first"),
    (b"PAR1\x15", "a Parquet file; write it as CSV first"),
    (b"\x28\xb5\x2f\xfd\0", "compressed with zstd; unpack it first"),
])
def test_a_file_that_is_no_text_is_one_complaint(content: bytes, complaint: str) -> None:
    """And not one for every line."""
    with pytest.raises(GiveUp, match=complaint):
        list(lines_of(io.BufferedReader(io.BytesIO(content))))


MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
ASKED = ["utf-16-le", "utf-16-be", "latin-1", "windows-1252"]


@pytest.mark.parametrize(("encoding", "asked"), [
    *((encoding, "") for encoding in [*MARKED, "utf-16-le", "utf-16-be"]), *((encoding, encoding) for encoding in ASKED)
])
def test_every_encoding_gives_the_same_lines(encoding: str, asked: str) -> None:
    """A mark or the zeros of UTF-16 are recognized, legacy encodings are named; file and pipe are read alike."""
    text = '{"name":"caf\u00e9","external_id":"x"}\n{"name":"\u00f1","external_id":"y"}\n'
    expected = [Line(number, line.encode()) for number, line in enumerate(text.splitlines(), 1)]
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb", buffering=0) as pipe:
        pipe.write(text.encode(encoding))
        pipe.close()
        piped = list(read_ndjson(as_they_come(reading, encoding=asked)))

    assert [line for line in piped if line] == expected
    assert list(read_ndjson(lines_of(io.BufferedReader(io.BytesIO(text.encode(encoding))), asked))) == expected


@pytest.mark.parametrize(("head", "asked", "complaint"), [
    (codecs.BOM_UTF16_LE, "latin-1", "begins as UTF-16 does and is not iso8859-1"),
    (codecs.BOM_UTF8, "windows-1252", "begins as UTF-8 does and is not cp1252"),
    (b"{}", "base64", "'base64' is no encoding of text; try utf-8, utf-16 or windows-1252"),
    (b"{}", "latin-99", "'latin-99' is no encoding of text"),
])
def test_an_encoding_that_cannot_be_is_refused(head: bytes, asked: str, complaint: str) -> None:
    """A mark denies any other encoding, which would read letters that nobody wrote."""
    with pytest.raises(GiveUp, match=complaint):
        recognized_encoding(head, asked)


def test_the_end_of_a_file_in_the_wrong_encoding_is_named() -> None:
    """Half a character of UTF-16 at the end is an error and no line."""
    with pytest.raises(GiveUp, match="the file is not UTF-16"):
        list(lines_of(io.BufferedReader(io.BytesIO("{}\n".encode("utf-16") + b"x"))))


@pytest.mark.parametrize("timestamp", ["46351.34375", '"46351.34375"', "20260301", "0", "2026.5"])
def test_a_time_before_1973_is_named(timestamp: str) -> None:
    """A spreadsheet's day, a day without dashes or a year would count in 1970."""
    line = f'{{"name":"a","external_id":"x","timestamp":{timestamp}}}'.encode()

    (problem,) = read_ndjson([line])

    assert isinstance(problem, Problem)
    assert "would be a time before 1973; write a day as 2026-03-01" in problem.message


@pytest.mark.parametrize("timestamp", [
    "1767225600.25", '"1767225600"', "-5", "1e999999999999999999999", '"no"', '"2026-03-01"', "null",
])
def test_any_other_time_is_left_to_the_server(timestamp: str) -> None:
    """Lines go as they are."""
    line = f'{{"name":"a","external_id":"x","timestamp":{timestamp}}}'.encode()
    assert list(read_ndjson([line])) == [Line(1, line)]


def test_lines_of_a_pipe_go_together_or_on_their_own() -> None:
    """What has waited is told by a None, also while a line is unfinished; the last one needs no end."""
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb", buffering=0) as pipe:
        lines = as_they_come(reading, wait_s=0.0)
        pipe.write(b"a\nb\nlong")
        assert [next(lines) for _ in range(3)] == [b"a", b"b", None]
        pipe.write(b"er\n\nlast")
        assert [next(lines) for _ in range(3)] == [b"longer", b"", None]
        pipe.close()
        assert list(lines) == [b"last"]


def test_a_group_ends_where_nothing_follows_yet() -> None:
    """Nothing is sent where there is nothing."""
    a, b = Line(1, b"a"), Line(2, b"b")

    assert list(batches([None, a, None, None, b], 500)) == [[a], [b]]


@pytest.mark.parametrize("event", [b"{}", b'{"name":"a"}', b'{"name":"a","external_id":null}'])
def test_an_event_without_an_id_gets_one(event: bytes) -> None:
    """What was missing or null is an external_id; the rest is as it was."""
    (line,) = read_ndjson(io.BytesIO(event))

    assert isinstance(line, Line)
    assert json.loads(line.event)["external_id"]
    assert {**json.loads(line.event), "external_id": None} == {**json.loads(event), "external_id": None}


def ids(lines: Iterable[Line | Problem]) -> list[str]:
    """The external_id of each event."""
    return [json.loads(line.event)["external_id"] for line in lines if isinstance(line, Line)]


def test_lines_keep_their_ids_when_a_file_grows_and_equal_ones_are_different_events() -> None:
    """Sent again, in whatever company, the same line is the same event; a second one like it in a file is another."""
    line, other = b'{"name":"a"}\n', b'{"name":"b"}\n'

    first = ids(read_ndjson(io.BytesIO(line + line)))
    grown = ids(read_ndjson(io.BytesIO(other + line + b"\n" + line + line)))

    assert len(set(grown)) == 4
    assert grown[1:3] == first
    assert not set(grown) & set(ids(read_ndjson(io.BytesIO(line + other), apart="another time")))


def test_occurrences_are_counted_beyond_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no memory for them, every line still gets the id of its occurrence."""
    monkeypatch.setattr(event_files, "CACHE_KIB", 8)
    with StableIds() as given:
        rounds = [[given.next(b"%d" % number) for number in range(3000)] for _ in range(2)]

    assert {id.partition(":")[2] for id in rounds[0]} == {"1"}
    assert rounds[1] == [id.replace(":1", ":2") for id in rounds[0]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"events":[{"name":"a"}]}', "a whole request, not an event: give each of its events a line of its own"),
        (b'"a"', "Expected `object`"),
        (b'{"a":NaN}', "malformed"),
        (b"\xff\xfe", "byte 1 of the line is not UTF-8"),
        (b'{"name":"caf\xe9"}', "byte 13 of the line is not UTF-8"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"a":"' + b"x" * EVENT_BYTES_MAX + b'"}', "a whole request may have 10,485,760"),
    ],
    ids=lambda value: value[:20],
)
def test_a_line_that_is_no_event_is_named_by_its_number(line: bytes, complaint: str) -> None:
    """A line that would refuse its whole request is reported with its number, and the next one is read all the same."""
    bad, good = read_ndjson(io.BytesIO(line + b'\n{"name":"a"}\n'))

    assert isinstance(bad, Problem)
    assert bad.line == 1
    assert complaint in bad.message
    assert isinstance(good, Line)
    assert good.number == 2


def test_batches_keep_every_line_in_order_and_within_bounds() -> None:
    """No batch has more events or bytes than allowed, and together they are all the lines."""
    lines = [Line(number, b"x" * (number % 7 * 700_000)) for number in range(40)]

    groups = list(batches(lines, 5))

    assert [line for group in groups for line in group] == lines
    assert all(len(group) <= 5 for group in groups)
    assert all(len(group) == 1 or sum(len(line.event) for line in group) <= 4 * 1024 * 1024 for group in groups)
