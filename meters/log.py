"""The log port: streams, records, positions and the partition key.

``Log`` is the protocol that each log implements (``ingest.log``): ``append`` takes ``Entry`` objects and ``read``
returns ``Record`` objects. Errors are ``TryAgain``, ``Refused`` and ``PositionLost``. ``partition_of`` maps a
customer to a partition; ``format_position`` and ``parse_position`` write and read positions as in ``Log-Position``.

The log is the only truth; everything else is a view of it.
"""

import hashlib
import struct
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, overload

import msgspec

from meters.errors import LINES_MAX

# The partition key. The partition is the one that Kafka's default partitioner chooses for the key
# ``ORGANIZATION_ID:CUSTOMER``, where the customer is the external id, or the id here if there is none. So a
# customer's events stay in one partition, in order, whether a gateway or another Kafka producer writes them.
# ``murmur2`` is the hash of Java clients; librdkafka calls it ``murmur2_random``.

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


# Promises of a log. Stream ``usage.events`` holds facts from producers, ``usage.control`` decisions of the operator.
# Partitions may be added, never removed; records are numbered from 0, without gaps unless the log allows holes.
#
# * ``append`` returns only when the records would survive the death of every process (and, for the embedded log, a
#   loss of power). After an error the records may or may not have been written: the caller answers "try again", and
#   the identity of the events makes the retry harmless.
# * ``read`` returns consecutive records from the requested position and never skips a record silently. If the next
#   record cannot be read (retention removed it, the stream was replaced), it raises ``PositionLost``.
#
# A position is the offset of the *next* record: after offset 7 the position is 8. Times are microseconds since 1970
# UTC; a record's time is its time of ingestion, never an event's own.

USAGE_EVENTS = "usage.events"
USAGE_CONTROL = "usage.control"
COUNT_DIGITS_MAX = 18  # an offset is a 64-bit number


def format_position(position: Mapping[int, int]) -> str:
    """Positions as they stand in the ``Log-Position`` and ``As-Of`` headers: ``0:18,3:7``."""
    return ",".join(f"{partition}:{offset}" for partition, offset in sorted(position.items()))


def parse_position(text: str) -> dict[int, int] | None:
    """The inverse of ``format_position``; None for anything else, so that a caller can refuse it."""
    position: dict[int, int] = {}
    for part in text.split(",") if text else []:
        partition, colon, offset = part.strip().partition(":")
        if not (colon and is_count(partition) and is_count(offset)):
            return None
        position[int(partition)] = int(offset)
    return position


def is_count(text: str, digits_max: int = COUNT_DIGITS_MAX) -> bool:
    """Whether the text is a number of so many digits at most, without a sign."""
    return text.isascii() and text.isdigit() and len(text) <= digits_max


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What is asked to be appended: one record's value, with where it belongs.

    ``value`` is NDJSON, one or more JSON objects, a line each, UTF-8, without a final newline.
    ``organization_id`` names the tenant of every line (None: each line names its own).
    ``admitted`` says that the gateway checked every line, so that a reader need not check again; ``distinct_keys``
    says besides that no line's metadata gives a key twice, so that its text may be kept as it stands.
    """

    value: bytes
    partition: int = 0
    organization_id: str | None = None
    admitted: bool = False
    distinct_keys: bool = False


class Record(msgspec.Struct, frozen=True, gc=False):
    """What was appended, with its place and time."""

    partition: int
    offset: int
    timestamp_us: int
    value: bytes
    organization_id: str | None = None
    admitted: bool = False
    distinct_keys: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether one of our own processes wrote it, so that its time is that of a clock that the operator sets."""
        return self.admitted and self.timestamp_us < LATEST_US


LATEST_US = (int(datetime(9000, 1, 1, tzinfo=UTC).timestamp()) * 1000 - 1) * 1000
"""The last millisecond that ranges of quantities reach. A record's time is its producer's word: one that sends
microseconds as milliseconds names the year 55839, which no calendar has. Such a record has this time, always the same,
because a record is known again by its time; its lines are dead letters."""


