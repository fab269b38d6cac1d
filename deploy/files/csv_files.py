"""CSV files of events: what the file is, what its columns hold, and an event for each row.

``CsvForm`` says how the file is written: encoding, delimiter, decimal sign and times. The encoding and the delimiter
are recognized where the content leaves no doubt. Decimal commas and times with the day or month first are read only on
request, because the same text may mean another number or another day. ``CsvFile.survey`` reads the whole file once and
returns a ``Survey`` that says, column by column, what will be sent; ``Survey.check`` refuses what a meter would pass
over in silence. ``CsvFile.lines`` reads the file again and makes the events. Neither holds more than one row.
"""

import csv
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO

import msgspec

from deploy.console import counted, harmless
from deploy.errors import USAGE, GiveUp
from deploy.files.event_files import HEAD_BYTES, StableIds, early_time, recognized_encoding, shown_encoding, undecodable
from deploy.files.sending import Line, Problem
from meters.event import JSON_NUMBER
from meters.timestamps import parse_timestamp

# Mapping.

FIELDS = (
    "name", "timestamp", "external_customer_id", "customer_id", "external_id", "parent_id", "member_id",
    "external_member_id", "organization_id",
)
METADATA = "metadata."
RESERVED = ("_cost", "_llm")  # the two metadata keys that hold an object
IDENTITY = ("name", "external_customer_id", "customer_id")  # what of a mapping makes the same row another event
TIMESTAMP = "timestamp"


def parse_mapping(options: list[str], flag: str) -> dict[str, str]:
    """``name=model,metadata.tokens=Tokens`` as {"name": "model", ...}. Raises GiveUp for what no event has."""
    mapping: dict[str, str] = {}
    for part in (part for option in options for part in _parts(option, flag)):
        field, equals, value = part.partition("=")
        field = field.strip()
        if not equals:
            raise GiveUp(f"{flag} takes FIELD=VALUE, separated by commas, and not {part!r}", USAGE)
        key = field.removeprefix(METADATA) if field.startswith(METADATA) else ""
        if field not in FIELDS and key in ("", *RESERVED):
            raise GiveUp(f"{flag}: events have no {field!r}; only {', '.join(FIELDS)} and metadata.NAME", USAGE)
        mapping[field] = value.strip()
    return mapping


def _parts(option: str, flag: str) -> list[str]:
    """What stands between the commas; one with a comma in itself is quoted as in the file. Raises GiveUp."""
    try:
        return next(csv.reader([option], strict=True, skipinitialspace=True), []) or [""]
    except csv.Error as error:
        raise GiveUp(f"{flag} is read as a line of CSV, and {option!r} is none: {error}", USAGE) from None


# Form. Everything that a person may say about the file.

DELIMITERS = (",", ";", "\t", "|")  # what is recognized, the first that fits
DELIMITER_NAMES = {"tab": "\t", "\\t": "\t"}
DECIMAL_SIGNS = (".", ",")
ISO, EXCEL, DAY_FIRST, MONTH_FIRST = "iso", "excel", "day-first", "month-first"
TIME_FORMATS = (ISO, EXCEL, DAY_FIRST, MONTH_FIRST)
CALENDAR_DAY = re.compile(
    r"(\d{1,2})([./-])(\d{1,2})\2(\d{4})"
    r"(?:(?:, ?| |T)(\d{1,2}):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?(?: ?([AaPp])[Mm])?)? ?(Z|[+-]\d\d:?\d\d)?", re.ASCII,
)
EXCEL_START = datetime(1899, 12, 30, tzinfo=UTC)  # so that every day from March 1900 on has its number in a spreadsheet
EXCEL_DAYS = range(61, 2_958_466)  # from March 1900 to the end of 9999
EXCEL_DAYS_LIKELY = range(20_000, 80_000)  # 1954 to 2119: what a number is probably meant to be
EXCEL_CUT_DECIMALS = 5  # a cell without a format shows no more, which is less than half a second wrong
SECONDS_PER_DAY = 86_400


