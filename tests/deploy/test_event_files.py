"""Files become events: bytes kept, ids given, lines known."""

import codecs
import gzip
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from deploy import event_files
from deploy.errors import USAGE, GiveUp
from deploy.event_files import CsvFile, StableIds, as_they_come, parse_mapping, read_ndjson
from deploy.sending import EVENT_BYTES_MAX, Line, Problem, batches
from meters.exact import Token
from meters.timestamps import parse_timestamp

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


def test_a_mark_of_utf_8_is_no_part_of_the_first_line() -> None:
    """Windows writes one in front of NDJSON as of CSV."""
    line = b'{"name":"a","external_id":"x"}'

    assert list(read_ndjson(io.BytesIO(codecs.BOM_UTF8 + line + b"\n" + line))) == [Line(1, line), Line(2, line)]


@pytest.mark.parametrize(("content", "complaint"), [
    (gzip.compress(b"{}\n", mtime=0), "compressed with gzip; unpack it first"),
    ("{}\n".encode("utf-16"), "UTF-16; save it as UTF-8 first"),
])
def test_a_file_that_is_no_text_is_one_complaint(content: bytes, complaint: str) -> None:
    """And not one for every line."""
    with pytest.raises(GiveUp, match=complaint):
        list(read_ndjson(io.BytesIO(content)))


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


def test_a_row_becomes_the_event_its_mapping_says(tmp_path: Path) -> None:
    """Numbers keep their digits, empty cells are left out, a time without offset is UTC, a made id is there."""
    first, second, third = csv_file(tmp_path).lines()

    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert json.loads(first.event) == {
        "external_id": ids([first])[0], "external_customer_id": "ada", "name": "call",
        "timestamp": "2026-03-01T10:00:00.123456+00:00", "metadata": {"tokens": 812, "_cost": {"amount": 812}},
    }
    assert b'"tokens":0.10' in second.event
    assert b'"note":true' in second.event
    assert b'"timestamp":"1767225600"' in second.event
    assert third == Problem(4, "timestamp: 'never' is no ISO 8601 time")


@pytest.mark.parametrize(
    ("cell", "sent"),
    [
        ("1.767225600000000000e+09", "1767225600.000000000"),  # as numpy writes it
        ("1.7672256001234E9", "1767225600.1234"),
        ("17672256005e-1", "1767225600.5"),
        ("1767225600.25", "1767225600.25"),
        ("-5", "-5"),
    ],
)
def test_a_time_as_a_number_is_sent_as_the_server_takes_it(tmp_path: Path, cell: str, sent: str) -> None:
    """An exponent is worked out, since no time has one in text; the server reads what is sent."""
    (line,) = csv_file(tmp_path, f"user,at,total\nada,{cell},1\n").lines()

    assert isinstance(line, Line)
    assert json.loads(line.event)["timestamp"] == sent
    assert parse_timestamp(sent) == parse_timestamp(Token(cell))


@pytest.mark.parametrize("cell", ["1.7e9", "1.76723E+09", "1e999999999999999999999", "1e-999999999", "0e5"])
def test_a_time_whose_digits_are_lost_is_named(tmp_path: Path, cell: str) -> None:
    """What a spreadsheet shortened could be off by hours: its line is named instead of guessed."""
    problem, good = csv_file(tmp_path, f"user,at,total\nada,{cell},1\nbob,1767225600,1\n").lines()

    message = f"timestamp: {cell!r} does not say every digit of its seconds; write it without an exponent"
    assert problem == Problem(2, message)
    assert isinstance(good, Line)


@pytest.mark.parametrize("cell", ["20260301", "2026", "0", "20260301.0", "99999999"])
def test_a_day_without_dashes_is_named(tmp_path: Path, cell: str) -> None:
    """As seconds it would be a time in the 1970s, which nobody means."""
    problem, good = csv_file(tmp_path, f"user,at,total\nada,{cell},1\nbob,100000000,1\n").lines()

    message = f"timestamp: {cell!r} is no time; write a day as 2026-03-01, or the seconds since 1970"
    assert problem == Problem(2, message)
    assert isinstance(good, Line)


