"""Polar's benefits and grants here: by which meter they go, how they end, and until when they are Polar's."""

import asyncio
import json
from datetime import timedelta
from itertools import permutations
from unittest.mock import patch

import httpx
import pytest

from meters.catalogue.catalogue import Change
from meters.webhooks import keys
from tests.support.polar.organization import BEGINNING, Delivery, Json, Polar, numbers, signed, state, text
from tests.support.servers.query_api import Server
from tests.support.waiting import until

JANUARY = BEGINNING
FEBRUARY, DAY = BEGINNING + timedelta(days=31), timedelta(days=1)


def told_of_both(polar: Polar) -> None:
    """Polar tells of the grant of a benefit and of a subscription, both for its meter."""
    polar.deliver("benefit_grant.created", polar.grant(JANUARY + DAY), "grant")
    polar.deliver("subscription.active", polar.subscription(JANUARY), "subscription")


def archiving(polar: Polar, meter: str) -> int:
    """The status that is answered when the meter is to be archived."""
    return polar.tenant.ask("PATCH", f"/v1/meters/{meter}", json={"is_archived": True}).status_code


def shown(polar: Polar) -> list[str]:
    """The meters in everything that is shown of the benefit, its grant and the subscription."""
    tenant, known = polar.tenant, state(polar)
    (benefit,) = tenant.get("/v1/benefits/")["items"]
    (granted,) = tenant.get(f"/v1/benefits/{polar.benefit_id}/grants")["items"]
    again = tenant.get(f"/v1/benefit-grants/{polar.grant_id}")
    benefits: list[Json] = [benefit, granted["benefit"], again["benefit"]]
    grants: list[Json] = [granted, again, known["granted_benefits"][0]]
    return (
        [one["properties"]["meter_id"] for one in benefits]
        + [one["properties"]["last_credited_meter_id"] for one in grants]
        + [one["meter_id"] for one in known["active_subscriptions"][0]["meters"]]
    )


@pytest.mark.parametrize("news_first", [False, True])
def test_a_meter_goes_by_the_id_it_has_here_whenever_it_was_made(polar: Polar, news_first: bool) -> None:
    """Before or after the news; and where another meter becomes Polar's, it is that one's id."""
    if news_first:
        told_of_both(polar)
    meter = polar.mirrored_meter()
    if not news_first:
        told_of_both(polar)
    assert set(shown(polar)) == {meter}
    assert archiving(polar, meter) == 422
    other = polar.tenant.meter()
    polar.tenant.patch(f"/v1/meters/{meter}", {"metadata": {}})
    polar.tenant.patch(f"/v1/meters/{other}", {"metadata": {"polar_meter_id": polar.meter_id}})
    assert set(shown(polar)) == {other}
    assert (archiving(polar, meter), archiving(polar, other)) == (200, 422)


def test_a_meter_that_a_subscription_pays_for_is_not_archived(polar: Polar) -> None:
    """While it is active, and while there is a source that would tell of its end."""
    polar.deliver("subscription.active", polar.subscription(JANUARY), "1")
    meter = polar.mirrored_meter()
    assert archiving(polar, meter) == 422
    polar.deliver("subscription.revoked", polar.subscription(FEBRUARY, status="canceled"), "2")
    assert archiving(polar, meter) == 200
    polar.tenant.patch(f"/v1/meters/{meter}", {"is_archived": False})
    polar.deliver("subscription.active", polar.subscription(FEBRUARY + DAY), "3")
    assert archiving(polar, meter) == 422
    no_more_news(polar)
    assert archiving(polar, meter) == 200


def no_more_news(polar: Polar) -> None:
    """The organization's sources are deleted."""
    for source in polar.tenant.get("/v1/webhooks/sources")["items"]:
        assert polar.tenant.ask("DELETE", f"/v1/webhooks/sources/{source['id']}").status_code == 204


def test_the_steps_for_polars_grants_are_made_here_once_nobody_tells_of_them(polar: Polar) -> None:
    """After the last source was deleted they are renewed, taken back and given, by the meter that is known here."""
    polar.deliver("benefit_grant.created", polar.grant(JANUARY), "1")
    meter = polar.mirrored_meter()
    no_more_news(polar)
    grant, benefit = f"/v1/benefit-grants/{polar.grant_id}", f"/v1/benefits/{polar.benefit_id}"
    assert polar.tenant.post(f"{grant}/revoke", {})["is_revoked"] is True
    assert numbers(polar) == [(0, 0, 0)]
    polar.tenant.post(f"{benefit}/grants", {"customer_id": polar.customer_id})
    assert numbers(polar) == [(100, 0, 100)]
    polar.tenant.patch(benefit, {"properties": {"meter_id": meter, "units": 30, "rollover": False}})
    polar.tenant.server.now += DAY
    polar.tenant.post(f"{grant}/cycle", {})
    assert numbers(polar) == [(30, 0, 30)]
    assert archiving(polar, meter) == 422
    assert polar.tenant.ask("DELETE", benefit).status_code == 204
    assert numbers(polar) == [(0, 0, 0)]
    assert archiving(polar, meter) == 200