class CsvForm(msgspec.Struct, frozen=True):
    """How a file is written. An empty ``delimiter`` or ``encoding`` is recognized by the content."""

    delimiter: str = ""
    decimal: str = "."
    time_format: str = ISO
    encoding: str = ""

    def check(self) -> "CsvForm":
        """Return the form with its names resolved. Raises GiveUp for what no file can have."""
        delimiter = DELIMITER_NAMES.get(self.delimiter.lower(), self.delimiter)
        if len(delimiter) > 1 or delimiter in ('"', "\n", "\r"):
            raise GiveUp(f"--delimiter takes one character, or tab, and not {self.delimiter!r}", USAGE)
        if self.decimal not in DECIMAL_SIGNS:
            raise GiveUp(f"--decimal takes '.' or ',', and not {self.decimal!r}", USAGE)
        if self.time_format not in TIME_FORMATS:
            _check_pattern(self.time_format)
        return CsvForm(delimiter, self.decimal, self.time_format, self.encoding)

    def number(self, cell: str) -> str | None:
        """The number of a cell as JSON writes it, or None. Digits are never grouped, as 1.234 would be in doubt."""
        text = cell.strip()
        if self.decimal == ",":
            text = "" if "." in text else text.replace(",", ".")
        return text if JSON_NUMBER.fullmatch(text) else None

    def value(self, cell: str) -> object:
        """A cell as JSON would write it: a number keeps its digits, true and false are booleans, the rest is text."""
        if cell in ("true", "false"):
            return cell == "true"
        number = self.number(cell)
        return cell if number is None else msgspec.Raw(number.encode())

    def time(self, cell: str) -> str:
        """The time of a cell as the server reads it; in UTC where the cell has no offset. Raises ValueError."""
        cell = cell.strip()
        if self.time_format == ISO:
            return self._iso_time(cell)
        if self.time_format == EXCEL:
            instant = _excel_time(self.number(cell))
        elif self.time_format in (DAY_FIRST, MONTH_FIRST):
            instant = _calendar_time(cell, is_day_first=self.time_format == DAY_FIRST)
        else:
            instant = _patterned_time(cell, self.time_format)
        if instant is None:
            raise ValueError(f"timestamp: {cell!r} does not fit --time-format {self.time_format}")
        return _with_offset(instant)

    def _iso_time(self, cell: str) -> str:
        number = self.number(cell)
        if number is not None:
            number = _written_out(number)
            if complaint := early_time(number):
                raise ValueError(f"timestamp: {cell!r} is no time{_as_excel(number)}; {complaint}")
            return number
        try:
            return _with_offset(datetime.fromisoformat(cell))
        except ValueError:
            raise ValueError(f"timestamp: {cell!r} is no ISO 8601 time{_time_hint(cell)}") from None


def _check_pattern(pattern: str) -> None:
    try:
        datetime.strptime(datetime(2026, 11, 25, 8, 15, tzinfo=UTC).strftime(pattern), pattern)  # noqa: DTZ007
    except ValueError:
        is_pattern = False
    else:
        is_pattern = "%" in pattern
    if not is_pattern or not re.search("%[Yy]", pattern):
        raise GiveUp(
            f"--time-format takes {', '.join(TIME_FORMATS)}, or a pattern with a year such as '%d.%m.%Y %H:%M', "
            f"and not {pattern!r}", USAGE,
        )


def _with_offset(instant: datetime) -> str:
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).isoformat()


def _excel_time(number: str | None) -> datetime | None:
    """The time of a spreadsheet's serial number: days since the end of 1899, in the 1900 date system.

    Up to five decimals are rounded to a second, since that is what is left of a second in them; more decimals are
    rounded to the millisecond that a spreadsheet keeps.
    """
    days = Decimal(number) if number and len(number) < len("2958465.") + 20 else Decimal(0)
    if "e" in (number or "").lower() or int(days) not in EXCEL_DAYS:
        return None
    decimals = len(str(days).partition(".")[2])
    step = Decimal(1) if decimals <= EXCEL_CUT_DECIMALS else Decimal("0.001")
    return EXCEL_START + timedelta(milliseconds=int((days * SECONDS_PER_DAY).quantize(step) * 1000))


def _calendar_time(cell: str, *, is_day_first: bool) -> datetime | None:
    """The time of a text such as 25.11.2026 08:15, 11/25/2026 8:15:00 PM; None for any other."""
    found = CALENDAR_DAY.fullmatch(cell)
    if not found:
        return None
    first, _, second, year, hour, minute, seconds, fraction, half, offset = found.groups()
    day, month = (first, second) if is_day_first else (second, first)
    if half and not 1 <= int(hour) <= 12:
        return None
    hours = int(hour or 0) % 12 + 12 * (half in "Pp") if half else int(hour or 0)
    clock = f"{hours:02}:{minute or '00'}:{seconds or '00'}.{(fraction or '0')[:6]:0<6}"
    try:
        return datetime.fromisoformat(f"{year}-{int(month):02}-{int(day):02}T{clock}{offset or ''}")
    except ValueError:
        return None


