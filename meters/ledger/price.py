"""Prices: what usage costs, with credits used first and an optional cap.

``Price`` is a price for a unit, ``Prices`` folds the decisions ``MeterPriced``, and ``charge`` computes an amount.
Unit prices are cents with up to 12 decimals, amounts are whole cents. The result is an estimate of the running
period; invoices are made elsewhere.
"""

from datetime import datetime
from decimal import ROUND_HALF_UP, Context, Decimal

import msgspec

from meters.errors import Detail, detail
from meters.exact import DECIMALS, is_number_text, round_amount

UNIT_AMOUNT_DIGITS_MAX = 17
"""Digits of a unit price, 12 of them after the point (Polar's column)."""

CAP_AMOUNT_MAX = 2**31 - 1
"""Cents of a cap (Polar's column)."""

_EXACT = Context(prec=80, rounding=ROUND_HALF_UP)  # which is half away from zero


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Cents for a unit of a meter, and the most that a period costs, in cents."""

    unit_amount: Decimal
    cap_amount: int | None = None


class MeterPriced(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="meter.priced"):
    """A meter's price from now on, for periods under way, too; None takes it away."""

    meter_id: str
    price: Price | None
    at: datetime


class Prices:
    """The prices of today, by meter."""

    def __init__(self) -> None:
        self._prices: dict[str, Price] = {}

    def apply(self, change: object) -> None:
        """Take in one change; others than ``MeterPriced`` are somebody else's."""
        if isinstance(change, MeterPriced):
            self._prices.pop(change.meter_id, None)
            if change.price is not None:
                self._prices[change.meter_id] = change.price

    def of(self, meter_id: str) -> Price | None:
        """The meter's price, if it has one."""
        return self._prices.get(meter_id)


def charge(price: Price, consumed: Decimal, credited: Decimal = Decimal(0)) -> int:
    """Cents for what was used beyond the credits, rounded half away from zero, then capped."""
    billed = max(Decimal(0), _EXACT.subtract(consumed, credited))
    cents = int(_EXACT.multiply(price.unit_amount, billed).quantize(Decimal(1), context=_EXACT))
    return cents if price.cap_amount is None else min(cents, price.cap_amount)


def parse_price(body: object) -> Price | list[Detail]:
    """The price that a decoded request body states, or every complaint about it.

    ``unit_amount`` is a number or the text of one, so that no client bends its digits.
    """
    if not isinstance(body, dict):
        return [detail("model_attributes_type", ("body",), "Input should be a valid dictionary or object", body)]
    unit_amount, complaints = _unit_amount(body)
    cap = body.get("cap_amount")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or not 0 <= cap <= CAP_AMOUNT_MAX):
        message = f"Input should be a whole number of cents from 0 to {CAP_AMOUNT_MAX}"
        complaints.append(detail("value_error", ("body", "cap_amount"), message, cap))
    return complaints or Price(unit_amount=unit_amount, cap_amount=cap)


def _number(given: object) -> Decimal | None:
    if isinstance(given, bool) or not isinstance(given, int | str | Decimal):
        return None
    if isinstance(given, str) and not is_number_text(given):
        return None
    try:
        return Decimal(given)
    except ArithmeticError:  # an exponent that is too far away
        return None


def _unit_amount(body: dict[str, object]) -> tuple[Decimal, list[Detail]]:
    loc = ("body", "unit_amount")
    if "unit_amount" not in body:
        return Decimal(0), [detail("missing", loc, "Field required", body)]
    given = body["unit_amount"]
    amount = _number(given)
    whole_digits_max = UNIT_AMOUNT_DIGITS_MAX - DECIMALS
    if amount is None or not amount.is_finite() or amount <= 0 or amount >= 10**whole_digits_max:
        message = f"Input should be a number of cents above 0, with at most {whole_digits_max} digits before the point"
        return Decimal(0), [detail("decimal_parsing", loc, message, given)]
    rounded = round_amount(amount)
    if rounded is None or rounded != amount:
        return Decimal(0), [detail("decimal_max_places", loc, f"At most {DECIMALS} decimals are taken", given)]
    return rounded, []
