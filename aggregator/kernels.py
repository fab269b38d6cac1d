"""What is done to every byte of every line, compiled: loops over arrays, which hold no interpreter's lock.

``scan`` reads lines of JSON. It is as strict as ``msgspec``, and stricter: an escape, a tab between tokens, a field of
another type, a line without a name or an external id are odd, and a line that is odd is for ``apply`` to read. All it
can do wrong is to take something odd for ordinary, and a property test holds it against ``apply`` there.

Quotes are found first, in a loop without branches. Where a text has no backslash every second quote ends a string,
whatever stands in it, so most of a line is jumped over.

Numba compiles this module when it is first imported, in some four seconds, and keeps the result beside it, or where
NUMBA_CACHE_DIR says; from then on importing takes 0.6 to 0.9 s. ``quick`` imports it, in a thread, when that pays.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import xxhash
import xxhash._xxhash as _xxhash  # type: ignore[import-not-found]
from llvmlite import ir
from llvmlite.binding import address_of_symbol, load_library_permanently
from numba import boolean, int32, int64, njit, types, uint8, uint64, void
from numba.core import cgutils
from numba.extending import intrinsic

from aggregator.timestamps import UNREADABLE

_FIELDS = (
    "name", "metadata", "timestamp", "external_id", "external_customer_id", "customer_id", "member_id",
    "external_member_id", "parent_id",
)  # fmt: skip
FIELDS = len(_FIELDS)
(
    NAME, METADATA, TIMESTAMP, EXTERNAL_ID, EXTERNAL_CUSTOMER_ID, CUSTOMER_ID, MEMBER_ID, EXTERNAL_MEMBER_ID, PARENT_ID
) = range(FIELDS)  # fmt: skip
MISSING = -1
"""Where a field would end."""
ODD = -1
"""There is something that these loops do not read."""
UNKNOWN = -1
"""The number of a customer who has none yet."""

_DEPTH_MAX = 60  # an integer has a bit for each level
_KEYS = np.frombuffer("".join(_FIELDS).encode(), np.uint8)
_KEY_ENDS = np.cumsum([len(field) for field in _FIELDS]).astype(np.int32)
_TRUE, _FALSE, _NULL = (np.frombuffer(word, np.uint8) for word in (b"true", b"false", b"null"))
_EMPTY = np.frombuffer(b"{}", np.uint8)
_QUOTE, _BACKSLASH, _COLON, _COMMA, _BLANK, _NEWLINE = b'"\\:, \n'
_MINUS, _PLUS, _POINT, _ZERO, _NINE, _LARGE_E, _SMALL_E = b"-+.09Ee"
_OBJECT, _OBJECT_END, _LIST, _LIST_END, _T, _Z = b"{}[]TZ"
_OPENED, _KEY, _VALUE, _DONE = range(4)  # what comes next: the first in a bracket, a key, a value, or what follows one
_MICROSECONDS = 1_000_000
_TIME_BYTES_MIN = len("2026-03-01T10:00:00Z")

Text = types.Array(uint8, 1, "C", readonly=True)
Spans = int32[:, :, ::1]  # by line and field: where its text begins and ends
Lines = int32[:, ::1]  # where a line begins and ends
Function = TypeVar("Function", bound=Callable[..., Any])

load_library_permanently(_xxhash.__file__)
if sys.platform == "win32" or address_of_symbol("XXH3_64bits") is None or address_of_symbol("XXH3_128bits") is None:
    raise ImportError("this build of xxhash does not show its functions in C")
_hash_64 = types.ExternalFunction("XXH3_64bits", uint64(uint64, uint64))


def _kernel(signature: Any) -> Callable[[Function], Function]:
    def compiled(function: Function) -> Function:
        try:
            return cast(Function, njit(signature, nogil=True, cache=True)(function))
        except RuntimeError:  # no folder to keep it in: it is compiled again by the next process
            return cast(Function, njit(signature, nogil=True)(function))

    return compiled


@intrinsic
def _hash_128(typing: Any, address: Any, length: Any) -> Any:
    """The high and the low half. C returns them as two words, which Numba has no type for, but LLVM has."""

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.LiteralStructType([word, word]), [word, word])
        found = builder.call(cgutils.get_or_insert_function(builder.module, kind, "XXH3_128bits"), arguments)
        halves = [builder.extract_value(found, 1), builder.extract_value(found, 0)]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(uint64, 2)(uint64, uint64), call


@_kernel(int64(Text, int32[::1]))
def find_quotes(text: Any, places: Any) -> Any:
    """How many quotes there are, and where; ODD with a backslash, or a control character that ends no line."""
    odd = False
    for byte in text:
        odd |= (byte == _BACKSLASH) | ((byte < _BLANK) & (byte != _NEWLINE))
    if odd:
        return ODD
    count = 0
    for at in range(len(text)):
        places[count] = at
        count += text[at] == _QUOTE
    return count


@_kernel(int64(Text, int64))
def _after_digits(text: Any, at: Any) -> Any:
    while at < len(text) and _ZERO <= text[at] <= _NINE:
        at += 1
    return at


@_kernel(int64(Text, int64))
def _after_number(text: Any, at: Any) -> Any:
    end = len(text)
    at += text[at] == _MINUS
    after = at + 1 if at < end and text[at] == _ZERO else _after_digits(text, at)
    if after == at:
        return ODD
    at = after
    if at < end and text[at] == _POINT:
        after = _after_digits(text, at + 1)
        if after == at + 1:
            return ODD
        at = after
    if at < end and (text[at] == _SMALL_E or text[at] == _LARGE_E):
        at += 1
        at += at < end and (text[at] == _PLUS or text[at] == _MINUS)
        after = _after_digits(text, at)
        if after == at:
            return ODD
        at = after
    return at


@_kernel(int64(Text, int64))
def _after_scalar(text: Any, at: Any) -> Any:
    """Behind a number, true, false or null; ODD where none stands."""
    for word in (_TRUE, _FALSE, _NULL):
        if text[at] == word[0]:
            if at + len(word) > len(text):
                return ODD
            for place in range(len(word)):
                if text[at + place] != word[place]:
                    return ODD
            return at + len(word)
    return _after_number(text, at)


@_kernel(int64(Text, int64, int64))
def _field(text: Any, begin: Any, end: Any) -> Any:
    """Which field a key names."""
    first = 0
    for field in range(len(_KEY_ENDS)):
        last = _KEY_ENDS[field]
        if last - first == end - begin:
            place = 0
            while place < end - begin and text[begin + place] == _KEYS[first + place]:
                place += 1
            if place == end - begin:
                return field
        first = last
    return MISSING


@_kernel(int64(Text, int64))
def _after_blanks(text: Any, at: Any) -> Any:
    while at < len(text) and text[at] == _BLANK:
        at += 1
    return at


@_kernel(types.UniTuple(int64, 2)(Text, int64, int32[::1], int64, int64, int32[:, ::1]))
def _scan_line(text: Any, at: Any, quotes: Any, quotes_count: Any, quote: Any, spans: Any) -> Any:
    """Read one line from ``at`` on; where it ends and how many quotes were passed, or ODD and whatever."""
    end = len(text)
    depth, objects, state, field = 0, 0, _VALUE, MISSING  # ``objects`` has a bit for each open bracket: 1 for a brace
    while state != _DONE or depth > 0:
        at = _after_blanks(text, at)
        if at >= end:
            return ODD, quote
        byte = text[at]
        in_object = objects & 1 == 1
        if byte == _QUOTE and (state == _KEY or (state == _OPENED and in_object)):
            if quote + 1 >= quotes_count:
                return ODD, quote
            if depth == 1:
                field = _field(text, at + 1, quotes[quote + 1])
            at = _after_blanks(text, quotes[quote + 1] + 1)
            if at >= end or text[at] != _COLON:
                return ODD, quote
            at, quote, state = at + 1, quote + 2, _VALUE
        elif byte == _COMMA and state == _DONE:
            at, state = at + 1, _KEY if in_object else _VALUE
        elif byte == (_OBJECT_END if in_object else _LIST_END) and state in (_DONE, _OPENED):
            at, depth, objects, state = at + 1, depth - 1, objects >> 1, _DONE
            if depth == 1 and field == METADATA:
                spans[field, 1] = at
        elif state in (_KEY, _DONE) or (state == _OPENED and in_object):
            return ODD, quote
        elif byte in (_OBJECT, _LIST):
            known = depth == 1 and field != MISSING
            if depth == _DEPTH_MAX or (byte == _LIST and (depth == 0 or known)) or (known and field != METADATA):
                return ODD, quote
            if known:
                spans[field, 0] = at
            at, depth, objects, state = at + 1, depth + 1, (objects << 1) | (byte == _OBJECT), _OPENED
        elif byte == _QUOTE:
            if quote + 1 >= quotes_count or depth == 0 or (depth == 1 and field == METADATA):
                return ODD, quote
            if depth == 1 and field != MISSING:
                spans[field, 0], spans[field, 1] = at + 1, quotes[quote + 1]
            at, quote, state = quotes[quote + 1] + 1, quote + 2, _DONE
        else:
            at, state = _after_scalar(text, at), _DONE
            known = depth == 1 and field != MISSING
            if at == ODD or depth == 0 or (known and (field == METADATA or byte != _NULL[0])):
                return ODD, quote
            if known:
                spans[field, 1] = MISSING
    return at, quote


@_kernel(int64(Text, int32[::1], int64, Spans, Lines))
def scan(text: Any, quotes: Any, quotes_count: Any, spans: Any, lines: Any) -> Any:
    """Read as many lines as ``spans`` has rows; how many were read before the first that is odd.

    The span of a text lies within its quotes, that of metadata includes its braces.
    """
    at, quote = 0, 0
    for row in range(len(spans)):
        for field in range(FIELDS):
            spans[row, field, 0], spans[row, field, 1] = 0, MISSING
        lines[row, 0] = at
        at, quote = _scan_line(text, at, quotes, quotes_count, quote, spans[row])
        if at == ODD or spans[row, NAME, 1] == MISSING or spans[row, EXTERNAL_ID, 1] == MISSING:
            return row
        lines[row, 1] = at
        is_last = row + 1 == len(spans)
        if is_last != (at == len(text)) or not (is_last or text[at] == _NEWLINE):
            return row
        at += 1
    return len(spans)


@_kernel(void(Text, Spans, int64, int32[::1], uint8[::1]))
def gather(text: Any, spans: Any, field: Any, offsets: Any, out: Any) -> Any:
    """The texts of a field end to end, and where each begins; ``{}`` where there is no metadata."""
    at = np.uint64(0)
    for row in range(len(spans)):
        offsets[row] = at
        if spans[row, field, 1] == MISSING:
            if field == METADATA:
                for byte in _EMPTY:
                    out[at] = byte
                    at += np.uint64(1)
            continue
        begin = np.uint64(spans[row, field, 0])
        length = np.uint64(spans[row, field, 1]) - begin
        for place in range(length):
            out[at + place] = text[begin + place]
        at += length
    offsets[len(spans)] = at


@_kernel(void(Text, Lines, uint64[::1]))
def hash_lines(text: Any, lines: Any, out: Any) -> Any:
    """XXH3 of each line, 64 bits."""
    base = text.ctypes.data
    for row in range(len(lines)):
        out[row] = _hash_64(base + lines[row, 0], lines[row, 1] - lines[row, 0])


@_kernel(void(Text, Spans, int64, uint8[::1], int64, uint64[::1], uint64[::1]))
def hash_texts(text: Any, spans: Any, field: Any, room: Any, prefix_bytes: Any, hi: Any, lo: Any) -> Any:
    """XXH3 of what ``room`` begins with and a field's text behind it, 128 bits; rows without the field are left."""
    base = room.ctypes.data
    for row in range(len(spans)):
        begin, end = spans[row, field]
        if end != MISSING:
            for place in range(end - begin):
                room[prefix_bytes + place] = text[begin + place]
            hi[row], lo[row] = _hash_128(uint64(base), uint64(prefix_bytes + end - begin))