def _patterned_time(cell: str, pattern: str) -> datetime | None:
    try:
        return datetime.strptime(cell, pattern)  # noqa: DTZ007 (one without an offset is UTC)
    except ValueError:
        return None


def _as_excel(number: str) -> str:
    """What the number is as a spreadsheet's time, where it may well be one."""
    instant = _excel_time(number)
    if instant is None or (instant - EXCEL_START).days not in EXCEL_DAYS_LIKELY:
        return ""
    return f" (a spreadsheet's {instant:%Y-%m-%d %H:%M:%S}?); if so, give --time-format {EXCEL}"


def _time_hint(cell: str) -> str:
    with_point = cell.replace(",", ".")
    if JSON_NUMBER.fullmatch(with_point) and (hint := _as_excel(with_point)):
        return f"{hint} and --decimal ,"
    fitting = [name for name in (DAY_FIRST, MONTH_FIRST) if _calendar_time(cell, is_day_first=name == DAY_FIRST)]
    if len(fitting) > 1:
        return f"; the day or the month may come first: give --time-format {DAY_FIRST} or {MONTH_FIRST}"
    way = fitting[0] if fitting else "with a pattern such as '%d.%m.%Y %H:%M'"
    return f"; give --time-format {way}"


def _written_out(number: str) -> str:
    """The number without an exponent, which a time has nowhere in text.

    Raises ValueError where the exponent stands for digits that are not there: a spreadsheet writes 1.76723E+09, which
    may be more than an hour from what its cell held.
    """
    if "e" not in number.lower():
        return number
    try:
        value = Decimal(number)
    except ArithmeticError:  # an exponent beyond all
        value = Decimal("NaN")
    decimals = -value.as_tuple().exponent if value.is_finite() else -1  # type: ignore[operator]  # a number's is one
    if not 0 <= decimals <= TIME_DECIMALS_MAX:
        raise ValueError(f"timestamp: {number!r} does not say every digit of its seconds; write it without an exponent")
    return f"{value:f}"


# Survey.

TEXTS_SHOWN_MAX = 5  # cells of one column tend to be alike
SHOWN_LENGTH_MAX = 40  # characters of a cell in a message: enough to find it
TIME_DECIMALS_MAX = 40  # decimals of a time that is written with an exponent; programs write 18 digits at most
CURRENCY = "(?:[$€£¥₹]|EUR|USD|GBP|CHF|JPY|INR)?"
GROUP = "[., '\u2019\u00a0\u2009\u202f]"
MEANT_AS_A_NUMBER = re.compile(
    rf"\(?[+\-\u2212]? ?{CURRENCY} ?[+\-\u2212]?(\d+([.,]\d*)?|[.,]\d+|\d{{1,3}}({GROUP}\d{{3}})+([.,]\d+)?)"
    rf"([eE][+-]?\d+)? ?%? ?{CURRENCY}\)?", re.ASCII,
)
"""What a person may have meant as a number: thousands set apart, a decimal comma, money, a plus, zeros in front."""
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
HALF_WRITTEN = (
    "the last line does not end with a newline, so somebody may be writing it still: it was not sent. Import the file "
    "again when it is whole, or give --complete if it is"
)