def test_a_column_with_a_comma_is_quoted(tmp_path: Path) -> None:
    """Each option is a line of CSV; what is none is refused."""
    options = ['external_customer_id=user, "metadata.net=total, net"', "metadata.x=a=b"]

    assert parse_mapping(options, "--map") == {
        "external_customer_id": "user", "metadata.net": "total, net", "metadata.x": "a=b",
    }
    with pytest.raises(GiveUp, match="--map is read as a line of CSV"):
        parse_mapping(['"metadata.net=total, net'], "--map")


def test_a_file_that_grew_or_was_mended_repeats_what_was_there(tmp_path: Path) -> None:
    """Rows keep their ids whatever stands before, behind and between them; equal ones are counted through."""
    rows = ["ada,,1,", "ada,,1,", "bob,,2,"]
    header = "user,at,total,note"
    text, grown = ("\n".join([header, *lines]) + "\n" for lines in (rows, ["new,,1,", rows[0], *rows[:2], "bob,,3,"]))

    first, second = ids(csv_file(tmp_path, text).lines()), ids(csv_file(tmp_path, grown).lines())

    assert len(set(first)) == 3
    assert second[1:3] == first[:2]
    assert not {second[0], *second[3:]} & set(first)


@pytest.mark.parametrize(("row", "cells"), [("ada,1,1,234,", 5), ("ada", 1), ("ada,1,1", 3)])
def test_a_row_with_cells_too_many_or_too_few_is_named(tmp_path: Path, row: str, cells: int) -> None:
    """A comma inside a number that nobody quoted would be another number, and what is missing is not guessed."""
    problem, good = csv_file(tmp_path, f"user,at,total,note\n{row}\n\nada,,1,\n").lines()

    assert problem == Problem(2, f"the row has {cells} cells, and the header has 4")
    assert isinstance(good, Line)


def test_a_column_without_a_name_is_no_hindrance(tmp_path: Path) -> None:
    """Tables have one that were written with their index; its cells make rows different."""
    file = csv_file(tmp_path, ",user,at,total\n0,ada,,1\n1,ada,,1\n")
    assert len(set(ids(file.lines()))) == 2


def test_what_is_set_makes_other_events_and_how_metadata_is_read_does_not(tmp_path: Path) -> None:
    """--set and the column of the customer say what a row is; a mapping of metadata and a new column do not."""
    path = csv_file(tmp_path).path

    def made(columns: str, constants: str) -> list[str]:
        return ids(CsvFile(path, parse_mapping([columns], "--map"), parse_mapping([constants], "--set")).lines())

    who = "external_customer_id=user"
    before = made(who, "name=a")
    assert made(f"{who},metadata.n=total", "name=a") == before
    assert not set(before) & set(made(who, "name=b"))
    assert not set(before) & set(made("external_customer_id=total", "name=a"))
    header, *rows = CSV.splitlines()
    path.write_text("\n".join([f"{header},region", *(f"{row}," for row in rows), ""]))
    assert made(who, "name=a") == before


def test_a_last_line_that_may_be_half_written_is_held_back(tmp_path: Path) -> None:
    """It counts once it is whole, with what it says then; --complete sends it as it is."""
    path = tmp_path / "usage.csv"
    columns, constants = {"external_customer_id": "user", "metadata.n": "n"}, {"name": "call"}

    def found(text: str, *, is_complete: bool = False) -> list[Line | Problem]:
        path.write_text(text)
        file = CsvFile(path, columns, constants, is_complete=is_complete)
        file.check()
        return list(file.lines())

    first, half = found("user,n\nfa,1\nfa,12")
    assert isinstance(first, Line)
    assert isinstance(half, Problem)
    assert (half.line, "may be writing it still" in half.message) == (3, True)
    assert found("user,n\nfa,1\nfa,1234\n")[0] == first
    assert found("user,n\nfa,1\nfa,1234\n") == found("user,n\nfa,1\nfa,1234", is_complete=True)
    assert found("user,n\r\nfa,1\r\n")[0] == first
    assert found("user,n") == []