def test_what_polar_could_not_grant_is_not_shown(polar: Polar) -> None:
    """Neither in the customer's state nor, with its meter, in the portal, until it is granted; nor once it is not."""
    polar.mirrored_meter()
    granted = polar.grant(JANUARY)
    session: Json = {}
    for place, is_granted in enumerate([False, True, False]):
        told = {"is_granted": is_granted, "modified_at": text(JANUARY + place * DAY)}
        told |= {} if is_granted else {"granted_at": None, "properties": {}}
        assert polar.deliver("benefit_grant.updated", granted | told, f"{place}").json() == {"status": "accepted"}
        session = session or polar.tenant.post("/v1/customer-sessions/", {"external_customer_id": "ann"})
        portal = polar.tenant.ask("GET", "/v1/customer-portal/usage", secret=session["token"]).json()["items"]
        assert (len(state(polar)["granted_benefits"]), len(portal)) == (is_granted, is_granted)
        assert polar.tenant.get(f"/v1/benefit-grants/{polar.grant_id}")["is_granted"] is is_granted


def deletion(polar: Polar) -> list[Delivery]:
    """A benefit is granted and deleted at Polar, which ends the grant; what came before may be dated later."""
    granted = polar.grant(JANUARY)
    deleted = granted["benefit"] | {"is_deleted": True, "modified_at": text(JANUARY + DAY)}
    return [
        ("benefit_grant.created", granted),
        ("benefit_grant.revoked", polar.revoked(granted, JANUARY + DAY) | {"benefit": deleted}),
        ("benefit.updated", granted["benefit"] | {"description": "Renamed", "modified_at": text(JANUARY + 2 * DAY)}),
        ("benefit.updated", deleted),
    ]


@pytest.mark.parametrize("order", [(0, 1), (0, 3, 1), (0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 0), (2, 3, 0, 1)])
def test_a_benefit_that_was_deleted_at_polar_is_gone(polar: Polar, order: tuple[int, ...]) -> None:
    """In whatever order that is told, it is not there any more, and its meter can be archived."""
    meter, news = polar.mirrored_meter(), deletion(polar)
    for place in order:
        assert polar.deliver(*news[place], f"{place}").json() == {"status": "accepted"}
    assert polar.tenant.get("/v1/benefits/")["items"] == []
    assert polar.tenant.ask("GET", f"/v1/benefits/{polar.benefit_id}").status_code == 404
    assert polar.tenant.get(f"/v1/benefit-grants/{polar.grant_id}")["benefit"]["is_deleted"] is True
    assert (numbers(polar), state(polar)["granted_benefits"]) == ([(0, 0, 0)], [])
    assert archiving(polar, meter) == 200


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_benefit_is_known_by_its_own_news(polar: Polar, order: tuple[int, ...]) -> None:
    """Before anybody has it, and in its newest state; benefits of other types say nothing here."""
    meter, benefit = polar.mirrored_meter(), polar.grant(JANUARY)["benefit"]
    news = [
        ("benefit.created", benefit),
        ("benefit.updated", benefit | {"description": "Renamed", "modified_at": text(FEBRUARY)}),
        ("benefit.created", benefit | {"id": f"7777{polar.benefit_id[4:]}", "type": "custom", "properties": {}}),
    ]
    for place in order:
        assert polar.deliver(*news[place], f"{place}").status_code == 202
    (shown,) = polar.tenant.get("/v1/benefits/")["items"]
    assert (shown["id"], shown["description"]) == (polar.benefit_id, "Renamed")
    assert shown["properties"] == {"meter_id": meter, "units": 100, "rollover": False}


def test_a_deletion_is_the_last_word_also_beside_older_news(server: Server, polar: Polar) -> None:
    """Polar tells of a benefit with every customer's grant: of two at once neither decides by what was before both."""
    (kind, granted), _, (_, renamed), deleted = deletion(polar)
    polar.deliver(kind, granted, "before")
    older = "benefit_grant.updated", granted | {"benefit": renamed}
    decide, at_once, deciding = server.aggregator.decide, list[asyncio.Event](), server.app.state.desk.deciding

    async def together(*changes: Change) -> None:
        at_once.append(asyncio.Event())
        if len(at_once) == 1:
            await until(lambda: len(at_once) == 2 or bool(deciding._lock._waiters))
        else:
            await at_once[0].wait()
        await decide(*changes)
        at_once[0].set()

    async def both() -> list[int]:
        first = asyncio.create_task(post(*deleted))
        await until(lambda: len(at_once) == 1)
        return [answer.status_code for answer in await asyncio.gather(first, post(*older))]

    async def post(kind: str, data: Json) -> httpx.Response:
        body = json.dumps({"type": kind, "data": data}).encode()
        headers = signed(body, kind, int(server.now.timestamp()), keys(polar.secret)[0])
        return await server.http.post("/webhooks/polar", headers=headers, content=body)

    with patch.object(server.aggregator, "decide", together):
        assert server.run(both()) == [202, 202]
    assert polar.tenant.get("/v1/benefits/")["items"] == []