class Column(msgspec.Struct):
    """What the cells of a column are that becomes a field. ``examples`` are cells that may not be what is meant."""

    label: str  # such as ``total -> metadata.total``
    field: str
    place: int
    cells: int = 0  # that are not empty
    numbers: int = 0
    almost: int = 0  # look like numbers and are none
    misfits: int = 0  # of a timestamp: no times
    commas: int = 0
    first: str = ""
    first_problem: str = ""
    examples: list[str] = []

    def add(self, line: int, cell: str, form: CsvForm) -> None:
        """Count one cell."""
        if not cell.strip():
            return
        self.cells += 1
        if self.field == TIMESTAMP:
            self._add_time(line, cell, form)
        elif form.number(cell) is not None:
            self.numbers += 1
        else:
            is_almost = MEANT_AS_A_NUMBER.fullmatch(cell.strip()) is not None
            self.almost += is_almost
            self.commas += is_almost and DECIMAL_COMMA.fullmatch(cell.strip()) is not None
            self._show(line, cell)

    def _add_time(self, line: int, cell: str, form: CsvForm) -> None:
        try:
            time = form.time(cell)
        except ValueError as error:
            self.misfits += 1
            self.first_problem = self.first_problem or str(error).removeprefix("timestamp: ")
            self._show(line, cell)
        else:
            self.first = self.first or str(parse_timestamp(time))

    def _show(self, line: int, cell: str) -> None:
        if len(self.examples) < TEXTS_SHOWN_MAX:
            self.examples.append(f"line {line} {cell[:SHOWN_LENGTH_MAX]!r}")

    @property
    def texts(self) -> int:
        """Cells that are no numbers."""
        return self.cells - self.numbers

    def is_doubtful(self, form: CsvForm) -> bool:
        """Whether the cells may be meant otherwise than they would be sent.

        A row whose time is no ISO time is reported by its line. With another format every misfit says that the format
        may be wrong, and then the other times are wrong without being noticed.
        """
        if self.field == TIMESTAMP:
            return bool(self.misfits) and (self.misfits == self.cells or form.time_format != ISO)
        return self.field.startswith(METADATA) and bool(self.texts) and bool(self.numbers or self.almost)

    def described(self, rows: int) -> str:
        """The column's line of the report."""
        return f"{self.label}: {self._content()}" + (f", {rows - self.cells:,} empty" if rows > self.cells else "")

    def _content(self) -> str:
        if self.field == TIMESTAMP:
            first = f", the first {self.first}" if self.first else ""
            found = f"{counted(self.cells - self.misfits, 'time', 'times')}{first}"
            return f"{found}; {self.complaint()}" if self.misfits else found
        if not self.field.startswith(METADATA) or not (self.numbers or self.almost):
            return counted(self.cells, "text", "texts")
        return self.complaint() if self.texts else counted(self.numbers, "number", "numbers")

    def complaint(self) -> str:
        """How many cells are not what the others are, and which."""
        if self.field == TIMESTAMP:
            number, kind = self.misfits, "time"
        else:
            number, kind = self.texts, "number"
        verb = "is" if number == 1 else "are"
        return f"{number:,} of {counted(self.cells, 'cell', 'cells')} {verb} no {kind} ({', '.join(self.examples)})"


class Survey(msgspec.Struct):
    """What the file holds, read to its end before anything is sent."""

    name: str
    form: CsvForm
    columns: list[Column]
    rows: int = 0
    uneven: int = 0  # rows with more or fewer cells than the header

    def report(self) -> Iterator[str]:
        """The file in a line, and a line for each column."""
        delimiter = "tabs" if self.form.delimiter == "\t" else f"{self.form.delimiter!r}"
        encoding = shown_encoding(self.form.encoding)
        uneven = f", {self.uneven:,} with too many or too few cells" if self.uneven else ""
        yield f"{self.name}: {counted(self.rows, 'row', 'rows')}{uneven}, in {encoding}, separated by {delimiter}"
        for column in self.columns:
            yield harmless(f"  {column.described(self.rows - self.uneven)}")

    def check(self, allowed: frozenset[str] = frozenset()) -> None:
        """Raise GiveUp for cells that a meter would pass over, unless their column is ``allowed`` to hold text."""
        doubtful = [column for column in self.columns if column.is_doubtful(self.form)]
        for column in doubtful:
            if column.field == TIMESTAMP:
                problem = f"{column.label}: {column.complaint()}: {column.first_problem}; nothing was sent"
                raise GiveUp(harmless(problem), USAGE)
        refused = [column for column in doubtful if _option_name(column) not in allowed]
        if refused:
            found = "; ".join(f"{column.label}: {column.complaint()}" for column in refused)
            raise GiveUp(harmless(f"{found}. {self._way_on(refused)}; nothing was sent"), USAGE)

    def _way_on(self, columns: Sequence[Column]) -> str:
        allow = " ".join(f"--allow-text {_quoted(_option_name(column))}" for column in columns)
        has_commas = self.form.decimal == "." and any(column.commas for column in columns)
        comma = ", give --decimal , if the comma is the decimal sign" if has_commas else ""
        sign = "1234,5" if self.form.decimal == "," else "1234.5"
        return (
            f"No meter adds up text. Write numbers as {sign} (nothing around them, no grouped digits, no + or 0 in "
            f"front){comma}, or give {allow} if text is meant"
        )


