"""Files of events: their encoding, NDJSON, and stable ids for their lines.

``read_ndjson`` passes lines on byte by byte. Every event leaves with an ``external_id``: if a line has none,
``StableIds`` makes one from the line's content and the number of its occurrence in the file. So a file that is sent
again, or that has grown, counts nothing twice. ``recognized_encoding`` names the encoding of a file by its first
bytes; ``deploy.files.csv_files`` reads tables with it.
"""

import codecs
import hashlib
import io
import os
import select
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing
from decimal import Decimal
from types import TracebackType
from typing import IO

import msgspec

from deploy.errors import USAGE, GiveUp
from deploy.files.sending import EVENT_BYTES_MAX, Line, Problem
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


# Encodings. A mark at the beginning, or zeros beside the first characters, leave no doubt; anything else is UTF-8
# unless a person says otherwise, because a text in a legacy encoding does not say which one it has.

HEAD_BYTES = 4
UTF_8 = "utf-8-sig"  # with or without a mark
MARKS = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHER_FILES = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"PK\x03\x04": "a workbook or another zip archive; save the table as CSV",
    b"PAR1": "a Parquet file; write it as CSV",
}
LEGACY = "windows-1252"  # the most likely of those that do not say what they are
AROUND_BYTES = 12  # shown on both sides of a byte that is not UTF-8


def recognized_encoding(head: bytes, asked: str = "", name: str = "the file") -> str:
    """Return the encoding of a text that begins with these bytes: the one that is ``asked`` for, unless they deny it.

    Raises GiveUp for a file that is no text, and for an encoding that is unknown or not the file's.
    """
    for mark, way in OTHER_FILES.items():
        if head.startswith(mark):
            raise GiveUp(f"{name} is {way} first", USAGE)
    marked = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "")
    if not asked:
        return marked or _by_zeros(head) or UTF_8
    try:
        encoding = codecs.lookup(asked).name
        "".encode(encoding)  # refuses what codes bytes, such as base64
    except LookupError:
        raise GiveUp(f"--encoding: {asked!r} is no encoding of text; try utf-8, utf-16 or {LEGACY}", USAGE) from None
    if marked and not encoding.startswith(marked.removesuffix("-sig")):
        seen = f"begins as {shown_encoding(marked)} does"
        raise GiveUp(f"{name} {seen} and is not {encoding}; leave --encoding out", USAGE)
    return UTF_8 if encoding == "utf-8" else encoding


def _by_zeros(head: bytes) -> str:
    """UTF-16 without a mark: its first character is one of ASCII."""
    match [byte > 0 for byte in head[:2]]:
        case [True, False]:
            return "utf-16-le"
        case [False, True]:
            return "utf-16-be"
    return ""


def shown_encoding(encoding: str) -> str:
    """The encoding as people write it."""
    return encoding.removesuffix("-sig").upper()


def undecodable(source: IO[bytes], encoding: str, name: str, error: UnicodeDecodeError) -> str:
    """Describe the first bytes of a file that its encoding does not have; in UTF-8 with their line."""
    if encoding == UTF_8:
        source.seek(0)
        for number, line in enumerate(source, 1):
            if found := _foreign_byte(line):
                return f"{name}, line {number}: {found}"
    return f"{name} is not {shown_encoding(encoding)}: {error.reason}; name its encoding with --encoding"


