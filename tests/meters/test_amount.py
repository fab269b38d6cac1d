"""Amounts are exact: what was sent is what is counted."""

from decimal import ROUND_HALF_EVEN, Context, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meters.aggregation import exact_sum, mean
from meters.exact import DECIMALS, INTEGER_DIGITS_MAX, amount_text, number_text, parse_amount

MODEL = Context(prec=5000, rounding=ROUND_HALF_EVEN)

digits = st.text("0123456789", min_size=1, max_size=40)
integers = st.from_regex(r"0|[1-9][0-9]{0,35}", fullmatch=True)
fractions = st.one_of(st.just(""), digits.map(lambda text: "." + text))
exponents = st.one_of(st.just(""), st.builds("{}{}".format, st.sampled_from(["e", "E+", "e-"]), st.integers(0, 60)))
tokens = st.builds("{}{}{}{}".format, st.sampled_from(["", "-"]), integers, fractions, exponents)


def model(token: str) -> Decimal | None:
    """What the token states, by arithmetic wide enough for anything."""
    rounded = MODEL.quantize(Decimal(token), Decimal(1).scaleb(-DECIMALS))
    return rounded if abs(rounded) < Decimal(10) ** INTEGER_DIGITS_MAX else None


@given(tokens)
def test_an_amount_is_the_number_rounded_half_even_to_12_decimals(token: str) -> None:
    """Whatever the notation: the exact value, or None beyond 26 integer digits."""
    assert parse_amount(token) == parse_amount(token.encode()) == model(token)


@given(tokens)
def test_the_text_of_an_amount_is_plain_and_states_it_exactly(token: str) -> None:
    """Plain digits, nothing superfluous, and the same amount when it is read again."""
    amount = parse_amount(token)
    if amount is not None:
        text = amount_text(amount)
        assert parse_amount(text) == amount
        assert not set(text) & set("eE+")
        assert text == "0" or not text.endswith(".")
        assert "." not in text or text[-1] != "0"
        assert text != "-0"


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("812", "812"),
        ("0.0425", "0.0425"),
        ("-1.50", "-1.5"),
        ("100.0", "100"),
        ("1e2", "100"),
        ("-0.0", "0"),
        ("0.0000000000005", "0"),  # half to even
        ("0.0000000000015", "0.000000000002"),
        ("0.30000000000000004", "0.3"),
        ("1e-9999999999999999999", "0"),
        ("-0.0E+9999999999999999999", "0"),
        ("99999999999999999999999999.999999999999", "99999999999999999999999999.999999999999"),
    ],
)
def test_amounts_as_text(token: str, text: str) -> None:
    """A reader sees plain decimals."""
    amount = parse_amount(token)
    assert amount is not None
    assert amount_text(amount) == text


@pytest.mark.parametrize(
    "token", ["1e26", "9" * 27, "1e400", "1e9999999999999999999", "99999999999999999999999999.9999999999996"]
)
def test_more_than_26_integer_digits_are_no_amount(token: str) -> None:
    """Also when only the rounding makes the 27th digit."""
    assert parse_amount(token) is None


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("5", "5"),
        ("-0", "0"),
        ("5.0", "5.0"),
        ("5.10", "5.1"),
        ("1e5", "100000.0"),
        ("0.1", "0.1"),
        ("-0.0", "0.0"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1234567890123", "0.123456789012"),
    ],
)
def test_numbers_as_text_keep_integers_and_fractions_apart(token: str, text: str) -> None:
    """What ``like`` reads: an integer as it was sent, any other number with at least one decimal."""
    assert number_text(token) == number_text(token.encode()) == text


def test_ten_times_a_tenth_is_one() -> None:
    """Where doubles give 0.9999999999999999."""
    tenth = parse_amount("0.1")
    assert tenth is not None
    assert exact_sum([tenth] * 10) == 1


def test_integers_beyond_a_double_are_exact() -> None:
    """Where doubles give 9007199254740992."""
    large = parse_amount("9007199254740993")
    assert large is not None
    assert exact_sum([large, Decimal(1)]) == 9007199254740994


@given(st.lists(st.integers(-(10**38) + 1, 10**38 - 1).map(lambda n: Decimal(n).scaleb(-12, MODEL)), max_size=20))
def test_sums_and_means_are_exact(amounts: list[Decimal]) -> None:
    """A sum is exact; a mean is the exact quotient, rounded once."""
    total = sum((int(amount.scaleb(12, MODEL)) for amount in amounts), 0)
    assert exact_sum(amounts) == Decimal(total).scaleb(-12, MODEL)
    if amounts:
        quotient = MODEL.divide(Decimal(total).scaleb(-12, MODEL), Decimal(len(amounts)))
        assert mean(exact_sum(amounts), len(amounts)) == MODEL.quantize(quotient, Decimal("1e-12"))
