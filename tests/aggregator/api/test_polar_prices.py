"""Prices that Polar told: which customer pays what, from when on, and what is shown where nobody knows."""

from datetime import timedelta
from typing import Any

import pytest

from tests.support.polar.organization import BEGINNING, Json, Polar, state, text
from tests.support.records import line
from tests.support.servers.query_api import Server

LATER = BEGINNING + timedelta(days=1)


@pytest.fixture
def polar(server: Server) -> Polar:
    """A Polar organization whose meter is linked to one here that adds up tokens."""
    told = Polar(server.tenant())
    meter(told)
    return told


def meter(polar: Polar, func: str = "sum", **metadata: str) -> str:
    """A meter of tokens that says which one of Polar's it is; its id."""
    made = polar.tenant.meter(func=func, property="tokens")
    polar.tenant.patch(f"/v1/meters/{made}", {"metadata": {"polar_meter_id": polar.meter_id} | metadata})
    return made


def use(polar: Polar, id: str, tokens: int, who: str = "ann") -> None:
    """The customer uses so many tokens, now."""
    polar.tenant.send(line(id, external_customer_id=who, metadata=f'{{"tokens": {tokens}}}'))


def subscribe(
    polar: Polar, delivery: str, *prices: Json, kind: str = "subscription.created", **fields: Any
) -> Any:
    """Polar tells of the subscription, with these prices; the answer's JSON."""
    delivered = polar.deliver(kind, polar.subscription(BEGINNING, prices=list(prices), **fields), delivery)
    assert delivered.status_code == 202, delivered.text
    return delivered.json()


def amounts(polar: Polar, who: str = "ann") -> tuple[list[int], int | None, list[int | None]]:
    """Cents of the period by the state, the charges and the portal."""
    tenant = polar.tenant
    found = tenant.get(f"/v1/customers/external/{who}/state")
    told = [one["amount"] for held in found["active_subscriptions"] for one in held["meters"]]
    charges = tenant.get(f"/v1/customers/{found['id']}/charges")["amount"]
    return told, charges, [one["amount"] for one in portal(polar, who)]


def portal(polar: Polar, who: str = "ann") -> list[Any]:
    """What the customer sees of each meter."""
    session = polar.tenant.post("/v1/customer-sessions/", {"external_customer_id": who})["token"]
    items: list[Any] = polar.tenant.ask("GET", "/v1/customer-portal/usage", secret=session).json()["items"]
    return items


def test_a_price_that_polar_told_is_shown_everywhere(polar: Polar) -> None:
    """100 credits, 130 used, 10 cents a token: 30 tokens cost 300."""
    subscribe(polar, "1", polar.price("10.0"))
    polar.deliver("benefit_grant.created", polar.grant(BEGINNING + timedelta(minutes=5)), "2")
    use(polar, "a", 130)
    assert amounts(polar) == ([300], 300, [300])
    (item,) = polar.tenant.get(f"/v1/customers/{state(polar)['id']}/charges")["items"]
    shown = (item["unit_amount"], item["currency"], item["product_id"], item["billed_units"])
    assert shown == ("10", "usd", "product", 30)


def test_prices_belong_to_products(polar: Polar) -> None:
    """10 tokens of one plan at 10 cents cost 100; of another plan at 5 cents on the same meter, 50."""
    subscribe(polar, "1", polar.price("10.0"))
    bob = polar.customer(id=f"77777777{polar.customer_id[8:]}", external_id="bob", email="bob@example.com")
    subscribe(
        polar, "2", polar.price("5.0"), id=f"88888888{polar.subscription_id[8:]}", product_id="other",
        customer_id=bob["id"], customer=bob,
    )  # fmt: skip
    for who in ("ann", "bob"):
        use(polar, who, 10, who)
    assert amounts(polar, "ann") == ([100], 100, [100])
    assert amounts(polar, "bob") == ([50], 50, [50])


