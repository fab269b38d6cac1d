"""The memory of acknowledged identities, in dictionaries and in a table of compiled loops."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.admission.duplicates import Fingerprints, RecentIdentities, Verdict
from ingest.admission.intake import Quick
from ingest.admission.kernels import BodyReader

Memory = Callable[..., RecentIdentities]
in_dictionaries: Memory = RecentIdentities
in_a_table: Memory = partial(RecentIdentities, loops=Quick(BodyReader()))


@pytest.fixture(params=[in_dictionaries, in_a_table], ids=["dictionaries", "table"])
def memory(request: pytest.FixtureRequest) -> Memory:
    """What makes one."""
    return request.param


def test_an_id_belongs_to_its_organization(memory: Memory) -> None:
    """Two organizations may use the same external id."""
    recent = memory()
    assert recent.take(Fingerprints.of("one", ["id"], [b"{}"])) is None
    assert recent.take(Fingerprints.of("other", ["id"], [b"{}"])) is None
    assert recent.take(Fingerprints.of("one", ["id"], [b"{}"])) == [Verdict.DUPLICATE]


def test_the_first_content_of_an_identity_stays(memory: Memory) -> None:
    """Whatever came under the same id since, in the same request or in later ones, is compared with the first."""
    recent, first, second = memory(), *(Fingerprints.of("o", ["id"], [text]) for text in (b"1", b"2"))
    twice = Fingerprints.of("o", ["new", "id", "new"], [b"1", b"1", b"2"])
    assert recent.take(first) is None
    assert recent.take(second) == [Verdict.KNOWN]
    assert recent.take(twice) == [Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.KNOWN]
    assert recent.take(twice) == [Verdict.DUPLICATE, Verdict.DUPLICATE, Verdict.KNOWN]
    assert recent.take(first) == [Verdict.DUPLICATE]


def test_an_event_twice_in_a_request_alone_is_new_once(memory: Memory) -> None:
    """Nothing else of the request has to be known for it."""
    twice = Fingerprints.of("o", ["id", "other", "id"], [b"1", b"1", b"2"])
    recent = memory()
    assert recent.take(twice) == [Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.KNOWN]
    assert recent.take(twice) == [Verdict.DUPLICATE, Verdict.DUPLICATE, Verdict.KNOWN]


def test_it_is_limited_and_keeps_the_younger_ones(memory: Memory) -> None:
    """At least one generation is remembered, never more than two."""
    recent = memory(generation_max=10)
    for number in range(25):
        assert recent.take(Fingerprints.of("o", [str(number)], [b"{}"])) is None
    known = [number for number in range(25) if deepcopy(recent).take(Fingerprints.of("o", [str(number)], [b"{}"]))]
    assert known == list(range(10, 25))


def test_a_request_may_be_larger_than_what_is_remembered(memory: Memory) -> None:
    """The events at its end are remembered."""
    recent, many = memory(generation_max=10), [str(number) for number in range(40_000)]
    assert recent.take(Fingerprints.of("o", many, [b"{}"] * len(many))) is None
    assert recent.take(Fingerprints.of("o", many[-1:], [b"{}"])) == [Verdict.DUPLICATE]


def test_what_was_known_before_there_was_a_table_stays_known() -> None:
    """Of both generations."""
    swift = Quick()
    recent = RecentIdentities(10, swift)
    for number in range(15):
        recent.take(Fingerprints.of("o", [str(number)], [b"{}"]))
    swift.loader.loops = BodyReader()
    known = [number for number in range(15) if deepcopy(recent).take(Fingerprints.of("o", [str(number)], [b"{}"]))]
    assert known == list(range(15))


@given(st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), max_size=6), max_size=20))
def test_a_table_says_what_dictionaries_say(requests: list[list[tuple[int, int]]]) -> None:
    """Whatever comes again, whenever, as long as nothing is forgotten."""
    one, other = in_dictionaries(), in_a_table()
    for request in requests:
        events = Fingerprints([2 * key for key, _ in request], [content for _, content in request])
        assert one.take(events) == other.take(events)