@_kernel(uint64(uint64[::1], uint64[::1], int32[::1], uint64, uint64))
def _slot(hi: Any, lo: Any, numbers: Any, own_hi: Any, own_lo: Any) -> Any:
    """Where a hash is, or belongs, in a table with open addresses: a power of two slots, some free (UNKNOWN)."""
    mask = np.uint64(len(numbers) - 1)
    slot = own_lo & mask
    while numbers[slot] != UNKNOWN and not (lo[slot] == own_lo and hi[slot] == own_hi):
        slot = (slot + np.uint64(1)) & mask
    return slot


@_kernel(void(uint64[::1], uint64[::1], int32[::1], uint64[::1], uint64[::1], int32[::1]))
def find_numbers(hi: Any, lo: Any, numbers: Any, his: Any, los: Any, found: Any) -> Any:
    """Look hashes up in such a table."""
    for row in range(len(his)):
        found[row] = numbers[_slot(hi, lo, numbers, his[row], los[row])]


@_kernel(void(uint64[::1], uint64[::1], int32[::1], uint64[::1], uint64[::1], int32[::1]))
def put_numbers(hi: Any, lo: Any, numbers: Any, his: Any, los: Any, put: Any) -> Any:
    """Put hashes with their numbers into such a table; it must have room for them."""
    for row in range(len(his)):
        slot = _slot(hi, lo, numbers, his[row], los[row])
        hi[slot], lo[slot], numbers[slot] = his[row], los[row], put[row]


