"""What became of Polar's incoming webhooks is visible: each delivery with its reason, and the credits that wait."""

from datetime import timedelta
from unittest.mock import patch

import pytest

from aggregator.service import cuts
from aggregator.view import Unavailable
from meters.catalogue.polar_facts import RECENT_MAX
from meters.webhooks import keys
from tests.support.polar.organization import BEGINNING, Polar, signed, text
from tests.support.servers.query_api import Server

DELIVERIES, WAITING = "/v1/webhooks/polar/deliveries", "/v1/webhooks/polar/waiting"


def outcomes(polar: Polar) -> list[tuple[str, str, list[str]]]:
    """Of each delivery the id, what became of it and why; newest first."""
    found = polar.tenant.get(DELIVERIES, limit=100)["items"]
    return [(one["delivery_id"], one["outcome"], one["reasons"]) for one in found]


def metric(server: Server, name: str) -> float:
    """A value of ``/metrics``."""
    lines = server.ask("GET", "/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def count(server: Server, outcome: str) -> float:
    """How many deliveries ended so."""
    return metric(server, f'meterstream_polar_webhooks_total{{outcome="{outcome}"}}')


async def far_behind(*question: object) -> None:
    """The store's answer while it has much to count."""
    raise Unavailable("far behind")


def test_every_delivery_is_shown_with_its_reason(server: Server, polar: Polar) -> None:
    """Applied, known, ignored, refused and failed; what is not signed is counted, and is nobody's."""
    before = {outcome: count(server, outcome) for outcome in ("applied", "known", "ignored", "refused", "unsigned")}
    polar.mirrored_meter()
    polar.deliver("customer.created", polar.customer(), "a")
    polar.deliver("customer.created", polar.customer(), "a")
    polar.deliver("checkout.created", {"id": "x"}, "b")
    polar.deliver("customer.created", {"name": 5}, "c")
    euros = polar.subscription(BEGINNING, prices=[polar.price("10.0"), polar.price("-1", meter_id="other")])
    polar.deliver("subscription.created", euros, "d")
    server.ask("POST", "/webhooks/polar", content=b"{}")
    shown = outcomes(polar)
    assert [(id, outcome) for id, outcome, _ in shown] == [
        ("d", "applied"), ("c", "refused"), ("b", "ignored"), ("a", "known"), ("a", "applied"),
    ]  # fmt: skip
    reasons = [reasons for *_, reasons in shown]
    assert reasons[0][0].startswith("the price of Polar's meter other is not taken: Input should be a number of cents")
    assert reasons[1] == ["Expected `str | null`, got `int` - at `$.name`"]
    assert reasons[2] == ["this type says nothing about usage, credits or subscriptions"]
    assert reasons[3:] == [["this delivery was applied before"], []]
    more = {outcome: count(server, outcome) - number for outcome, number in before.items()}
    assert more == {"applied": 2, "known": 1, "ignored": 1, "refused": 1, "unsigned": 1}


def test_a_delivery_that_fails_for_now_is_shown(polar: Polar) -> None:
    """And so is the one after it, which completes it."""
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(BEGINNING, rollover=True), "a")
    renewed = polar.grant(BEGINNING + timedelta(days=30), rollover=True)
    with patch.object(cuts, "consumed_between", far_behind):
        assert polar.deliver("benefit_grant.cycled", renewed, "b").status_code == 503
    assert polar.deliver("benefit_grant.cycled", renewed, "b").status_code == 202
    assert [(id, outcome) for id, outcome, _ in outcomes(polar)] == [("b", "known"), ("b", "failed"), ("a", "applied")]


def test_credits_of_a_meter_that_is_not_linked_wait_visibly(server: Server, polar: Polar) -> None:
    """With how many, of how many customers, until the link is made."""
    before = metric(server, "meterstream_polar_waiting_credits")
    polar.deliver("benefit_grant.created", polar.grant(BEGINNING), "1")
    later = BEGINNING + timedelta(days=30)
    polar.deliver("benefit_grant.cycled", polar.grant(later, units=40), "2")
    assert "credits wait: no meter here is linked to Polar's meter" in outcomes(polar)[0][2][0]
    assert polar.tenant.get(WAITING)["items"] == [{
        "polar_meter_id": polar.meter_id, "customers": 1, "credits": 2, "units": 140, "first_at": text(BEGINNING),
        "last_at": text(later),
    }]  # fmt: skip
    assert metric(server, "meterstream_polar_waiting_credits") - before == 2
    polar.mirrored_meter()
    assert polar.tenant.get(WAITING)["items"] == []
    assert metric(server, "meterstream_polar_waiting_credits") == before


def test_nobody_sees_anothers_deliveries(server: Server, polar: Polar) -> None:
    """Nor what waits for another's meters."""
    polar.deliver("benefit_grant.created", polar.grant(BEGINNING), "1")
    eve = Polar(server.tenant())
    assert outcomes(eve) == []
    assert eve.tenant.get(WAITING)["items"] == []


def test_the_newest_deliveries_are_kept(polar: Polar) -> None:
    """A bounded number of them for each organization, with texts of a bounded length."""
    for number in range(RECENT_MAX + 5):
        polar.deliver("checkout.created", {}, f"n{number}")
    polar.deliver("x" * 5_000, {}, "long")
    found = polar.tenant.get(DELIVERIES, limit=1)
    assert found["pagination"]["total_count"] == RECENT_MAX
    assert len(found["items"][0]["type"]) == 300


def test_applied_deliveries_outlast_a_restart(server: Server, polar: Polar) -> None:
    """They are in the log; what was ignored is not."""
    polar.deliver("customer.created", polar.customer(), "a")
    polar.deliver("checkout.created", {}, "b")
    with patch.object(server.app.state.desk.inbox, "_received", {}):
        assert [(id, outcome) for id, outcome, _ in outcomes(polar)] == [("a", "applied")]


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"type": 5}'])
def test_a_body_that_cannot_be_read_is_shown_as_refused(polar: Polar, body: bytes) -> None:
    """Under the id that its headers name."""
    server = polar.tenant.server
    headers = signed(body, "odd", int(server.now.timestamp()), keys(polar.secret)[0])
    assert server.ask("POST", "/webhooks/polar", headers=headers, content=body).status_code == 422
    ((id, outcome, reasons),) = outcomes(polar)
    assert (id, outcome, bool(reasons)) == ("odd", "refused", True)
