"""Prices: cents for units, to the last decimal and then whole."""

from decimal import Decimal
from typing import Any

import pytest

from meters.ledger.price import UNIT_AMOUNT_DIGITS_MAX, Price, charge, charge_parts, parse_price


@pytest.mark.parametrize(
    ("unit_amount", "cap", "consumed", "credited", "cents"),
    [
        ("100", None, "1.994", "0", 199),
        ("100", None, "1.995", "0", 200),  # half away from zero
        ("1", None, "0.5", "0", 1),
        ("1", None, "2.5", "0", 3),
        ("100", None, "-3", "0", 0),  # nobody is paid for usage below zero
        ("100", None, "7", "10", 0),  # credits first
        ("100", None, "12", "10", 200),
        ("100", 150, "12", "10", 150),
        ("0.000000000001", None, "1000000", "0", 0),
        ("0.000000000001", None, "500000000000", "0", 1),
        ("99999.999999999999", None, "99999999999999999999999999", "0", 9999999999999999899999999900000),
    ],
)
def test_charges(unit_amount: str, cap: int | None, consumed: str, credited: str, cents: int) -> None:
    """round-half-away(unit * max(0, units - credits)), then the cap."""
    price = Price(unit_amount=Decimal(unit_amount), cap_amount=cap)
    assert charge(price, Decimal(consumed), Decimal(credited)) == cents


@pytest.mark.parametrize(
    "body",
    [
        {}, [], {"unit_amount": 0}, {"unit_amount": -1}, {"unit_amount": True}, {"unit_amount": "x"},
        {"unit_amount": "NaN"}, {"unit_amount": "100000"}, {"unit_amount": "0.0000000000001"},
        {"unit_amount": "1e-13"}, {"unit_amount": 1, "cap_amount": -1}, {"unit_amount": 1, "cap_amount": 1.5},
        {"unit_amount": 1, "cap_amount": True}, {"unit_amount": "1e999999999"}, {"unit_amount": None},
        {"unit_amount": "1e-3000000000"}, {"unit_amount": "1_0"}, {"unit_amount": " 1 "}, {"unit_amount": "\u0663"},
        {"unit_amount": "1\n"}, {"unit_amount": ""}, {"unit_amount": "1." + "0" * 100 + "1"},
        {"unit_amount": "99999." + "9" * 100},
    ],
)  # fmt: skip
def test_what_is_no_price_is_refused(body: Any) -> None:
    """With words for what is wrong."""
    refused = parse_price(body)
    assert isinstance(refused, list)
    assert all(entry["msg"] for entry in refused)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0.000000000001", "1E-12"), (5, "5"), ("99999.5", "99999.5"), ("1e2", "100"),
        ("99999.999999999999" + "0" * 100, "99999.999999999999"),
    ],
)  # fmt: skip
def test_a_price_keeps_its_digits(given: Any, kept: str) -> None:
    """Numbers and texts of numbers are taken."""
    price = parse_price({"unit_amount": given, "cap_amount": 10})
    assert price == Price(unit_amount=Decimal(kept), cap_amount=10)
    assert isinstance(price, Price)
    assert len(price.unit_amount.as_tuple().digits) <= UNIT_AMOUNT_DIGITS_MAX


@pytest.mark.parametrize("given", ["EURO", "e1r", "", 5, "\u00e9\u00e9\u00e9"])
def test_a_currency_has_three_letters(given: Any) -> None:
    """It is kept in lower case; a price without one is in dollars."""
    assert isinstance(parse_price({"unit_amount": 1, "currency": given}), list)
    assert parse_price({"unit_amount": 1, "currency": "EUR"}) == Price(unit_amount=Decimal(1), currency="eur")
    assert parse_price({"unit_amount": 1}) == Price(unit_amount=Decimal(1), currency="usd")


@pytest.mark.parametrize(
    ("parts", "credited", "cents"),
    [
        ([("10", None, 100), ("5", None, 110)], 0, 1050),
        ([("10", None, 100), ("5", None, 110)], 100, 50),
        ([("10", None, 100), ("5", None, 110)], 104, 30),
        ([("10", 500, 100), ("5", None, 110)], 0, 550),  # each price caps its own part
        ([("10", None, 100), ("5", None, 80), ("1", None, 120)], 0, 1020),  # 20 came back, and 20 of 40 more are new
        ([("0.5", None, 1), ("0.5", None, 2)], 0, 2),  # each part rounds half away from zero
        ([("0", None, 100), ("5", None, 110)], 0, 50),
    ],
)
def test_usage_at_several_prices(parts: list[tuple[str, int | None, int]], credited: int, cents: int) -> None:
    """Each price has the usage up to its end; credits pay for the earliest usage."""
    priced = [(Price(unit_amount=Decimal(unit), cap_amount=cap), Decimal(used)) for unit, cap, used in parts]
    assert charge_parts(priced, Decimal(credited)) == cents
