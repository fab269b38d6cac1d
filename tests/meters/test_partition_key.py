"""The partition of an event is the one that Kafka's own clients choose for its key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meters.log import CustomerPartitions, murmur2, partition_key, partition_of


@pytest.mark.parametrize(
    ("data", "signed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
        (b"", 275646681),
    ],
)
def test_murmur2_is_kafkas(data: bytes, signed: int) -> None:
    """The values that Kafka's own tests hold its Java code to, as unsigned numbers."""
    assert murmur2(data) == signed % 2**32


def test_a_partition_is_never_negative() -> None:
    """Kafka drops the sign bit before it divides, so that every hash has a partition."""
    assert {partition_of(b"%d" % number, 12) for number in range(500)} == set(range(12))
    assert partition_of(b"21", 1) == 0


def test_the_key_names_organization_and_customer() -> None:
    """What a producer of another kind has to send as the key."""
    assert partition_key("6f8b1f9e-0f4e-4b8e-9a53-3f6f4f1d2c10", "ada") == b"6f8b1f9e-0f4e-4b8e-9a53-3f6f4f1d2c10:ada"


@given(st.text(max_size=40), st.text(max_size=40), st.integers(1, 64))
def test_the_short_way_is_the_same(organization_id: str, customer: str, partitions: int) -> None:
    """What is computed once for an organization changes no partition."""
    assert CustomerPartitions(organization_id, partitions).of(customer) == partition_of(
        partition_key(organization_id, customer), partitions
    )
