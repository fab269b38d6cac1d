"""Compiled loops over the bytes of event lines (Numba). They run without the interpreter's lock.

``scan`` parses JSON lines into spans of their fields. It is at least as strict as msgspec: an escape, a tab between
tokens, a field of an unexpected type, or a line without a name or external id is marked odd, and the decoders of
``decode.py`` read that line instead. The one possible error, taking an odd line for an ordinary one, is covered by a
property test against those decoders. The other functions hash lines and texts, look numbers up and read timestamps.

Quotes are found first, in a loop without branches. In a text without a backslash every second quote ends a string, so
most bytes of a line are skipped.

``decode.Quick`` imports this module in a thread, once enough lines have arrived (see ``meters.compiled``).
"""

from typing import Any

import numpy as np
from numba import boolean, int32, int64, types, uint8, uint32, uint64, void

from meters.compiled import (
    BACKSLASH,
    BLANK,
    COLON,
    COMMA,
    FALSE,
    LIST,
    LIST_END,
    MINUS,
    MISSING,
    NEWLINE,
    NULL,
    OBJECT,
    OBJECT_END,
    ODD,
    PLUS,
    POINT,
    QUOTE,
    TRUE,
    ZERO,
    Bytes,
    Text,
    after_blanks,
    after_digits,
    copy_bytes,
    hash_64,
    hash_128,
    kernel,
    keys_table,
    place_of,
    read_time,
    text_at,
)
from meters.timestamps import UNREADABLE

_FIELDS = (
    "name", "metadata", "timestamp", "external_id", "external_customer_id", "customer_id", "member_id",
    "external_member_id", "parent_id",
)  # fmt: skip
FIELDS = len(_FIELDS)
(
    NAME, METADATA, TIMESTAMP, EXTERNAL_ID, EXTERNAL_CUSTOMER_ID, CUSTOMER_ID, MEMBER_ID, EXTERNAL_MEMBER_ID, PARENT_ID
) = range(FIELDS)  # fmt: skip
UNKNOWN = -1
"""The number of a customer who has none yet."""

_DEPTH_MAX = 60  # an integer has a bit for each level
_KEYS, _KEY_ENDS = keys_table(*_FIELDS)
_EMPTY = np.frombuffer(b"{}", np.uint8)
_LARGE_E, _SMALL_E = b"Ee"
_OPENED, _KEY, _VALUE, _DONE = range(4)  # what comes next: the first in a bracket, a key, a value, or what follows one

Spans = int32[:, :, ::1]  # by line and field: where its text begins and ends
Lines = int32[:, ::1]  # where a line begins and ends


@kernel(int64(Bytes, int32[::1]))
def find_quotes(text: Any, places: Any) -> Any:
    """How many quotes there are, and where; ODD with a backslash, or a control character that ends no line."""
    odd = False
    for byte in text:
        odd |= (byte == BACKSLASH) | ((byte < BLANK) & (byte != NEWLINE))
    if odd:
        return ODD
    count = 0
    for at in range(len(text)):
        places[count] = at
        count += text[at] == QUOTE
    return count


@kernel(int64(Text, int64))
def _after_number(text: Any, at: Any) -> Any:
    at += text[at] == MINUS
    after = at + 1 if text[at] == ZERO else after_digits(text, at)
    if after == at:
        return ODD
    at = after
    if text[at] == POINT:
        after = after_digits(text, at + 1)
        if after == at + 1:
            return ODD
        at = after
    if text[at] == _SMALL_E or text[at] == _LARGE_E:
        at += 1
        at += text[at] == PLUS or text[at] == MINUS
        after = after_digits(text, at)
        if after == at:
            return ODD
        at = after
    return at


@kernel(int64(Text, int64))
def _after_scalar(text: Any, at: Any) -> Any:
    """Behind a number, true, false or null; ODD where none stands."""
    for word in (TRUE, FALSE, NULL):
        if text[at] == word[0]:
            for place in range(len(word)):
                if text[at + place] != word[place]:
                    return ODD
            return at + len(word)
    return _after_number(text, at)


