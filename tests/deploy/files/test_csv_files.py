"""CSV files become events: what a file is, what its columns hold, and what is refused before anything is sent."""

import codecs
import io
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from deploy.errors import USAGE, GiveUp
from deploy.files.csv_files import CsvFile, CsvForm, parse_mapping, rereadable
from deploy.files.sending import Line, Problem
from meters.exact import Token
from meters.timestamps import parse_timestamp

CSV = "user,at,total,note\nada,2026-03-01 10:00:00.1234567,812,\nbob,1767225600,0.10,true\ncid,never,1,00123\n"
COLUMNS = [
    "external_customer_id=user,timestamp=at", "metadata.tokens=total,metadata.note=note", "metadata._cost.amount=total",
]


def table(
    content: str | bytes = CSV, columns: list[str] = COLUMNS, constants: str = "name=call", **form: str
) -> CsvFile:
    """A file of this content, with its columns mapped."""
    source = io.BytesIO(content.encode() if isinstance(content, str) else content)
    mapping, fixed = parse_mapping(columns, "--map"), parse_mapping([constants], "--set")
    return CsvFile(source, "usage.csv", mapping, fixed, CsvForm(**form).check())


def found(file: CsvFile) -> list[Line | Problem]:
    """What the rows become."""
    return list(file.lines(file.survey()))


def events(file: CsvFile) -> list[dict[str, object]]:
    """The events without their ids; every row is one."""
    lines = found(file)
    assert all(isinstance(line, Line) for line in lines), lines
    read = [json.loads(line.event) for line in lines if isinstance(line, Line)]
    return [{field: value for field, value in event.items() if field != "external_id"} for event in read]


def ids(lines: Iterable[Line | Problem]) -> list[str]:
    """The external_id of each event."""
    return [json.loads(line.event)["external_id"] for line in lines if isinstance(line, Line)]


def refusal(file: CsvFile, allowed: frozenset[str] = frozenset()) -> str:
    """What is said instead of sending anything."""
    with pytest.raises(GiveUp) as raised:
        file.survey(allowed).check(allowed)
    assert raised.value.exit_code == USAGE
    return str(raised.value)


def only(column: str, *cells: str, field: str = "metadata.n", **form: str) -> CsvFile:
    """A file with one mapped column beside the customer's."""
    rows = "".join(f"ada;{cell}\n" for cell in cells)
    return table(f"user;{column}\n{rows}", [f"external_customer_id=user,{field}={column}"], **form)


def test_a_row_becomes_the_event_its_mapping_says() -> None:
    """Numbers keep their digits, empty cells are left out, a time without offset is UTC, a made id is there."""
    first, second, third = found(table())

    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert json.loads(first.event) == {
        "external_id": ids([first])[0], "external_customer_id": "ada", "name": "call",
        "timestamp": "2026-03-01T10:00:00.123456+00:00", "metadata": {"tokens": 812, "_cost": {"amount": 812}},
    }
    assert b'"tokens":0.10' in second.event
    assert b'"note":true' in second.event
    assert b'"timestamp":"1767225600"' in second.event
    assert isinstance(third, Problem)
    assert (third.line, "timestamp: 'never' is no ISO 8601 time; give --time-format" in third.message) == (4, True)


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
def test_a_time_as_a_number_is_sent_as_the_server_takes_it(cell: str, sent: str) -> None:
    """An exponent is worked out, since no time has one in text; the server reads what is sent."""
    (line,) = found(table(f"user,at,total,note\nada,{cell},1,\n"))

    assert isinstance(line, Line)
    assert json.loads(line.event)["timestamp"] == sent
    assert parse_timestamp(sent) == parse_timestamp(Token(cell))


@pytest.mark.parametrize("cell", ["1.7e9", "1.76723E+09", "1e999999999999999999999", "1e-999999999", "0e5"])
def test_a_time_whose_digits_are_lost_is_named(cell: str) -> None:
    """What a spreadsheet shortened could be off by hours: its line is named instead of guessed."""
    problem, good = found(table(f"user,at,total,note\nada,{cell},1,\nbob,1767225600,1,\n"))

    message = f"timestamp: {cell!r} does not say every digit of its seconds; write it without an exponent"
    assert problem == Problem(2, message)
    assert isinstance(good, Line)


