"""Polar's webhooks in: believed when signed, and true in whatever order they come."""

import json
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from unittest.mock import patch

import pytest

from aggregator.service import cuts
from aggregator.view import Unavailable
from meters.ledger.ledger import MeterReset
from meters.webhooks import keys
from tests.support.polar.organization import BEGINNING, Delivery, Polar, numbers, signed, state, text
from tests.support.records import line
from tests.support.servers.query_api import Server

JANUARY = BEGINNING
FEBRUARY, MARCH = BEGINNING + timedelta(days=31), BEGINNING + timedelta(days=59)
PAID = timedelta(minutes=5)  # after a period began it is paid for, and credited


def test_a_delivery_needs_a_signature_of_this_moment(server: Server, polar: Polar) -> None:
    """Either reading of the secret will do; another secret, a changed body, an old or future time will not."""
    body = json.dumps({"type": "customer.created", "data": polar.customer()}).encode()
    now_s = int(server.now.timestamp())
    standard = "whsec_c2VjcmV0LW9mLXN0YW5kYXJkLXdlYmhvb2tz"
    polar.tenant.post("/v1/webhooks/sources", {"secret": standard})
    (key,) = keys(polar.secret)

    def status(key: bytes, at_s: int = now_s, sent: bytes = body, id: str = "one", **changed: str) -> int:
        headers = signed(body, id, at_s, key) | changed
        return server.ask("POST", "/webhooks/polar", headers=headers, content=sent).status_code

    assert status(key, id="a") == 202
    assert [status(reading, id=f"b{place}") for place, reading in enumerate(keys(standard))] == [202, 202]
    assert status(b"somebody's") == 401
    assert status(key, sent=body + b" ") == 401
    assert status(key, id="c", **{"webhook-id": "d"}) == 401
    off = (-301, -300, 300, 301)
    assert [status(key, at_s=now_s + by, id=f"e{by}") for by in off] == [401, 202, 202, 401]
    assert server.ask("POST", "/webhooks/polar", content=body).status_code == 401


def test_a_signature_reaches_its_own_organization_alone(server: Server, polar: Polar) -> None:
    """The secret says whose customers these are, and an id of one organization is not another's to change."""
    other = Polar(server.tenant())
    assert polar.deliver("customer.created", polar.customer(), "x").status_code == 202
    assert other.tenant.ask("GET", "/v1/customers/external/ann").status_code == 404
    assert polar.tenant.get("/v1/customers/external/ann")["id"] == polar.customer_id
    assert other.deliver("customer.updated", polar.customer(MARCH, name="Eve"), "y").status_code == 422
    assert state(polar)["name"] == "Ann"


def own(polar: Polar) -> list[Delivery]:
    """A benefit, its grant and a subscription."""
    grant = polar.grant(JANUARY)
    return [("benefit.created", grant["benefit"]), ("benefit_grant.created", grant),
            ("subscription.created", polar.subscription(JANUARY))]  # fmt: skip


def shown(polar: Polar) -> list[object]:
    """What an organization sees of its benefits, grants, subscriptions and credits."""
    tenant = polar.tenant
    benefits, ann = tenant.get("/v1/benefits/"), tenant.get("/v1/customers/external/ann/state")
    credits = tenant.get(f"/v1/customers/{ann['id']}/credits")
    return [benefits, tenant.get(f"/v1/benefits/{polar.benefit_id}/grants"), ann, credits]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("benefit.updated", {"is_deleted": True}),
        ("benefit.updated", {"description": "Eve's"}),
        ("benefit_grant.revoked", {"is_revoked": True, "is_granted": False, "revoked_at": text(MARCH)}),
        ("benefit_grant.updated", {}),
        ("subscription.revoked", {"status": "canceled", "ended_at": text(MARCH)}),
        ("subscription.updated", {"prices": []}),
    ],
)
def test_a_tenants_news_change_nothing_of_anothers(
    server: Server, polar: Polar, kind: str, change: dict[str, object]
) -> None:
    """Neither with all ids of the other one's, nor with its own customer: refused, and the other's lists stay."""
    polar.mirrored_meter()
    for id, (type_, data) in enumerate(own(polar)):
        assert polar.deliver(type_, data, str(id)).status_code == 202
    before = shown(polar)
    eve = Polar(server.tenant())
    eve.deliver("customer.created", eve.customer(), "1")
    stolen = next(data for type_, data in own(polar) if type_.partition(".")[0] == kind.partition(".")[0])
    stolen = stolen | {"modified_at": text(MARCH)} | change
    disguised = stolen | {"customer_id": eve.customer_id, "customer": eve.customer()}
    answers = [eve.deliver(kind, data, f"s{place}") for place, data in enumerate((stolen, disguised))]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert shown(polar) == before


