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

from ingest.admission.duplicates import AT_ONCE_MAX, Generations, Numbers
from ingest.limits import PARTITIONS_TOGETHER_MAX
from meters.compiled import (
    COMMA,
    EXTERNAL_CUSTOMER_ID,
    EXTERNAL_ID,
    FIELDS,
    LIST,
    LIST_END,
    METADATA_KEYS_MAX,
    MISSING,
    NAME,
    NEWLINE,
    OBJECT,
    OBJECT_END,
    ODD,
    TIMESTAMP,
    Bytes,
    Spans,
    Text,
    after,
    after_blanks,
    after_event,
    copy_bytes,
    hash_64,
    hash_64_seeded,
    kernel,
    key_at,
    keys_table,
    place_of,
    read_time,
    text_at,
)
from meters.errors import NAME_LENGTH_MAX
from meters.log import MULTIPLIER, POSITIVE, SEED, WORD, Pieces

# The lines of a body by partition, in compiled loops: what ``ingest.admission.partitioner`` does, without an object
# for a line.
#
# Kafka's hash takes Python some microseconds for each customer, and a line in a list of its own takes as much as its
# checks did. Here an event takes 0.15 us. See ``meters.log`` for the hash.

_BLOCK_BYTES = 4
_BIT_LAST = PARTITIONS_TOGETHER_MAX - 1

Places = npt.NDArray[np.int32]
"""Where texts begin and end in a value, in two columns."""


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
    int64(Bytes, Spans, Spans, int64[::1], uint8[::1], int64, int64[::1], uint8[::1], int64[::1], uint64[::1]),
    lock=True,
)
def _spread(
    value: Any, lines: Any, customers: Any, rows: Any, key: Any, begun_bytes: Any, partitions: Any, joined: Any,
    ends: Any, masks: Any,
) -> Any:
    """Copy each line to those of its partition; ``ends`` say where these end, one place behind a newline.

    A bit of a body's mask is set for each of the first 64 partitions it has lines in; ``rows`` say where bodies end.
    """
    address, key_address = uint64(value.ctypes.data), uint64(key.ctypes.data)
    for row in range(len(lines)):
        customer, length = customers[row, 0], customers[row, 1] - customers[row, 0]
        copy_bytes(key_address + uint64(begun_bytes), address + uint64(customer), uint64(length))
        digest = _murmur2(key, begun_bytes + length) & np.uint64(POSITIVE)
        partitions[row] = np.int64(digest % np.uint64(len(ends)))
        ends[partitions[row]] += lines[row, 1] - lines[row, 0] + 1
    row = 0
    for body in range(len(rows)):
        while row < rows[body]:
            masks[body] |= np.uint64(1) << np.uint64(partitions[row] & _BIT_LAST)
            row += 1
    begin = 0
    for partition in range(len(ends)):
        begin, ends[partition] = begin + ends[partition], begin
    for row in range(len(lines)):
        at, length = ends[partitions[row]], lines[row, 1] - lines[row, 0]
        copy_bytes(uint64(joined.ctypes.data) + uint64(at), address + uint64(lines[row, 0]), uint64(length))
        joined[at + length] = NEWLINE
        ends[partitions[row]] = at + length + 1
    return begin


def spread(
    value: bytes, lines: Places, customers: Places, rows: Sequence[int], begun: bytes, partitions: int
) -> tuple[list[tuple[int, bytes]], list[int]]:
    """Each partition that lines belong to, with its lines in order; ``begun`` is how the key of each customer begins.

    ``rows`` say how many lines there are up to the end of each body. With the lines comes for each body the sum of
    ``1 << partition``, which means something where there are ``PARTITIONS_TOGETHER_MAX`` partitions at most.
    """
    key = np.empty(len(begun) + len(value), np.uint8)  # longer than any: to look for the longest takes more
    key[: len(begun)] = np.frombuffer(begun, np.uint8)
    joined, ends = np.empty(len(value) + 1, np.uint8), np.zeros(partitions, np.int64)
    chosen, masks = np.empty(len(lines), np.int64), np.zeros(len(rows), np.uint64)
    bodies = np.array(rows, np.int64)
    _spread(np.frombuffer(value, np.uint8), lines, customers, bodies, key, len(begun), chosen, joined, ends, masks)
    found, text, begin = [], joined.tobytes(), 0
    for partition, end in enumerate(ends.tolist()):
        if end > begin:
            found.append((partition, text[begin : end - 1]))
        begin = end
    return found, masks.tolist()


# Ordinary bodies, read by compiled loops: what is checked, cut into lines and hashed, without an object for an event.
#
# ``read`` takes bodies ``{"events": [...]}`` where every event has a name, an external customer and an external id that
# is not empty, no key twice and none that is unknown, values of ordinary types and lengths, and no escape. Anything
# else is odd, and for ``ingest.admission.validate`` to read. A length is counted in bytes here, so a text in another
# alphabet may look too long and is read there, too. The bodies have to be UTF-8.
#
# ``ingest.admission.intake`` imports this module, in a thread, when that pays: see ``meters.compiled``.