@_kernel(int64(Text, int64, int64))
def _digits(text: Any, at: Any, count: Any) -> Any:
    """The number that so many digits write, or ODD."""
    value = 0
    for place in range(at, at + count):
        if not _ZERO <= text[place] <= _NINE:
            return ODD
        value = 10 * value + text[place] - _ZERO
    return value


@_kernel(int64(int64, int64, int64))
def _days(year: Any, month: Any, day: Any) -> Any:
    """Days since 1970, or UNREADABLE where the calendar has no such day."""
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    length = 29 if month == 2 and leap else 28 if month == 2 else 30 if month in (4, 6, 9, 11) else 31
    if not (1 <= month <= 12 and 1 <= day <= length):
        return UNREADABLE
    years = year - (month <= 2)  # that begin in March, so that the day a leap year has more is the last
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return 365 * years + years // 4 - years // 100 + years // 400 + of_year - 719_468


@_kernel(int64(Text, int64, int64))
def _zone(text: Any, begin: Any, end: Any) -> Any:
    """The seconds east of Greenwich that ``Z`` or ``+01:00`` says, or UNREADABLE."""
    if end - begin == 1 and text[begin] == _Z:
        return 0
    if end - begin != 6 or text[begin + 3] != _COLON or not (text[begin] == _PLUS or text[begin] == _MINUS):
        return UNREADABLE
    hours, minutes = _digits(text, begin + 1, 2), _digits(text, begin + 4, 2)
    if not (0 <= hours <= 23 and 0 <= minutes <= 59):
        return UNREADABLE
    return (60 * hours + minutes) * (60 if text[begin] == _PLUS else -60)


