"""What Polar tells again: it changes nothing, and nothing is kept of it."""

from datetime import timedelta

from meters.log import USAGE_CONTROL
from tests.support.polar.organization import BEGINNING, Polar, numbers, state

JANUARY = BEGINNING
FEBRUARY, PAID = BEGINNING + timedelta(days=31), timedelta(minutes=5)


def test_a_redelivery_changes_nothing(polar: Polar) -> None:
    """The same delivery is known again, and the same news under another id adds nothing."""
    polar.mirrored_meter()
    news = polar.grant(JANUARY)
    assert polar.deliver("benefit_grant.created", news, "1").json() == {"status": "accepted"}
    before, decided = state(polar), polar.tenant.server.aggregator._now.control_position
    assert polar.deliver("benefit_grant.created", news, "1").json() == {"status": "repeated"}
    assert polar.tenant.server.aggregator._now.control_position == decided
    assert polar.deliver("benefit_grant.updated", news, "2").json() == {"status": "accepted"}
    assert state(polar) == before
    assert numbers(polar) == [(100, 0, 100)]


def test_news_that_say_nothing_new_leave_no_record(polar: Polar) -> None:
    """Polar tells a customer's state whenever it worked a balance out: the log grows by what changed alone."""
    polar.mirrored_meter()
    granted, subscribed = polar.grant(JANUARY + PAID), polar.subscription(JANUARY)
    polar.deliver("subscription.created", subscribed, "1")
    polar.deliver("benefit_grant.created", granted, "2")
    log = polar.tenant.server.log
    before, decided = state(polar), log.ends(USAGE_CONTROL)
    same = {"active_subscriptions": [], "granted_benefits": [], "active_meters": []}
    for number in range(20):
        told = polar.deliver("customer.state_changed", polar.customer() | same, f"state-{number}")
        assert (told.status_code, told.json()) == (202, {"status": "accepted"})
    for id, (kind, news) in enumerate([("subscription.updated", subscribed), ("benefit_grant.updated", granted)]):
        assert polar.deliver(kind, news, f"again-{id}").json() == {"status": "accepted"}
    assert (state(polar), log.ends(USAGE_CONTROL)) == (before, decided)
    assert polar.deliver("benefit_grant.created", granted, "2").json() == {"status": "repeated"}
    polar.deliver("customer.state_changed", polar.customer(FEBRUARY, name="Anna") | same, "new")
    assert state(polar)["name"] == "Anna"
    assert log.ends(USAGE_CONTROL) != decided