def test_a_grant_may_not_bring_anothers_benefit(server: Server, polar: Polar) -> None:
    """A grant of one's own carries its benefit along: with another's id it is refused, and the benefit is as before."""
    polar.mirrored_meter()
    for id, (kind, data) in enumerate(own(polar)):
        polar.deliver(kind, data, str(id))
    before = shown(polar)
    eve = Polar(server.tenant())
    benefit = polar.grant(JANUARY)["benefit"] | {"modified_at": text(MARCH), "is_deleted": True}
    granted = eve.grant(MARCH) | {"benefit": benefit, "benefit_id": polar.benefit_id}
    assert eve.deliver("benefit_grant.created", granted, "1").status_code == 422
    assert shown(polar) == before


def test_types_without_a_meaning_here_are_passed_over(polar: Polar) -> None:
    """They are accepted, so that the sender is content; a payload of another shape than its type's is refused."""
    assert polar.deliver("checkout.created", {"id": "x"}, "1").json() == {"status": "ignored"}
    assert polar.deliver("order.created", {"id": "x"}, "2").json() == {"status": "ignored"}
    assert polar.deliver("customer.created", {"name": 5}, "3").status_code == 422


def test_news_of_a_meter_wait_until_it_is_known(polar: Polar) -> None:
    """Facts are kept, and the meter that is made later, or said to be Polar's later, is credited then."""
    polar.deliver("subscription.created", polar.subscription(JANUARY), "0")
    polar.deliver("benefit_grant.created", polar.grant(JANUARY + PAID), "1")
    assert state(polar)["active_meters"] == []
    meter = polar.tenant.meter()
    polar.tenant.patch(f"/v1/meters/{meter}", {"metadata": {"polar_meter_id": polar.meter_id}})
    assert numbers(polar) == [(100, 0, 100)]
    assert [one["meter_id"] for one in state(polar)["active_subscriptions"][0]["meters"]] == [meter]
    session = polar.tenant.post("/v1/customer-sessions/", {"external_customer_id": "ann"})["token"]
    (shown,) = polar.tenant.ask("GET", "/v1/customer-portal/meters/", secret=session).json()["items"]
    assert (shown["meter_id"], shown["balance"]) == (meter, 100)
    (displayed,) = polar.tenant.ask("GET", "/v1/customer-portal/usage", secret=session).json()["items"]
    assert displayed["period"] == {"start": text(JANUARY), "end": text(JANUARY + timedelta(days=30))}


async def far_behind(*question: object) -> Decimal:
    """The store's answer while it has much to count."""
    raise Unavailable("far behind")


def test_a_meter_whose_news_could_not_be_credited_is_asked_for_again(polar: Polar) -> None:
    """The first time the store does not answer; the same change again credits what Polar told, and a create is one."""
    polar.deliver("subscription.created", polar.subscription(JANUARY), "0")
    polar.deliver("benefit_grant.created", polar.grant(JANUARY + PAID, rollover=True), "1")
    polar.deliver("subscription.cycled", polar.subscription(FEBRUARY), "2")
    with patch.object(cuts, "consumed_between", far_behind):
        meter = polar.mirrored_meter()
        change = {"metadata": {"polar_meter_id": polar.meter_id}}
        assert polar.tenant.ask("PATCH", f"/v1/meters/{meter}", json=change).status_code == 503
    polar.tenant.patch(f"/v1/meters/{meter}", change)
    assert [one["id"] for one in polar.tenant.get("/v1/meters/")["items"]] == [meter]
    assert numbers(polar)[0][0] > 0


