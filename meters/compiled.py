"""The compiled scanner of an event's line, and shared parts of the compiled loops: compiler options, times, hashes.

The loops themselves are ``ingest.admission.kernels`` and ``aggregator.decode.kernels``. They accept only ordinary
input, by the rules of ``meters.event`` and ``meters.timestamps``. Anything else is marked ODD or UNREADABLE, and the
full parser decides. So a loop can be wrong in two ways only: by accepting odd input as ordinary, or by reading beyond
a text. Property tests compare the loops with the full parser, also on damaged input.

``after_event`` is the one scanner of an event: it finds where each field's text begins and ends. A backslash, a control
character or a space other than a blank makes an event odd. The scanner is stricter with an event that was not
validated before, because the gateway accepts what it returns. Its functions return the offset behind what they read.
On a syntax error they return ``end``: the byte there continues no event, so every caller fails without further checks.

Numba compiles each of these modules at its first import, which takes a few seconds, and caches the result (in the
folder NUMBA_CACHE_DIR, or beside the module); later imports take less than a second. Import them in a thread.
"""

import pkgutil
import sys
import zlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import xxhash
import xxhash._xxhash as _xxhash  # type: ignore[import-not-found]
from llvmlite import ir
from llvmlite.binding import address_of_symbol, load_library_permanently
from numba import boolean, int32, int64, njit, types, uint8, uint64
from numba.core import cgutils
from numba.extending import intrinsic

from meters.errors import COST_INTEGER_DIGITS_MAX, STRING_LENGTH_MAX
from meters.timestamps import UNREADABLE

ODD = -1
"""There is something that these loops do not read."""
MISSING = -1
"""Where a field would end, or which one it would be."""

QUOTE, BACKSLASH, COLON, COMMA, BLANK, NEWLINE = b'"\\:, \n'
MINUS, PLUS, POINT, ZERO, NINE = b"-+.09"
OBJECT, OBJECT_END, LIST, LIST_END = b"{}[]"
TRUE, FALSE, NULL = (np.frombuffer(word, np.uint8) for word in (b"true", b"false", b"null"))
_T, _Z = b"TZ"
_MICROSECONDS = 1_000_000
_TIME_BYTES_MIN = len("2026-03-01T10:00:00Z")
_HASHED_BYTES = 300  # for a look whether hashes are right: more than XXH3 treats in another way

Text = types.CPointer(uint8)
"""Bytes of an object of Python, behind which Python keeps a 0. No loop passes that, so none asks for the end."""
Bytes = types.Array(uint8, 1, "C", readonly=True)
Ends = types.Array(int32, 1, "C", readonly=True)
Function = TypeVar("Function", bound=Callable[..., Any])

_SYMBOLS = ("XXH3_64bits", "XXH3_64bits_withSeed", "XXH3_128bits")
load_library_permanently(_xxhash.__file__)
if sys.platform == "win32" or None in map(address_of_symbol, _SYMBOLS):
    raise ImportError("this build of xxhash does not show its functions in C")
hash_64: Any = types.ExternalFunction("XXH3_64bits", uint64(uint64, uint64))
hash_64_seeded: Any = types.ExternalFunction("XXH3_64bits_withSeed", uint64(uint64, uint64, uint64))
copy_bytes: Any = types.ExternalFunction("memcpy", uint64(uint64, uint64, uint64))  # to, from, how many

_MEANT = zlib.crc32(b"".join(pkgutil.get_data("meters", name) or b"" for name in ("compiled.py", "errors.py")))


def kernel(signature: Any, *, lock: bool = False) -> Callable[[Function], Function]:
    """Compile a function for one signature, to run without the interpreter's lock or with it."""

    def compiled(function: Function) -> Function:
        # What Numba keeps has the functions and limits of these sources in it, so its name says which ones.
        function.__qualname__ += f".{_MEANT:x}"
        try:
            return cast(Function, njit(signature, nogil=not lock, cache=True)(function))
        except RuntimeError:  # no folder to keep it in: it is compiled again by the next process
            return cast(Function, njit(signature, nogil=not lock)(function))

    return compiled