@pytest.mark.parametrize("cell", ["20260301", "2026", "0", "20260301.0", "99999999"])
def test_a_day_without_dashes_is_named(cell: str) -> None:
    """As seconds it would be a time in the 1970s, which nobody means."""
    problem, good = found(table(f"user,at,total,note\nada,{cell},1,\nbob,100000000,1,\n"))

    message = f"timestamp: {cell!r} is no time; write a day as 2026-03-01, or the seconds since 1970"
    assert problem == Problem(2, message)
    assert isinstance(good, Line)


def test_a_column_with_a_comma_is_quoted() -> None:
    """Each option is a line of CSV; what is none is refused."""
    options = ['external_customer_id=user, "metadata.net=total, net"', "metadata.x=a=b"]

    assert parse_mapping(options, "--map") == {
        "external_customer_id": "user", "metadata.net": "total, net", "metadata.x": "a=b",
    }
    with pytest.raises(GiveUp, match="--map is read as a line of CSV"):
        parse_mapping(['"metadata.net=total, net'], "--map")


def test_a_file_that_grew_or_was_mended_repeats_what_was_there() -> None:
    """Rows keep their ids whatever stands before, behind and between them; equal ones are counted through."""
    rows = ["ada,,1,", "ada,,1,", "bob,,2,"]
    header = "user,at,total,note"
    text, grown = ("\n".join([header, *lines]) + "\n" for lines in (rows, ["new,,1,", rows[0], *rows[:2], "bob,,3,"]))

    first, second = ids(found(table(text))), ids(found(table(grown)))

    assert len(set(first)) == 3
    assert second[1:3] == first[:2]
    assert not {second[0], *second[3:]} & set(first)


@pytest.mark.parametrize(("row", "cells"), [("ada,1,1,234,", 5), ("ada", 1), ("ada,1,1", 3)])
def test_a_row_with_cells_too_many_or_too_few_is_named(row: str, cells: int) -> None:
    """A comma inside a number that nobody quoted would be another number, and what is missing is not guessed."""
    problem, good = found(table(f"user,at,total,note\n{row}\n\nada,,1,\n"))

    assert problem == Problem(2, f"the row has {cells} cells, and the header has 4")
    assert isinstance(good, Line)


def test_a_column_without_a_name_is_no_hindrance() -> None:
    """Tables have one that were written with their index; its cells make rows different."""
    columns = ["external_customer_id=user,metadata.tokens=total"]
    file = table(",user,at,total\n0,ada,,1\n1,ada,,1\n", columns)
    assert len(set(ids(found(file)))) == 2


def test_what_is_set_makes_other_events_and_how_metadata_is_read_does_not() -> None:
    """--set and the column of the customer say what a row is; a mapping of metadata and a new column do not."""
    text = CSV

    def made(columns: str, constants: str) -> list[str]:
        return ids(found(table(text, [columns], constants)))

    who = "external_customer_id=user"
    before = made(who, "name=a")
    assert made(f"{who},metadata.n=total", "name=a") == before
    assert not set(before) & set(made(who, "name=b"))
    assert not set(before) & set(made("external_customer_id=total", "name=a"))
    header, *rows = CSV.splitlines()
    text = "\n".join([f"{header},region", *(f"{row}," for row in rows), ""])
    assert made(who, "name=a") == before


def test_a_last_line_that_may_be_half_written_is_held_back() -> None:
    """It counts once it is whole, with what it says then; --complete sends it as it is."""
    columns, constants = {"external_customer_id": "user", "metadata.n": "n"}, {"name": "call"}

    def read(text: str, *, is_complete: bool = False, encoding: str = "utf-8") -> list[Line | Problem]:
        return found(CsvFile(io.BytesIO(text.encode(encoding)), "f", columns, constants, is_complete=is_complete))

    first, half = read("user,n\nfa,1\nfa,12")
    assert isinstance(first, Line)
    assert isinstance(half, Problem)
    assert (half.line, "may be writing it still" in half.message) == (3, True)
    assert read("user,n\nfa,1\nfa,1234\n")[0] == first
    assert read("user,n\nfa,1\nfa,1234\n") == read("user,n\nfa,1\nfa,1234", is_complete=True)
    assert read("user,n\r\nfa,1\r\n")[0] == first
    assert read("user,n") == []
    assert read("user,n\nfa,1\nfa,1234\n", encoding="utf-16") == read("user,n\nfa,1\nfa,1234\n")


