"""The lines of a body by partition, in compiled loops: what ``ingest.spread`` does, without an object for a line.

Kafka's hash takes Python some microseconds for each customer, and a line in a list of its own takes as much as its
checks did. Here an event takes 0.15 us. See ``meters.partition_key`` for the hash.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import int32, int64, uint8, uint64

from ingest.limits import PARTITIONS_TOGETHER_MAX
from meters.compiled import NEWLINE, Bytes, copy_bytes, kernel
from meters.partition_key import MULTIPLIER, POSITIVE, SEED, WORD

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
