"""Files of events: NDJSON and CSV, with stable ids for their lines.

``read_ndjson`` passes lines on byte by byte; ``CsvFile`` maps columns to an event's fields. Every event leaves with
an ``external_id``: if a line has none, ``StableIds`` makes one from the line's content and the number of its
occurrence in the file. So a file that is sent again, or that has grown, counts nothing twice.
"""

import codecs
import csv
import hashlib
import os
import re
import select
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec

from deploy.errors import USAGE, GiveUp
from deploy.sending import EVENT_BYTES_MAX, Line, Problem
from ingest.limits import BODY_BYTES_MAX
from meters.event import JSON_NUMBER

# Stable ids. An id is a digest of the content and of the number of its occurrence among equal lines of the file. Two
# equal lines of one file are two events. Neither the file's name nor the line's number is part of the id: an equal
# line of another file is the same event. So a file that has grown, or some of whose lines were corrected, repeats the
# ids of its other lines.
#
# Occurrences are counted in a temporary file, because a file may have more lines than fit into memory.

DIGEST_BYTES = 16  # no two contents will ever share it
CACHE_KIB = 32 * 1024  # what counting takes of memory; more lies in the temporary file


class StableIds:
    """Gives each content of one file its ids. A context manager."""

    def __init__(self, apart: str = "") -> None:
        """``apart`` tells events that are meant to be others from those whose lines say the same."""
        self._apart = apart.encode() + b"\0" if apart else b""
        self._counts = sqlite3.connect("", isolation_level=None)  # no name: SQLite removes it by itself
        for setting in (f"cache_size = -{CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._counts.execute(f"PRAGMA {setting}")
        self._counts.execute("CREATE TABLE seen (content BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._counts.execute("BEGIN")  # one transaction for all: nothing of it has to outlive the command

    def __enter__(self) -> "StableIds":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counts.close()

    def next(self, content: bytes) -> str:
        """The id of a line that says this: of its first occurrence, then of its second, and so on. Raises GiveUp."""
        digest = hashlib.sha256(self._apart + content).digest()[:DIGEST_BYTES]
        try:
            with closing(self._counts.execute(
                "INSERT INTO seen VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times", (digest,)
            )) as counted:
                times: int = counted.fetchone()[0]
        except sqlite3.Error as error:
            raise GiveUp(f"the temporary directory cannot be written: {error}; name another one with TMPDIR") from None
        return f"{digest.hex()}:{times}"


def never_again() -> str:
    """A value for ``apart`` that nothing else will ever have."""
    return uuid.uuid4().hex


# Reading. Input from a pipe is not held back for long: its lines are batched only with lines of the same second.

FIELDS = (
    "name", "timestamp", "external_customer_id", "customer_id", "external_id", "parent_id", "member_id",
    "external_member_id", "organization_id",
)
METADATA = "metadata."
RESERVED = ("_cost", "_llm")  # the two metadata keys that hold an object
IDENTITY = ("name", "external_customer_id", "customer_id")  # what of a mapping makes the same row another event
TEXTS_SHOWN_MAX = 5  # cells of one column tend to be alike
TIME_DECIMALS_MAX = 40  # decimals of a time that is written with an exponent; programs write 18 digits at most
SECONDS_MIN = 100_000_000  # in 1973; a smaller number is a year, or a day such as 20260301
MEANT_AS_A_NUMBER = re.compile(
    r"[+-]?(\d+([.,]\d*)?|[.,]\d+|\d{1,3}([., '\u00a0\u202f]\d{3})+([.,]\d+)?)([eE][+-]?\d+)?%?"
)
"""What a person may have meant as a number: thousands set apart, a decimal comma, a plus, zeros in front."""
OTHER_FILES = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    codecs.BOM_UTF16_LE + b"{\0": "UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE + b"\0{": "UTF-16; save it as UTF-8",
}
HALF_WRITTEN = (
    "the last line does not end with a newline, so somebody may be writing it still: it was not sent. Import the file "
    "again when it is whole, or give --complete if it is"
)
WAIT_S = 1.0  # that a line waits for others to go with it: what is piped happens now
CHUNK_BYTES = 1024 * 1024


def read_ndjson(file: Iterable[bytes | None], apart: str = "") -> Iterator[Line | Problem | None]:
    """An event a line, empty lines skipped; ``apart`` is that of StableIds. A None of ``as_they_come`` stays one.

    Raises GiveUp for a file whose first bytes say that it is no text in UTF-8.
    """
    with StableIds(apart) as ids:
        yield from _read_ndjson(file, ids)


def as_they_come(descriptor: int, wait_s: float = WAIT_S) -> Iterator[bytes | None]:
    """The lines of a pipe, and None where one has waited for so long: whoever collects them sends what there is."""
    unfinished = bytearray()
    due_s: float | None = None
    while True:
        left_s = None if due_s is None else max(due_s - time.monotonic(), 0.0)
        if not select.select([descriptor], [], [], left_s)[0]:
            due_s = None
            yield None
            continue
        chunk = os.read(descriptor, CHUNK_BYTES)
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield bytes(unfinished + line)
            unfinished.clear()
        unfinished += rest
        if not chunk:
            break
        if lines and due_s is None:
            due_s = time.monotonic() + wait_s
    if unfinished:
        yield bytes(unfinished)


def _read_ndjson(file: Iterable[bytes | None], ids: StableIds) -> Iterator[Line | Problem | None]:
    decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
    number = 0
    for raw in file:
        if raw is None:
            yield None
            continue
        number += 1
        line = (raw if number > 1 else _first(raw)).strip()
        if not line:
            continue
        try:
            event = _fields(decoder, line)
        except (msgspec.MsgspecError, ValueError) as error:
            yield Problem(number, f"not an event: {error}")
            continue
        if "events" in event and "name" not in event:
            yield Problem(number, "a whole request, not an event: give each of its events a line of its own")
            continue
        if bytes(event.get("external_id", b"null")) in (b"null", b'""'):
            comma = b"," if event else b""  # the last key wins, so a null before it does no harm
            line = line[:-1] + comma + b'"external_id":"' + ids.next(line).encode() + b'"}'
        yield Line(number, line)


def _first(raw: bytes) -> bytes:
    """The first line without a mark of UTF-8. Raises GiveUp where every line would be complained of."""
    for mark, way in OTHER_FILES.items():
        if raw.startswith(mark):
            raise GiveUp(f"the file is {way} first", USAGE)
    return raw.removeprefix(codecs.BOM_UTF8)


def _fields(decoder: "msgspec.json.Decoder[dict[str, msgspec.Raw]]", line: bytes) -> dict[str, msgspec.Raw]:
    """An event's values as they stand there, checked for what would refuse every other line of the request as well.

    Raises ValueError or MsgspecError.
    """
    if len(line) > EVENT_BYTES_MAX:
        raise ValueError(f"it has {len(line):,} bytes, and a whole request may have {BODY_BYTES_MAX:,}")
    try:
        line.decode()  # the decoder skips over the bytes of texts
        return decoder.decode(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8; save the file as such") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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


class CsvFile(msgspec.Struct, frozen=True):
    """A CSV file with a header line, and how its columns become events."""

    path: Path
    columns: dict[str, str]  # event field -> column
    constants: dict[str, str]  # event field -> the same value for every line
    apart: str = ""  # that of StableIds
    is_complete: bool = False  # also where the last line has no newline

    def check(self, *, texts_meant: bool = False) -> None:
        """Raises GiveUp when the mapping cannot work, or the file cannot be read, before anything is sent.

        Unless they are meant, that goes for cells that look like numbers and are none for JSON, too: no meter adds them
        up, and once they are sent, a mended row is another event. The file is read to its end, since a quote that
        nobody closes makes one row of many.
        """
        fields = self.columns.keys() | self.constants.keys()
        if "name" not in fields or not fields & {"external_customer_id", "customer_id"}:
            raise GiveUp(
                "an event needs a name and a customer: give them with --map name=COLUMN,external_customer_id=COLUMN "
                "or, the same for all, --set name=TEXT,external_customer_id=TEXT", USAGE,
            )
        with self._open() as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, None)
                self._check_header(header)
                texts = self._texts(header or [], reader)
                shown, hidden = list(islice(texts, TEXTS_SHOWN_MAX)), sum(1 for _ in texts)
            except UnicodeDecodeError:
                raise GiveUp(f"{self.path} is not UTF-8; save it as such; nothing was sent", USAGE) from None
            except csv.Error as error:
                place = f"{self.path}, line {reader.line_num}"
                raise GiveUp(f"{place} cannot be read: {error}; nothing was sent", USAGE) from None
        if shown and not texts_meant:
            raise GiveUp(_complaint(shown, hidden), USAGE)

    def _check_header(self, header: list[str] | None) -> None:
        if header is None:
            raise GiveUp(f"{self.path} is empty; it should begin with a line that names its columns", USAGE)
        mapped = sorted(set(self.columns.values()))
        if missing := [column for column in mapped if column not in header]:
            raise GiveUp(f"{self.path} has no column {', '.join(missing)}; it has {', '.join(header)}", USAGE)
        if twice := [column for column in mapped if header.count(column) > 1]:
            raise GiveUp(f"{self.path} has several columns {', '.join(twice)}; give each a name of its own", USAGE)

    def lines(self) -> Iterator[Line | Problem]:
        """An event for every row, with the number of the file's line on which the row ends."""
        with self._open() as file, StableIds(self.apart) as ids:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            for number, cells in self._rows(reader):
                if cells is None:
                    yield Problem(number, HALF_WRITTEN)
                    continue
                if len(cells) != len(header):
                    yield Problem(number, f"the row has {len(cells)} cells, and the header has {len(header)}")
                    continue
                row = dict(zip(header, cells, strict=True))
                external_id = ids.next(self._identity(row))
                try:
                    yield Line(number, msgspec.json.encode(self._event(row, external_id)))
                except ValueError as error:
                    yield Problem(number, str(error))

    def _rows(self, reader: Any) -> Iterator[tuple[int, list[str] | None]]:
        """Every row with the line on which it ends; None for a last one that somebody may be writing still."""
        held: tuple[int, list[str] | None] | None = None
        for cells in reader:
            if held is not None:
                yield held
            held = (reader.line_num, cells) if cells else None
        if held is not None:
            yield held if self.is_complete or self._ends_a_line() else (held[0], None)

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            return file.read(1) in (b"\n", b"\r")

    def _identity(self, row: Mapping[str, str]) -> bytes:
        """What makes a row the same event: its cells in any order of columns, what is set, whom and what it names.

        Not how metadata is mapped: another reading of a row that was counted already is a conflict, and not more usage.
        """
        cells = sorted((column, cell) for column, cell in row.items() if cell)
        roles = [(field, self.columns[field]) for field in IDENTITY if field in self.columns]
        return msgspec.json.encode([cells, sorted(self.constants.items()), roles])

    def rows(self) -> int:
        """About how many rows there are, for a progress bar (a quoted newline counts as one more)."""
        with self.path.open("rb") as file:
            return max(sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b"")) - 1, 0)

    def _open(self) -> IO[str]:
        try:
            return self.path.open(encoding="utf-8-sig", newline="")
        except OSError as error:
            raise GiveUp(f"cannot read {self.path}: {error.strerror}", USAGE) from None

    def _texts(self, header: list[str], reader: Any) -> Iterator[str]:
        """Where what looks like a number would be sent as text."""
        for field, value in self.constants.items():
            if field.startswith(METADATA) and _is_almost_number(value):
                yield f"--set {field}: {value!r}"
        mapped = {column for field, column in self.columns.items() if field.startswith(METADATA)}
        places = [(header.index(column), column) for column in sorted(mapped)]
        for cells in reader:
            for place, column in places if len(cells) == len(header) else ():
                if _is_almost_number(cells[place]):
                    yield f"line {reader.line_num}, {column}: {cells[place]!r}"

    def _event(self, row: Mapping[str, str], external_id: str) -> dict[str, object]:
        event: dict[str, object] = {"external_id": external_id}
        metadata: dict[str, object] = {}
        texts = {field: row.get(column, "") for field, column in self.columns.items()} | self.constants
        for field, value in texts.items():
            if value == "":
                continue
            if field.startswith(METADATA):
                _place(metadata, field.removeprefix(METADATA), _value(value))
            else:
                event[field] = _instant(value) if field == "timestamp" else value
        return event | {"metadata": metadata} if metadata else event


