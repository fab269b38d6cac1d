"""The index of identities."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aggregator.seen import Keys, Seen, repeats

few = st.integers(0, 3)  # a small range makes halves collide all the time
batches = st.lists(st.lists(st.tuples(few, few), max_size=12), max_size=12)


def keys(identities: list[tuple[int, int]]) -> Keys:
    """Columns of identities, each with a content hash made from it."""
    hi = np.array([hi for hi, _ in identities], np.uint64)
    lo = np.array([lo for _, lo in identities], np.uint64)
    return Keys(hi, lo, hi * np.uint64(1000) + lo + np.uint64(1))


@given(batches)
def test_the_index_knows_exactly_what_was_added(batches: list[list[tuple[int, int]]]) -> None:
    """After any batches, each new identity once, an identity is found if and only if it was added, with its content."""
    seen, model = Seen(), set[tuple[int, int]]()
    for batch in batches:
        new = sorted(set(batch) - model)
        seen.add(keys(new))
        model |= set(new)
        everything = [(hi, lo) for hi in range(4) for lo in range(4)]
        asked = keys(everything)
        found, content = seen.find(asked.hi, asked.lo)

        assert [identity in model for identity in everything] == found.tolist()
        assert [int(c) for c, f in zip(asked.content, found, strict=True) if f] == content[found].tolist()
    seen.settle()
    assert len(model) == len(seen)


@given(st.lists(st.tuples(few, few), max_size=30))
def test_repeats_name_the_first_row_of_an_identity(identities: list[tuple[int, int]]) -> None:
    """Within a batch every row points at the first row of its identity, and only that row is first."""
    columns = keys(identities)
    found = repeats(columns.hi, columns.lo)

    expected = [identities.index(identity) for identity in identities]
    assert expected == found.of.tolist()
    assert [row == first for row, first in enumerate(expected)] == found.first.tolist()