def keys_table(*names: str) -> tuple[Any, Any]:
    """Names for ``place_of``: end to end, and where each ends."""
    return np.frombuffer("".join(names).encode(), np.uint8), np.cumsum([len(name) for name in names]).astype(np.int32)


def _text_at(typing: Any, address: Any) -> Any:
    """The text at an address. An array that is handed on has its references counted; a look into it tests a sign."""

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return Text(uint64), call


def _hash_128(typing: Any, address: Any, length: Any) -> Any:
    """The high and the low half. C returns them as two words, which Numba has no type for, but LLVM has."""

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.LiteralStructType([word, word]), [word, word])
        found = builder.call(cgutils.get_or_insert_function(builder.module, kind, "XXH3_128bits"), arguments)
        halves = [builder.extract_value(found, 1), builder.extract_value(found, 0)]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(uint64, 2)(uint64, uint64), call


text_at: Any = intrinsic(_text_at)
hash_128: Any = intrinsic(_hash_128)


@kernel(int64(Text, int64))
def after_digits(text: Any, at: Any) -> Any:
    """Behind all digits that stand there."""
    while ZERO <= text[at] <= NINE:
        at += 1
    return at


@kernel(int64(Text, int64))
def after_blanks(text: Any, at: Any) -> Any:
    """Behind all blanks that stand there; no other space is one."""
    while text[at] == BLANK:
        at += 1
    return at


@kernel(int64(Text, int64, int64, Bytes, Ends))
def place_of(text: Any, begin: Any, end: Any, names: Any, ends: Any) -> Any:
    """Which of the names stands there, or MISSING."""
    first = 0
    for place in range(len(ends)):
        last = ends[place]
        if last - first == end - begin:
            same = 0
            while same < end - begin and text[begin + same] == names[first + same]:
                same += 1
            if same == end - begin:
                return place
        first = last
    return MISSING


METADATA_KEYS_MAX = 32
"""Keys of an unchecked event's metadata. Each is compared with all before it, so more are for the careful reading."""

_FIELDS = (
    "name", "external_customer_id", "external_id", "timestamp", "metadata", "customer_id", "member_id",
    "external_member_id", "parent_id",
)  # fmt: skip
FIELDS = len(_FIELDS)
(
    NAME, EXTERNAL_CUSTOMER_ID, EXTERNAL_ID, TIMESTAMP, METADATA, CUSTOMER_ID, MEMBER_ID, EXTERNAL_MEMBER_ID, PARENT_ID
) = range(FIELDS)  # fmt: skip

_KEYS, _KEY_ENDS = keys_table(*_FIELDS)
_TEXT, _COUNT, _CENTS, _CURRENCY = range(4)  # kinds of values
_COST, _COST_ENDS = keys_table("amount", "currency")
_COST_KINDS = np.array([_CENTS, _CURRENCY], np.int32)
_COST_NEEDED = 0b11
_LLM, _LLM_ENDS = keys_table(
    "vendor", "model", "input_tokens", "output_tokens", "total_tokens", "cached_input_tokens"
)
_LLM_KINDS = np.array([_TEXT] * 2 + [_COUNT] * 4, np.int32)
_LLM_NEEDED = 0b11111
_RESERVED, _RESERVED_ENDS = keys_table("_cost", "_llm")
_USD, _USD_ENDS = keys_table("usd")
_DIGITS_MAX = 18  # surely fit into 64 bits
_ANY_DIGITS = 1 << 60
_DEPTH_MAX = 60  # an integer has a bit for each level
_LARGE_E, _SMALL_E = b"Ee"

Spans = int32[:, ::1]
"""Where texts begin and end. A text's span lies within its quotes, that of metadata includes its braces."""


@kernel(int64(Text, int64, int64, int64))
def after(text: Any, at: Any, byte: Any, end: Any) -> Any:
    """Behind a byte and the blanks around it."""
    at = after_blanks(text, at)
    return after_blanks(text, at + 1) if text[at] == byte else end


@kernel(int64(Text, int64, int64))
def _after_text(text: Any, at: Any, end: Any) -> Any:
    """Behind a text that has no escape and no control character."""
    if text[at] != QUOTE:
        return end
    at += 1
    while text[at] != QUOTE and text[at] != BACKSLASH and text[at] >= BLANK:
        at += 1
    return at + 1 if text[at] == QUOTE else end


