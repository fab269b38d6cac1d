"""Dead letters that are large, and together more than DuckDB may have in memory: they are stored, listed and given."""

from pathlib import Path
from random import Random

import pytest

from aggregator.decode.dedup import PART_BYTES
from aggregator.store.database import Settings
from tests.support.servers.query_api import Tenant, serving

LETTERS = 17
LETTER_BYTES = 4_000_000
TIGHT = Settings(memory_limit="64MB", threads=1)  # less than they have


def large(number: int, length: int) -> bytes:
    """No event, of so many bytes: none of its parts is like another."""
    return (b"{" + Random(number).randbytes(length).hex().encode())[:length]


def test_more_large_letters_than_memory_holds_are_listed_and_given(tmp_path: Path) -> None:
    """Also once a checkpoint has packed them; a list has the beginning of each, and its own answer all of one."""
    with serving(tmp_path, settings=TIGHT) as server:
        tenant = server.tenant()
        for number in range(LETTERS):
            tenant.send(large(number, LETTER_BYTES), admitted=False)
        tenant.send(b"{small", admitted=False)
        store = server.aggregator._now.store
        store.checkpoint()
        store.read_through()
        small, *letters = tenant.get("/v1/dead-letters/", limit=100)["items"]
        assert [small] == tenant.get("/v1/dead-letters/", limit=1)["items"]
        assert (small["raw"], small["is_cut"]) == ("{small", False)
        assert len(letters) == LETTERS
        for number, letter in enumerate(reversed(letters)):
            whole = large(number, LETTER_BYTES).decode()
            assert (letter["raw"], letter["is_cut"]) == (whole[:PART_BYTES], True)
            assert tenant.get(f"/v1/dead-letters/{letter['id']}") == letter | {"raw": whole, "is_cut": False}


@pytest.mark.parametrize("length", [PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 2 * PART_BYTES + 1])
def test_a_letter_is_put_together_as_it_was(tenant: Tenant, length: int) -> None:
    """Whether its last part is a whole one or not; in a list it is cut if it has more than one."""
    tenant.send(large(0, length), large(1, length), admitted=False)
    for letter in tenant.get("/v1/dead-letters/")["items"]:
        assert letter["is_cut"] == (length > PART_BYTES)
        whole = tenant.get(f"/v1/dead-letters/{letter['id']}")
        assert (whole["raw"], whole["is_cut"]) == (large(letter["line"], length).decode(), False)