def test_a_new_price_of_a_product_leaves_old_subscribers_theirs(polar: Polar) -> None:
    """What a subscription states is what it pays, whatever another subscription of the same product states later."""
    subscribe(polar, "1", polar.price("10.0"))
    bob = polar.customer(id=f"77777777{polar.customer_id[8:]}", external_id="bob", email="bob@example.com")
    other = {"id": f"88888888{polar.subscription_id[8:]}", "customer_id": bob["id"], "customer": bob}
    subscribe(polar, "2", polar.price("5.0"), **other)
    use(polar, "a", 10)
    assert amounts(polar) == ([100], 100, [100])


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 1, 0)])
@pytest.mark.parametrize(
    ("func", "before", "after", "credits", "cents"),
    [
        ("sum", 100, 10, 0, 1050),  # 100 at 10 cents, 10 at 5
        ("sum", 100, 10, 40, 650),  # the credits pay for the first 40
        ("sum", 100, 10, 105, 25),  # and for the next 65 and 5 of the last
        ("sum", 100, -20, 0, 1000),  # what was billed at the old price stays billed
        ("max", 100, 10, 0, 500),  # not added up: the newest price holds for the whole period
    ],
)
def test_usage_costs_the_price_of_its_time(
    server: Server, order: tuple[int, ...], func: str, before: int, after: int, credits: int, cents: int
) -> None:
    """A plan is changed within the period: by Polar's rule each part has its price, in whatever order that is told."""
    polar = Polar(server.tenant())
    made = meter(polar, func)
    polar.deliver("customer.created", polar.customer(), "0")
    if credits:
        polar.tenant.post(f"/v1/customers/{polar.customer_id}/credits", {"meter_id": made, "units": credits})
    start = server.now
    use(polar, "a", before)
    server.now += timedelta(hours=1)
    changed = text(server.now)
    server.now += timedelta(hours=1)
    use(polar, "b", after)
    news = [
        {"prices": [polar.price("10.0")]},
        {"prices": [polar.price("5.0")], "product_id": "other", "modified_at": changed},
    ]
    for id, place in enumerate(order):
        period = polar.subscription(start - timedelta(days=1), **news[place])
        polar.deliver("subscription.updated", period, f"n{id}")
    assert amounts(polar) == ([cents], cents, [cents])


def test_a_trial_costs_nothing(polar: Polar) -> None:
    """As at Polar, which bills no usage of a trial; the price is shown."""
    subscribe(polar, "1", polar.price("10.0"), status="trialing")
    use(polar, "a", 130)
    assert amounts(polar) == ([0], 0, [0])


def test_usage_is_billed_once_where_two_subscriptions_price_it(polar: Polar) -> None:
    """The newer one pays."""
    subscribe(polar, "1", polar.price("10.0"))
    newer = {"id": f"88888888{polar.subscription_id[8:]}", "created_at": text(LATER), "modified_at": text(LATER)}
    subscribe(polar, "2", polar.price("5.0"), **newer)
    use(polar, "a", 10)
    assert amounts(polar) == ([0, 50], 50, [50])


@pytest.mark.parametrize("unit_amount", [None, "0", "a lot"])
def test_a_price_that_is_not_known_is_null(polar: Polar, unit_amount: str | None) -> None:
    """And never 0. Polar's clients take no null in a state, so the subscription's meter is left out there."""
    answer = subscribe(polar, "1", polar.price(unit_amount))
    assert answer["status"] == "accepted"
    use(polar, "a", 130)
    assert amounts(polar) == ([], None, [None])
    assert [one["consumed_units"] for one in state(polar)["active_meters"]] == [130]


def test_nothing_that_has_a_price_comes_to_no_amount(polar: Polar) -> None:
    """Usage without any price: what it costs nobody knows."""
    polar.deliver("customer.created", polar.customer(), "1")
    use(polar, "a", 130)
    charges = polar.tenant.get(f"/v1/customers/{polar.customer_id}/charges")
    assert (charges["items"], charges["amount"], charges["currency"]) == ([], None, None)


def test_the_meters_own_price_stands_in_where_polar_told_none(polar: Polar) -> None:
    """As in logs of versions that did not read Polar's prices. What a subscription states comes before it."""
    meter_id = polar.tenant.get("/v1/meters/")["items"][0]["id"]
    assert polar.tenant.ask("PUT", f"/v1/meters/{meter_id}/price", json={"unit_amount": "2"}).is_success
    subscribe(polar, "1", polar.price(None))
    use(polar, "a", 130)
    assert amounts(polar) == ([260], 260, [260])
    subscribe(polar, "2", polar.price("10.0"), kind="subscription.updated", modified_at=text(LATER))
    assert amounts(polar) == ([1300], 1300, [1300])


def test_an_organization_has_one_currency(polar: Polar) -> None:
    """A price in another one is refused with words; what else Polar told is taken."""
    subscribe(polar, "1", polar.price("10.0"))
    bob = polar.customer(id=f"77777777{polar.customer_id[8:]}", external_id="bob", email="bob@example.com")
    other = {"id": f"88888888{polar.subscription_id[8:]}", "customer_id": bob["id"], "customer": bob, "currency": "eur"}
    answer = subscribe(polar, "2", polar.price("5.0", price_currency="eur"), **other)
    assert answer["status"] == "accepted"
    assert "it is in eur, and this organization's prices are in usd" in answer["notes"][0]
    use(polar, "b", 10, "bob")
    assert amounts(polar, "bob") == ([], None, [None])
    meter_id = polar.tenant.get("/v1/meters/")["items"][0]["id"]
    body = {"unit_amount": "1", "currency": "eur"}
    refused = polar.tenant.ask("PUT", f"/v1/meters/{meter_id}/price", json=body)
    assert refused.status_code == 422
    assert "prices are in usd" in refused.json()["detail"][0]["msg"]


