"""The terminal: how answers are shown, and how typed values are read.

``show``, ``show_table`` and ``show_json`` write answers to stdout as a table, JSON or CSV (``Output``); ``note`` and
``progress_bar`` write to stderr. ``parse_filter``, ``parse_clause`` and ``parse_instant`` read the values of options.
Quantities arrive and leave as exact decimals; no number passes through a float.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from enum import StrEnum
from typing import Any

import msgspec

from deploy.errors import USAGE, GiveUp
from meters import exact
from meters.event import JSON_NUMBER

# Typed values. Filters are ``--where model=gpt-4 --where 'tokens>=100'``; all of them must hold.
#
#     =  !=  >  >=  <  <=      compare            ~  !~      contains, does not contain
#
# A value that reads as a JSON number, true or false has that type. Quotes make it text (``--where 'zip="00123"'``),
# and so do leading zeros. Numbers in other notations (``+5``, ``5.``) are refused, because it is unclear what is
# meant.
#
# Times are ISO 8601, in UTC unless they state a zone. One name may refer to several objects.

OPERATORS = {"=": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "~": "like", "!~": "not_like"}
CLAUSE = re.compile(r"\s*(?P<property>[^=!<>~]+?)\s*(?P<operator>!=|>=|<=|!~|=|>|<|~)\s*(?P<value>.*?)\s*", re.DOTALL)
LIKE_A_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
CONTAINS = ("~", "!~")  # look at a number as it is written, which JSON keeps of one without an exponent


def parse_clause(text: str) -> dict[str, Any]:
    """One clause in the API's form. Raises GiveUp."""
    found = CLAUSE.fullmatch(text)
    if not found:
        raise GiveUp(f"--where takes PROPERTY=VALUE (or one of {' '.join(OPERATORS)}), and not {text!r}", USAGE)
    return {
        "property": found["property"],
        "operator": OPERATORS[found["operator"]],
        "value": _value(found["value"], found["operator"]),
    }


def parse_filter(filter: str | None, where: list[str]) -> dict[str, Any]:
    """A filter from JSON, from clauses, or from neither, which matches everything. Raises GiveUp."""
    if not filter:
        return {"conjunction": "and", "clauses": [parse_clause(text) for text in where]}
    if where:
        raise GiveUp("--filter and --where exclude each other; put all of it into one", USAGE)
    try:
        parsed = exact.decode(filter)
    except ValueError as error:
        raise GiveUp(f"--filter is no JSON: {error}", USAGE) from None
    if not isinstance(parsed, dict):
        raise GiveUp('--filter takes an object such as {"conjunction": "and", "clauses": []}', USAGE)
    return parsed


def parse_instant(text: str, option: str, zone: tzinfo = UTC) -> datetime:
    """The instant that was given for an option; ``zone`` is for one that does not say. Raises GiveUp."""
    try:
        given = datetime.fromisoformat(text)
        instant = given if given.tzinfo else given.replace(tzinfo=zone)
        instant.astimezone(UTC)  # the first and the last hours of all have no time in UTC
    except (ValueError, OverflowError):
        raise GiveUp(f"{option} takes a time such as 2026-03-01T00:00:00Z, and not {text!r}", USAGE) from None
    return instant