@kernel(types.UniTuple(int64, 2)(Text, int64, int32[::1], int64, int64, int32[:, ::1]))
def _scan_line(text: Any, at: Any, quotes: Any, quotes_count: Any, quote: Any, spans: Any) -> Any:
    """Read one line from ``at`` on; where it ends and how many quotes were passed, or ODD and whatever."""
    depth, objects, state, field = 0, 0, _VALUE, MISSING  # ``objects`` has a bit for each open bracket: 1 for a brace
    while state != _DONE or depth > 0:
        at = after_blanks(text, at)
        byte = text[at]
        in_object = objects & 1 == 1
        if byte == QUOTE and (state == _KEY or (state == _OPENED and in_object)):
            if quote + 1 >= quotes_count:
                return ODD, quote
            if depth == 1:
                field = place_of(text, at + 1, quotes[quote + 1], _KEYS, _KEY_ENDS)
            at = after_blanks(text, quotes[quote + 1] + 1)
            if text[at] != COLON:
                return ODD, quote
            at, quote, state = at + 1, quote + 2, _VALUE
        elif byte == COMMA and state == _DONE:
            at, state = at + 1, _KEY if in_object else _VALUE
        elif byte == (OBJECT_END if in_object else LIST_END) and state in (_DONE, _OPENED):
            at, depth, objects, state = at + 1, depth - 1, objects >> 1, _DONE
            if depth == 1 and field == METADATA:
                spans[field, 1] = at
        elif state in (_KEY, _DONE) or (state == _OPENED and in_object):
            return ODD, quote
        elif byte in (OBJECT, LIST):
            known = depth == 1 and field != MISSING
            if depth == _DEPTH_MAX or (byte == LIST and (depth == 0 or known)) or (known and field != METADATA):
                return ODD, quote
            if known:
                spans[field, 0] = at
            at, depth, objects, state = at + 1, depth + 1, (objects << 1) | (byte == OBJECT), _OPENED
        elif byte == QUOTE:
            if quote + 1 >= quotes_count or depth == 0 or (depth == 1 and field == METADATA):
                return ODD, quote
            if depth == 1 and field != MISSING:
                spans[field, 0], spans[field, 1] = at + 1, quotes[quote + 1]
            at, quote, state = quotes[quote + 1] + 1, quote + 2, _DONE
        else:
            at, state = _after_scalar(text, at), _DONE
            known = depth == 1 and field != MISSING
            if at == ODD or depth == 0 or (known and (field == METADATA or byte != NULL[0])):
                return ODD, quote
            if known:
                spans[field, 1] = MISSING
    return at, quote


@kernel(int64(Bytes, int32[::1], int64, Spans, Lines))
def scan(joined: Any, quotes: Any, quotes_count: Any, spans: Any, lines: Any) -> Any:
    """Read as many lines as ``spans`` has rows; how many were read before the first that is odd.

    The span of a text lies within its quotes, that of metadata includes its braces.
    """
    at, quote, text = 0, 0, text_at(uint64(joined.ctypes.data))
    for row in range(len(spans)):
        for field in range(FIELDS):
            spans[row, field, 0], spans[row, field, 1] = 0, MISSING
        lines[row, 0] = at
        at, quote = _scan_line(text, at, quotes, quotes_count, quote, spans[row])
        if at == ODD or spans[row, NAME, 1] == MISSING or spans[row, EXTERNAL_ID, 1] == MISSING:
            return row
        lines[row, 1] = at
        is_last = row + 1 == len(spans)
        if is_last != (at == len(joined)) or not (is_last or text[at] == NEWLINE):
            return row
        at += 1
    return len(spans)