@pytest.mark.parametrize("cell", ["1,234.50", "050", "+5", ".5", "5.", "1 000", "12%", "1,5"])
def test_a_cell_that_looks_like_a_number_and_is_none_is_refused_unless_it_is_meant(tmp_path: Path, cell: str) -> None:
    """It would be text, which no meter adds up; the first ones are named. What is a number or plainly text is fine."""
    plain = "".join(f"u,,{text},\n" for text in ("5", " 50 ", "10.0.0.1", "2026-03-01", "a5"))
    file = csv_file(tmp_path, f'user,at,total,note\n{plain}' + f'u,,1,"{cell}"\n' * 7)

    with pytest.raises(GiveUp, match=r"nothing was sent") as raised:
        file.check()

    assert raised.value.exit_code == USAGE
    assert f"line 7, note: {cell!r}; line 8, note: {cell!r}; line 9" in str(raised.value)
    assert "; and 2 more. Write them as 1234.5" in str(raised.value)
    file.check(texts_meant=True)
    events = [line.event for line in file.lines() if isinstance(line, Line)]
    assert json.loads(events[-1])["metadata"]["note"] == cell


def test_a_value_for_all_lines_that_looks_like_a_number_is_refused_likewise(tmp_path: Path) -> None:
    """Whatever --set gives is looked at, too."""
    path = csv_file(tmp_path, "user\nada\n").path
    constants = parse_mapping(["name=call,metadata.zip=00123"], "--set")

    with pytest.raises(GiveUp, match=r"text, which no meter adds up: --set metadata.zip: '00123'\."):
        CsvFile(path, {"external_customer_id": "user"}, constants).check()


def test_blanks_around_a_number_are_nothing(tmp_path: Path) -> None:
    """' 50 ' is 50."""
    file = csv_file(tmp_path, "user,at,total,note\nu,, 50 ,\n")

    assert b'"tokens":50,' in b"".join(line.event for line in file.lines() if isinstance(line, Line))
    file.check()


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    """And not one that lacks columns."""
    with pytest.raises(GiveUp, match=r"usage\.csv is empty"):
        csv_file(tmp_path, "").check()


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
        ({"name": "note", "external_customer_id": "user"}, "has several columns note; give each a name"),
    ],
)
def test_a_mapping_fits_its_file(tmp_path: Path, columns: dict[str, str], complaint: str) -> None:
    """An event needs a name and a customer, and a column that is mapped must be there, once."""
    with pytest.raises(GiveUp, match=complaint):
        CsvFile(csv_file(tmp_path, CSV.replace("total", "note")).path, columns, {}).check()


def test_batches_keep_every_line_in_order_and_within_bounds() -> None:
    """No batch has more events or bytes than allowed, and together they are all the lines."""
    lines = [Line(number, b"x" * (number % 7 * 700_000)) for number in range(40)]

    groups = list(batches(lines, 5))

    assert [line for group in groups for line in group] == lines
    assert all(len(group) <= 5 for group in groups)
    assert all(len(group) == 1 or sum(len(line.event) for line in group) <= 4 * 1024 * 1024 for group in groups)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (b'user,total\nada,1\nbob,"2\ncid,3\n', "line 4 cannot be read: unexpected end of data"),
        (b"user,total\nada,1\nb\xf6b,2\n", "is not UTF-8; save it as such"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_not_begun(tmp_path: Path, broken: bytes, complaint: str) -> None:
    """A quote that nobody closes would swallow the rest, as one row that counts."""
    path = tmp_path / "usage.csv"
    path.write_bytes(broken)
    file = CsvFile(path, parse_mapping(["external_customer_id=user"], "--map"), parse_mapping(["name=call"], "--set"))

    with pytest.raises(GiveUp, match=f"{complaint}; nothing was sent"):
        file.check()