def test_rows_that_came_after_the_survey_wait_for_the_next_import() -> None:
    """Nobody looked at their cells; the row before them is whole by now."""
    source = io.BytesIO(b"user,n\nfa,1\nfa,12")
    file = CsvFile(source, "f", {"external_customer_id": "user", "metadata.n": "n"}, {"name": "call"})
    survey = file.survey()
    source.seek(0, os.SEEK_END)
    source.write(b"34\nfa,$5\n")

    counted = [json.loads(line.event)["metadata"]["n"] for line in file.lines(survey) if isinstance(line, Line)]
    assert counted == [1, 1234]


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
        ({"name": "kind", "external_customer_id": "user"}, "has no column kind; separated by ',' it has user, at"),
        ({"name": "note", "external_customer_id": "user"}, "has several columns note; give each a name"),
    ],
)
def test_a_mapping_fits_its_file(columns: dict[str, str], complaint: str) -> None:
    """An event needs a name and a customer, and a column that is mapped must be there, once."""
    with pytest.raises(GiveUp, match=complaint):
        CsvFile(io.BytesIO(CSV.replace("total", "note").encode()), "usage.csv", columns, {}).survey()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (b'user,total\nada,1\nbob,"2\ncid,3\n', "line 4 cannot be read: unexpected end of data"),
        (b"user,total\nada,1\nb\xf6b,2\n", "line 3: byte 2 of the line is not UTF-8; save the file as such"),
        ("user,total\nada,1\n".encode("utf-16") + b"x", "is not UTF-16: truncated data"),
        (b"PK\x03\x04", "usage.csv is a workbook or another zip archive; save the table as CSV first"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_not_begun(broken: bytes, complaint: str) -> None:
    """A quote that nobody closes would swallow the rest, as one row that counts."""
    assert complaint in refusal(table(broken, ["external_customer_id=user"]))


# What a column holds. Nothing may count as nothing without a word.

MIXED = ["$5", "(5)", "5 kB", "n/a", "\u22125", "1\u2019000", "$7", "-"]


def test_cells_that_are_no_numbers_among_numbers_are_counted_and_refused() -> None:
    """They would be text, which no meter adds up; who means text says so for the column."""
    file = only("total", *map(str, range(10)), *MIXED)

    said = refusal(file)
    assert "total -> metadata.n: 8 of 18 cells are no number (line 12 '$5', line 13 '(5)', line 14 '5 kB'," in said
    assert said.endswith("or give --allow-text total if text is meant; nothing was sent")
    allowed = frozenset({"total"})
    file.survey(allowed).check(allowed)
    assert [event["metadata"] for event in events(file)][-8:] == [{"n": cell} for cell in MIXED]


ALMOST = [
    "1,234.50", "050", "+5", ".5", "5.", "1 000", "12%", "1,5", "$5", "5 EUR", "(5)", "(1,234)", "\u22125",
    "1\u2019000", "1\u00a0000,5", "-$5",
]  # fmt: skip


@pytest.mark.parametrize("cell", ALMOST)
def test_a_column_of_what_looks_like_numbers_and_is_none_is_refused(cell: str) -> None:
    """Also where no cell of the column is a number."""
    file = only("total", cell, cell)

    assert "total -> metadata.n: 2 of 2 cells are no number (line 2" in refusal(file)
    file.survey(frozenset({"total"})).check(frozenset({"total"}))


@pytest.mark.parametrize("cells", [
    ["gpt-4", "10.0.0.1", "2026-03-01", "a5"], ["true", "false"], ["5", " 50 ", "", "  ", "-1e3"], ["", ""], ["5 kB"],
])
def test_a_column_of_one_kind_is_what_it_is(cells: list[str]) -> None:
    """Plain text, booleans, or numbers with blanks around and cells left empty."""
    only("total", *cells).survey().check()


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["5", "true"], "1 of 2 cells is no number"),
        (["5", "gpt-4"], "1 of 2 cells is no number"),
        (["00123", "a5"], "2 of 2 cells are no number"),
    ],
)
def test_a_column_of_several_kinds_needs_a_word(cells: list[str], words: str) -> None:
    """A meter would pass over some of it."""
    assert words in refusal(only("total", *cells))