def test_a_customer_known_by_external_id_is_the_same_one(polar: Polar) -> None:
    """Polar's customer is found under the application's own id, and keeps the id that it has here."""
    known = polar.tenant.customer(external_id="ann", email="old@example.com")
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(JANUARY), "1")
    found = state(polar)
    assert (found["id"], found["email"]) == (known, "ann@example.com")
    assert numbers(polar) == [(100, 0, 100)]
    polar.deliver("customer.deleted", polar.customer(MARCH), "2")
    assert polar.tenant.ask("GET", f"/v1/customers/{known}").status_code == 404
    polar.deliver("customer.updated", polar.customer(FEBRUARY), "3")
    assert polar.tenant.ask("GET", f"/v1/customers/{known}").status_code == 404


def test_a_team_of_polars_is_a_team(polar: Polar) -> None:
    """It may have no address, and an individual may become one."""
    polar.deliver("customer.created", polar.customer(), "1")
    assert (state(polar)["type"], state(polar)["email"]) == ("individual", "ann@example.com")
    polar.deliver("customer.updated", polar.customer(FEBRUARY, type="team", email=None), "2")
    assert (state(polar)["type"], state(polar)["email"]) == ("team", None)


def test_a_subscription_is_shown_as_polar_told_of_it(polar: Polar) -> None:
    """With its seats, its units and what was asked at the checkout; where Polar told none there are none."""
    names = ("seats", "units", "custom_field_data")
    for id, fields in enumerate([(None, None, {}), (3, 5, {"team size": "10", "ratio": 0.5, "vat": None})]):
        told = dict(zip(names, fields, strict=True)) if id else {}
        polar.deliver("subscription.active", polar.subscription(JANUARY + id * PAID, **told), f"{id}")
        (shown,) = state(polar)["active_subscriptions"]
        assert tuple(shown[name] for name in names) == fields


def test_what_is_polars_is_changed_there(polar: Polar) -> None:
    """No step of its grants or benefits is made here: Polar's own news of it would count it twice."""
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(JANUARY), "1")
    grant, benefit, customer = polar.grant_id, polar.benefit_id, polar.customer_id
    steps = [
        ("POST", f"/v1/benefit-grants/{grant}/revoke", None),
        ("POST", f"/v1/benefit-grants/{grant}/cycle", {}),
        ("POST", f"/v1/benefits/{benefit}/grants", {"customer_id": customer}),
        ("PATCH", f"/v1/benefits/{benefit}", {"description": "Ours"}),
        ("DELETE", f"/v1/benefits/{benefit}", None),
    ]
    for method, path, body in steps:
        answer = polar.tenant.ask(method, path, json=body)
        assert (answer.status_code, "is Polar's: change it there" in answer.text) == (422, True)
    assert numbers(polar) == [(100, 0, 100)]
    polar.deliver("benefit_grant.revoked", polar.revoked(polar.grant(JANUARY), FEBRUARY), "2")
    assert numbers(polar) == [(0, 0, 0)]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)])
def test_who_gets_an_external_id_late_is_found_by_it(polar: Polar, order: tuple[int, ...]) -> None:
    """The customer here has the units in every order, and no second one is left over."""
    known = polar.tenant.customer(external_id="ann", email="old@example.com")
    polar.mirrored_meter()
    nameless = polar.customer(external_id=None)
    named = polar.customer(JANUARY + timedelta(days=1))
    news = [
        ("customer.created", nameless),
        ("customer.updated", named),
        ("benefit_grant.created", polar.grant(FEBRUARY) | {"customer": named if order != (0, 2, 1) else nameless}),
    ]
    for place in order:
        polar.deliver(*news[place], f"{place}")
    assert (state(polar)["id"], state(polar)["email"]) == (known, "ann@example.com")
    assert numbers(polar) == [(100, 0, 100)]
    assert [one["customer"]["id"] for one in polar.tenant.get(f"/v1/benefits/{polar.benefit_id}/grants")["items"]] == [
        known
    ]
    assert [one["id"] for one in polar.tenant.get("/v1/customers/")["items"]] == [known]


