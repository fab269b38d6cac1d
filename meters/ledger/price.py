"""Prices: what usage costs, with credits used first and an optional cap.

A price has two sources. The operator sets one for a meter (``MeterPriced``); it holds for everybody and for periods
under way. Polar states one for a product, and a subscription pays it from a time on (``SubscriptionPriced``).
``Prices`` folds both; ``meters.tariff`` picks the prices of one customer and meter. ``charge`` computes
an amount, ``charge_parts`` one for usage at several prices.
Unit prices are cents with up to 12 decimals, amounts are whole cents. The result is an estimate of the running
period; invoices are made elsewhere.
"""

from bisect import insort
from collections.abc import Iterable
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


DEFAULT_CURRENCY = "usd"
"""The currency of a price that names none (Polar's default)."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Cents for a unit of a meter, and the most that a period costs, in cents. ``currency`` is an ISO code."""

    unit_amount: Decimal
    cap_amount: int | None = None
    currency: str = DEFAULT_CURRENCY


FREE = Price(unit_amount=Decimal(0))
"""The price of usage that the customer's product is known not to charge for."""


class MeterPriced(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="meter.priced"):
    """A meter's price from now on, for periods under way, too; None takes it away."""

    meter_id: str
    price: Price | None
    at: datetime


class ProductPrice(msgspec.Struct, frozen=True, kw_only=True):
    """A product's price for one of Polar's meters; None where the product has one that could not be read."""

    meter_id: str
    price: Price | None


class SubscriptionPriced(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="subscription.priced"):
    """The prices that a subscription pays from ``at`` on, which are those of its product then.

    Two subscriptions of one product may pay different prices: a product's new price leaves old subscribers theirs.
    """

    organization_id: str
    subscription_id: str
    product_id: str
    at: datetime
    prices: list[ProductPrice]


PriceChange = MeterPriced | SubscriptionPriced


class Prices:
    """The price of each meter today, and the prices of each subscription over time."""

    def __init__(self) -> None:
        self._prices: dict[str, Price] = {}
        self._subscribed: dict[str, tuple[SubscriptionPriced, ...]] = {}  # by subscription, in the order of time

    def apply(self, change: object) -> None:
        """Apply one change. Changes of other kinds are ignored."""
        match change:
            case MeterPriced(meter_id=meter_id, price=price):
                self._prices.pop(meter_id, None)
                if price is not None:
                    self._prices[meter_id] = price
            case SubscriptionPriced(subscription_id=id) if self.is_news(change):
                known = [other for other in self._subscribed.get(id, ()) if other.at != change.at]
                insort(known, change, key=_at)
                self._subscribed[id] = tuple(known)

    def is_news(self, change: SubscriptionPriced) -> bool:
        """Return whether the change adds to what is known, so that the order of changes does not matter.

        Of two changes for one time, one holds: the first by its text.
        """
        known = next((one for one in self.of_subscription(change.subscription_id) if one.at == change.at), None)
        return known is None or _text(change) < _text(known)

    def of(self, meter_id: str) -> Price | None:
        """Return the meter's price for everybody, if it has one."""
        return self._prices.get(meter_id)

    def of_subscription(self, subscription_id: str) -> tuple[SubscriptionPriced, ...]:
        """Return the subscription's prices in the order of time; nothing where they are not known."""
        return self._subscribed.get(subscription_id, ())


def _at(change: SubscriptionPriced) -> datetime:
    return change.at


def _text(change: SubscriptionPriced) -> bytes:
    return msgspec.json.encode((change.product_id, change.prices))


def charge(price: Price, consumed: Decimal, credited: Decimal = Decimal(0)) -> int:
    """Return cents for what was used beyond the credits, rounded half away from zero, then capped."""
    return charge_parts([(price, consumed)], credited)


def charge_parts(parts: Iterable[tuple[Price, Decimal]], credited: Decimal = Decimal(0)) -> int:
    """Return cents for usage at several prices, one after the other.

    Args:
        parts: each price with the usage of the whole period up to where the price ends.
        credited: units that cost nothing. The earliest usage takes them.

    Each price rounds half away from zero and caps its own part, as lines of an invoice do. Usage that was taken back
    and used again costs once.
    """
    total, paid = 0, Decimal(0)
    for price, consumed in parts:
        billed = max(Decimal(0), _EXACT.subtract(_EXACT.subtract(consumed, credited), paid))
        paid = _EXACT.add(paid, billed)
        cents = int(_EXACT.multiply(price.unit_amount, billed).quantize(Decimal(1), context=_EXACT))
        total += cents if price.cap_amount is None else min(cents, price.cap_amount)
    return total


def parse_price(body: object) -> Price | list[Detail]:
    """Return the price that a decoded request body or a price of Polar's states, or every complaint about it.

    ``unit_amount`` is a number or the text of one, so that no client changes its digits. A price without a currency is
    in ``DEFAULT_CURRENCY``.
    """
    if not isinstance(body, dict):
        return [detail("model_attributes_type", ("body",), "Input should be a valid dictionary or object", body)]
    unit_amount, complaints = _unit_amount(body)
    cap = body.get("cap_amount")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or not 0 <= cap <= CAP_AMOUNT_MAX):
        message = f"Input should be a whole number of cents from 0 to {CAP_AMOUNT_MAX}"
        complaints.append(detail("value_error", ("body", "cap_amount"), message, cap))
    currency = body.get("currency")
    if currency is not None and not _is_currency(currency):
        message = "Input should be an ISO code of three letters, such as usd"
        complaints.append(detail("value_error", ("body", "currency"), message, currency))
    if complaints:
        return complaints
    return Price(unit_amount=unit_amount, cap_amount=cap, currency=(currency or DEFAULT_CURRENCY).lower())


def _is_currency(given: object) -> bool:
    return isinstance(given, str) and len(given) == 3 and given.isascii() and given.isalpha()


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