def test_several_columns_are_named_with_their_options() -> None:
    """The way on can be copied; a name with a blank in it is quoted."""
    file = table("user,in put,out\nada,5,$6\nada,x,7\n", ["external_customer_id=user,metadata.a=in put,metadata.b=out"])

    said = refusal(file)
    assert "in put -> metadata.a: 1 of 2 cells is no number (line 3 'x'); out -> metadata.b: 1 of 2" in said
    assert "or give --allow-text 'in put' --allow-text out if text is meant" in said
    assert "out -> metadata.b: 1 of 2" in refusal(file, frozenset({"in put"}))
    assert "--allow-text: no column Out is mapped" in refusal(file, frozenset({"Out"}))


def test_a_value_for_all_lines_that_looks_like_a_number_is_refused_likewise() -> None:
    """Whatever --set gives is looked at, too."""
    file = table("user\nada\n", ["external_customer_id=user"], "name=call,metadata.zip=00123")

    assert "--set metadata.zip: 1 of 1 cell is no number ('00123')" in refusal(file)
    file.survey(frozenset({"metadata.zip"})).check(frozenset({"metadata.zip"}))


def test_blanks_around_a_number_are_nothing() -> None:
    """' 50 ' is 50, and blanks alone are an empty cell."""
    assert [event.get("metadata") for event in events(only("total", " 50 ", "  "))] == [{"n": 50}, None]


def test_an_empty_file_is_called_empty() -> None:
    """And not one that lacks columns."""
    assert "usage.csv is empty" in refusal(table(""))


def test_a_file_of_json_is_sent_to_its_command() -> None:
    """The columns that are missing would say little."""
    assert "goes to `meterstream events send`" in refusal(table('{"name":"call"}\n', ["external_customer_id=user"]))


def test_the_report_has_a_line_for_each_column() -> None:
    """Rows, encoding and delimiter; of each column what it holds, how many cells are empty, and the first time."""
    text = "user;at;total;note\nada;2026-03-01 10:00;5;x\nbob;never;;y\nbob;;1;z\nodd\n"
    report = list(table(text).survey().report())

    assert report == [
        "usage.csv: 4 rows, 1 with too many or too few cells, in UTF-8, separated by ';'",
        "  user -> external_customer_id: 3 texts",
        "  at -> timestamp: 1 time, the first 2026-03-01 10:00:00+00:00; "
        "1 of 2 cells is no time (line 3 'never'), 1 empty",
        "  total -> metadata.tokens: 2 numbers, 1 empty",
        "  note -> metadata.note: 3 texts",
        "  total -> metadata._cost.amount: 2 numbers, 1 empty",
    ]


# What a file is: recognized where it is certain, chosen where it is not.

GERMAN = "user;at;total\nj\u00f6rg;25.11.2026 08:15;1,5\nada;26.11.2026;20\n"
READ = [
    {"name": "call", "external_customer_id": user, "timestamp": f"2026-11-{clock}:00+00:00", "metadata": {"n": number}}
    for user, clock, number in (("j\u00f6rg", "25T08:15", 1.5), ("ada", "26T00:00", 20))
]
GERMAN_COLUMNS = ["external_customer_id=user,timestamp=at,metadata.n=total"]
DAY_FIRST_COMMA = {"time_format": "day-first", "decimal": ","}


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_the_delimiter_is_recognized_by_the_mapped_columns(delimiter: str) -> None:
    """The one with which all of them are there; a comma in a quoted cell separates nothing."""
    text = GERMAN.replace("1,5", '"1,5"').replace(";", delimiter)
    assert events(table(text, GERMAN_COLUMNS, **DAY_FIRST_COMMA)) == READ


