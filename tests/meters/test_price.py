"""Prices: cents for units, to the last decimal and then whole."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace

from meters.ledger.price import (
    UNIT_AMOUNT_DIGITS_MAX,
    MeterPriced,
    Price,
    Prices,
    SubscriptionPriced,
    charge,
    charge_parts,
    parse_price,
)


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


WHOLE = "Input should be a whole number of cents from 0 to 2147483647"
CODE = "Input should be an ISO code of three letters, such as usd"
RANGE = "Input should be a number of cents above 0, with at most 5 digits before the point"


@pytest.mark.parametrize(
    ("body", "complaints"),
    [
        ([], [("model_attributes_type", ["body"], "Input should be a valid dictionary or object", [])]),
        ({}, [("missing", ["body", "unit_amount"], "Field required", {})]),
        ({"unit_amount": 0}, [("decimal_parsing", ["body", "unit_amount"], RANGE, 0)]),
        ({"unit_amount": "1e-13"},
         [("decimal_max_places", ["body", "unit_amount"], "At most 12 decimals are taken", "1e-13")]),
        ({"unit_amount": 1, "cap_amount": -1, "currency": "EURO"},
         [("value_error", ["body", "cap_amount"], WHOLE, -1), ("value_error", ["body", "currency"], CODE, "EURO")]),
        ({"unit_amount": "x", "cap_amount": 2**31},
         [("decimal_parsing", ["body", "unit_amount"], RANGE, "x"),
          ("value_error", ["body", "cap_amount"], WHOLE, 2**31)]),
    ],
)  # fmt: skip
def test_every_complaint_says_what_is_wrong_and_where(body: Any, complaints: list[Any]) -> None:
    """Its type, its field, what to give instead, and what was given."""
    refused = parse_price(body)
    assert isinstance(refused, list)
    assert [(one["type"], list(one["loc"]), one["msg"], one["input"]) for one in refused] == complaints


@pytest.mark.parametrize("cap", [0, 2**31 - 1, None])
def test_a_cap_is_taken_up_to_its_bounds(cap: int | None) -> None:
    """A period may cost nothing at most, and as much as fits Polar's column."""
    assert parse_price({"unit_amount": 1, "cap_amount": cap}) == Price(unit_amount=Decimal(1), cap_amount=cap)


def test_prices_of_meters_and_subscriptions() -> None:
    """A meter has its newest price, or none again; a subscription its prices in the order of time."""
    def priced(day: int, product: str, subscription: str = "s") -> SubscriptionPriced:
        return SubscriptionPriced(
            organization_id="o", subscription_id=subscription, product_id=product, prices=[],
            at=datetime(2026, 1, day, tzinfo=UTC),
        )  # fmt: skip

    prices, cent = Prices(), Price(unit_amount=Decimal(1))
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for meter, price in (("m", cent), ("n", cent), ("m", replace(cent, cap_amount=5)), ("n", None)):
        prices.apply(MeterPriced(meter_id=meter, price=price, at=now))
    assert [prices.of(meter) for meter in ("m", "n", "o")] == [replace(cent, cap_amount=5), None, None]
    told = [priced(5, "c"), priced(1, "a"), priced(3, "b"), priced(2, "a", "t"), priced(3, "z"), priced(3, "a")]
    news = []
    for one in told:
        news.append(prices.is_news(one))
        prices.apply(one)
    assert news == [True, True, True, True, False, True]  # of two for one time, the first by its text
    assert prices.of_subscription("s") == (priced(1, "a"), priced(3, "a"), priced(5, "c"))
    assert prices.of_subscription("t") == (priced(2, "a", "t"),)
    assert prices.of_subscription("u") == ()


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
