"""Which partition an event belongs to: the one that Kafka's own default would choose for its key.

The key is the organization's id, a colon, and the customer: by the name that the organization gave it, or by its id
here where it has none. A customer's events stay in one partition and so in their order, whoever writes them: a
gateway, or a producer of another kind that sets this key and leaves the choice to its client (``murmur2``, what Java
clients do by default; librdkafka calls it ``murmur2_random``).
"""

import struct
from collections.abc import Iterable

SEED, MULTIPLIER = 0x9747B28C, 0x5BD1E995
WORD, POSITIVE = 0xFFFFFFFF, 0x7FFFFFFF
"""The constants of Kafka's hash: what it begins with and multiplies by, which bits are kept, and which at last."""

_BLOCK_BYTES = 4


def partition_key(organization_id: str, customer: str) -> bytes:
    """The key of a customer's events; ``customer`` is its external id, or its id where it has none."""
    return f"{organization_id}:{customer}".encode()


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of the key among so many."""
    return (murmur2(key) & POSITIVE) % partitions


def murmur2(data: bytes) -> int:
    """MurmurHash2 with the seed that Kafka took, as an unsigned 32-bit number."""
    return _end(_mixed(SEED ^ len(data), _blocks(data)), data)


class CustomerPartitions:
    """``partition_of`` for the customers of one organization, whose ids begin all the keys and are mixed in once.

    A hash depends on the key's length from the start, so there is one beginning for each length that occurs.
    """

    def __init__(self, organization_id: str, partitions: int) -> None:
        prefix = partition_key(organization_id, "")
        self._begun_bytes = len(prefix) // _BLOCK_BYTES * _BLOCK_BYTES
        self._begun, self._left = prefix[: self._begun_bytes], prefix[self._begun_bytes :]
        self._partitions = partitions
        self._beginnings: dict[int, int] = {}

    def of(self, customer: str) -> int:
        """The customer's partition."""
        rest = self._left + customer.encode()
        length = self._begun_bytes + len(rest)
        digest = self._beginnings.get(length)
        if digest is None:
            digest = self._beginnings[length] = _mixed(SEED ^ length, _blocks(self._begun))
        return (_end(_mixed(digest, _blocks(rest)), rest) & POSITIVE) % self._partitions


def _blocks(data: bytes) -> tuple[int, ...]:
    return struct.unpack_from(f"<{len(data) // _BLOCK_BYTES}I", data)


def _mixed(digest: int, blocks: Iterable[int]) -> int:
    for block in blocks:
        block = block * MULTIPLIER & WORD
        digest = digest * MULTIPLIER & WORD ^ (block ^ block >> 24) * MULTIPLIER & WORD
    return digest


def _end(digest: int, data: bytes) -> int:
    """Mix in what is left behind the blocks, and finish."""
    left = len(data) % _BLOCK_BYTES
    if left:
        digest = (digest ^ int.from_bytes(data[-left:], "little")) * MULTIPLIER & WORD
    digest = (digest ^ digest >> 13) * MULTIPLIER & WORD
    return digest ^ digest >> 15