def has_too_many_lines(value: bytes) -> bool:
    """Whether the record of this value counts as a single line, which is none of an event."""
    return len(value) >= LINES_MAX and value.count(b"\n") >= LINES_MAX


class Places(Protocol):
    """Where texts begin and end: an array of two columns. (This package does not load numpy for its name.)"""

    def __len__(self) -> int:
        """How many texts there are."""

    def __getitem__(self, rows: slice, /) -> "Places":
        """Some of them."""

    def tolist(self) -> list[list[int]]:
        """Both places of each."""


class Pieces(Sequence[bytes]):
    """Pieces of a record's value, each made when it is asked for: nearly none ever is."""

    def __init__(self, value: bytes, places: Places) -> None:
        self._value, self._places = value, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, row: int) -> bytes: ...

    @overload
    def __getitem__(self, row: slice) -> "Pieces": ...

    def __getitem__(self, row: int | slice) -> "bytes | Pieces":
        if isinstance(row, slice):
            return Pieces(self._value, self._places[row])
        [(begin, end)] = self._places[row : row + 1 or None].tolist()
        return self._value[begin:end]

    def __iter__(self) -> Iterator[bytes]:
        return (self._value[begin:end] for begin, end in self._places.tolist())


def lines_of(value: bytes) -> list[bytes]:
    """The lines of a record, by number. One without anything in it is none."""
    return [value] if has_too_many_lines(value) else value.split(b"\n")


class TryAgain(Exception):
    """The log cannot take or give this now; the same call may succeed after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PositionLost(Exception):
    """The record at the position asked for is gone or is another stream's: stop, and let an operator decide."""


class OpenAgain(Exception):
    """The stream has more partitions than when it was opened: read on from positions that name them, too."""


class Refused(Exception):
    """This entry can never be taken (too large, no such partition): do not repeat it."""


class NoSuchPartition(Refused):
    """The partition is not there. An event could go to another, once its caller knows which there are."""


class Log(Protocol):
    """The port. Implementations pass ``tests/contracts/test_log.py``.

    ``append`` may be called from many tasks at once; ``read`` and the rest are blocking calls for a thread
    that owns them, because the reader is a loop of its own.
    """

    async def append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        """Make the entries durable and return each one's offset, in order.

        A record is there whole or not at all. Of several entries some may be there where this raises: what has to hold
        together is one entry.

        Raises TryAgain when the log is full, slow or closing; Refused for what can never be taken.
        """
        ...

    def submit(self, stream: str, entries: Sequence[Entry]) -> Awaitable[list[int]]:
        """The same, of one entry at least, and begun when this returns: the future of the offsets, of the running loop.

        Raises at once what is known at once, and TryAgain, too, while the log's partitions are not known.
        """
        ...

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """Return the next records from ``positions`` ({partition: next offset}), in order within a partition.

        Returns as soon as there is at least one record, with about ``bytes_max`` bytes at the most (always
        one record), or an empty list after ``wait_s`` seconds. Raises PositionLost, TryAgain, and OpenAgain once
        when partitions were added.
        """
        ...

    def starts(self, stream: str) -> dict[int, int]:
        """The offset of the oldest record still held, by partition (equal to the end when there is none)."""
        ...

    def ends(self, stream: str) -> dict[int, int]:
        """The offset that the next record will get, by partition."""
        ...

    def trim(self, stream: str, older_than_us: int) -> int:
        """Remove the oldest records, those ingested before the instant; how many. Raises TryAgain.

        The newest record of a partition always stays. A kind whose retention is set elsewhere removes none.
        """
        ...

    def identity(self, stream: str) -> str:
        """A name that changes when the stream is deleted and made again. The store refuses another's."""
        ...

    def close(self) -> None:
        """Finish what was begun, then let go of every file, thread and socket. Later calls raise TryAgain."""
        ...


