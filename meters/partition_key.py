"""Which partition an event belongs to: the one that Kafka's own default would choose for its key.

The key is the organization's id, a colon, and the customer: by the name that the organization gave it, or by its id
here where it has none. A customer's events stay in one partition and so in their order, whoever writes them: a
gateway, or a producer of another kind that sets this key and leaves the choice to its client (``murmur2``, what Java
clients do by default; librdkafka calls it ``murmur2_random``).
"""

_SEED = 0x9747B28C
_MULTIPLIER = 0x5BD1E995
_WORD = 0xFFFFFFFF
_POSITIVE = 0x7FFFFFFF


def partition_key(organization_id: str, customer: str) -> bytes:
    """The key of a customer's events; ``customer`` is its external id, or its id where it has none."""
    return f"{organization_id}:{customer}".encode()


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of the key among so many."""
    return (murmur2(key) & _POSITIVE) % partitions


def murmur2(data: bytes) -> int:
    """MurmurHash2 with the seed that Kafka took, as an unsigned 32-bit number."""
    length = len(data)
    digest = _SEED ^ length
    for start in range(0, length - length % 4, 4):
        block = int.from_bytes(data[start : start + 4], "little") * _MULTIPLIER & _WORD
        block = (block ^ block >> 24) * _MULTIPLIER & _WORD
        digest = digest * _MULTIPLIER & _WORD ^ block
    rest = data[length - length % 4 :]
    if rest:
        digest = (digest ^ int.from_bytes(rest, "little")) * _MULTIPLIER & _WORD
    digest = (digest ^ digest >> 13) * _MULTIPLIER & _WORD
    return digest ^ digest >> 15
