"""JSON whose numbers keep their digits."""

from decimal import Decimal

import msgspec
import pytest

from meters.exact import Object, Token, decode, decode_tokens, echo, encode


def test_fractions_are_decimals_and_come_back_as_they_were() -> None:
    """Trailing zeros and all: nothing passes through a double."""
    text = b'{"a":0.10,"b":[1,12345678901234567890.123456789],"c":true,"d":null,"e":"1.5"}'
    value = decode(text)
    assert value["a"] == Decimal("0.10")
    assert type(value["b"][0]) is int
    assert encode(value) == text


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"NaN",
        b"[Infinity]",
        b"\xff",
        b'"\\ud800"',
        b'{"\\uDC00":1}',
        b"1e99999999999999999999",
        b"1" * 5000,
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_what_is_not_json_is_a_value_error(text: bytes) -> None:
    """Whatever the reason, the caller catches one kind."""
    with pytest.raises(ValueError):  # noqa: PT011 - the kinds differ, and all of them are ValueErrors
        decode(text)


def test_escaped_pairs_are_characters() -> None:
    """A whole surrogate pair is well."""
    assert decode(b'"\\ud83d\\ude00"') == "😀"


def test_tokens_are_kept_and_told_as_sent() -> None:
    """For reading events: numbers unread, repeated keys named, and an echo of the very text."""
    value = decode_tokens(b'{"n":1.50,"n":1e400,"o":{"x":[-0]}}')
    assert value == {"n": Token("1e400"), "o": {"x": [Token("-0")]}}
    assert isinstance(value, Object)
    assert value.repeated == ["n"]
    assert value["o"].repeated == []
    assert msgspec.json.encode(echo(value)) == b'{"n":1e400,"o":{"x":[-0]}}'