def _foreign_byte(line: bytes) -> str:
    """What is not UTF-8 in a line; empty where all of it is."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        around = line[max(error.start - AROUND_BYTES, 0) : error.start + AROUND_BYTES].decode(LEGACY, "replace").strip()
        return (
            f"byte {error.start + 1} of the line is not UTF-8; save the file as such, or give its encoding "
            f"(with --encoding {LEGACY} it would read {around!r})"
        )
    return ""


# Reading. Input from a pipe is not held back for long: its lines are batched only with lines of the same second.

WAIT_S = 1.0  # that a line waits for others to go with it: what is piped happens now
CHUNK_BYTES = 1024 * 1024
SECONDS_MIN = 100_000_000  # in 1973; a smaller number is a year, a day such as 20260301, or a spreadsheet's


def early_time(number: str) -> str:
    """What to write instead of a number that would be a time before 1973, which nobody means; empty for others.

    The number has no exponent.
    """
    return "write a day as 2026-03-01, or the seconds since 1970" if 0 <= Decimal(number) < SECONDS_MIN else ""


def lines_of(file: io.BufferedReader, encoding: str = "") -> Iterator[bytes]:
    """The lines of a file in UTF-8, whatever its encoding; those of UTF-8 byte by byte. Raises GiveUp."""
    encoding = recognized_encoding(file.peek(HEAD_BYTES)[:HEAD_BYTES], encoding)
    if encoding == UTF_8:
        yield from file
        return
    try:
        yield from (line.encode() for line in io.TextIOWrapper(file, encoding, newline="\n"))
    except UnicodeDecodeError as error:
        raise GiveUp(undecodable(file, encoding, "the file", error), USAGE) from None


def read_ndjson(file: Iterable[bytes | None], apart: str = "") -> Iterator[Line | Problem | None]:
    """An event a line, empty lines skipped; ``apart`` is that of StableIds. A None of ``as_they_come`` stays one.

    The lines are UTF-8, as ``lines_of`` and ``as_they_come`` give them.
    """
    with StableIds(apart) as ids:
        yield from _read_ndjson(file, ids)


def as_they_come(descriptor: int, wait_s: float = WAIT_S, encoding: str = "") -> Iterator[bytes | None]:
    """The lines of a pipe, and None where one has waited for so long: whoever collects them sends what there is.

    Nothing is held back to look at all of it first, as a pipe may never end. Raises GiveUp as ``lines_of`` does.
    """
    unfinished = bytearray()
    decoder: codecs.IncrementalDecoder | None = None
    is_first = True
    due_s: float | None = None
    while True:
        left_s = None if due_s is None else max(due_s - time.monotonic(), 0.0)
        if not select.select([descriptor], [], [], left_s)[0]:
            due_s = None
            yield None
            continue
        chunk = os.read(descriptor, CHUNK_BYTES)
        is_end = not chunk
        if is_first:
            is_first, known = False, recognized_encoding(chunk[:HEAD_BYTES], encoding, "what was piped")
            decoder = None if known == UTF_8 else codecs.getincrementaldecoder(known)()
        if decoder:
            chunk = _decoded(decoder, chunk, is_end=is_end)
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield bytes(unfinished + line)
            unfinished.clear()
        unfinished += rest
        if is_end:
            break
        if lines and due_s is None:
            due_s = time.monotonic() + wait_s
    if unfinished:
        yield bytes(unfinished)


def _decoded(decoder: codecs.IncrementalDecoder, chunk: bytes, *, is_end: bool) -> bytes:
    try:
        return decoder.decode(chunk, final=is_end).encode()
    except UnicodeDecodeError as error:
        raise GiveUp(f"what was piped is not {error.encoding}: {error.reason}; name its encoding", USAGE) from None


def _read_ndjson(file: Iterable[bytes | None], ids: StableIds) -> Iterator[Line | Problem | None]:
    decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
    number = 0
    for raw in file:
        if raw is None:
            yield None
            continue
        number += 1
        line = (raw if number > 1 else raw.removeprefix(codecs.BOM_UTF8)).strip()
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
        if complaint := _early(bytes(event.get("timestamp", b""))):
            yield Problem(number, f"timestamp: {complaint}")
            continue
        if bytes(event.get("external_id", b"null")) in (b"null", b'""'):
            comma = b"," if event else b""  # the last key wins, so a null before it does no harm
            line = line[:-1] + comma + b'"external_id":"' + ids.next(line).encode() + b'"}'
        yield Line(number, line)


def _early(raw: bytes) -> str:
    """What is wrong with a timestamp that is a number, or the text of one, of a time before 1973."""
    token = raw.strip(b'"').decode(errors="replace")
    if not JSON_NUMBER.fullmatch(token) or "e" in token.lower():
        return ""
    way_on = early_time(token)
    return f"{token} would be a time before 1973; {way_on}" if way_on else ""


def _fields(decoder: "msgspec.json.Decoder[dict[str, msgspec.Raw]]", line: bytes) -> dict[str, msgspec.Raw]:
    """An event's values as they stand there, checked for what would refuse every other line of the request as well.

    Raises ValueError or MsgspecError.
    """
    if len(line) > EVENT_BYTES_MAX:
        raise ValueError(f"it has {len(line):,} bytes, and a whole request may have {BODY_BYTES_MAX:,}")
    if found := _foreign_byte(line):  # the decoder skips over the bytes of texts
        raise ValueError(found)
    try:
        return decoder.decode(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