def _option_name(column: Column) -> str:
    return column.label.partition(" -> ")[0].removeprefix("--set ")


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else f"'{name}'"


# The file. It is read twice, so what comes from a pipe lies in a temporary file meanwhile.


@contextmanager
def rereadable(path: Path, standard_input: IO[bytes] | None = None) -> Iterator[IO[bytes]]:
    """Open a file that can be read several times; a pipe is copied to the temporary directory. Raises GiveUp."""
    if standard_input:
        with _copied(standard_input, path) as copy:
            yield copy
        return
    try:
        source = path.open("rb")
    except OSError as error:
        raise GiveUp(f"cannot read {path}: {error.strerror}", USAGE) from None
    with source:
        if path.is_file():
            yield source
            return
        with _copied(source, path) as copy:
            yield copy


@contextmanager
def _copied(source: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as copy:
        try:
            shutil.copyfileobj(source, copy)
        except OSError as error:
            raise GiveUp(f"{path} cannot be copied to the temporary directory: {error.strerror}; set TMPDIR") from None
        yield copy


class CsvFile(msgspec.Struct, frozen=True):
    """A CSV file with a header line, and how its columns become events."""

    source: IO[bytes]
    name: str
    columns: dict[str, str]  # event field -> column
    constants: dict[str, str]  # event field -> the same value for every line
    form: CsvForm = CsvForm()
    apart: str = ""  # that of StableIds
    is_complete: bool = False  # also where the last line has no newline

    def survey(self, allowed: frozenset[str] = frozenset()) -> Survey:
        """Read the file to its end and return what its columns hold.

        To its end, since a quote that nobody closes makes one row of many. Raises GiveUp when the mapping cannot work,
        the file cannot be read, or ``allowed`` names a column that is not mapped.
        """
        fields = self.columns.keys() | self.constants.keys()
        if "name" not in fields or not fields & {"external_customer_id", "customer_id"}:
            raise GiveUp(
                "an event needs a name and a customer: give them with --map name=COLUMN,external_customer_id=COLUMN "
                "or, the same for all, --set name=TEXT,external_customer_id=TEXT", USAGE,
            )
        known = [*self.columns.values(), *(field for field in self.constants if field.startswith(METADATA))]
        if unknown := sorted(allowed.difference(known)):
            raise GiveUp(f"--allow-text: no column {', '.join(unknown)} is mapped to the metadata", USAGE)
        form = self._recognized()
        with self._rows(form) as (header, rows):
            self._check_header(header, form)
            columns = [
                Column(f"{name} -> {field}", field, header.index(name)) for field, name in self.columns.items()
            ]
            survey = Survey(self.name, form, columns)
            for line, cells in rows:
                survey.rows += 1
                if len(cells) != len(header):
                    survey.uneven += 1
                    continue
                for column in columns:
                    column.add(line, cells[column.place], form)
        columns += self._almost_constants(form)
        return survey

    def _almost_constants(self, form: CsvForm) -> Iterator[Column]:
        """What --set gives that looks like a number and is none."""
        for field, value in self.constants.items():
            column = Column(f"--set {field}", field, 0)
            column.add(0, value, form)
            column.examples = [repr(value)]
            if column.is_doubtful(form):
                yield column

    def _check_header(self, header: list[str] | None, form: CsvForm) -> None:
        if not header:
            raise GiveUp(f"{self.name} is empty; it should begin with a line that names its columns", USAGE)
        mapped = sorted(set(self.columns.values()))
        if missing := [column for column in mapped if column not in header]:
            hint = "; a file of JSON goes to `meterstream events send`" if header[0].startswith(("{", "[")) else ""
            seen = f"separated by {form.delimiter!r} it has {', '.join(header)}"
            raise GiveUp(harmless(f"{self.name} has no column {', '.join(missing)}; {seen}{hint}"), USAGE)
        if twice := [column for column in mapped if header.count(column) > 1]:
            raise GiveUp(f"{self.name} has several columns {', '.join(twice)}; give each a name of its own", USAGE)

    def lines(self, survey: Survey) -> Iterator[Line | Problem]:
        """An event for every row of the survey, with the number of the file's line on which the row ends."""
        with self._rows(survey.form) as (header, rows), StableIds(self.apart) as ids:
            held: tuple[int, list[str]] | None = None
            for position, row in enumerate(rows):
                if held is not None:
                    yield self._line(*held, header, ids, survey.form)
                held = row if position < survey.rows else None
                if held is None:  # rows that came since the survey were not looked at
                    return
            if held is not None:
                is_whole = self.is_complete or self._ends_a_line()
                yield self._line(*held, header, ids, survey.form) if is_whole else Problem(held[0], HALF_WRITTEN)

    def _line(self, number: int, cells: list[str], header: list[str], ids: StableIds, form: CsvForm) -> Line | Problem:
        if len(cells) != len(header):
            return Problem(number, f"the row has {len(cells)} cells, and the header has {len(header)}")
        row = dict(zip(header, cells, strict=True))
        external_id = ids.next(self._identity(row))
        try:
            return Line(number, msgspec.json.encode(self._event(row, external_id, form)))
        except ValueError as error:
            return Problem(number, str(error))

    def _identity(self, row: Mapping[str, str]) -> bytes:
        """What makes a row the same event: its cells in any order of columns, what is set, whom and what it names.

        Not how metadata is mapped, nor the form: another reading of a row that was counted already is a conflict, and
        not more usage.
        """
        cells = sorted((column, cell) for column, cell in row.items() if cell)
        roles = [(field, self.columns[field]) for field in IDENTITY if field in self.columns]
        return msgspec.json.encode([cells, sorted(self.constants.items()), roles])

    def _event(self, row: Mapping[str, str], external_id: str, form: CsvForm) -> dict[str, object]:
        event: dict[str, object] = {"external_id": external_id}
        metadata: dict[str, object] = {}
        texts = {field: row.get(column, "") for field, column in self.columns.items()} | self.constants
        for field, value in texts.items():
            if not value.strip():
                continue
            if field.startswith(METADATA):
                _place(metadata, field.removeprefix(METADATA), form.value(value))
            else:
                event[field] = form.time(value) if field == TIMESTAMP else value
        return event | {"metadata": metadata} if metadata else event

    def _ends_a_line(self) -> bool:
        self.source.seek(max(self.source.seek(0, os.SEEK_END) - HEAD_BYTES, 0))
        return self.source.read().rstrip(b"\0").endswith((b"\n", b"\r"))

    def _recognized(self) -> CsvForm:
        """The form with encoding and delimiter filled in. Raises GiveUp for a file that is no text."""
        self.source.seek(0)
        encoding = recognized_encoding(self.source.read(HEAD_BYTES), self.form.encoding, self.name)
        form = msgspec.structs.replace(self.form, encoding=encoding)
        if form.delimiter:
            return form
        headers: dict[str, list[str]] = {}
        for delimiter in DELIMITERS:
            with self._rows(msgspec.structs.replace(form, delimiter=delimiter), is_strict=False) as (header, _):
                headers[delimiter] = header
        mapped = set(self.columns.values())
        # The first delimiter with which all mapped columns are there; without one, the first that finds most columns.
        best = max(DELIMITERS, key=lambda delimiter: (mapped <= set(headers[delimiter]), len(headers[delimiter])))
        fitting = (delimiter for delimiter in DELIMITERS if mapped and mapped <= set(headers[delimiter]))
        return msgspec.structs.replace(form, delimiter=next(fitting, best))

    @contextmanager
    def _rows(
        self, form: CsvForm, *, is_strict: bool = True
    ) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
        """The header, and every row that is not empty with the line on which it ends. Raises GiveUp."""
        self.source.seek(0)
        text = io.TextIOWrapper(self.source, form.encoding, newline="")
        reader = csv.reader(text, strict=is_strict, delimiter=form.delimiter)
        try:
            header = [cell.removeprefix("\ufeff") for cell in next(reader, [])]
            yield header, ((reader.line_num, cells) for cells in reader if cells)
        except UnicodeDecodeError as error:
            text.detach()
            found = undecodable(self.source, form.encoding, self.name, error)
            raise GiveUp(f"{found}; nothing was sent", USAGE) from None
        except csv.Error as error:
            place = f"{self.name}, line {reader.line_num}"
            raise GiveUp(f"{place} cannot be read: {error}; nothing was sent", USAGE) from None
        finally:
            if text.buffer is not None:
                text.detach()


def _place(metadata: dict[str, object], key: str, value: object) -> None:
    """Set a key; a reserved one holds an object (``_cost.amount``)."""
    outer, dot, inner = key.partition(".")
    if dot and outer in RESERVED:
        inside = metadata.setdefault(outer, {})
        assert isinstance(inside, dict)
        inside[inner] = value
    else:
        metadata[key] = value
