"""What follows from Polar's news is the same whatever the order in which they come."""

import itertools
from typing import Any

import pytest
from msgspec.structs import replace

from meters.catalogue.catalogue import Catalogue, Customer, CustomerCreated, CustomerUpdated
from meters.catalogue.polar_facts import (
    GONE,
    RECENT_MAX,
    Credited,
    DeliveryApplied,
    Fact,
    Known,
    Linked,
    Period,
    Revoked,
)
from meters.ledger.joined import CustomersJoined
from tests.support.polar.news import (
    AGAIN,
    CUSTOMER,
    DAY,
    T0,
    Json,
    customer,
    days,
    ended,
    grant,
    period,
    record,
    said,
    told,
)

STORIES: dict[str, tuple[list[tuple[str, Json]], list[int], list[tuple[int, bool, int | None]]]] = {
    # the deliveries; the days of the cuts; for each credit its day, whether it renews, and when it was taken back
    "renewals without a price": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.cycled", grant(30)), ("benefit_grant.cycled", grant(60))],
        [30, 60],
        [(0, False, None), (30, True, None), (60, True, None)],
    ),
    "a subscription cuts, so the benefit does not": (
        [("subscription.created", period(0)), ("benefit_grant.created", grant(1)),
         ("subscription.cycled", period(30)), ("benefit_grant.cycled", grant(31))],
        [0, 30],
        [(1, False, None), (31, True, None)],
    ),
    "taken back and given again": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.revoked", grant(0, revoked=10)),
         ("benefit_grant.updated", grant(20))],
        [],
        [(0, False, 10), (20, False, None)],
    ),
    "two benefits of one meter are renewed together": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.created", grant(0, id="h")),
         ("benefit_grant.cycled", grant(30)), ("benefit_grant.cycled", grant(31, id="h"))],
        [30],
        [(0, False, None), (0, False, None), (30, True, None), (31, True, None)],
    ),
    "a product with a price that comes in mid-cycle cuts from the next period on": (
        [("subscription.created", period(0, prices=[])), ("benefit_grant.created", grant(1)),
         ("subscription.updated", period(0, modified_at=(T0 + 9 * DAY).isoformat())),
         ("subscription.cycled", period(30))],
        [30],
        [(1, False, None)],
    ),
    "a product without a price that comes in mid-cycle leaves the cut": (
        [("subscription.created", period(0)), ("benefit_grant.created", grant(1)),
         ("subscription.updated", period(0, prices=[], modified_at=(T0 + 9 * DAY).isoformat()))],
        [0],
        [(1, False, None)],
    ),
    "news that never came are told by the next": (
        [("benefit_grant.cycled", grant(30, before=0)), ("subscription.revoked", period(0, "canceled", 45))],
        [0, 30, 45],
        [(0, False, None), (30, True, None)],
    ),
}  # fmt: skip


