"""Shared parts of the compiled loops over the bytes of events: compiler options, keys, times and hashes.

The loops themselves are ``ingest.admission.kernels`` and ``aggregator.decode.kernels``. They accept only ordinary
input, by the rules of ``meters.event`` and ``meters.timestamps``. Anything else is marked ODD or UNREADABLE, and the
full parser decides. So a loop can be wrong in two ways only: by accepting odd input as ordinary, or by reading beyond
a text. Property tests compare the loops with the full parser, also on damaged input.

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
from numba import int32, int64, njit, types, uint8, uint64
from numba.core import cgutils
from numba.extending import intrinsic

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
        # What Numba keeps has this module's functions and the limits of refusals in it, so its name says which ones.
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