@pytest.mark.parametrize(("content", "form"), [
    (GERMAN.replace("user;at;total", '"user";"at";"total"'), {}),
    (GERMAN.encode("utf-16"), {}),
    (GERMAN.encode("utf-16-le"), {}),
    (codecs.BOM_UTF8 + GERMAN.encode(), {}),
    (GERMAN.encode("latin-1"), {"encoding": "latin-1"}),
    (GERMAN.encode("cp1252"), {"encoding": "windows-1252"}),
    (codecs.BOM_UTF16_LE + GERMAN.encode("utf-16-le"), {"encoding": "utf-16-le"}),
    (GERMAN.replace(";", "\t").encode("utf-16"), {"delimiter": "tab"}),
    (GERMAN.replace(";", "~").encode(), {"delimiter": "~"}),
    (GERMAN.replace("25.11.", "11/25/").replace("26.11.", "11/26/").encode(), {"time_format": "month-first"}),
    (GERMAN.replace("26.11.2026", "26.11.2026 00:00").encode(), {"time_format": "%d.%m.%Y %H:%M"}),
    (GERMAN.replace("25.11.2026 08:15", "46351,34375").replace("26.11.2026", "46352"), {"time_format": "excel"}),
], ids=str)
def test_what_people_really_have_is_read(content: str | bytes, form: dict[str, str]) -> None:
    """The same two rows, whoever wrote them; their ids are those of their cells."""
    assert events(table(content, GERMAN_COLUMNS, **(DAY_FIRST_COMMA | form))) == READ


def test_another_encoding_or_reading_repeats_the_ids() -> None:
    """Another reading of a row that was counted is a conflict, and not more usage."""
    first = ids(found(table(GERMAN, GERMAN_COLUMNS, **DAY_FIRST_COMMA)))
    again = table(GERMAN.encode("utf-16"), GERMAN_COLUMNS, decimal=",", time_format="%d.%m.%Y %H:%M", delimiter=";")

    assert ids(found(again))[:1] == first[:1]


@pytest.mark.parametrize(("form", "complaint"), [
    ({}, "give --time-format day-first"),
    ({"time_format": "day-first"}, "give --decimal , if the comma is the decimal sign"),
    (DAY_FIRST_COMMA | {"delimiter": ","}, "has no column at, total, user; separated by ',' it has user;at;total"),
    (DAY_FIRST_COMMA | {"time_format": "month-first"}, "'25.11.2026 08:15' does not fit --time-format month-first"),
    (DAY_FIRST_COMMA | {"time_format": "excel"}, "'25.11.2026 08:15' does not fit --time-format excel"),
    (DAY_FIRST_COMMA | {"delimiter": ";;"}, "--delimiter takes one character, or tab"),
    ({"decimal": "'"}, "--decimal takes '.' or ','"),
    ({"time_format": "german"}, "--time-format takes iso, excel, day-first, month-first, or a pattern with a year"),
    ({"time_format": "%d.%m. %H:%M"}, "a pattern with a year such as"),
    ({"time_format": "%Y %Q"}, "a pattern with a year such as"),
    ({"encoding": "utf-17"}, "is no encoding of text"),
], ids=str)
def test_an_error_names_what_was_seen_and_the_option(form: dict[str, str], complaint: str) -> None:
    """Nothing is guessed: the file is refused with the way on."""
    with pytest.raises(GiveUp) as raised:
        table(GERMAN, GERMAN_COLUMNS, **form).survey().check()
    assert complaint in str(raised.value)


def test_a_file_in_a_legacy_encoding_is_shown_as_it_would_read() -> None:
    """The person decides whether that is right."""
    said = refusal(table(GERMAN.encode("latin-1"), GERMAN_COLUMNS))
    assert "usage.csv, line 2: byte 2 of the line is not UTF-8" in said
    assert "(with --encoding windows-1252 it would read 'j\u00f6rg;25.11.20')" in said


def test_both_ways_to_read_a_day_are_offered() -> None:
    """5.11. may be in May."""
    assert "the day or the month may come first: give --time-format day-first or month-first" in refusal(
        only("at", "5/11/2026", field="timestamp")
    )


