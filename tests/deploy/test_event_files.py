"""Files become events: bytes kept, ids given, lines known."""

import io
import json
from pathlib import Path

import pytest

from deploy.event_files import CsvFile, parse_mapping, read_ndjson
from deploy.giving_up import USAGE, GiveUp
from deploy.sending import Line, Problem, batches

CSV = "user,at,total,note\nada,2026-03-01 10:00:00.1234567,812,\nbob,1767225600,0.10,true\ncid,never,1,00123\n"


def csv_file(tmp_path: Path, text: str = CSV) -> CsvFile:
    """The file with its columns mapped."""
    path = tmp_path / "usage.csv"
    path.write_text(text, encoding="utf-8")
    columns = ["external_customer_id=user,timestamp=at", "metadata.tokens=total,metadata.note=note"]
    columns += ["metadata._cost.amount=total"]
    return CsvFile(path, parse_mapping(columns, "--map"), parse_mapping(["name=call"], "--set"))


def test_an_event_line_is_passed_on_byte_by_byte() -> None:
    """A line with an external_id leaves as it came, digits and spaces and all; empty lines are skipped."""
    line = b'{"name" : "a", "external_id":"x", "metadata": {"n": 1.50, "big": 9007199254740993}}'

    assert list(read_ndjson(io.BytesIO(b"\n" + line + b"\n\n"))) == [Line(2, line)]


@pytest.mark.parametrize("event", [b"{}", b'{"name":"a"}', b'{"name":"a","external_id":null}'])
def test_an_event_without_an_id_gets_one(event: bytes) -> None:
    """What was missing or null is a fresh external_id; the rest is as it was."""
    (first,) = read_ndjson(io.BytesIO(event))
    (second,) = read_ndjson(io.BytesIO(event))

    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert json.loads(first.event)["external_id"] != json.loads(second.event)["external_id"]
    assert {**json.loads(first.event), "external_id": None} == {**json.loads(event), "external_id": None}


@pytest.mark.parametrize("line", [b"{", b"[]", b'"a"', b'{"a":NaN}', b"\xff\xfe"])
def test_a_line_that_is_no_event_is_named_by_its_number(line: bytes) -> None:
    """A bad line is reported with its number, and the next one is read all the same."""
    bad, good = read_ndjson(io.BytesIO(line + b'\n{"name":"a"}\n'))

    assert isinstance(bad, Problem)
    assert bad.line == 1
    assert isinstance(good, Line)
    assert good.number == 2


def test_a_row_becomes_the_event_its_mapping_says(tmp_path: Path) -> None:
    """Numbers keep their digits, empty cells are left out, a time without offset is UTC, ids name file and line."""
    first, second, third = csv_file(tmp_path).lines()

    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert json.loads(first.event) == {
        "external_id": f"{csv_file(tmp_path).digest()}:2", "external_customer_id": "ada", "name": "call",
        "timestamp": "2026-03-01T10:00:00.123456+00:00", "metadata": {"tokens": 812, "_cost": {"amount": 812}},
    }
    assert b'"tokens":0.10' in second.event
    assert b'"note":true' in second.event
    assert b'"timestamp":"1767225600"' in second.event
    assert third == Problem(4, "timestamp: 'never' is no ISO 8601 time")


def test_the_ids_of_a_file_depend_on_its_content_alone(tmp_path: Path) -> None:
    """The same content under any name gives the same events; another content gives other ids."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = csv_file(tmp_path / "one"), csv_file(tmp_path / "two")
    other = csv_file(tmp_path, CSV + "dan,2026-03-01T10:00:00Z,1,\n")

    assert list(one.lines()) == list(two.lines())
    assert one.digest() != other.digest()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["name"], "takes FIELD=VALUE"),
        (["nmae=a"], "no 'nmae'"),
        (["metadata.=a"], "no 'metadata.'"),
        (["metadata._cost=a"], "no 'metadata._cost'"),
    ],
)
def test_a_mapping_names_what_events_have(options: list[str], complaint: str) -> None:
    """A field that no event has is wrong usage, found before anything is sent."""
    with pytest.raises(GiveUp, match=complaint) as raised:
        parse_mapping(options, "--map")

    assert raised.value.exit_code == USAGE


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"name": "user"}, "needs a name and a customer"),
        ({"name": "kind", "external_customer_id": "user"}, "has no column kind; it has user, at"),
    ],
)
def test_a_mapping_fits_its_file(tmp_path: Path, columns: dict[str, str], complaint: str) -> None:
    """An event needs a name and a customer, and a column that is mapped must be there."""
    with pytest.raises(GiveUp, match=complaint):
        CsvFile(csv_file(tmp_path).path, columns, {}).check()


def test_batches_keep_every_line_in_order_and_within_bounds() -> None:
    """No batch has more events or bytes than allowed, and together they are all the lines."""
    lines = [Line(number, b"x" * (number % 7 * 700_000)) for number in range(40)]

    groups = list(batches(lines, 5))

    assert [line for group in groups for line in group] == lines
    assert all(len(group) <= 5 for group in groups)
    assert all(len(group) == 1 or sum(len(line.event) for line in group) <= 4 * 1024 * 1024 for group in groups)


@pytest.mark.parametrize("broken", [b'user,total\nada,1\nbob,"2\ncid,3\n', b"user,total\nada,1\nb\xf6b,2\n"])
def test_a_file_that_cannot_be_read_to_its_end_is_not_begun(tmp_path: Path, broken: bytes) -> None:
    """A quote that nobody closes would swallow the rest; once mended it is another file, with other ids."""
    path = tmp_path / "usage.csv"
    path.write_bytes(broken)
    file = CsvFile(path, parse_mapping(["external_customer_id=user"], "--map"), parse_mapping(["name=call"], "--set"))

    with pytest.raises(GiveUp, match="nothing was sent"):
        file.check()