def test_what_is_known_of_a_customer_apart_from_polar_goes_along(polar: Polar) -> None:
    """Credits by hand under the id that Polar's customer had here are the other one's when it turns out to be that."""
    known = polar.tenant.customer(external_id="ann")
    meter = polar.mirrored_meter()
    nameless = polar.customer(external_id=None)
    polar.deliver("benefit_grant.created", polar.grant(JANUARY) | {"customer": nameless}, "1")
    polar.tenant.post(f"/v1/customers/{polar.customer_id}/credits", {"meter_id": meter, "units": 7})
    polar.deliver("customer.updated", polar.customer(FEBRUARY), "2")
    left = polar.tenant.get(f"/v1/customers/{polar.customer_id}/state")
    assert (left["id"], numbers(polar)) == (known, [(107, 0, 107)])
    assert left == state(polar)


def test_a_product_that_comes_in_mid_cycle_begins_nothing_anew(polar: Polar) -> None:
    """Usage and credits stay as they are when a product with a price for the meter is changed to."""
    meter = polar.mirrored_meter()
    polar.deliver("customer.created", polar.customer(), "1")
    polar.tenant.post(f"/v1/customers/{polar.customer_id}/credits", {"meter_id": meter, "units": 500})
    for number in range(8):
        polar.tenant.event(f"use-{number}", external_customer_id="ann")
    start = polar.tenant.server.now + timedelta(seconds=1)
    polar.tenant.server.now += timedelta(hours=1)
    polar.deliver("subscription.created", polar.subscription(start, prices=[]), "2")
    changed = polar.subscription(start, modified_at=text(start + timedelta(minutes=1)))
    polar.deliver("subscription.updated", changed, "3")
    assert numbers(polar) == [(500, 8, 492)]


def test_a_meter_that_is_no_longer_polars_loses_what_polar_told(polar: Polar) -> None:
    """Moved to another meter, units are there alone; what was given by hand stays where it is."""
    first, second = polar.mirrored_meter(), polar.tenant.meter()
    polar.deliver("benefit_grant.created", polar.grant(JANUARY), "1")
    polar.tenant.post(f"/v1/customers/{polar.customer_id}/credits", {"meter_id": first, "units": 7})

    def credited() -> dict[str, int]:
        return {one["meter_id"]: one["credited_units"] for one in state(polar)["active_meters"]}

    assert credited() == {first: 107}
    polar.tenant.patch(f"/v1/meters/{second}", {"metadata": {"polar_meter_id": polar.meter_id}})
    assert credited() == {first: 107}
    polar.tenant.patch(f"/v1/meters/{first}", {"metadata": {}})
    assert credited() == {first: 7, second: 100}
    polar.deliver("benefit_grant.revoked", polar.revoked(polar.grant(JANUARY), FEBRUARY), "2")
    assert credited() == {first: 7, second: 0}


def test_two_meters_of_polars_can_be_one_here(polar: Polar) -> None:
    """What is told of the one does not take back what was told of the other."""
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(JANUARY), "1")
    meter = polar.tenant.get("/v1/meters/")["items"][0]["id"]
    other = polar.grant(FEBRUARY) | {"id": f"5555{polar.grant_id[4:]}"}
    other["properties"] |= {"last_credited_meter_id": meter, "last_credited_units": 30}
    for id in ("2", "3"):
        polar.deliver("benefit_grant.created", other, id)
        assert numbers(polar) == [(130, 0, 130)]


