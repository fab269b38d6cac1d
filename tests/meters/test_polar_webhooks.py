"""What is read from Polar's payloads: prices, meters, grants and whose they are, and what is refused."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace

from meters.aggregation import Aggregation
from meters.catalogue.catalogue import Catalogue, CustomerCreated, MeterCreated
from meters.catalogue.polar_facts import DeliveryApplied
from meters.filters import EVERYTHING
from meters.ledger.price import Price, SubscriptionPriced
from meters.meter import Meter
from meters.polar_webhooks import News, Unreadable, here, meter_of, meters_here, read
from tests.support.polar.news import (
    AGAIN,
    CUSTOMER,
    DAY,
    T0,
    Json,
    customer,
    ended,
    grant,
    period,
    said,
    told,
)


def priced(*prices: Json, **fields: Any) -> Json:
    """A subscription with these prices, in dollars where nothing else is said."""
    return period(0, prices=list(prices), **fields)


def rate(meter: str, cents: str, **fields: Any) -> Json:
    """A price per unit of one of Polar's meters."""
    return {"id": f"price {meter}", "meter_id": meter, "unit_amount": cents, **fields}


def test_a_subscription_pays_the_prices_that_polar_states() -> None:
    """Each meter's once; what cannot be taken is kept as not known, with words for why."""
    told_so = priced(
        rate("m", "1.5", cap_amount=900), rate("n", "2", price_currency="EUR"), rate("o", "-1"), {"id": "fixed"},
        currency="usd", meters=[rate("m", "9"), rate("q", "3")],
    )  # fmt: skip
    news = said(Catalogue(), "subscription.created", told_so)
    (change,) = [one for one in news.changes if isinstance(one, SubscriptionPriced)]
    assert (change.organization_id, change.subscription_id, change.product_id, change.at) == ("org", "s", "p", T0)
    assert {one.meter_id: one.price for one in change.prices} == {
        "m": Price(unit_amount=Decimal("1.5"), cap_amount=900), "n": None, "o": None,
        "q": Price(unit_amount=Decimal(3)),
    }  # fmt: skip
    euros, negative = sorted(news.notes)
    assert euros == (
        "the price of Polar's meter n is not taken: it is in eur, and this organization's prices are in usd; an "
        "organization has one currency"
    )
    assert negative.startswith("the price of Polar's meter o is not taken: Input should be a number of cents above 0")


def test_the_first_price_decides_an_organizations_currency() -> None:
    """Another organization's does not, and neither do the subscription's own earlier prices."""
    catalogue = told([("subscription.created", priced(rate("m", "1", price_currency="eur")))])
    changed = {"modified_at": (T0 + DAY).isoformat()}
    own = said(catalogue, "subscription.updated", priced(rate("m", "1"), **changed))
    other = said(catalogue, "subscription.created", priced(rate("m", "1"), id="t"))
    assert [len(news.notes) for news in (own, other)] == [0, 1]
    elsewhere = read(
        catalogue, "elsewhere", delivery_id="1", kind="subscription.created", now=T0,
        data=priced(rate("m", "1"), id="t", customer=None, customer_id=AGAIN),
    )  # fmt: skip
    assert elsewhere is not None
    assert elsewhere.notes == []


