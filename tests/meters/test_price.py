"""Prices: cents for units, to the last decimal and then whole."""

from decimal import Decimal
from typing import Any

import pytest

from meters.ledger.price import UNIT_AMOUNT_DIGITS_MAX, Price, charge, parse_price


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