@kernel(types.UniTuple(int64, 3)(Text, int64, int64))
def key_at(text: Any, at: Any, end: Any) -> Any:
    """Where a key begins and ends, and where its value begins."""
    behind = _after_text(text, at, end)
    return at + 1, behind - 1, after(text, behind, COLON, end)


@kernel(int64(Text, int64, Bytes, int64))
def _after_word(text: Any, at: Any, word: Any, end: Any) -> Any:
    for place in range(len(word)):
        if text[at + place] != word[place]:
            return end
    return at + len(word)


@kernel(int64(Text, int64, int64, int64, int64))
def _after_number(text: Any, at: Any, digits_max: Any, decimals_max: Any, end: Any) -> Any:
    """Behind a number without exponent, of so many digits before its point and so many behind it at most."""
    at += text[at] == MINUS
    begin, at = at, after_digits(text, at)
    if not 1 <= at - begin <= digits_max or (text[begin] == ZERO and at - begin > 1):
        return end
    if text[at] != POINT:
        return at
    begin, at = at + 1, after_digits(text, at + 1)
    return at if 1 <= at - begin <= decimals_max else end


@kernel(int64(Text, int64, int64))
def _after_any_number(text: Any, at: Any, end: Any) -> Any:
    at = _after_number(text, at, _ANY_DIGITS, _ANY_DIGITS, end)
    if text[at] != _SMALL_E and text[at] != _LARGE_E:
        return at
    at += 1
    at += text[at] == PLUS or text[at] == MINUS
    behind = after_digits(text, at)
    return behind if behind > at else end


@kernel(int64(Text, int64, int64))
def _after_scalar(text: Any, at: Any, end: Any) -> Any:
    """Behind a text, true, false, null or a number."""
    if text[at] == QUOTE:
        return _after_text(text, at, end)
    for word in (TRUE, FALSE, NULL):
        if text[at] == word[0]:
            return _after_word(text, at, word, end)
    return _after_any_number(text, at, end)


@kernel(int64(Text, int64, int64))
def _after_any(text: Any, at: Any, end: Any) -> Any:
    """Behind any value of JSON, be it an object or a list."""
    depth, objects = 0, 0  # ``objects`` has a bit for each open bracket: 1 for a brace
    while at != end:
        byte = text[at]
        if byte in (OBJECT, LIST):
            if depth == _DEPTH_MAX:
                return end
            depth, objects, at = depth + 1, (objects << 1) | (byte == OBJECT), after_blanks(text, at + 1)
            if text[at] != (OBJECT_END if byte == OBJECT else LIST_END):
                if byte == OBJECT:
                    _, _, at = key_at(text, at, end)
                continue
        else:
            at = _after_scalar(text, at, end)
        following = after_blanks(text, at)
        while depth > 0 and text[following] == (OBJECT_END if objects & 1 else LIST_END):
            depth, objects, at = depth - 1, objects >> 1, following + 1
            following = after_blanks(text, at)
        if depth == 0:
            return at
        at = after(text, following, COMMA, end)
        if objects & 1:
            _, _, at = key_at(text, at, end)
    return end


@kernel(int64(Text, int64, int64))
def _after_value(text: Any, at: Any, end: Any) -> Any:
    """Behind an ordinary value of metadata."""
    if text[at] == QUOTE:
        behind = _after_text(text, at, end)
        return behind if 1 <= behind - at - 2 <= STRING_LENGTH_MAX else end
    if text[at] == TRUE[0]:
        return _after_word(text, at, TRUE, end)
    if text[at] == FALSE[0]:
        return _after_word(text, at, FALSE, end)
    return _after_number(text, at, _DIGITS_MAX, _DIGITS_MAX, end)


@kernel(int64(Text, int64, int64, int64))
def _after_known(text: Any, at: Any, kind: Any, end: Any) -> Any:
    """Behind a value whose kind its key says."""
    if kind == _COUNT:
        return _after_number(text, at, _DIGITS_MAX, 0, end)
    if kind == _CENTS:
        return _after_number(text, at, COST_INTEGER_DIGITS_MAX, _DIGITS_MAX, end)
    behind = _after_text(text, at, end)
    if kind == _CURRENCY and place_of(text, at + 1, behind - 1, _USD, _USD_ENDS) == MISSING:
        return end
    return behind


