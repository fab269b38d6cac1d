"""Values on the disk are packed: events of one sender resemble each other, so zstd makes them 5 to 15 times smaller.

That is less to write and sync than packing costs, and a log that keeps everything stays affordable. A value too short
to gain is stored as it is. Which of the two it is shows in the lengths: a packed value is shorter than its plain
length, which stands beside it; an unpacked one is as long.
"""

import threading

import zstandard

PACK_BYTES_MIN = 1024  # a shorter value gains little and costs a call
LEVEL = 1  # 0.3 us for an event of 300 bytes; higher levels cost more than the disk saves


class _Packers(threading.local):
    """A compressor and a decompressor for each thread: they must not be shared."""

    def __init__(self) -> None:
        self.pack = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress
        self.unpack = zstandard.ZstdDecompressor().decompress


_packers = _Packers()


def pack(value: bytes) -> bytes:
    """The value as it is stored: packed if that makes it shorter."""
    if len(value) < PACK_BYTES_MIN:
        return value
    packed = _packers.pack(value)
    return packed if len(packed) < len(value) else value


def unpack(stored: bytes, length: int) -> bytes:
    """The value of ``length`` bytes that was stored. Raises ValueError when these bytes are not it."""
    if len(stored) == length:
        return stored
    try:
        value: bytes = _packers.unpack(stored, max_output_size=length)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(value) != length:
        raise ValueError(f"{len(value)} bytes instead of {length}")
    return value