def test_usage_and_rollover_cross_a_renewal(polar: Polar) -> None:
    """What was used before the cut is paid from credits before it; what rolls over is there afterwards."""
    polar.mirrored_meter()
    now = polar.tenant.server.now
    polar.deliver("benefit_grant.created", polar.grant(now - timedelta(days=40), rollover=True), "1")
    for number in range(30):  # they arrive now, before a cut that the clock has reached by the time it is told
        polar.tenant.event(f"use-{number}", external_customer_id="ann")
    assert numbers(polar) == [(100, 30, 70)]
    polar.tenant.server.now += timedelta(seconds=1)
    renewed = polar.grant(polar.tenant.server.now, units=50)
    polar.deliver("benefit_grant.cycled", renewed, "2")
    assert numbers(polar) == [(120, 0, 120)]


def used(polar: Polar, times: int) -> None:
    """The customer uses so many units, now."""
    polar.tenant.send(*(line(f"use-{number}", external_customer_id="ann") for number in range(times)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1), (0, 1, 0, 1)])
def test_a_revoked_grant_gives_its_units_back_and_leaves_the_usage(polar: Polar, order: tuple[int, ...]) -> None:
    """Credits of 100, usage of 80, taken back: 80 are owed, in whatever order that is told, and told again too."""
    polar.mirrored_meter()
    used(polar, 80)
    now = polar.tenant.server.now
    granted = polar.grant(now - timedelta(days=40))
    ended = polar.revoked(granted, now + timedelta(seconds=1))
    news = [("benefit_grant.created", granted), ("benefit_grant.revoked", ended)]
    for id, place in enumerate(order):
        polar.deliver(*news[place], str(id))
    assert numbers(polar) == [(0, 80, -80)]
    (meter,) = state(polar)["active_meters"]
    rows = polar.tenant.get(f"/v1/customer-meters/{meter['id']}/ledger")["items"]
    assert [(row["cause"], float(row["units"])) for row in rows] == [("revoke", -100), ("usage", -80), ("grant", 100)]


