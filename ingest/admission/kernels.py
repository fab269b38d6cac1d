"""Compiled loops of admission: the fast reader, the partitioner and the table of recent identities.

* ``read`` checks ordinary bodies, cuts them into lines and hashes the lines, without a Python object for each event.
* ``spread`` distributes the lines over partitions, by the same hash as ``meters.log``.
* ``Table`` holds the hashes of recent events for ``ingest.admission.duplicates``.

``read`` accepts only ordinary events and stops at the first body that has another one; ``ingest.admission.validate``
reads that body. Numba compiles the module at its first import: ``ingest.admission.intake`` imports it in a thread
(see ``meters.compiled``).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import boolean, int32, int64, types, uint8, uint64

from ingest.limits import PARTITIONS_TOGETHER_MAX
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
    POINT,
    QUOTE,
    TRUE,
    ZERO,
    Bytes,
    Ends,
    Text,
    after_blanks,
    after_digits,
    copy_bytes,
    hash_64,
    hash_64_seeded,
    kernel,
    keys_table,
    place_of,
    read_time,
    text_at,
)
from meters.errors import COST_INTEGER_DIGITS_MAX, NAME_LENGTH_MAX, STRING_LENGTH_MAX
from meters.log import MULTIPLIER, POSITIVE, SEED, WORD

# The lines of a body by partition, in compiled loops: what ``ingest.admission.partitioner`` does, without an object
# for a line.
#
# Kafka's hash takes Python some microseconds for each customer, and a line in a list of its own takes as much as its
# checks did. Here an event takes 0.15 us. See ``meters.log`` for the hash.

_BLOCK_BYTES = 4
_CUSTOMER = 4  # the column of places in which a customer begins; the next one has its end
Places = int32[:, ::1]
_BIT_LAST = PARTITIONS_TOGETHER_MAX - 1


@kernel(uint64(uint8[::1], int64))
def _murmur2(data: Any, length: Any) -> Any:
    word, multiplier = np.uint64(WORD), np.uint64(MULTIPLIER)
    digest, at = np.uint64(SEED) ^ np.uint64(length), 0
    while at + _BLOCK_BYTES <= length:
        low, high = np.uint64(data[at]) | np.uint64(data[at + 1]) << np.uint64(8), np.uint64(data[at + 2])
        block = (low | high << np.uint64(16) | np.uint64(data[at + 3]) << np.uint64(24)) * multiplier & word
        digest = digest * multiplier & word ^ (block ^ block >> np.uint64(24)) * multiplier & word
        at += _BLOCK_BYTES
    if at < length:
        left = np.uint64(0)
        for place in range(at, length):
            left |= np.uint64(data[place]) << np.uint64(8 * (place - at))
        digest = (digest ^ left) * multiplier & word
    digest = (digest ^ digest >> np.uint64(13)) * multiplier & word
    return digest ^ digest >> np.uint64(15)


@kernel(
    int64(Bytes, Places, int64[::1], uint8[::1], int64, int64[::1], uint8[::1], int64[::1], uint64[::1]), lock=True
)
def _spread(
    value: Any, places: Any, rows: Any, key: Any, begun_bytes: Any, partitions: Any, joined: Any, ends: Any,
    masks: Any,
) -> Any:
    """Copy each line to those of its partition; ``ends`` say where these end, one place behind a newline.

    A bit of a body's mask is set for each of the first 64 partitions it has lines in; ``rows`` say where bodies end.
    """
    address, key_address = uint64(value.ctypes.data), uint64(key.ctypes.data)
    for row in range(len(places)):
        customer, length = places[row, _CUSTOMER], places[row, _CUSTOMER + 1] - places[row, _CUSTOMER]
        copy_bytes(key_address + uint64(begun_bytes), address + uint64(customer), uint64(length))
        digest = _murmur2(key, begun_bytes + length) & np.uint64(POSITIVE)
        partitions[row] = np.int64(digest % np.uint64(len(ends)))
        ends[partitions[row]] += places[row, 1] - places[row, 0] + 1
    row = 0
    for body in range(len(rows)):
        while row < rows[body]:
            masks[body] |= np.uint64(1) << np.uint64(partitions[row] & _BIT_LAST)
            row += 1
    begin = 0
    for partition in range(len(ends)):
        begin, ends[partition] = begin + ends[partition], begin
    for row in range(len(places)):
        at, length = ends[partitions[row]], places[row, 1] - places[row, 0]
        copy_bytes(uint64(joined.ctypes.data) + uint64(at), address + uint64(places[row, 0]), uint64(length))
        joined[at + length] = NEWLINE
        ends[partitions[row]] = at + length + 1
    return begin


def spread(
    value: bytes, places: npt.NDArray[np.int32], rows: Sequence[int], begun: bytes, partitions: int
) -> tuple[list[tuple[int, bytes]], list[int]]:
    """Each partition that lines belong to, with its lines in order; ``begun`` is how the key of each customer begins.

    The columns of ``places`` say where in the value lines, external ids and customers begin and end, ``rows`` how many
    lines there are up to the end of each body. With them comes for each body the sum of ``1 << partition``, which means
    something where there are ``PARTITIONS_TOGETHER_MAX`` partitions at most.
    """
    key = np.empty(len(begun) + len(value), np.uint8)  # longer than any: to look for the longest takes more
    key[: len(begun)] = np.frombuffer(begun, np.uint8)
    joined, ends = np.empty(len(value) + 1, np.uint8), np.zeros(partitions, np.int64)
    chosen, masks = np.empty(len(places), np.int64), np.zeros(len(rows), np.uint64)
    bodies = np.array(rows, np.int64)
    _spread(np.frombuffer(value, np.uint8), places, bodies, key, len(begun), chosen, joined, ends, masks)
    found, text, begin = [], joined.tobytes(), 0
    for partition, end in enumerate(ends.tolist()):
        if end > begin:
            found.append((partition, text[begin : end - 1]))
        begin = end
    return found, masks.tolist()


# Ordinary bodies, read by compiled loops: what is checked, cut into lines and hashed, without an object for an event.
#
# ``read`` takes bodies ``{"events": [...]}`` where every event has a name, an external customer and an external id,
# no key twice and none that is unknown, values of ordinary types and lengths, and no escape. Anything else is odd,
# and for ``ingest.admission.validate`` to read. A length is counted in bytes here, so a text in another alphabet may
# look too long and is read there, too. The bodies have to be UTF-8.
#
# ``ingest.admission.intake`` imports this module, in a thread, when that pays: see ``meters.compiled``.

# Where the keys of one event's metadata are, of which each is compared with all before it. There is one such place,
# since nobody else runs while it is used.
_METADATA_KEYS = np.empty((32, 2), np.int32)
_INTEGER_DIGITS_MAX = 18  # surely fit into 64 bits
_ENVELOPE, _ENVELOPE_ENDS = keys_table("events")
_TEXT, _NULLABLE, _NAME, _TIME, _METADATA, _COUNT, _CENTS, _CURRENCY = range(8)  # kinds of values
_EVENT, _EVENT_ENDS = keys_table(
    "name", "external_customer_id", "external_id", "timestamp", "metadata", "customer_id", "member_id",
    "external_member_id", "parent_id",
)  # fmt: skip
_EVENT_KINDS = np.array([_NAME, _TEXT, _TEXT, _TIME, _METADATA] + [_NULLABLE] * 4, np.int32)
_EVENT_NEEDED = 0b111
_CUSTOMER, _ID = 1, 2
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
_EVENT_BYTES_MIN = len('{"name":"","external_customer_id":"","external_id":""}')

_TAKEN_MAX = 10_000  # of events that a table takes at once, so that it is never full
_ACCEPTED, _DUPLICATE, _CONFLICT = range(3)
_FREE = 0  # instead of a key
Slots = uint64[:, ::1]  # a key and a content each
Words = npt.NDArray[np.uint64]


class Found(NamedTuple):
    """Events as lines, and where in them is what: six places each, of the line, its external id and its customer.

    ``keys`` are hashes of the external ids, which depend on the seed, ``contents`` those of the lines; ``rows`` say how
    many events there are up to the end of each body.
    """

    value: bytes
    places: npt.NDArray[np.int32]
    keys: Words
    contents: Words
    rows: list[int]

    def spread(self, begun: bytes, partitions: int) -> tuple[list[tuple[int, bytes]], list[int]]:
        """The lines by partition, and which of these each body has lines in; see ``ingest.admission.kernels``."""
        return spread(self.value, self.places, self.rows, begun, partitions)


@kernel(int64(Text, int64, int64, int64))
def _after(text: Any, at: Any, byte: Any, end: Any) -> Any:
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
def _key(text: Any, at: Any, end: Any) -> Any:
    """Where a key begins and ends, and where its value begins."""
    after = _after_text(text, at, end)
    return at + 1, after - 1, _after(text, after, COLON, end)


@kernel(int64(Text, int64, Bytes, int64))
def _after_word(text: Any, at: Any, word: Any, end: Any) -> Any:
    for place in range(len(word)):
        if text[at + place] != word[place]:
            return end
    return at + len(word)


@kernel(int64(Text, int64, int64, boolean, int64))
def _after_number(text: Any, at: Any, digits_max: Any, whole: Any, end: Any) -> Any:
    """Behind a number without exponent that has so many digits before its point, and none after it if ``whole``."""
    at += text[at] == MINUS
    begin, at = at, after_digits(text, at)
    if not 1 <= at - begin <= digits_max or (text[begin] == ZERO and at - begin > 1):
        return end
    if whole or text[at] != POINT:
        return at
    begin, at = at + 1, after_digits(text, at + 1)
    return at if 1 <= at - begin <= _INTEGER_DIGITS_MAX else end


@kernel(int64(Text, int64, int64))
def _after_value(text: Any, at: Any, end: Any) -> Any:
    """Behind an ordinary value of metadata."""
    if text[at] == QUOTE:
        after = _after_text(text, at, end)
        return after if 1 <= after - at - 2 <= STRING_LENGTH_MAX else end
    if text[at] == TRUE[0]:
        return _after_word(text, at, TRUE, end)
    if text[at] == FALSE[0]:
        return _after_word(text, at, FALSE, end)
    return _after_number(text, at, _INTEGER_DIGITS_MAX, False, end)


@kernel(int64(Text, int64, int64, int64))
def _after_known(text: Any, at: Any, kind: Any, end: Any) -> Any:
    """Behind a value whose kind its key says."""
    if kind == _COUNT:
        return _after_number(text, at, _INTEGER_DIGITS_MAX, True, end)
    if kind == _CENTS:
        return _after_number(text, at, COST_INTEGER_DIGITS_MAX, False, end)
    if kind == _NULLABLE and text[at] == NULL[0]:
        return _after_word(text, at, NULL, end)
    after = _after_text(text, at, end)
    if kind == _NAME and after - at - 2 > NAME_LENGTH_MAX:
        return end
    if kind == _CURRENCY and place_of(text, at + 1, after - 1, _USD, _USD_ENDS) == MISSING:
        return end
    return after


@kernel(int64(Text, int64, Bytes, Ends, Ends, int64, int64))
def _after_reserved(text: Any, at: Any, names: Any, ends: Any, kinds: Any, needed: Any, end: Any) -> Any:
    """Behind an object of known keys."""
    seen, more = 0, True
    at = _after(text, at, OBJECT, end)
    while more:
        first, last, at = _key(text, at, end)
        place = place_of(text, first, last, names, ends)
        if place == MISSING or (seen >> place) & 1:
            return end
        seen |= 1 << place
        at = after_blanks(text, _after_known(text, at, kinds[place], end))
        more = text[at] == COMMA
        at = _after(text, at, COMMA if more else OBJECT_END, end)
    return at if seen & needed == needed else end


@kernel(boolean(Text, int64, int64, Places, int64))
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


@kernel(int64(Text, int64, Places, int64))
def _after_metadata(text: Any, at: Any, keys: Any, end: Any) -> Any:
    at = _after(text, at, OBJECT, end)
    if text[at] == OBJECT_END:
        return _after(text, at, OBJECT_END, end)
    count, more = 0, True
    while more:
        first, last, at = _key(text, at, end)
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
        at = _after(text, at, COMMA if more else OBJECT_END, end)
    return at


@kernel(int64(Text, int64, int64, int64, int32[::1], Places, int64))
def _after_event(
    text: Any, at: Any, earliest_us: Any, latest_us: Any, places: Any, keys: Any, end: Any
) -> Any:
    """Behind an event whose time lies between two; ``places`` are filled."""
    seen, more = 0, True
    places[0], at = at, _after(text, at, OBJECT, end)
    while more:
        first, last, at = _key(text, at, end)
        place = place_of(text, first, last, _EVENT, _EVENT_ENDS)
        if at == end or place == MISSING or (seen >> place) & 1:
            return end
        seen |= 1 << place
        begin, kind = at, _EVENT_KINDS[place]
        at = _after_metadata(text, at, keys, end) if kind == _METADATA else _after_known(text, at, kind, end)
        if kind == _TIME and not (at < end and earliest_us <= read_time(text, begin + 1, at - 1) <= latest_us):
            return end
        if place == _ID:
            places[2], places[3] = begin + 1, at - 1
        elif place == _CUSTOMER:
            places[4], places[5] = begin + 1, at - 1
        at = after_blanks(text, at)
        more = text[at] == COMMA
        places[1] = at + 1
        at = _after(text, at, COMMA if more else OBJECT_END, end)
    return at if seen & _EVENT_NEEDED == _EVENT_NEEDED else end


@kernel(int64(Text, int64, int64))
def _envelope(text: Any, at: Any, end: Any) -> Any:
    """Where the first event of a body begins."""
    first, last, at = _key(text, _after(text, at, OBJECT, end), end)
    is_known = place_of(text, first, last, _ENVELOPE, _ENVELOPE_ENDS) != MISSING
    return _after(text, at, LIST, end) if is_known else end


# It keeps the interpreter's lock: to wait for it again takes longer than a body.
@kernel(
    int64(Bytes, int64[::1], int64, int64, uint64, Places, uint64[::1], uint64[::1], uint8[::1], Places, int64[::1]),
    lock=True,
)
def _read(
    bodies: Any, ends: Any, earliest_us: Any, latest_us: Any, seed: Any, places: Any, keys: Any, contents: Any,
    joined: Any, metadata_keys: Any, rows: Any,
) -> Any:
    """How many of the bodies are ordinary, before the first that is odd; ``rows`` says how many events up to each.

    Whatever is odd ends at the 0 behind its body, where nothing goes on.
    """
    address, text = uint64(bodies.ctypes.data), text_at(uint64(bodies.ctypes.data))
    out, row, begin = 0, 0, 0
    for body in range(len(ends)):
        end = ends[body]
        at, more = _envelope(text, begin, end), True
        while more:
            if row == len(places):
                return body
            at = _after_event(text, at, earliest_us, latest_us, places[row], metadata_keys, end)
            if at == end:
                return body
            first, length = places[row, 0], places[row, 1] - places[row, 0]
            contents[row] = hash_64(address + uint64(first), uint64(length))
            keys[row] = hash_64_seeded(address + uint64(places[row, 2]), uint64(places[row, 3] - places[row, 2]), seed)
            copy_bytes(uint64(joined.ctypes.data) + uint64(out), address + uint64(first), uint64(length))
            for place in range(6):
                places[row, place] += out - first
            out += length
            joined[out] = NEWLINE
            out, row = out + 1, row + 1
            more = text[at] == COMMA
            at = _after(text, at, COMMA if more else LIST_END, end)
        if text[at] != OBJECT_END or after_blanks(text, at + 1) != end:
            return body
        rows[body], begin = row, end + 1
    return len(ends)


def read(bodies: Sequence[bytes], earliest_us: int, latest_us: int, seed: int) -> Found | None:
    """The events of bodies in UTF-8 whose times lie between two, in microseconds since 1970, up to the first odd body.

    None if that is the first.
    """
    text = bodies[0] if len(bodies) == 1 else b"\0".join(bodies)
    if type(text) is not bytes:  # behind others there need be no 0
        return None
    ends = np.array(list(itertools.accumulate(map(len, bodies), lambda end, length: end + 1 + length)))
    rows_max = len(text) // _EVENT_BYTES_MIN + 1
    places, joined = np.empty((rows_max, 6), np.int32), np.empty(len(text) + 1, np.uint8)
    keys, contents, rows = np.empty(rows_max, np.uint64), np.empty(rows_max, np.uint64), np.empty(len(ends), np.int64)
    all_bytes = np.frombuffer(text, np.uint8)
    count = _read(all_bytes, ends, earliest_us, latest_us, seed, places, keys, contents, joined, _METADATA_KEYS, rows)
    if not count:
        return None
    found = rows[:count].tolist()
    last = found[-1]
    # Copies are as large as what is in them; the arrays are as large as all of the bodies might need.
    columns = places[:last].copy(), keys[:last].copy(), contents[:last].copy()
    return Found(joined[: places[last - 1, 1]].tobytes(), *columns, found)


@kernel(int64(Slots, uint64))
def _slot(table: Any, key: Any) -> Any:
    """Where a key is, or belongs, in a table with open addresses: a power of two slots, some of them free."""
    mask = np.uint64(len(table) - 1)
    slot = (key >> np.uint64(1)) & mask  # its lowest bit is set in every key
    while table[slot, 0] != _FREE and table[slot, 0] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel(types.UniTuple(int64, 2)(Slots, Slots, uint64[::1], uint64[::1], uint8[::1]), lock=True)
def _take(young: Any, old: Any, keys: Any, contents: Any, codes: Any) -> Any:
    """Judge events and put them into ``young``; how many are there for the first time, and how many known at all."""
    put, known = 0, 0
    for row in range(len(keys)):
        key = keys[row] | np.uint64(1)
        place, before = _slot(young, key), _slot(old, key)
        content = contents[row]
        is_young, is_old = young[place, 0] == key, old[before, 0] == key
        first = old[before, 1] if is_old else young[place, 1] if is_young else content
        codes[row] = _ACCEPTED
        if is_young or is_old:
            codes[row] = _DUPLICATE if first == content else _CONFLICT
            known += 1
        if not is_young:
            young[place, 0], young[place, 1] = key, first
            put += 1
    return put, known


class Table:
    """The keys and contents of the last events, up to ``generation_max`` to twice as many, in 16 bytes each.

    It has two generations of slots, of which half are free at least.
    """

    def __init__(self, generation_max: int) -> None:
        self._max = generation_max
        slots = 1 << (2 * (generation_max + _TAKEN_MAX)).bit_length()
        self._young, self._old = np.zeros((slots, 2), np.uint64), np.zeros((slots, 2), np.uint64)
        self._count = 0

    def take(self, keys: Sequence[int], contents: Sequence[int]) -> list[int] | None:
        """Remember events, and say for each 0 (new), 1 (known) or 2 (with another content); None if all are new."""
        all_keys, all_contents = np.asarray(keys, np.uint64), np.asarray(contents, np.uint64)
        codes, known = np.empty(len(all_keys), np.uint8), 0
        for begin in range(0, len(codes), _TAKEN_MAX):
            some = slice(begin, begin + _TAKEN_MAX)
            put, repeated = _take(self._young, self._old, all_keys[some], all_contents[some], codes[some])
            self._count, known = self._count + put, known + repeated
            if self._count >= self._max:
                self._young, self._old, self._count = self._old, self._young, 0
                self._young.fill(_FREE)
        return codes.tolist() if known else None