def _complaint(texts: list[str], hidden: int) -> str:
    shown = "; ".join(texts) + (f"; and {hidden:,} more" if hidden else "")
    return (
        f"cells look like numbers and would be sent as text, which no meter adds up: {shown}. Write them as 1234.5 "
        "(no comma, + or 0 in front), or give --texts if they are meant; nothing was sent"
    )


def _is_almost_number(text: str) -> bool:
    number = text.strip()
    return MEANT_AS_A_NUMBER.fullmatch(number) is not None and not JSON_NUMBER.fullmatch(number)


def _place(metadata: dict[str, object], key: str, value: object) -> None:
    """Set a key; a reserved one holds an object (``_cost.amount``)."""
    outer, dot, inner = key.partition(".")
    if dot and outer in RESERVED:
        inside = metadata.setdefault(outer, {})
        assert isinstance(inside, dict)
        inside[inner] = value
    else:
        metadata[key] = value


def _value(text: str) -> object:
    """A cell as JSON would write it: a number keeps its digits, true and false are booleans, the rest is text."""
    if text in ("true", "false"):
        return text == "true"
    number = text.strip()
    return msgspec.Raw(number.encode()) if JSON_NUMBER.fullmatch(number) else text


def _instant(text: str) -> str:
    """A time with its offset; without one it is UTC. A number is seconds or milliseconds, as the server reads it."""
    if JSON_NUMBER.fullmatch(text):
        number = _written_out(text)
        if 0 <= Decimal(number) < SECONDS_MIN and Decimal(number) % 1 == 0:
            raise ValueError(f"timestamp: {text!r} is no time; write a day as 2026-03-01, or the seconds since 1970")
        return number
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"timestamp: {text!r} is no ISO 8601 time") from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).isoformat()


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