@_kernel(int64(Text, int64, int64))
def _time(text: Any, begin: Any, end: Any) -> Any:
    """Microseconds since 1970 of ``2026-03-01T10:00:00Z``, digits after a point or not; UNREADABLE for what differs."""
    if end - begin < _TIME_BYTES_MIN or text[begin + 4] != _MINUS or text[begin + 7] != _MINUS:
        return UNREADABLE
    if not (text[begin + 10] == _T or text[begin + 10] == _BLANK):
        return UNREADABLE
    if text[begin + 13] != _COLON or text[begin + 16] != _COLON:
        return UNREADABLE
    year, month, day = _digits(text, begin, 4), _digits(text, begin + 5, 2), _digits(text, begin + 8, 2)
    hour, minute, second = _digits(text, begin + 11, 2), _digits(text, begin + 14, 2), _digits(text, begin + 17, 2)
    if not (1 < year < 9999 and 0 <= hour <= 23 and 0 <= minute <= 59 and 0 <= second <= 59):
        return UNREADABLE
    fraction, unit, at = 0, _MICROSECONDS, begin + 19
    if text[at] == _POINT:
        at += 1
        while at < end and _ZERO <= text[at] <= _NINE:
            unit //= 10  # 0 for what is finer than a microsecond, which is cut
            fraction += (text[at] - _ZERO) * unit
            at += 1
        if at == begin + 20:
            return UNREADABLE
    days, east = _days(year, month, day), _zone(text, at, end)
    if days == UNREADABLE or east == UNREADABLE:
        return UNREADABLE
    return (((days * 24 + hour) * 60 + minute) * 60 + second - east) * _MICROSECONDS + fraction


@_kernel(boolean(Text, Spans, int64[::1]))
def read_times(text: Any, spans: Any, times: Any) -> Any:
    """The times of the lines that say one; whether none was UNREADABLE."""
    all_read = True
    for row in range(len(spans)):
        begin, end = spans[row, TIMESTAMP]
        if end != MISSING:
            times[row] = _time(text, begin, end)
            all_read &= times[row] != UNREADABLE
    return all_read


def _check() -> None:
    """Raise ImportError where the hashes are not those of ``xxhash``: a processor may return two words otherwise."""
    text = np.arange(300, dtype=np.uint8)
    spans = np.array([[[0, end]] for end in range(300)], np.int32)
    hi, lo, short = np.empty(300, np.uint64), np.empty(300, np.uint64), np.empty(300, np.uint64)
    hash_texts(text, spans, 0, np.empty(300, np.uint8), 0, hi, lo)
    hash_lines(text, spans[:, 0].copy(), short)
    for end in range(300):
        said = xxhash.xxh3_128_intdigest(bytes(text[:end])), xxhash.xxh3_64_intdigest(bytes(text[:end]))
        if said != ((int(hi[end]) << 64) + int(lo[end]), int(short[end])):
            raise ImportError("xxhash is called otherwise on this processor")


_check()