_ENVELOPE, _ENVELOPE_ENDS = keys_table("events")
_LINE, _ID, _CUSTOMER = range(3)  # whose places
_EVENT_BYTES_MIN = len('{"name":"","external_customer_id":"","external_id":""}')

_FREE = 0  # instead of a key

Slots = uint64[:, ::1]  # a key and a content each
Words = npt.NDArray[np.uint64]


class Found(NamedTuple):
    """Events as lines, end to end, and where each line, its external id and its customer are.

    ``keys`` are hashes of the external ids, which depend on the seed, ``contents`` those of the lines; ``rows`` say how
    many events there are up to the end of each body.
    """

    value: bytes
    line_places: Places
    id_places: Places
    customer_places: Places
    keys: Words
    contents: Words
    rows: list[int]

    @property
    def lines(self) -> Pieces:
        """Each line."""
        return Pieces(self.value, self.line_places)

    @property
    def external_ids(self) -> list[str]:
        """The external id of each line."""
        return [piece.decode() for piece in Pieces(self.value, self.id_places)]

    def of_body(self, number: int) -> "Found":
        """The events of one body."""
        some = slice(self.rows[number - 1] if number else 0, self.rows[number])
        lines = self.line_places[some]
        begin, end = int(lines[0, 0]), int(lines[-1, 1])
        places = lines - begin, self.id_places[some] - begin, self.customer_places[some] - begin
        return Found(self.value[begin:end], *places, self.keys[some], self.contents[some], [len(lines)])

    def spread(self, begun: bytes, partitions: int) -> tuple[list[tuple[int, bytes]], list[int]]:
        """The lines by partition, and which of these each body has lines in; see ``spread``."""
        return spread(self.value, self.line_places, self.customer_places, self.rows, begun, partitions)


@kernel(boolean(Text, Spans, int64, int64))
def _is_ordinary(text: Any, spans: Any, earliest_us: Any, latest_us: Any) -> Any:
    """Whether an event's fields are there, its name is short, and its time lies between two."""
    name, customer, external_id = spans[NAME, 1], spans[EXTERNAL_CUSTOMER_ID, 1], spans[EXTERNAL_ID, 1]
    if name == MISSING or customer == MISSING or external_id == MISSING or name - spans[NAME, 0] > NAME_LENGTH_MAX:
        return False
    if external_id == spans[EXTERNAL_ID, 0]:
        return False
    begin, end = spans[TIMESTAMP]
    return end == MISSING or earliest_us <= read_time(text, begin, end) <= latest_us


@kernel(int64(Text, int64, int64))
def _envelope(text: Any, at: Any, end: Any) -> Any:
    """Where the first event of a body begins."""
    first, last, at = key_at(text, after(text, at, OBJECT, end), end)
    is_known = place_of(text, first, last, _ENVELOPE, _ENVELOPE_ENDS) != MISSING
    return after(text, at, LIST, end) if is_known else end


# It keeps the interpreter's lock: to wait for it again takes longer than a body.
@kernel(
    int64(
        Bytes, int64[::1], int64, int64, uint64, Spans, Spans, int32[:, :, ::1], uint64[::1], uint64[::1], uint8[::1],
        int64[::1],
    ),
    lock=True,
)
def _read(
    bodies: Any, ends: Any, earliest_us: Any, latest_us: Any, seed: Any, spans: Any, metadata_keys: Any, places: Any,
    keys: Any, contents: Any, joined: Any, rows: Any,
) -> Any:
    """How many of the bodies are ordinary, before the first that is odd; ``rows`` says how many events up to each.

    Whatever is odd ends at the 0 behind its body, where nothing goes on: see ``meters.compiled``.
    """
    address, text = uint64(bodies.ctypes.data), text_at(uint64(bodies.ctypes.data))
    out, row, begin = 0, 0, 0
    for body in range(len(ends)):
        end = ends[body]
        at, more = _envelope(text, begin, end), True
        while more:
            first = at
            if row == len(keys):
                return body
            at = after_event(text, first, False, metadata_keys, spans, end)
            if at == ODD or not _is_ordinary(text, spans, earliest_us, latest_us):
                return body
            length = at - first
            contents[row] = hash_64(address + uint64(first), uint64(length))
            id_begin, id_end = spans[EXTERNAL_ID]
            keys[row] = hash_64_seeded(address + uint64(id_begin), uint64(id_end - id_begin), seed)
            copy_bytes(uint64(joined.ctypes.data) + uint64(out), address + uint64(first), uint64(length))
            customer_begin, customer_end = spans[EXTERNAL_CUSTOMER_ID]
            moved = out - first
            places[_LINE, row, 0], places[_LINE, row, 1] = out, out + length
            places[_ID, row, 0], places[_ID, row, 1] = id_begin + moved, id_end + moved
            places[_CUSTOMER, row, 0], places[_CUSTOMER, row, 1] = customer_begin + moved, customer_end + moved
            out += length
            joined[out] = NEWLINE
            out, row, at = out + 1, row + 1, after_blanks(text, at)
            more = text[at] == COMMA
            at = after(text, at, COMMA if more else LIST_END, end)
        if text[at] != OBJECT_END or after_blanks(text, at + 1) != end:
            return body
        rows[body], begin = row, end + 1
    return len(ends)