ENDS: dict[str, tuple[list[tuple[str, Json]], list[int], list[tuple[int, int, bool]]]] = {
    # the deliveries; the days of the cuts; for each movement its day, its units, and whether it renews
    "the taking back is told of with its units": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.revoked", ended(grant(0), 10))],
        [],
        [(0, 100, False), (10, -100, False)],
    ),
    "told of by its end alone": (
        [("benefit_grant.revoked", ended(grant(0), 10))],
        [],
        [(0, 100, False), (10, -100, False)],
    ),
    "renewed, ended, and given again": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.cycled", grant(5)),
         ("benefit_grant.revoked", ended(grant(5), 10)),
         ("benefit_grant.created", grant(20) | {"previous_properties": ended(grant(5), 10)["properties"]})],
        [5],
        [(0, 100, False), (5, 100, True), (10, -100, False), (20, 100, False)],
    ),
    "an upgrade, taken back first": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.revoked", ended(grant(0), 10)),
         ("benefit_grant.created", grant(11, 1000, id="h")), ("benefit_grant.cycled", grant(30, 1000, id="h"))],
        [30],
        [(0, 100, False), (10, -100, False), (11, 1000, False), (30, 1000, True)],
    ),
    "an upgrade, given first": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.revoked", ended(grant(0), 10)),
         ("benefit_grant.created", grant(9, 1000, id="h"))],
        [],
        [(0, 100, False), (9, 1000, False), (10, -100, False)],
    ),
    "of two grants of a benefit the first to end keeps its units, and begins nothing anew when given again": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.created", grant(1, id="h")),
         ("benefit_grant.revoked", ended(grant(0), 10, kept=True)), ("benefit_grant.created", grant(20))],
        [],
        [(0, 100, False), (1, 100, False), (20, 100, False)],
    ),
    "of two grants of a benefit the last to end gives its units back": (
        [("benefit_grant.created", grant(0)), ("benefit_grant.created", grant(1, id="h")),
         ("benefit_grant.revoked", ended(grant(0), 10, kept=True)),
         ("benefit_grant.revoked", ended(grant(1, id="h"), 20))],
        [],
        [(0, 100, False), (1, 100, False), (20, -100, False)],
    ),
    "a subscription ends with its grant": (
        [("subscription.created", period(0)), ("benefit_grant.created", grant(1)),
         ("subscription.revoked", period(0, "canceled", 10)), ("benefit_grant.revoked", ended(grant(1), 11))],
        [0, 10],
        [(1, 100, False), (11, -100, False)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STORIES)
def test_every_order_calls_for_the_same(name: str) -> None:
    """Every order of a story, each delivery told twice, calls for these cuts and credits."""
    deliveries, cuts, given = STORIES[name]
    for order in itertools.permutations(deliveries):
        catalogue = told(list(order))
        assert days(catalogue.mirror.wanted(CUSTOMER, "m")) == (cuts, given)


@pytest.mark.parametrize("name", ENDS)
def test_every_order_takes_back_what_polar_took_back(name: str) -> None:
    """Units go once, with the sign that Polar gives them; an end is no renewal, and cuts nothing."""
    deliveries, cuts, movements = ENDS[name]
    for order in itertools.permutations(deliveries):
        wanted = told(list(order)).mirror.wanted(CUSTOMER, "m")
        assert days(wanted)[0] == cuts
        assert [((one.fact.at - T0) // DAY, one.fact.units, one.is_cycle) for one in wanted.given] == movements
        assert not [one.revoked for one in wanted.given if one.revoked is not None]


@pytest.mark.parametrize("name", STORIES | ENDS)
def test_what_is_known_decides_nothing(name: str) -> None:
    """After a story in any order each of its deliveries, told once more, says nothing new; what is newer does."""
    deliveries = (STORIES | ENDS)[name][0]
    for order in itertools.permutations(deliveries):
        catalogue = Catalogue()
        for kind, data in order:
            for change in said(catalogue, kind, data).changes:
                catalogue.apply(change)
        assert [said(catalogue, kind, data).changes for kind, data in deliveries] == [[]] * len(deliveries)
        (newer,) = said(catalogue, "customer.state_changed", customer(99)).changes[-1:]
        assert isinstance(newer, DeliveryApplied)
        assert newer.facts == [Known(f"customer:{CUSTOMER}", (T0 + 99 * DAY).isoformat(timespec="microseconds"))]


def test_of_what_is_told_twice_the_earlier_telling_is_news() -> None:
    """It is right, whenever it is heard. One that is as late as the known one, or later, adds nothing to anything."""
    def credited(told: int, units: int = 100) -> Credited:
        return Credited(CUSTOMER, "m", "g", T0, units, False, T0 + told * DAY)

    def begun(told: int, *meters: str) -> Period:
        return Period("s", CUSTOMER, T0, list(meters), T0 + told * DAY)

    end = Revoked("g", T0 + DAY, takes=True)
    known = [Known("grant:g", "5"), Linked(CUSTOMER, CUSTOMER), credited(5), begun(5, "m"), end]
    old = [*known, Known("grant:g", "4"), credited(7, 300), begun(7), begun(5, "m", "n")]
    new = [Known("grant:g", "6"), Linked(CUSTOMER, "other"), credited(4, 300), begun(4), replace(end, takes=False)]
    catalogue = Catalogue([record("org", *known)])
    wanted = catalogue.mirror.wanted(CUSTOMER, "m")
    assert days(wanted) == ([0], [(0, False, 1)])
    assert [one for one in old if catalogue.mirror.is_news("org", one)] == []
    assert [one for one in new if catalogue.mirror.is_news("org", one)] == new
    catalogue.apply(record("org", *old))
    assert catalogue.mirror.wanted(CUSTOMER, "m") == wanted
    catalogue.apply(record("org", *new))
    assert [one for one in new if catalogue.mirror.is_news("org", one)] == []
    wanted = catalogue.mirror.wanted("other", "m")
    assert (wanted.cuts, [(one.fact.units, one.revoked) for one in wanted.given]) == ([], [(300, None)])


def test_an_end_that_is_told_both_ways_takes_nothing_more() -> None:
    """A payload without units says that the end took them; told again with them, it is known whether it did."""
    def records(*facts: Fact) -> Catalogue:
        return Catalogue([record("org", Linked(CUSTOMER, CUSTOMER), *facts)])

    def credited(day: int, units: int) -> Credited:
        return Credited(CUSTOMER, "m", "g", T0 + day * DAY, units, False, T0 + day * DAY)

    end = Revoked("g", T0 + 10.5 * DAY, takes=True)
    back = records(credited(0, 100), credited(10, -100), end).mirror.wanted(CUSTOMER, "m")
    assert days(back) == ([], [(0, False, None), (10, False, None)])
    kept = records(credited(0, 100), end)
    assert days(kept.mirror.wanted(CUSTOMER, "m")) == ([], [(0, False, 10)])
    for change in said(kept, "benefit_grant.updated", ended(grant(0), 10, kept=True)).changes:
        kept.apply(change)
    assert days(kept.mirror.wanted(CUSTOMER, "m")) == ([], [(0, False, None)])


def test_an_external_id_that_was_given_here_stays() -> None:
    """Polar knows of none, in its newest news too: whose usage it is does not depend on that."""
    catalogue = told([("customer.created", customer(external_id=None))])
    catalogue.apply(CustomerUpdated(replace(catalogue.customers[CUSTOMER], external_id="ada")))
    for change in said(catalogue, "customer.updated", customer(3, external_id=None, name="Ada")).changes:
        catalogue.apply(change)
    found = catalogue.customer_by_external_id("org", "ada")
    assert found is not None
    assert (found.id, found.name) == (CUSTOMER, "Ada")


@pytest.mark.parametrize("name", STORIES | ENDS)
def test_every_order_leaves_the_same_things(name: str) -> None:
    """Customers, grants, benefits and subscriptions are those of their newest news."""
    found = [told(list(order)) for order in itertools.permutations((STORIES | ENDS)[name][0])]
    for catalogue in found:
        assert catalogue.customers == found[0].customers
        for kind in ("benefits", "grants", "subscriptions"):
            assert getattr(catalogue.benefits, kind) == getattr(found[0].benefits, kind)


def test_a_deleted_customer_stays_deleted() -> None:
    """Older news that come later bring nobody back, and nobody is made whose end is known."""
    news = [("customer.created", customer()), ("customer.updated", customer(3)), ("customer.deleted", customer(5))]
    for order in itertools.permutations(news):
        assert told(list(order)).customer("org", CUSTOMER) is None


def again(kind: str, day: int, **fields: Any) -> tuple[str, Json]:
    """News of a customer that was made at Polar after the first one was deleted there, with the same external id."""
    return f"customer.{kind}", customer(day, id=AGAIN, created_at=(T0 + 5 * DAY).isoformat(), name="again", **fields)


@pytest.mark.parametrize("embedded", [True, False])
def test_who_gets_an_external_id_late_is_the_customer_here_who_has_it(embedded: bool) -> None:
    """In every order: grants and periods that were told before go along, and so does what they call for."""
    here = Customer(id="here", organization_id="org", external_id="c-here", created_at=T0)
    late = {"customer": customer(1)} if embedded else {"customer": None}
    news = [
        ("customer.created", customer(external_id=None)),
        ("customer.updated", customer(1)),
        ("benefit_grant.created", grant(2) | late),
        ("subscription.created", period(3) | late),
    ]
    for order in itertools.permutations(news):
        catalogue = told(list(order), CustomerCreated(here))
        assert days(catalogue.mirror.wanted("here", "m")) == ([3], [(2, False, None)])
        assert days(catalogue.mirror.wanted(CUSTOMER, "m")) == ([], [])
        assert [one.id for one in catalogue.benefits.grants_of("here")] == ["g"]
        assert [one.id for one in catalogue.benefits.subscriptions_of("here")] == ["s"]
        assert not catalogue.benefits.grants_of(CUSTOMER) + catalogue.benefits.subscriptions_of(CUSTOMER)
        assert catalogue.customers_by_email("org", "c@x.org") == ["here"]


@pytest.mark.parametrize("name", ["c-here", None])
def test_a_late_deletion_is_that_of_the_customer_who_was_deleted(name: str | None) -> None:
    """Whoever was made again under the external id stays, with what was granted since."""
    kind, made = again("created", 6)
    news = [
        ("customer.created", customer()),
        ("customer.deleted", customer(5, external_id=name)),
        (kind, made),
        ("benefit_grant.created", grant(7) | {"customer_id": AGAIN, "customer": made}),
    ]
    for order in itertools.permutations(news):
        catalogue = told(list(order))
        living = catalogue.customer_by_external_id("org", "c-here")
        assert living is not None
        assert living.name == "again"
        assert days(catalogue.mirror.wanted(living.id, "m")) == ([], [(7, False, None)])
        assert [one.id for one in catalogue.benefits.grants_of(living.id)] == ["g"]
        kind, gone = again("deleted", 8)
        for change in said(catalogue, kind, gone).changes:
            catalogue.apply(change)
        assert not [one for one in catalogue.customers.values() if one.deleted_at is None]


def test_a_deletion_of_a_stranger_deletes_nobody() -> None:
    """A customer of Polar's who was never heard of is not the one here who has the external id by now."""
    here = Customer(id="here", organization_id="org", external_id="c-here", created_at=T0)
    catalogue = Catalogue([CustomerCreated(here)])
    news = said(catalogue, "customer.deleted", customer(5))
    assert [type(change) for change in news.changes] == [DeliveryApplied]
    for change in news.changes:
        catalogue.apply(change)
    late = said(catalogue, "customer.created", customer())  # of before its end, with the external id it had then
    assert late.changes == []
    assert catalogue.customer_named("org", CUSTOMER) == CUSTOMER


def test_what_is_known_of_whom_and_of_which_meter() -> None:
    """Of each organization apart: who is whom, which meters were credited or have a price, and for whom."""
    def credited(polar: str, meter: str, grant: str) -> Credited:
        return Credited(polar, meter, grant, T0, 100, False, T0)

    def begun(polar: str, day: int, *meters: str) -> Period:
        return Period(f"s {polar}", polar, T0 + day * DAY, list(meters), T0)

    mirror = Catalogue([
        record("org", Linked("a", "ann"), Linked("a2", "ann"), Linked("b", "bob"), Linked("b", "ben")),
        record("org", credited("a", "m", "g1"), credited("b", "m", "g2"), credited("a2", "n", "g3"), id="2"),
        record("org", begun("a", 1, "m", "p"), begun("a2", 2, "m"), begun("b", 3, "q"), id="3"),
        record("else", Linked("z", "zoe"), credited("z", "m", "g9"), begun("z", 1, "p"), Known("customer:z", GONE)),
    ]).mirror  # fmt: skip
    assert {id: mirror.linked("org", id) for id in ("a", "a2", "b", "z")} == {
        "a": "ann", "a2": "ann", "b": "ben", "z": None
    }  # fmt: skip
    assert mirror.once("org", "b") == ("bob", "ben")
    assert {id: mirror.living(id) for id in ("ann", "bob", "ben", "zoe")} == {
        "ann": ["a", "a2"], "bob": [], "ben": ["b"], "zoe": []
    }  # fmt: skip
    assert {id: sorted(mirror.meters(id)) for id in ("ann", "ben", "bob")} == {
        "ann": ["m", "n", "p"], "ben": ["m", "q"], "bob": []
    }  # fmt: skip
    assert {id: sorted(mirror.customers(id)) for id in ("m", "n", "p", "q", "r")} == {
        "m": ["ann", "ann", "ben", "zoe"], "n": ["ann"], "p": ["ann", "zoe"], "q": ["ben"], "r": []
    }  # fmt: skip
    assert (mirror.credited_meters("org"), mirror.credited_meters("else"), mirror.credited_meters("no")) == (
        ["m", "n"], ["m"], []
    )  # fmt: skip
    assert [[one.grant_id for one in mirror.credits(of, meter)] for of, meter in (
        ("org", "m"), ("org", "n"), ("else", "m"), ("else", "n"), ("no", "m")
    )] == [["g1", "g2"], ["g3"], ["g9"], [], []]  # fmt: skip
    assert days(mirror.wanted("ann", "m")) == ([1, 2], [(0, False, None)])  # of both of Polar's customers
    assert days(mirror.wanted("ann", "m", "n")) == ([1, 2], [(0, False, None), (0, False, None)])
    assert days(mirror.wanted("ben", "q")) == ([3], [])


def test_who_is_joined_takes_polars_customers_along() -> None:
    """Those that are still theirs; a customer who is told of again as somebody's is moved, not doubled."""
    def join(id: str, into: str) -> CustomersJoined:
        return CustomersJoined(organization_id="org", id=id, into=into, at=T0)

    mirror = Catalogue([
        record("org", Linked("a", "ann"), Linked("b", "ann"), Linked("b", "bob"), Linked("c", "cy")),
        join("ann", "dan"), join("cy", "cy"),
    ]).mirror  # fmt: skip
    assert {id: mirror.once("org", id) for id in "abc"} == {"a": ("ann", "dan"), "b": ("ann", "bob"), "c": ("cy",)}
    mirror.apply(record("org", Linked("a", "ann"), id="2"))
    assert (mirror.once("org", "a"), mirror.living("ann"), mirror.living("dan")) == (("dan", "ann"), ["a"], [])


def test_the_newest_deliveries_are_kept_without_their_facts() -> None:
    """So many of each organization, oldest first; that a delivery was heard is known of all."""
    mirror = Catalogue([record("org", Known("x", str(id)), id=str(id)) for id in range(RECENT_MAX + 2)]).mirror
    mirror.apply(record("else", Known("x", "1"), id="1"))
    recent = mirror.recent("org")
    assert [one.delivery_id for one in recent] == [str(id) for id in range(2, RECENT_MAX + 2)]
    assert {(len(one.facts), len(one.periods)) for one in recent} == {(0, 0)}
    assert ([one.delivery_id for one in mirror.recent("else")], mirror.recent("no")) == (["1"], [])
    heard = [mirror.heard(*one) for one in (("org", "0"), ("else", "1"), ("else", "0"), ("no", "0"))]
    assert heard == [True, True, False, False]