@kernel(int64(Text, int64, Bytes, Ends, Ends, int64, int64))
def _after_reserved(text: Any, at: Any, names: Any, ends: Any, kinds: Any, needed: Any, end: Any) -> Any:
    """Behind an object of known keys."""
    seen, more = 0, True
    at = after(text, at, OBJECT, end)
    while more:
        first, last, at = key_at(text, at, end)
        place = place_of(text, first, last, names, ends)
        if place == MISSING or (seen >> place) & 1:
            return end
        seen |= 1 << place
        at = after_blanks(text, _after_known(text, at, kinds[place], end))
        more = text[at] == COMMA
        at = after(text, at, COMMA if more else OBJECT_END, end)
    return at if seen & needed == needed else end


@kernel(boolean(Text, int64, int64, Spans, int64))
def _is_new(text: Any, begin: Any, end: Any, keys: Any, count: Any) -> Any:
    """Whether none of so many keys is the same."""
    for known in range(count):
        first, last = keys[known]
        if last - first == end - begin:
            same = 0
            while same < end - begin and text[begin + same] == text[first + same]:
                same += 1
            if same == end - begin:
                return False
    return True


@kernel(int64(Text, int64, Spans, int64))
def _after_metadata(text: Any, at: Any, keys: Any, end: Any) -> Any:
    """Behind metadata that no check would refuse, and that gives no key twice; ``keys`` is room for its keys."""
    at = after(text, at, OBJECT, end)
    count, more = 0, text[at] != OBJECT_END
    while more:
        first, last, at = key_at(text, at, end)
        if at == end or count == len(keys) or not _is_new(text, first, last, keys, count):
            return end
        keys[count, 0], keys[count, 1] = first, last
        count += 1
        reserved = place_of(text, first, last, _RESERVED, _RESERVED_ENDS)
        if reserved == MISSING:
            at = _after_value(text, at, end)
        elif reserved == 0:
            at = _after_reserved(text, at, _COST, _COST_ENDS, _COST_KINDS, _COST_NEEDED, end)
        else:
            at = _after_reserved(text, at, _LLM, _LLM_ENDS, _LLM_KINDS, _LLM_NEEDED, end)
        at = after_blanks(text, at)
        more = text[at] == COMMA
        if more:
            at = after_blanks(text, at + 1)
    return at + 1 if text[at] == OBJECT_END else end


@kernel(int64(Text, int64, boolean, Spans, Spans, int64))
def after_event(text: Any, at: Any, checked: Any, keys: Any, spans: Any, end: Any) -> Any:
    """Behind an event's closing brace, or ODD. ``spans`` get the place of each field; MISSING for its end if none.

    An event that nobody ``checked`` has no unknown key, no key twice and ordinary metadata; ``keys`` is room for
    METADATA_KEYS_MAX of its keys. A checked one may have any value where the gateway looks at none.
    """
    for field in range(FIELDS):
        spans[field, 0], spans[field, 1] = 0, MISSING
    at, more = after(text, at, OBJECT, end), True
    while more:
        first, last, begin = key_at(text, at, end)
        field = place_of(text, first, last, _KEYS, _KEY_ENDS)
        if not checked and (field == MISSING or spans[field, 0] > 0):
            return ODD
        if field == MISSING:
            at = _after_any(text, begin, end)
        elif field == METADATA:
            if not checked:
                at = _after_metadata(text, begin, keys, end)
            else:
                at = _after_any(text, begin, end) if text[begin] == OBJECT else end
            spans[field, 0], spans[field, 1] = begin, at
        elif text[begin] == NULL[0] and field != TIMESTAMP:
            at = _after_word(text, begin, NULL, end)
            spans[field, 0], spans[field, 1] = begin, MISSING
        else:
            at = _after_text(text, begin, end)
            spans[field, 0], spans[field, 1] = begin + 1, at - 1
        at = after_blanks(text, at)
        more = text[at] == COMMA
        if more:
            at = after_blanks(text, at + 1)
    return at + 1 if text[at] == OBJECT_END else ODD


