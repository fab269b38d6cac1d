"""What differences are worth, to the last digit and where several meters have one name."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest

from aggregator.reconcile.report import Worth, add, between
from meters.catalogue.catalogue import Catalogue, Change
from meters.event_values import Facts, Number
from meters.ledger.benefits import Subscription, SubscriptionSet
from meters.ledger.price import MeterPriced, Price, ProductPrice, SubscriptionPriced
from meters.meter import Meter
from tests.support.records import NOW, ORGANIZATION, created, meter

TEN = Facts(
    name="call", timestamp=datetime(2026, 3, 1, tzinfo=UTC), metadata={"tokens": Number("10", Decimal(10))},
    external_customer_id="ann",
)  # fmt: skip


def tokens(id: str, **fields: object) -> Meter:
    """A meter of this name, whatever it does."""
    return msgspec.structs.replace(meter(id, func="sum", property="tokens"), name="tokens", **fields)


def worth(prices: Mapping[str, int | str], *meters: Meter) -> Worth:
    """Meters with unit prices in cents."""
    priced = [MeterPriced(meter_id=id, price=Price(unit_amount=Decimal(cents)), at=NOW) for id, cents in prices.items()]
    return Worth(Catalogue([*created(*meters), *priced]))


def test_each_meter_of_a_name_has_its_own_quantity_and_price() -> None:
    """Both are told, apart by their ids; the money is that of both."""
    both = worth({"sum": 2, "count": 50}, tokens("sum"), msgspec.structs.replace(meter("count"), name="tokens"))

    found = both.of(ORGANIZATION, TEN)

    assert both.named(found) == {"tokens (sum)": 10, "tokens (count)": 1}
    assert both.cents(found) == 70


def test_a_meter_does_not_inherit_the_price_of_an_archived_one() -> None:
    """Its successor has no price, and is the only one that a person calls so."""
    successor = worth({"old": 100}, tokens("old", archived_at=NOW), tokens("new"))

    found = successor.of(ORGANIZATION, TEN)

    assert successor.named(found) == {"tokens": 10}
    assert successor.cents(found) is None


@pytest.mark.parametrize(
    ("general", "products", "cents"),
    [(None, ["5"], 50), (None, ["5", "5.0"], 50), ("5", ["5"], 50), (None, ["5", "2"], None), (None, [None], None)],
)
def test_products_have_prices(general: str | None, products: list[str | None], cents: int | None) -> None:
    """Where all subscriptions pay the same, that is the price; of several, a difference does not say which."""
    told: list[Change] = []
    for number, unit in enumerate(products):
        price = Price(unit_amount=Decimal(unit)) if unit else None
        told += [
            SubscriptionSet(Subscription(
                id=f"s{number}", organization_id=ORGANIZATION, customer_id=f"c{number}", status="active",
                created_at=NOW, amount=0, currency="usd", recurring_interval="month", current_period_start=NOW,
                product_id=f"p{number}", meter_ids=["sum"],
            )),
            SubscriptionPriced(
                organization_id=ORGANIZATION, subscription_id=f"s{number}", product_id=f"p{number}", at=NOW,
                prices=[ProductPrice(meter_id="sum", price=price)],
            ),
        ]  # fmt: skip
    if general:
        told.append(MeterPriced(meter_id="sum", price=Price(unit_amount=Decimal(general)), at=NOW))
    assert Worth(Catalogue([*created(tokens("sum")), *told])).cents({"sum": Decimal(10)}) == cents


@pytest.mark.parametrize(
    ("price", "cents"),
    [("2.5", "249999999999999999999999997.50"), ("99999.999999999999", "9999999999999999899999999900000.00")],
)
def test_the_largest_amount_has_its_price(price: str, cents: str) -> None:
    """Whatever an event may state can be told in cents, every one of them."""
    priced = worth({"sum": price}, tokens("sum"))

    assert priced.cents({"sum": Decimal("9" * 26)}) == Decimal(cents)
    assert priced.cents({"sum": Decimal("-" + "9" * 26)}) == Decimal("-" + cents)


def test_what_is_taken_away_keeps_its_digits() -> None:
    """An amount has 38 of them, and a difference as many."""
    amount = Decimal("12345678901234567890123456.123456789012")
    totals = {"sum": amount}
    add(totals, {"sum": amount}, -1)

    assert totals == {"sum": 0}
    assert between({}, {"sum": amount}) == {"sum": Decimal("-12345678901234567890123456.123456789012")}