class BodyReader:
    """The compiled reader of bodies, and what else ``ingest.quick`` loads with it."""

    def __init__(self) -> None:
        # Where the fields of one event are, and the keys of its metadata. There is one such room, since nobody else
        # runs while it is used.
        self._spans, self._metadata_keys = np.empty((FIELDS, 2), np.int32), np.empty((METADATA_KEYS_MAX, 2), np.int32)

    def read(self, bodies: Sequence[bytes], earliest_us: int, latest_us: int, seed: int) -> Found | None:
        """The events of bodies in UTF-8 up to the first odd body; None if that is the first.

        Their times lie between two, in microseconds since 1970.
        """
        text = bodies[0] if len(bodies) == 1 else b"\0".join(bodies)
        if type(text) is not bytes:  # behind others there need be no 0
            return None
        ends = np.array(list(itertools.accumulate(map(len, bodies), lambda end, length: end + 1 + length)))
        rows_max = len(text) // _EVENT_BYTES_MIN + 1
        places, joined = np.empty((3, rows_max, 2), np.int32), np.empty(len(text) + 1, np.uint8)
        keys, contents = np.empty(rows_max, np.uint64), np.empty(rows_max, np.uint64)
        rows = np.empty(len(ends), np.int64)
        count = _read(
            np.frombuffer(text, np.uint8), ends, earliest_us, latest_us, seed, self._spans, self._metadata_keys,
            places, keys, contents, joined, rows,
        )  # fmt: skip
        if not count:
            return None
        found = rows[:count].tolist()
        last = found[-1]
        # Copies are as large as what is in them; the arrays are as large as all of the bodies might need.
        lines, external_ids, customers = places[:, :last].copy()
        value = joined[: lines[-1, 1]].tobytes()
        return Found(value, lines, external_ids, customers, keys[:last].copy(), contents[:last].copy(), found)

    def table(self, generation_max: int) -> "Table":
        """An empty table of identities."""
        return Table(generation_max)


@kernel(int64(Slots, uint64))
def _slot(table: Any, key: Any) -> Any:
    """Where a key is, or belongs, in a table with open addresses: a power of two slots, some of them free."""
    mask = np.uint64(len(table) - 1)
    slot = (key >> np.uint64(1)) & mask  # its lowest bit is set in every key
    while table[slot, 0] != _FREE and table[slot, 0] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel(types.UniTuple(int64, 2)(Slots, Slots, uint64[::1], uint64[::1], uint64[::1], boolean[::1]), lock=True)
def _remember(young: Any, old: Any, keys: Any, contents: Any, firsts: Any, is_known: Any) -> Any:
    """Put events into ``young``; how many are there for the first time, and how many were known at all."""
    put, known = 0, 0
    for row in range(len(keys)):
        key = keys[row] | np.uint64(1)
        place, before = _slot(young, key), _slot(old, key)
        is_young, is_old = young[place, 0] == key, old[before, 0] == key
        firsts[row] = old[before, 1] if is_old else young[place, 1] if is_young else contents[row]
        is_known[row] = is_young or is_old
        known += is_known[row]
        if not is_young:
            young[place, 0], young[place, 1] = key, firsts[row]
            put += 1
    return put, known


class Table(Generations):
    """Generations in 16 bytes for each slot, of which half are free at least."""

    def __init__(self, generation_max: int) -> None:
        slots = 1 << (2 * (generation_max + AT_ONCE_MAX)).bit_length()
        self._young, self._old = np.zeros((slots, 2), np.uint64), np.zeros((slots, 2), np.uint64)
        self._count = 0

    @property
    def count(self) -> int:
        """Identities in the younger generation."""
        return self._count

    def remember(self, keys: Numbers, contents: Numbers) -> list[int | None] | None:
        """Put events into the younger generation. For each the content it was known with; None if all are new."""
        all_keys, all_contents = np.asarray(keys, np.uint64), np.asarray(contents, np.uint64)
        firsts, is_known = np.empty(len(all_keys), np.uint64), np.empty(len(all_keys), np.bool_)
        put, known = _remember(self._young, self._old, all_keys, all_contents, firsts, is_known)
        self._count += put
        if not known:
            return None
        return [first if flag else None for first, flag in zip(firsts.tolist(), is_known.tolist(), strict=True)]

    def age(self) -> None:
        """Forget the older generation; the younger one becomes it."""
        self._young, self._old, self._count = self._old, self._young, 0
        self._young.fill(_FREE)