@pytest.mark.parametrize("given_first", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_an_upgrade_leaves_the_usage_and_gives_the_new_units(
    polar: Polar, order: tuple[int, ...], given_first: bool
) -> None:
    """Credits of 100, usage of 80, then 1000 in the place of the 100: 920 are left, as at Polar."""
    polar.mirrored_meter()
    used(polar, 80)
    now = polar.tenant.server.now
    small, larger = polar.grant(now - timedelta(days=40)), polar.grant(now + timedelta(seconds=2), units=1000)
    news = [
        ("benefit_grant.created", small),
        ("benefit_grant.revoked", polar.revoked(small, now + timedelta(seconds=3 if given_first else 1))),
        ("benefit_grant.created", polar.another(larger, of=f"6666{polar.benefit_id[4:]}")),
    ]
    for place in order:
        polar.deliver(*news[place], f"{place}")
    assert numbers(polar) == [(1000, 80, 920)]


def test_an_external_id_given_here_outlasts_news_that_know_of_none(polar: Polar) -> None:
    """The customer's usage stays the customer's."""
    polar.mirrored_meter()
    polar.deliver("customer.created", polar.customer(external_id=None), "1")
    polar.tenant.patch(f"/v1/customers/{polar.customer_id}", {"external_id": "ann"})
    used(polar, 8)
    polar.deliver("customer.updated", polar.customer(FEBRUARY, external_id=None, name="Anna"), "2")
    assert (state(polar)["id"], state(polar)["name"]) == (polar.customer_id, "Anna")
    assert numbers(polar) == [(0, 8, -8)]


def test_a_cut_that_was_reckoned_twice_carries_over_once(server: Server, polar: Polar) -> None:
    """As by two deliveries at once, of which one had heard less: what is carried over follows from all credits."""
    meter = polar.mirrored_meter()
    for id, (kind, news) in enumerate(credits_only(polar)):
        polar.deliver(kind, news, str(id))
    before = numbers(polar)
    customer = polar.tenant.get("/v1/customers/external/ann")["id"]
    stale = MeterReset(
        id="polar:stale", organization_id=polar.tenant.id, customer_id=customer, meter_ids=[meter], at=MARCH + PAID,
        rollover={meter: Decimal(60)},
    )
    server.decide(stale)
    assert numbers(polar) == before
    polar.deliver("customer.updated", polar.customer(MARCH, name="Anna"), "more")
    assert numbers(polar) == before


def credits_only(polar: Polar) -> list[Delivery]:
    """A benefit without a price for the meter: granted, and renewed twice. The benefit begins the meter anew."""
    return [
        ("customer.created", polar.customer()),
        ("benefit_grant.created", polar.grant(JANUARY, rollover=True)),
        ("benefit_grant.cycled", polar.grant(FEBRUARY + PAID, units=50)),
        ("benefit_grant.cycled", polar.grant(MARCH + PAID, units=70, rollover=True)),
    ]


def subscribed(polar: Polar) -> list[Delivery]:
    """A price for the meter: the subscription begins it anew, and credits follow when the period is paid."""
    return [
        ("subscription.created", polar.subscription(JANUARY)),
        ("benefit_grant.created", polar.grant(JANUARY + PAID, rollover=True)),
        ("subscription.cycled", polar.subscription(FEBRUARY)),
        ("benefit_grant.cycled", polar.grant(FEBRUARY + PAID)),
    ]


def given_again(polar: Polar) -> list[Delivery]:
    """Granted, renamed, taken back, and given again."""
    return [
        ("customer.updated", polar.customer(FEBRUARY, name="Anna", metadata={"plan": "pro"})),
        ("benefit_grant.created", polar.grant(JANUARY)),
        ("benefit_grant.revoked", polar.revoked(polar.grant(JANUARY), FEBRUARY)),
        ("benefit_grant.updated", polar.grant(MARCH, units=30)),
    ]


def held_twice(polar: Polar) -> list[Delivery]:
    """Two grants of a benefit: the units of the one that ends first stay, and it is given again."""
    first = polar.grant(JANUARY)
    return [
        ("benefit_grant.created", first),
        ("benefit_grant.created", polar.another(polar.grant(JANUARY + PAID))),
        ("benefit_grant.revoked", polar.revoked(first, FEBRUARY, kept=True)),
        ("benefit_grant.created", polar.grant(MARCH) | {"previous_properties": first["properties"]}),
    ]


def canceled(polar: Polar) -> list[Delivery]:
    """A price for the meter and a benefit, both of which end; the grant's renewal is heard after or before."""
    granted, renewed = polar.grant(JANUARY + PAID), polar.grant(FEBRUARY + PAID)
    over = polar.subscription(FEBRUARY, status="canceled", ended_at=text(MARCH), modified_at=text(MARCH))
    return [
        ("benefit_grant.created", granted),
        ("benefit_grant.cycled", renewed | {"previous_properties": granted["properties"]}),
        ("benefit_grant.revoked", polar.revoked(renewed, MARCH + PAID)),
        ("subscription.revoked", over),
    ]


STORIES = [(credits_only, 170), (subscribed, 200), (given_again, 30), (held_twice, 300), (canceled, 0)]


@pytest.mark.parametrize(("story", "credited"), STORIES)
def test_any_order_ends_in_the_same_state(
    server: Server, story: Callable[[Polar], list[Delivery]], credited: int
) -> None:
    """As told, backwards and mixed: the same customer, balances, benefits and periods. Every order: tests/meters."""
    found = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        polar = Polar(server.tenant())
        meter = polar.mirrored_meter()
        deliveries = story(polar)
        for place in order:
            kind, data = deliveries[place]
            assert polar.deliver(kind, data, f"delivery-{place}").json() == {"status": "accepted"}
        assert [given for given, _, _ in numbers(polar)] == [credited]
        shown = json.dumps(polar.tenant.ask("GET", "/v1/customers/external/ann/state").json(), sort_keys=True)
        found.append(shown.replace(polar.tenant.id[8:], "...").replace(polar.tenant.id, "...").replace(meter, "meter"))
    own = [json.loads(shown) for shown in found]
    for one in own:
        one.pop("organization_id")
        for meter_shown in (*one["active_meters"], *(m for s in one["active_subscriptions"] for m in s["meters"])):
            meter_shown.pop("id")
    assert own == [own[0]] * len(own)
