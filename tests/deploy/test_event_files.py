"""Files become events: bytes kept, ids given, lines known."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from deploy import stable_ids
from deploy.event_files import CsvFile, parse_mapping, read_ndjson
from deploy.giving_up import USAGE, GiveUp
from deploy.sending import Line, Problem, batches
from deploy.stable_ids import StableIds
from meters.exact_json import Token
from meters.timestamp import parse_timestamp

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
    monkeypatch.setattr(stable_ids, "CACHE_KIB", 8)
    with StableIds() as given:
        rounds = [[given.next(b"%d" % number) for number in range(3000)] for _ in range(2)]

    assert {id.partition(":")[2] for id in rounds[0]} == {"1"}
    assert rounds[1] == [id.replace(":1", ":2") for id in rounds[0]]


@pytest.mark.parametrize("line", [b"{", b"[]", b'"a"', b'{"a":NaN}', b"\xff\xfe"])
def test_a_line_that_is_no_event_is_named_by_its_number(line: bytes) -> None:
    """A bad line is reported with its number, and the next one is read all the same."""
    bad, good = read_ndjson(io.BytesIO(line + b'\n{"name":"a"}\n'))

    assert isinstance(bad, Problem)
    assert bad.line == 1
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


def test_a_file_that_grew_or_was_mended_repeats_what_was_there(tmp_path: Path) -> None:
    """Rows keep their ids whatever stands before, behind and between them; equal ones are counted through."""
    rows = ["ada,1,1,", "ada,1,1,", "bob,2,2,"]
    header = "user,at,total,note"
    text, grown = ("\n".join([header, *lines]) + "\n" for lines in (rows, ["new,1,1,", rows[0], *rows[:2], "bob,2,3,"]))

    first, second = ids(csv_file(tmp_path, text).lines()), ids(csv_file(tmp_path, grown).lines())

    assert len(set(first)) == 3
    assert second[1:3] == first[:2]
    assert not {second[0], *second[3:]} & set(first)


def test_cells_beyond_the_last_column_are_no_hindrance(tmp_path: Path) -> None:
    """Beside a column without a name, too, as tables have that were written with their index."""
    file = csv_file(tmp_path, ",user,at,total\n0,ada,1,1,extra,more\n1,ada,1,1,\n")
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
    path.write_text("\n".join([f"{header},region", *(f"{row}," for row in rows)]))
    assert made(who, "name=a") == before


@pytest.mark.parametrize("cell", ["1,234.50", "050", "+5", ".5", "5.", "1 000", "12%", "1,5"])
def test_a_cell_that_looks_like_a_number_and_is_none_is_told(tmp_path: Path, cell: str) -> None:
    """It is text, which no meter adds up, and the first one is named; what is a number or plainly text is not."""
    plain = "".join(f"u,1,{text},\n" for text in ("5", "10.0.0.1", "2026-03-01", "a5"))
    file = csv_file(tmp_path, f'user,at,total,note\n{plain}u,1,1,"{cell}"\nu,1,1,"{cell}"\n')

    events = [line.event for line in file.lines() if isinstance(line, Line)]

    assert json.loads(events[-1])["metadata"]["note"] == cell
    assert (file.texts.count, file.texts.first) == (2, f"line 6, note: {cell!r}")


def test_blanks_around_a_number_are_nothing(tmp_path: Path) -> None:
    """' 50 ' is 50."""
    file = csv_file(tmp_path, "user,at,total,note\nu,1, 50 ,\n")

    assert b'"tokens":50,' in b"".join(line.event for line in file.lines() if isinstance(line, Line))
    assert file.texts.count == 0


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
    """A quote that nobody closes would swallow the rest, as one row that counts."""
    path = tmp_path / "usage.csv"
    path.write_bytes(broken)
    file = CsvFile(path, parse_mapping(["external_customer_id=user"], "--map"), parse_mapping(["name=call"], "--set"))

    with pytest.raises(GiveUp, match="nothing was sent"):
        file.check()
