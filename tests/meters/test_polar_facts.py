"""What follows from Polar's news is the same whatever the order in which they come."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from meters.catalogue.catalogue import Catalogue, Change, Customer, CustomerCreated, CustomerUpdated
from meters.catalogue.polar_facts import Credited, DeliveryApplied, Fact, Known, Linked, Period, Revoked, Told, Wanted
from meters.polar_webhooks import News, Unreadable, read

T0 = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
Json = dict[str, Any]
CUSTOMER = "0e1d7f2a-6f63-4c6c-8a53-111111111111"
AGAIN = "0e1d7f2a-6f63-4c6c-8a53-222222222222"


def customer(day: int = 0, **fields: Any) -> Json:
    """Polar's customer, as changed on a day."""
    return {"id": CUSTOMER, "created_at": T0.isoformat(), "modified_at": (T0 + day * DAY).isoformat(),
            "email": "c@x.org", "external_id": "c-here", "metadata": {}, **fields}  # fmt: skip


def grant(day: int, units: int = 100, revoked: int | None = None, id: str = "g", before: int | None = None) -> Json:
    """A grant that credited on a day, perhaps taken back on another; ``before`` is the day it credited before."""
    def credited(day: int | None) -> Json | None:
        at = {} if day is None else {"last_credited_at": (T0 + day * DAY).isoformat(), "last_credited_units": units}
        return at and {"last_credited_meter_id": "m", **at}

    changed = T0 + (day if revoked is None else revoked) * DAY
    return {"id": id, "created_at": T0.isoformat(), "modified_at": changed.isoformat(), "customer_id": CUSTOMER,
            "customer": customer(), "is_revoked": revoked is not None,
            "revoked_at": None if revoked is None else changed.isoformat(),
            "benefit": {"id": f"b-{id}", "type": "meter_credit", "created_at": T0.isoformat(),
                        "properties": {"meter_id": "m", "units": units, "rollover": False}},
            "properties": {} if revoked is not None else credited(day),
            "previous_properties": credited(day if revoked is not None else before)}  # fmt: skip


def ended(at: Json, day: int, *, kept: bool = False) -> Json:
    """A grant as Polar tells of its end on a day: what was credited, and the taking back or, if ``kept``, the same."""
    before, end = at["properties"], T0 + day * DAY
    back = {"last_credited_units": -before["last_credited_units"], "last_credited_at": end.isoformat()}
    later = (end + DAY / 2).isoformat()  # the end comes after its taking back, and the change after both
    return at | {"is_revoked": True, "revoked_at": later, "modified_at": later, "previous_properties": before,
                 "properties": before if kept else before | back}  # fmt: skip


def period(day: int, status: str = "active", ended: int | None = None, **fields: Any) -> Json:
    """A subscription with a price for the meter, in the period that began on a day."""
    return {"id": "s", "created_at": T0.isoformat(), "modified_at": (T0 + (ended or day) * DAY).isoformat(),
            "status": status, "customer_id": CUSTOMER, "product_id": "p", "customer": customer(),
            "current_period_start": (T0 + day * DAY).isoformat(), "prices": [{"id": "x", "meter_id": "m"}],
            "ended_at": None if ended is None else (T0 + ended * DAY).isoformat(), **fields}  # fmt: skip


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


def said(catalogue: Catalogue, kind: str, data: Json) -> News:
    """What a delivery makes."""
    news = read(catalogue, "org", delivery_id="any", kind=kind, data=data, now=T0 + 99 * DAY)
    assert news is not None
    return news


def told(deliveries: list[tuple[str, Json]], *before: Change) -> Catalogue:
    """A catalogue after some decisions and the deliveries, each of these twice."""
    catalogue = Catalogue(before)
    for kind, data in [*deliveries, *deliveries]:
        for change in said(catalogue, kind, data).changes:
            catalogue.apply(change)
    return catalogue


def days(wanted: Wanted) -> tuple[list[int], list[tuple[int, bool, int | None]]]:
    """What is wanted, with days for times."""
    def day(at: datetime) -> int:
        return (at - T0) // DAY

    given = [(day(g.fact.at), g.is_cycle, None if g.revoked is None else day(g.revoked)) for g in wanted.given]
    return [day(at) for at in wanted.cuts], given


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

    def applied(*told: Told) -> DeliveryApplied:
        periods = [one for one in told if isinstance(one, Period)]
        facts = [one for one in told if not isinstance(one, Period)]
        return DeliveryApplied(organization_id="org", delivery_id="1", kind="k", at=T0, facts=facts, periods=periods)

    end = Revoked("g", T0 + DAY, takes=True)
    known = [Known("grant:g", "5"), Linked(CUSTOMER, CUSTOMER), credited(5), begun(5, "m"), end]
    old = [*known, Known("grant:g", "4"), credited(7, 300), begun(7), begun(5, "m", "n")]
    new = [Known("grant:g", "6"), Linked(CUSTOMER, "other"), credited(4, 300), begun(4), replace(end, takes=False)]
    catalogue = Catalogue([applied(*known)])
    wanted = catalogue.mirror.wanted(CUSTOMER, "m")
    assert days(wanted) == ([0], [(0, False, 1)])
    assert [one for one in old if catalogue.mirror.is_news("org", one)] == []
    assert [one for one in new if catalogue.mirror.is_news("org", one)] == new
    catalogue.apply(applied(*old))
    assert catalogue.mirror.wanted(CUSTOMER, "m") == wanted
    catalogue.apply(applied(*new))
    assert [one for one in new if catalogue.mirror.is_news("org", one)] == []
    wanted = catalogue.mirror.wanted("other", "m")
    assert (wanted.cuts, [(one.fact.units, one.revoked) for one in wanted.given]) == ([], [(300, None)])


def test_an_end_that_is_told_both_ways_takes_nothing_more() -> None:
    """A payload without units says that the end took them; told again with them, it is known whether it did."""
    def records(*facts: Fact) -> Catalogue:
        known = [Linked(CUSTOMER, CUSTOMER), *facts]
        return Catalogue([DeliveryApplied(organization_id="org", delivery_id="1", kind="k", at=T0, facts=known)])

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


@pytest.mark.parametrize("data", [
    None, {}, [], {"id": 5}, {"id": "x", "created_at": "yesterday"}, customer() | {"id": "cus_zz"},
    customer() | {"created_at": "0001-01-01T00:00:00+14:00"}, customer() | {"modified_at": "9999-12-31T23:59:59-14:00"},
])
def test_another_shape_is_said_to_be_unreadable(data: object) -> None:
    """A type that is known has the fields that it has."""
    with pytest.raises(Unreadable):
        read(Catalogue(), "org", delivery_id="1", kind="customer.created", data=data, now=T0)
