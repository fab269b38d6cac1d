"""Property names: which keys of the metadata a path leads through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meters.event_values import is_built_in, lookup, parse_property, path_of, steps, written

KEYS = st.lists(st.sampled_from(['"', ".", "a", "metadata", "name", " ", "\\"]), max_size=6).map("".join)


@pytest.mark.parametrize(("path", "keys"), [
    ("tokens", ("tokens",)),
    ("_llm.input_tokens", ("_llm", "input_tokens")),
    ('"gen_ai.usage.input_tokens"', ("gen_ai.usage.input_tokens",)),
    ('span."gen_ai.usage.input_tokens".value', ("span", "gen_ai.usage.input_tokens", "value")),
    ('"a.b"."c.d"', ("a.b", "c.d")),
    ('"name"', ("name",)),
    ('"say ""hi"""', ('say "hi"',)),
    ('""', ("",)),
    ("", ("",)),
    ("a..b.", ("a", "", "b", "")),
    # quotes that do not enclose a whole key are part of it, as in meters made before keys could be quoted
    ('"a.b', ('"a', "b")),
    ('a".b"', ('a"', 'b"')),
    ('"a"b.c', ('"a"b', "c")),
    ('"', ('"',)),
    ('"""', ('"""',)),
])  # fmt: skip
def test_a_path_leads_through_its_keys(path: str, keys: tuple[str, ...]) -> None:
    """Dots separate keys, and what is quoted is one key."""
    assert steps(path) == keys


@given(st.lists(KEYS, min_size=1, max_size=4))
def test_every_key_has_a_spelling(keys: list[str]) -> None:
    """Read as a property of a meter, it leads to the keys and never to a built-in name."""
    property = parse_property(path_of(keys), ())

    assert isinstance(property, str)
    assert list(steps(property)) == keys
    assert not is_built_in(property)
    assert parse_property(written(property), ()) == property


@given(st.text(st.sampled_from(['a', "b", ".", " ", "/", "~"]), max_size=12))
def test_a_path_without_quotes_means_what_it_always_did(path: str) -> None:
    """Dots lead into objects."""
    assert list(steps(path)) == path.split(".")


def test_a_dotted_key_is_found_beside_an_object_of_the_same_names() -> None:
    """The spelling says which of both is meant."""
    metadata = {"gen_ai.tokens": 1, "gen_ai": {"tokens": 2}, "name": 3}

    assert lookup(metadata, '"gen_ai.tokens"') == 1
    assert lookup(metadata, "gen_ai.tokens") == 2
    assert lookup(metadata, '"name"') == 3
    assert lookup(metadata, '"gen_ai"."tokens"') == 2