def test_prices_may_be_in_another_currency_than_dollars(polar: Polar) -> None:
    """The first price decides, whoever states it; a price that can be stated again replaces its own."""
    meter_id = polar.tenant.get("/v1/meters/")["items"][0]["id"]
    path = f"/v1/meters/{meter_id}/price"
    assert polar.tenant.ask("PUT", path, json={"unit_amount": "1"}).json()["currency"] == "usd"
    assert polar.tenant.ask("PUT", path, json={"unit_amount": "1", "currency": "EUR"}).json()["currency"] == "eur"
    use(polar, "a", 10)
    subscribe(polar, "1", polar.price("10.0", price_currency="eur"))
    charges = polar.tenant.get(f"/v1/customers/{polar.customer_id}/charges")
    assert (charges["amount"], charges["currency"]) == (100, "eur")


def test_the_period_of_usage_is_shown(polar: Polar) -> None:
    """A month, where the subscription is paid for by the year."""
    month, year = BEGINNING + timedelta(days=31), BEGINNING + timedelta(days=365)
    subscribe(
        polar, "1", polar.price("10.0"), recurring_interval="year", current_period_end=text(year),
        current_meter_period_start=text(BEGINNING), current_meter_period_end=text(month),
    )  # fmt: skip
    use(polar, "a", 1)
    (item,) = portal(polar)
    assert item["period"] == {"start": text(BEGINNING), "end": text(month)}


OPTIONAL = (
    "amount", "currency", "recurring_interval", "modified_at", "cancel_at_period_end", "custom_field_data", "metadata",
    "meters", "discount_id", "current_period_end", "current_meter_period_start",
)  # fmt: skip


@pytest.mark.parametrize("field", OPTIONAL)
@pytest.mark.parametrize("kind", ["subscription.created", "subscription.updated", "subscription.canceled"])
def test_a_null_is_as_good_as_nothing(polar: Polar, kind: str, field: str) -> None:
    """Polar writes null for what it leaves out, in every type of news of a subscription."""
    subscribe(polar, "1", polar.price("10.0"), kind=kind, **{field: None})
    use(polar, "a", 130)
    assert amounts(polar) == ([1300], 1300, [1300])


def test_nulls_in_customers_benefits_and_grants_are_as_good_as_nothing(polar: Polar) -> None:
    """What the application keeps in metadata stays as it is."""
    grant = polar.grant(BEGINNING)
    grant["benefit"] |= {"metadata": None, "description": None, "is_deleted": None}
    grant["customer"] |= {"metadata": None, "deleted_at": None, "type": None, "name": None}
    told = grant | {"is_revoked": None, "is_granted": None, "previous_properties": None, "order_id": None}
    assert polar.deliver("benefit_grant.created", told, "1").status_code == 202
    assert [one["credited_units"] for one in state(polar)["active_meters"]] == [100]
    form = {"metadata": {"note": "x"}, "custom_field_data": {"vat": None, "size": 5}}
    subscribe(polar, "2", polar.price("10.0"), **form)
    (held,) = state(polar)["active_subscriptions"]
    assert (held["metadata"], held["custom_field_data"]) == (form["metadata"], form["custom_field_data"])


def test_a_meter_that_costs_something_is_shown_without_credits(polar: Polar) -> None:
    """25 tokens at 0.1 cent are 2.5 cents, rounded half away from zero. Prepaid usage is negative and costs nothing."""
    meter_id = polar.tenant.get("/v1/meters/")["items"][0]["id"]
    assert polar.tenant.ask("PUT", f"/v1/meters/{meter_id}/price", json={"unit_amount": "0.1"}).is_success
    for who, tokens in (("ann", 25), ("eve", -100)):
        polar.tenant.customer(external_id=who)
        use(polar, who, tokens, who)
    polar.tenant.customer(external_id="bob")  # who used nothing
    shown = {who: [(one["usage"], one["amount"]) for one in portal(polar, who)] for who in ("ann", "eve", "bob")}
    assert shown == {"ann": [(25, 3)], "eve": [(-100, 0)], "bob": []}


def test_prepaid_usage_is_shown_without_a_price(polar: Polar) -> None:
    """Negative usage leaves units; a meter that was merely used stays hidden."""
    for who, tokens in (("ann", 25), ("eve", -100)):
        polar.tenant.customer(external_id=who)
        use(polar, who, tokens, who)
    assert portal(polar, "ann") == []
    assert [(one["balance"], one["amount"]) for one in portal(polar, "eve")] == [(100, None)]
