"""Values are stored packed and come back to the byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.log.sqlite_file import PACK_BYTES_MIN, pack, unpack


@given(st.binary(max_size=64), st.integers(1, 200))
def test_what_was_packed_comes_back(piece: bytes, times: int) -> None:
    """Whatever the bytes, however long."""
    value = piece * times

    assert unpack(pack(value), len(value)) == value


def test_a_long_value_gets_shorter_and_a_short_one_stays() -> None:
    """Packing is for records of many events."""
    assert len(pack(b'{"name":"call"}' * 100)) < 150
    assert pack(b"x" * (PACK_BYTES_MIN - 1)) == b"x" * (PACK_BYTES_MIN - 1)


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_damaged_value_is_noticed(place: int) -> None:
    """A flipped byte is an error, never another value."""
    value = b'{"name":"call"}' * 100
    stored = bytearray(pack(value))
    stored[place] ^= 1

    with pytest.raises(ValueError, match=r"\w"):
        unpack(bytes(stored), len(value))