def meters_called(meters: Sequence[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """The meters of this id or name; archived ones only where there is no other."""
    found = [meter for meter in meters if wanted in (meter["id"], meter["name"])]
    return [meter for meter in found if not meter.get("archived_at")] or found


def ids(things: Sequence[dict[str, Any]]) -> str:
    """The ids of things of one name, to choose from."""
    return ", ".join(str(one["id"]) for one in things)


def _value(text: str, operator: str) -> str | bool | int | Decimal:
    if text in ("true", "false"):
        return text == "true"
    has_exponent = "e" in text.lower()
    if JSON_NUMBER.fullmatch(text) and not (has_exponent and operator in CONTAINS):
        return Decimal(text) if "." in text or has_exponent else int(text)
    if LIKE_A_NUMBER.fullmatch(text) and not text.isdigit() and operator not in CONTAINS:
        raise GiveUp(f"--where: {text} is no number for JSON; write it as 5, 0.5 or 1e3, or a text in quotes", USAGE)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


# Output.

CHART_WIDTH_MAX = 100  # columns of a table with bars: wider ones say no more
ASCII_BAR = 40  # columns of the longest bar where there are no blocks to draw it with
UNLIMITED = 10_000  # columns of what is no terminal; whoever reads there cuts for himself
READABLE = 8  # columns in which a text can still be read when it is folded
BORDER = 3  # columns that a table needs between two of its own
BLANKS_AND_JOINERS = "\u00a0\u202f\u200c\u200d"  # as names and numbers have them
FORMULA = ("=", "+", "-", "@", "\t", "\r")
SIGNED = re.compile(r"[+-]\d[\d,]*(\.\d+)?|0|")
FRACTION = re.compile(r"(?<=T\d\d:\d\d:\d\d)\.\d+")


class Output(StrEnum):
    """The forms of an answer."""

    table = "table"
    json = "json"
    csv = "csv"
    html = "html"  # a page; reconcile alone has one


def note(message: str) -> None:
    """Tell a person something that is not part of the answer."""
    print(message, file=sys.stderr, flush=True)


def require_stdout() -> None:
    """Raise GiveUp where nobody would see an answer, because standard output was closed."""
    if sys.stdout is None:
        raise GiveUp("the answer cannot be written: standard output is closed")


def text(value: object) -> str:
    """A value as a cell: plain decimals with digits grouped, nothing for None."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int() | Decimal():
            return f"{value:,f}" if isinstance(value, Decimal) else f"{value:,}"
        case str():
            return value
        case _:
            return as_json(value)


def counted(number: int, one: str, many: str) -> str:
    """A number with its noun: ``1 line``, ``1,200 lines``."""
    return f"{number:,} {one if number == 1 else many}"


def as_json(value: object) -> str:
    """JSON with every Decimal as the number it is."""
    return msgspec.json.Encoder(decimal_format="number").encode(value).decode()


def harmless(text: str) -> str:
    """What strangers wrote must not steer a terminal."""
    return "".join(
        character if character.isprintable() or character in BLANKS_AND_JOINERS else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def show_json(text: str) -> None:
    """Print JSON; on a terminal what could steer it is escaped, which is the same JSON."""
    if sys.stdout.isatty():
        text = "".join(one if one == "\n" or harmless(one) == one else json.dumps(one)[1:-1] for one in text)
    print(text)


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], output: Output) -> None:
    """Print rows: JSON with all that is known, CSV with the columns, a table with those that are not empty."""
    require_stdout()
    match output:
        case Output.json:
            show_json(msgspec.json.format(as_json(list(rows)), indent=2))
        case Output.csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([_plain(row.get(column)) for column in columns] for row in rows)
        case Output.table:
            filled = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
            show_table(rows, filled or columns)


def show_one(row: Mapping[str, Any], output: Output) -> None:
    """Print one thing with all that is known of it."""
    require_stdout()
    if output is Output.json:
        show_json(msgspec.json.format(as_json(row), indent=2))
    elif output is Output.csv:
        show([row], list(row), output)
    else:
        show_table([{"field": name, "value": value} for name, value in row.items()], ["field", "value"])


def show_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str = "", chart: str = "") -> None:
    """Print a table; ``chart`` names a column to be drawn as bars as well."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    require_stdout()
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    numeric = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    whole = [is_numeric or _is_whole(column) for column, is_numeric in zip(columns, numeric, strict=True)]
    console = Console(highlight=False, markup=False)
    console.width = _width(columns, cells, whole, console.width)
    table = Table(title=harmless(title) or None, title_justify="left", header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(
            column, justify="right" if numeric[place] else "left", overflow="fold", no_wrap=whole[place]
        )
    largest = max((Decimal(row[chart] or 0) for row in rows), default=Decimal(0)) if chart else Decimal(0)
    largest = largest if largest > 0 else Decimal(1)
    if chart:
        table.add_column("", ratio=1)
        table.width = min(console.width, CHART_WIDTH_MAX)
    for row, shown in zip(rows, cells, strict=True):
        share = float(Decimal(row[chart] or 0) / largest) if chart else 0.0
        bar = "#" * int(share * ASCII_BAR) if console.options.ascii_only else Bar(1.0, 0, share)
        table.add_row(*shown, *([bar] if chart else []))
    console.print(table)


def _is_whole(column: str) -> bool:
    """Whether the column holds what people copy or read at a glance: ids and times."""
    return column == "id" or column.endswith("_id") or _is_time(column)


def _is_time(column: str) -> bool:
    return column in ("at", "timestamp") or column.endswith("_at")


def _is_number(value: object) -> bool:
    """Whether a cell holds a number or nothing; one that shows its sign comes as text."""
    return SIGNED.fullmatch(value) is not None if isinstance(value, str) else isinstance(value, int | Decimal | None)


def _cell(column: str, value: object) -> str:
    """A value as a table shows it: times to the second."""
    return harmless(FRACTION.sub("", text(value)) if _is_time(column) else text(value))


def _width(columns: Sequence[str], cells: Sequence[Sequence[str]], whole: Sequence[bool], terminal: int) -> int:
    """How wide a table may be: as the terminal, unless ids, times and numbers would be cut to pieces there."""
    if not sys.stdout.isatty():
        return UNLIMITED
    from rich.cells import cell_len

    needed = 1
    for place, column in enumerate(columns):
        longest = max([cell_len(column), *(cell_len(row[place]) for row in cells)])
        needed += BORDER + (longest if whole[place] else min(longest, READABLE))
    return max(terminal, needed)


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr; nothing where nobody watches.

    Gives the function that moves it on by a number of steps; ``total`` None means the end is unknown.
    """
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.advance(task, steps)


def _plain(value: object) -> object:
    """A value as a cell of CSV. What strangers wrote must not be a formula in a spreadsheet, nor steer a terminal."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    text = as_json(value) if isinstance(value, Mapping | list | bool) else value
    if not isinstance(text, str):
        return text
    mark = "'" if text.startswith(FORMULA) and not SIGNED.fullmatch(text) else ""
    text = mark + text.replace("\r", "\n")  # the writer quotes no CR, and what follows would be a row of its own
    return harmless(text) if sys.stdout.isatty() else text