# The log's clock. Our own processes never let the log's time go back: a decision that is made after an event has a
# later time, also while the clock of this machine is behind one that stamped records before. Another Kafka producer
# sets the times of its records itself, so they are not part of this clock.

LAST_RECORDS_BYTES_MAX = 1 << 20
"""Bytes of one read of the last records. At least one record is returned, whatever its size."""


def newest_stamp_us(log: Log) -> int:
    """Return the newest time of our own processes among the last records of all partitions; 0 where there is none.

    Raises TryAgain.
    """
    newest_us = 0
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        starts = log.starts(stream)
        left = {partition: end - 1 for partition, end in log.ends(stream).items() if end > starts.get(partition, 0)}
        while left:
            try:
                records = log.read(stream, left, bytes_max=LAST_RECORDS_BYTES_MAX)
            except PositionLost:  # retention was here first, or the end is none of our records
                break
            newest_us = max([newest_us, *(record.timestamp_us for record in records if record.is_ours)])
            read = {record.partition for record in records}
            if not read & left.keys():
                break
            left = {partition: offset for partition, offset in left.items() if partition not in read}
    return newest_us


def seconds_ahead(stamp_us: int, now_us: int) -> float:
    """Return how far a time in the log is ahead of a clock, in seconds; 0 where it is not."""
    return max(0.0, (stamp_us - now_us) / 1_000_000)


# Positions of the feed: for each partition, the record and the line before which everything has been read. Written as
# ``partition:offset:line``, comma separated. A feed position refers to the log and not to the store, so it stays
# valid after a rebuild.

FeedPlace = tuple[int, int]
"""Offset of a record in its partition, and a line of it; in the order in which the log has them."""


def parse_places(text: str) -> dict[int, FeedPlace] | None:
    """{partition: place}; the empty text is the beginning, None no text of this kind."""
    found: dict[int, FeedPlace] = {}
    for part in filter(None, text.split(",")):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(map(is_count, numbers)):
            return None
        partition, offset, line = map(int, numbers)
        if partition in found:
            return None
        found[partition] = offset, line
    return found


def format_places(places: Mapping[int, FeedPlace]) -> str:
    """The inverse of ``parse_places``."""
    return ",".join(f"{partition}:{offset}:{line}" for partition, (offset, line) in sorted(places.items()))


# Witnesses of a position. A place says where in a log and not in which one: a log that was restored from an older copy
# and written on has other events at the same places, and so has a topic that was made again. The witness of a place
# tells them apart. It is a digest of the last event before the place. Events keep their places when a store is rebuilt.

WITNESS_DIGITS = 16
"""Hexadecimal digits of a witness: 64 bits against accidents; nobody gains by a witness that is made to fit."""


def witness_of(place: tuple[int, int], ingested_us: int, external_id: str) -> str:
    """The witness of the place behind an event, by the event's own place (offset, line), time of ingestion and id."""
    offset, line = place
    return hashlib.sha256(f"{offset}:{line}:{ingested_us}:{external_id}".encode()).hexdigest()[:WITNESS_DIGITS]


def parse_witnesses(text: str) -> dict[int, str] | None:
    """{partition: witness} of a text such as ``0:5f1d...,3:90ab...``; None for a text of another kind."""
    found: dict[int, str] = {}
    for part in filter(None, text.split(",")):
        partition, _, witness = part.partition(":")
        is_witness = len(witness) == WITNESS_DIGITS and not set(witness) - set("0123456789abcdef")
        if not (is_count(partition) and is_witness) or int(partition) in found:
            return None
        found[int(partition)] = witness
    return found


def format_witnesses(witnesses: Mapping[int, str]) -> str:
    """The inverse of ``parse_witnesses``."""
    return ",".join(f"{partition}:{witness}" for partition, witness in sorted(witnesses.items()))