def test_one_cell_that_does_not_fit_makes_the_format_doubtful() -> None:
    """25/11 shows that 5/11 is not in May; read by the month, it would count in the wrong month."""
    said = refusal(only("at", "5/11/2026", "25/11/2026", field="timestamp", time_format="month-first"))
    assert "at -> timestamp: 1 of 2 cells is no time (line 3 '25/11/2026')" in said


@pytest.mark.parametrize(("cell", "time"), [
    ("46351.34375", "2026-11-25T08:15:00+00:00"),
    ("46351", "2026-11-25T00:00:00+00:00"),
    ("61", "1900-03-01T00:00:00+00:00"),
    ("46351.34028", "2026-11-25T08:10:00+00:00"),  # five decimals are all that a cell shows
    ("46351.340277777778", "2026-11-25T08:10:00+00:00"),
    ("46351.340283564815", "2026-11-25T08:10:00.500000+00:00"),
])
def test_a_spreadsheets_time_is_read_on_request(cell: str, time: str) -> None:
    """To the second where no more is in its digits, else to the millisecond."""
    (event,) = events(only("at", cell, field="timestamp", time_format="excel"))
    assert event["timestamp"] == time


@pytest.mark.parametrize("cell", ["60", "2958466", "1767225600", "-5", "4e4", "2026-11-25", "x"])
def test_what_no_spreadsheet_writes_is_refused(cell: str) -> None:
    """Before March 1900 spreadsheets disagree about the day."""
    assert "does not fit --time-format excel" in refusal(only("at", cell, field="timestamp", time_format="excel"))


def test_a_spreadsheets_time_without_the_option_is_explained() -> None:
    """It would be half a day in January 1970."""
    said = refusal(only("at", "46351.34375", field="timestamp"))
    assert "'46351.34375' is no time (a spreadsheet's 2026-11-25 08:15:00?); if so, give --time-format excel" in said


@pytest.mark.parametrize(("cell", "time"), [
    ("5.11.2026", "2026-11-05T00:00:00+00:00"),
    ("05.11.2026 8:15", "2026-11-05T08:15:00+00:00"),
    ("05/11/2026, 08:15:30.25", "2026-11-05T08:15:30.250000+00:00"),
    ("05-11-2026 12:15 AM", "2026-11-05T00:15:00+00:00"),
    ("05/11/2026 12:15pm", "2026-11-05T12:15:00+00:00"),
    ("05.11.2026 08:15 +01:00", "2026-11-05T08:15:00+01:00"),
])
def test_a_day_first_is_read_with_every_clock(cell: str, time: str) -> None:
    """With or without a time, seconds, halves of the day and an offset."""
    (event,) = events(only("at", cell, field="timestamp", time_format="day-first"))
    assert event["timestamp"] == time


@pytest.mark.parametrize("cell", ["31.02.2026", "5.11.26", "5/11.2026", "5.11.2026 25:00", "5.11.2026 13:00 pm"])
def test_a_day_that_is_none_is_refused(cell: str) -> None:
    """And not moved to another."""
    file = only("at", cell, field="timestamp", time_format="day-first")
    assert "does not fit --time-format day-first" in refusal(file)


@pytest.mark.parametrize("cell", ["1.234,5", "1.5", "1,234,567"])
def test_digits_are_never_grouped(cell: str) -> None:
    """With a decimal comma, 1.234 is 1234 for some and a mistake for others."""
    assert "1 of 1 cell is no number" in refusal(only("total", cell, decimal=","))


def test_a_pipe_is_copied_and_read_twice(tmp_path: Path) -> None:
    """A named pipe gives its bytes once, and the rows are surveyed before they are sent."""
    os.mkfifo(path := tmp_path / "pipe")
    writer = threading.Thread(target=path.write_text, args=(CSV,))
    writer.start()
    with rereadable(path) as source:
        writer.join()
        file = CsvFile(source, "pipe", parse_mapping(COLUMNS, "--map"), {"name": "call"})
        survey = file.survey()
        assert (survey.rows, len(ids(file.lines(survey)))) == (3, 2)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(GiveUp, match=r"cannot read .*no\.csv: No such file"), rereadable(tmp_path / "no.csv"):
        pass