THINGS: list[tuple[str, Json]] = [
    ("customer.updated", customer(1)),
    ("benefit.updated", grant(0)["benefit"]),
    ("benefit_grant.updated", grant(1) | {
        "customer": None, "customer_id": AGAIN, "benefit": grant(0, id="new")["benefit"],
    }),
    ("benefit_grant.updated", grant(1, id="h") | {
        "customer": None, "customer_id": AGAIN, "benefit": grant(0)["benefit"],
    }),
    ("subscription.updated", period(1, customer=None, customer_id=AGAIN)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data"), THINGS)
def test_what_is_anothers_is_not_touched(kind: str, data: Json) -> None:
    """A customer, benefit, grant or subscription of another organization has the id: the delivery is refused."""
    catalogue = told([("subscription.created", period(0)), ("benefit_grant.created", grant(0))])
    with pytest.raises(Unreadable, match=r"^this id is another's$"):
        read(catalogue, "elsewhere", delivery_id="1", kind=kind, data=data, now=T0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id": "cus_zz"}, "a customer's id should be a UUID"),
        ({"external_id": "\ud800"}, "external_id has a character that no event can hold"),
        ({"created_at": "0001-01-01T00:00:00+14:00", "modified_at": None}, "a time is out of range"),
    ],
)
def test_what_is_wrong_with_a_customer_is_said(fields: Json, words: str) -> None:
    """Whoever repairs the delivery has to know."""
    with pytest.raises(Unreadable) as told_so:
        said(Catalogue(), "customer.created", customer() | fields)
    assert str(told_so.value) == words


def test_an_order_tells_of_its_customer_once_it_is_paid() -> None:
    """Other news of an order, and of things that concern neither usage nor credits, are passed over."""
    def heard(kind: str) -> News | None:
        return read(Catalogue(), "org", delivery_id="7", kind=kind, data={"customer": customer()}, now=T0)

    news = heard("order.paid")
    assert news is not None
    assert [type(change) for change in news.changes] == [CustomerCreated, DeliveryApplied]
    (applied,) = news.changes[-1:]
    assert isinstance(applied, DeliveryApplied)
    assert (applied.delivery_id, applied.kind, applied.at) == ("7", "order.paid", T0)
    assert (news.polar_customer_id, news.customer_ids) == (CUSTOMER, [CUSTOMER])
    assert [heard(kind) for kind in ("order.created", "order.refunded", "checkout.paid", "paid")] == [None] * 4


def test_nulls_are_left_out_but_not_of_what_is_the_applications() -> None:
    """Polar writes null for what it leaves out; metadata and custom fields are kept as they are, also in lists."""
    free = {"metadata": {"a": None, "b": [None]}, "custom_field_data": {"c": None}}
    catalogue = told([("subscription.created", priced(rate("m", "1", cap_amount=None), seats=None, **free))])
    kept = catalogue.benefits.subscriptions["s"]
    assert (kept.metadata, kept.custom_field_data, kept.seats) == (free["metadata"], free["custom_field_data"], None)
    assert (kept.meter_ids, kept.price_id) == (["m"], "price m")


@pytest.mark.parametrize("deeper", [lambda value: [value], lambda value: {"deeper": value}])
def test_no_depth_of_a_payload_is_too_much(deeper: Callable[[object], object]) -> None:
    """What lies deeper than anything that is read is left alone."""
    deep: object = None
    for _ in range(5_000):
        deep = deeper(deep)
    assert said(Catalogue(), "customer.created", customer(unheard_of=deep)).customer_ids == [CUSTOMER]


def test_a_grant_keeps_what_polar_credited_last() -> None:
    """What the properties say; where they say no time, what the ones before said."""
    rows = [
        ("benefit_grant.created", grant(0), 0, 100, True),
        ("benefit_grant.cycled", grant(5, before=0), 5, 100, True),
        ("benefit_grant.revoked", ended(grant(5), 10), 10, -100, False),
        ("benefit_grant.revoked", grant(5, revoked=10), 5, 100, False),
        ("benefit_grant.created", grant(3) | {"properties": None}, None, None, True),
        ("benefit_grant.created", grant(3) | {"is_granted": False}, 3, 100, False),
    ]
    for kind, data, day, units, is_held in rows:
        kept = told([(kind, data)]).benefits.grants["g"]
        at = kept.last_credited_at
        assert (None if at is None else (at - T0) // DAY, kept.last_credited_units, kept.is_held) == (
            day, units, is_held
        ), kind  # fmt: skip


def test_a_deleted_benefit_is_gone_since_polar_deleted_it() -> None:
    """As of its last change, or of its creation where it has no other time."""
    benefit = grant(0)["benefit"]
    for changed, day in ((None, 0), ((T0 + 4 * DAY).isoformat(), 4)):
        deleted = benefit | {"is_deleted": True, "modified_at": changed}
        catalogue = told([("benefit.created", benefit), ("benefit.deleted", deleted), ("benefit.updated", benefit)])
        assert catalogue.benefits.benefits["b-g"].deleted_at == T0 + day * DAY


def test_each_thing_that_polar_tells_of_is_polars() -> None:
    """By its own name: another thing of the same kind, in the same state, is news of its own."""
    catalogue = told([
        ("subscription.created", period(0)), ("subscription.created", period(0, id="t")),
        ("benefit_grant.created", grant(0)), ("benefit_grant.created", grant(0, id="h")),
    ])  # fmt: skip
    names = {"customer": [CUSTOMER], "subscription": ["s", "t"], "grant": ["g", "h"], "benefit": ["b-g", "b-h"]}
    things = [f"{kind}:{id}" for kind, ids in names.items() for id in ids]
    assert [thing for thing in things if not catalogue.mirror.is_mirrored("org", thing)] == []
    assert not any(catalogue.mirror.is_mirrored(of, "grant:x") for of in ("org", "elsewhere"))
    found = catalogue.benefits
    assert [list(kept) for kept in (found.subscriptions, found.grants, found.benefits)] == [
        ["s", "t"], ["g", "h"], ["b-g", "b-h"]
    ]  # fmt: skip


def test_which_meter_is_polars() -> None:
    """The one with its id, or the one whose metadata says so, of the organization alone."""
    def meter(id: str, organization: str = "org", **metadata: str) -> MeterCreated:
        return MeterCreated(Meter(
            id=id, organization_id=organization, name=id, filter=EVERYTHING, aggregation=Aggregation("count"),
            created_at=T0, metadata=metadata,
        ))  # fmt: skip

    catalogue = Catalogue([
        meter("same"), meter("mine", polar_meter_id="theirs"), meter("x", "elsewhere", polar_meter_id="far"),
        meter("far away", "elsewhere"),
    ])  # fmt: skip
    found = {id: meter_of(catalogue, "org", id) for id in ("same", "theirs", "mine", "far", "far away", "none")}
    assert {id: one and one.id for id, one in found.items()} == {
        "same": "same", "theirs": "mine", "mine": "mine", "far": None, "far away": None, "none": None,
    }  # fmt: skip
    assert meters_here(catalogue, "org", ["theirs", "none", "mine", "same"]) == ["mine", "same"]
    benefits = told([("benefit_grant.created", grant(0))]).benefits
    benefit, held = replace(benefits.benefits["b-g"], meter_id="theirs"), benefits.grants["g"]
    assert here(catalogue, benefit).meter_id == "mine"
    assert here(catalogue, replace(benefit, meter_id="none")).meter_id == "none"
    assert here(catalogue, replace(held, last_credited_meter_id="theirs")).last_credited_meter_id == "mine"
    assert here(catalogue, replace(held, last_credited_meter_id=None)).last_credited_meter_id is None


@pytest.mark.parametrize("data", [
    None, {}, [], {"id": 5}, {"id": "x", "created_at": "yesterday"}, customer() | {"id": "cus_zz"},
    customer() | {"created_at": "0001-01-01T00:00:00+14:00"}, customer() | {"modified_at": "9999-12-31T23:59:59-14:00"},
])
def test_another_shape_is_said_to_be_unreadable(data: object) -> None:
    """A type that is known has the fields that it has."""
    with pytest.raises(Unreadable):
        read(Catalogue(), "org", delivery_id="1", kind="customer.created", data=data, now=T0)