@kernel(void(Bytes, Spans, int64, int32[::1], uint8[::1]))
def gather(text: Any, spans: Any, field: Any, offsets: Any, out: Any) -> Any:
    """The texts of a field end to end, and where each begins; ``{}`` where there is no metadata."""
    at, source, target = np.uint64(0), uint64(text.ctypes.data), uint64(out.ctypes.data)
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
        copy_bytes(target + at, source + begin, length)
        at += length
    offsets[len(spans)] = at


@kernel(void(Bytes, Lines, uint64[::1]))
def hash_lines(text: Any, lines: Any, out: Any) -> Any:
    """XXH3 of each line, 64 bits."""
    base = text.ctypes.data
    for row in range(len(lines)):
        out[row] = hash_64(base + lines[row, 0], lines[row, 1] - lines[row, 0])


@kernel(void(Bytes, Spans, int64, uint8[::1], int64, uint64[::1], uint64[::1]))
def hash_texts(text: Any, spans: Any, field: Any, room: Any, prefix_bytes: Any, hi: Any, lo: Any) -> Any:
    """XXH3 of what ``room`` begins with and a field's text behind it, 128 bits; rows without the field are left."""
    base = room.ctypes.data
    for row in range(len(spans)):
        begin, end = spans[row, field]
        if end != MISSING:
            for place in range(end - begin):
                room[prefix_bytes + place] = text[begin + place]
            hi[row], lo[row] = hash_128(uint64(base), uint64(prefix_bytes + end - begin))


@kernel(uint64(uint64[::1], uint64[::1], int32[::1], uint64, uint64))
def _slot(hi: Any, lo: Any, numbers: Any, own_hi: Any, own_lo: Any) -> Any:
    """Where a hash is, or belongs, in a table with open addresses: a power of two slots, some free (UNKNOWN)."""
    mask = np.uint64(len(numbers) - 1)
    slot = own_lo & mask
    while numbers[slot] != UNKNOWN and not (lo[slot] == own_lo and hi[slot] == own_hi):
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel(void(uint64[::1], uint64[::1], int32[::1], uint64[::1], uint64[::1], int32[::1]))
def find_numbers(hi: Any, lo: Any, numbers: Any, his: Any, los: Any, found: Any) -> Any:
    """Look hashes up in such a table."""
    for row in range(len(his)):
        found[row] = numbers[_slot(hi, lo, numbers, his[row], los[row])]


@kernel(void(uint64[::1], uint64[::1], int32[::1], uint64[::1], uint64[::1], int32[::1]))
def put_numbers(hi: Any, lo: Any, numbers: Any, his: Any, los: Any, put: Any) -> Any:
    """Put hashes with their numbers into such a table; it must have room for them."""
    for row in range(len(his)):
        slot = _slot(hi, lo, numbers, his[row], los[row])
        hi[slot], lo[slot], numbers[slot] = his[row], los[row], put[row]


@kernel(void(uint64[::1], uint32[::1], uint64, uint64[::1], int64[::1]))
def search(words: Any, begins: Any, shift: Any, asked: Any, found: Any) -> Any:
    """For each word asked for, the first row of the ordered words that is not less; index: ``identities.Prefixes``."""
    for row in range(len(asked)):
        entry = asked[row] >> shift
        low, high = uint64(begins[entry]), uint64(begins[entry + np.uint64(1)])
        while low < high:
            middle = (low + high) >> np.uint64(1)
            if words[middle] < asked[row]:
                low = middle + np.uint64(1)
            else:
                high = middle
        found[row] = low


@kernel(boolean(Bytes, Spans, int64[::1]))
def read_times(joined: Any, spans: Any, times: Any) -> Any:
    """The times of the lines that say one; whether none was UNREADABLE."""
    all_read, text = True, text_at(uint64(joined.ctypes.data))
    for row in range(len(spans)):
        begin, end = spans[row, TIMESTAMP]
        if end != MISSING:
            times[row] = read_time(text, begin, end)
            all_read &= times[row] != UNREADABLE
    return all_read