@kernel(int64(Text, int64, int64))
def _digits(text: Any, at: Any, count: Any) -> Any:
    """The number that so many digits write, or ODD."""
    value = 0
    for place in range(at, at + count):
        if not ZERO <= text[place] <= NINE:
            return ODD
        value = 10 * value + text[place] - ZERO
    return value


@kernel(int64(int64, int64, int64))
def _days(year: Any, month: Any, day: Any) -> Any:
    """Days since 1970, or UNREADABLE where the calendar has no such day."""
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    length = 29 if month == 2 and leap else 28 if month == 2 else 30 if month in (4, 6, 9, 11) else 31
    if not (1 <= month <= 12 and 1 <= day <= length):
        return UNREADABLE
    years = year - (month <= 2)  # that begin in March, so that the day a leap year has more is the last
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return 365 * years + years // 4 - years // 100 + years // 400 + of_year - 719_468


@kernel(int64(Text, int64, int64))
def _zone(text: Any, begin: Any, end: Any) -> Any:
    """The seconds east of Greenwich that ``Z`` or ``+01:00`` says, or UNREADABLE."""
    if end - begin == 1 and text[begin] == _Z:
        return 0
    if end - begin != 6 or text[begin + 3] != COLON or not (text[begin] == PLUS or text[begin] == MINUS):
        return UNREADABLE
    hours, minutes = _digits(text, begin + 1, 2), _digits(text, begin + 4, 2)
    if not (0 <= hours <= 23 and 0 <= minutes <= 59):
        return UNREADABLE
    return (60 * hours + minutes) * (60 if text[begin] == PLUS else -60)


@kernel(int64(Text, int64, int64))
def read_time(text: Any, begin: Any, end: Any) -> Any:
    """Microseconds since 1970 of ``2026-03-01T10:00:00Z``, digits after a point or not; UNREADABLE for what differs."""
    if end - begin < _TIME_BYTES_MIN or text[begin + 4] != MINUS or text[begin + 7] != MINUS:
        return UNREADABLE
    if not (text[begin + 10] == _T or text[begin + 10] == BLANK):
        return UNREADABLE
    if text[begin + 13] != COLON or text[begin + 16] != COLON:
        return UNREADABLE
    year, month, day = _digits(text, begin, 4), _digits(text, begin + 5, 2), _digits(text, begin + 8, 2)
    hour, minute, second = _digits(text, begin + 11, 2), _digits(text, begin + 14, 2), _digits(text, begin + 17, 2)
    if not (1 < year < 9999 and 0 <= hour <= 23 and 0 <= minute <= 59 and 0 <= second <= 59):
        return UNREADABLE
    fraction, unit, at = 0, _MICROSECONDS, begin + 19
    if text[at] == POINT:
        at += 1
        while at < end and ZERO <= text[at] <= NINE:
            unit //= 10  # 0 for what is finer than a microsecond, which is cut
            fraction += (text[at] - ZERO) * unit
            at += 1
        if at == begin + 20:
            return UNREADABLE
    days, east = _days(year, month, day), _zone(text, at, end)
    if days == UNREADABLE or east == UNREADABLE:
        return UNREADABLE
    return (((days * 24 + hour) * 60 + minute) * 60 + second - east) * _MICROSECONDS + fraction


@kernel(types.UniTuple(uint64, 4)(Bytes, int64))
def _hashes(text: Any, length: Any) -> Any:
    address, bytes_ = uint64(text.ctypes.data), uint64(length)
    hi, lo = hash_128(address, bytes_)
    return hash_64(address, bytes_), hash_64_seeded(address, bytes_, uint64(length)), hi, lo


def _check() -> None:
    """Raise ImportError where the hashes are not those of ``xxhash``: a processor may return two words otherwise."""
    text = np.arange(_HASHED_BYTES, dtype=np.uint8)
    for length in range(_HASHED_BYTES):
        plain = bytes(text[:length])
        halves = divmod(xxhash.xxh3_128_intdigest(plain), 1 << 64)
        if _hashes(text, length) != (
            xxhash.xxh3_64_intdigest(plain), xxhash.xxh3_64_intdigest(plain, length), *halves
        ):
            raise ImportError("xxhash is called otherwise on this processor")


_check()
