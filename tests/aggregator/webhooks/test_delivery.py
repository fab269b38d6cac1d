"""Webhooks out: told once, signed, again until they are taken, and never to a place where they may not go."""

import base64
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from aggregator.store import webhook_outbox
from aggregator.webhooks import targets
from aggregator.webhooks.targets import Names
from meters.log import format_position
from meters.webhooks import SigningSecret, signature
from tests.support.polar.organization import Polar
from tests.support.servers.query_api import Server, Tenant
from tests.support.servers.webhook_receiver import HURRY, Delivery
from tests.support.servers.webhook_tenant import Told, caused_anew, live
from tests.support.waiting import until

MOMENT = timedelta(milliseconds=20)


def verified(delivery: Delivery, key: bytes, now_s: int) -> bool:
    """Whether one of the signatures is of this key."""
    head = delivery.headers
    wanted = signature(key, head["webhook-id"], str(now_s), delivery.body)
    return wanted in head["webhook-signature"].split() and head["webhook-timestamp"] == str(now_s)


def test_a_change_is_told_as_the_customers_state(tenant: Tenant) -> None:
    """The state is the one that the API answers; signatures are those of both readings of the secret."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        customer, meter = await told.customer(), await told.meter()
        await told.use("a", "b")
        await told.credit(customer, meter, 5)
        await told.settled()
        last = told.receiver.deliveries[-1]
        assert last.event["type"] == "customer.state_changed"
        assert last.event["api_version"] == last.headers["webhook-api-version"] == "2026-10"
        assert last.event["data"] == await told.ask("GET", f"/v1/customers/{customer}/state")
        assert [one["balance"] for one in last.event["data"]["active_meters"]] == [3]
        now_s = int(tenant.server.now.timestamp())
        standard = base64.b64decode(told.secret.removeprefix("whsec_"))
        assert [verified(last, key, now_s) for key in (standard, told.secret.encode(), b"no")] == [True, True, False]
        assert Webhook(told.secret).sign(
            last.headers["webhook-id"], tenant.server.now, last.body.decode()
        ) in last.headers["webhook-signature"]

    live(tenant, story)


def test_many_movements_are_one_message(tenant: Tenant) -> None:
    """What happens before the message is made is told together, and nobody else's customers are told."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        other = Told(stranger, told.receiver)
        await other.customer("eve")
        await told.customer()
        for number in range(20):
            await told.use(f"use-{number}")
        await told.settled()
        assert {delivery.event["data"]["external_id"] for delivery in told.receiver.deliveries} == {"ann"}

    stranger = tenant.server.tenant()
    live(tenant, story)
    with tenant.server.aggregator.outbox() as connection:
        assert connection.execute("SELECT count(*) FROM webhook_causes").fetchone() == (0,)


def test_usage_that_changes_nothing_is_not_told(tenant: Tenant) -> None:
    """An event that no meter counts leaves the state as it was told."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        customer = await told.customer()
        await told.arrived(1)
        await told.use("counted by nobody")
        await told.settled()
        await told.ask("PATCH", f"/v1/customers/{customer}", {"name": "Ann"})
        await told.settled()
        assert [delivery.event["data"]["name"] for delivery in told.receiver.deliveries] == [None, "Ann"]

    live(tenant, story)


def test_a_failure_is_tried_again_with_the_same_words(tenant: Tenant) -> None:
    """500, a redirect and silence are failures; the message keeps its id and its bytes; the log has every attempt."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        told.receiver.answers = [500, 307]
        await told.customer()
        deliveries = await told.arrived(3, passing=MOMENT)
        await told.settled()
        assert len({delivery.headers["webhook-id"] for delivery in deliveries}) == 1
        assert len({delivery.body for delivery in deliveries}) == 1
        found = await told.ask("GET", "/v1/webhooks/deliveries")
        shown = [(one["attempt"], one["http_code"], one["succeeded"]) for one in found["items"]]
        assert shown == [(3, 200, True), (2, 307, False), (1, 500, False)]

    live(tenant, story)


def test_what_failed_for_good_can_be_told_again(tenant: Tenant) -> None:
    """After the last attempt it is left; a redelivery sends the same id and bytes; another tenant cannot ask for it."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        told.receiver.answers = [500, None, 503]
        await told.customer()
        first = (await told.arrived(3, passing=MOMENT))[0]
        await told.settled()
        outcomes = [one["outcome"] for one in (await told.ask("GET", "/v1/webhooks/deliveries"))["items"]]
        assert outcomes == ["answered 503", "no answer within 5 s", "answered 500"]
        id = first.headers["webhook-id"]
        assert await told.ask("POST", f"/v1/webhooks/events/{id}/redeliver") == {"id": id, "endpoints": 1}
        again = (await told.arrived(4))[3]
        assert (again.headers["webhook-id"], again.body) == (id, first.body)

    stranger = tenant.server.tenant()
    live(tenant, story, pace=HURRY._replace(timeout_s=5))
    assert stranger.get("/v1/webhooks/deliveries")["items"] == []
    message = tenant.get("/v1/webhooks/deliveries")["items"][0]["webhook_event"]["id"]
    assert stranger.ask("POST", f"/v1/webhooks/events/{message}/redeliver").status_code == 404
    refusal = tenant.refusal("POST", "/v1/webhooks/events/not-a-uuid/redeliver")
    assert refusal == (422, "RequestValidationError", [("uuid_parsing", ["path", "id"])])


@pytest.mark.parametrize("ended", ["DELETE", "PATCH"])
def test_nothing_is_told_again_to_who_cannot_hear(tenant: Tenant, ended: str) -> None:
    """Where every endpoint is deleted or disabled that is said, and what was delivered stays delivered."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        await told.customer()
        (first,) = await told.arrived(1)
        await told.settled()
        off = None if ended == "DELETE" else {"enabled": False}
        await told.ask(ended, f"/v1/webhooks/endpoints/{told.endpoint_id}", off)
        path = f"/v1/webhooks/events/{first.headers['webhook-id']}/redeliver"
        with pytest.raises(AssertionError, match="Every endpoint that it was for is deleted or disabled"):
            await told.ask("POST", path)
        (shown,) = (await told.ask("GET", "/v1/webhooks/deliveries"))["items"]
        assert shown["webhook_event"]["status"] == "delivered"

    live(tenant, story)
    message = tenant.get("/v1/webhooks/deliveries")["items"][0]["webhook_event"]["id"]
    answer = tenant.ask("POST", f"/v1/webhooks/events/{message}/redeliver")
    assert (answer.status_code, answer.json()["error"], "Retry-After" in answer.headers) == (409, "Conflict", False)


def test_an_endpoint_that_is_gone_is_disabled(tenant: Tenant) -> None:
    """410 ends it at once; enabled again, it hears what it did not take, what moved meanwhile and what comes then."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        told.receiver.answers = [410]
        await told.customer()

        async def disabled() -> bool:
            shown = await told.ask("GET", f"/v1/webhooks/endpoints/{told.endpoint_id}")
            return shown["disabled_reason"] == "it answered 410"

        await until(disabled)
        await told.customer("bob")
        await told.ask("PATCH", f"/v1/webhooks/endpoints/{told.endpoint_id}", {"enabled": True})
        await told.customer("eve")
        await told.arrived(4)
        await told.settled()
        names = [delivery.event["data"]["external_id"] for delivery in told.receiver.deliveries]
        assert (names[0], sorted(names[1:])) == ("ann", ["ann", "bob", "eve"])

    live(tenant, story)


def test_an_endpoint_that_is_away_is_disabled_though_a_customer_moves_all_the_time(tenant: Tenant) -> None:
    """Each state takes the last one's place, and its attempts: they run out, and ten that failed are enough."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        await told.meter()
        told.receiver.answers = [500] * 100
        await told.customer()
        for number in range(20):
            await told.arrived(number + 1, passing=MOMENT)
            await told.use(f"use-{number}")
        endpoints = tenant.server.aggregator.catalogue.webhooks.endpoints
        await until(lambda: endpoints[told.endpoint_id].disabled_at is not None)
        assert endpoints[told.endpoint_id].disabled_reason == "10 messages in a row could not be delivered"
        found = await told.ask("GET", "/v1/webhooks/deliveries?limit=100")
        assert [one["attempt"] for one in reversed(found["items"])] == [1, 2] * 10

    live(tenant, story, pace=HURRY._replace(attempts_max=2))


def test_a_customer_whose_state_is_refused_holds_others_back_for_a_minute_only(tenant: Tenant) -> None:
    """However often both of them move meanwhile: each new state takes the place, and the age, of the one before."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        await told.meter()
        for name in ("ann", "bob"):
            await told.customer(name)
        await told.settled()
        told.receiver.refused = b'"external_id":"ann"'
        for number in range(8):
            for name in ("ann", "bob"):
                await told.use(f"{name}-{number}", name=name)
            await until(lambda: no_causes(tenant))
            tenant.server.now += timedelta(seconds=10)

        def heard() -> bool:
            found = [one.event["data"] for one in told.receiver.deliveries]
            return any(one["external_id"] == "bob" and [m["consumed_units"] for m in one["active_meters"]] == [8]
                       for one in found)  # fmt: skip

        await until(heard)

    live(tenant, story, pace=HURRY._replace(attempts_max=10, backoff_s=2))


@pytest.mark.parametrize("refused", ["meter.threshold_reached", "customer.state_changed"])
def test_a_type_that_is_refused_holds_back_no_other(
    tenant: Tenant, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the receiver's code knows only some of them; also where more of them wait than are sent in one turn."""
    monkeypatch.setattr(webhook_outbox, "MESSAGES_AT_ONCE", 2)

    async def story(told: Told) -> None:
        await told.listen("customer.state_changed", "meter.threshold_reached")
        meter, names = await told.meter(), ["ann", "bob", "cid"]
        for name in names:
            await told.customer(name)
        for value in (1, 2):
            threshold = {"meter_id": meter, "measure": "usage", "value": value}
            await told.ask("POST", "/v1/webhooks/thresholds", threshold)
        await told.settled()
        told.receiver.deliveries.clear()
        told.receiver.refused = f'"type":"{refused}"'.encode()
        for number in range(3):
            for name in names:
                await told.use(f"{name}-{number}", name=name)

        def heard() -> bool:
            found = [one.event for one in told.receiver.deliveries if one.event["type"] != refused]
            if refused == "customer.state_changed":
                return len({one["data"]["customer"]["external_id"] for one in found}) == 3 and len(found) == 6
            return {one["data"]["external_id"] for one in found
                    if [m["consumed_units"] for m in one["data"]["active_meters"]] == [3]} == set(names)  # fmt: skip

        await until(heard)
        assert refused in told.receiver.types()

    live(tenant, story, pace=HURRY._replace(attempts_max=10, backoff_s=3600))


def no_causes(tenant: Tenant) -> bool:
    """Whether everything that moved was made into messages."""
    with tenant.server.aggregator.outbox() as connection:
        causes = "SELECT count(*) FROM webhook_causes WHERE organization_id = ?"
        return connection.execute(causes, [tenant.id]).fetchone() == (0,)


def test_a_rotated_secret_signs_beside_the_new_one_for_a_day(tenant: Tenant) -> None:
    """Then the new one alone. No answer but those two shows a secret."""
    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")
        rotated = await told.ask("PATCH", f"/v1/webhooks/endpoints/{told.endpoint_id}/secret")
        await told.customer()
        (both,) = await told.arrived(1)
        tenant.server.now += timedelta(days=1)
        await told.customer("bob")
        late = (await told.arrived(2))[1]
        now_s = int(tenant.server.now.timestamp())
        keys = [secret.encode() for secret in (told.secret, rotated["secret"])]
        assert [verified(both, key, now_s - 86_400) for key in keys] == [True, True]
        assert [verified(late, key, now_s) for key in keys] == [False, True]
        shown = [await told.ask("GET", path) for path in ("/v1/webhooks/endpoints", "/v1/webhooks/deliveries")]
        assert not any(secret in str(shown) for secret in (told.secret, rotated["secret"]))

    live(tenant, story)
    assert "whsec" not in repr(SigningSecret("whsec_hush"))


def test_an_endpoint_that_does_not_say_of_what_is_told_what_polar_knows(tenant: Tenant) -> None:
    """So that Polar's clients can read it; where they want a secret there is a text that has nothing of it."""
    made = tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/"})
    shown = [
        tenant.get(f"/v1/webhooks/endpoints/{made['id']}"), *tenant.get("/v1/webhooks/endpoints")["items"],
        tenant.patch(f"/v1/webhooks/endpoints/{made['id']}", {"events": ["customer.state_changed"]}),
    ]  # fmt: skip
    assert made["events"] == ["customer.state_changed"]
    assert [one["secret"] for one in shown] == ["whsec_..."] * 3


def test_a_threshold_is_told_once_for_a_crossing_and_a_cycle(tenant: Tenant) -> None:
    """Reached, told once; credited above it and reached again, told again; a new cycle starts over."""
    async def story(told: Told) -> None:
        await told.listen("meter.threshold_reached")
        customer, meter = await told.customer(), await told.meter()
        for line_ in ({"measure": "usage", "unit": "percent", "value": 80}, {"measure": "balance", "value": 0}):
            await told.ask("POST", "/v1/webhooks/thresholds", {"meter_id": meter, **line_})
        await told.credit(customer, meter, 10)
        await told.use(*(f"a{number}" for number in range(7)))
        await told.settled()
        assert told.receiver.deliveries == []
        await told.use("b1")
        await told.arrived(1)
        await told.use("b2")  # still beyond the line: nothing more to say
        await told.settled()
        data = [delivery.event["data"] for delivery in told.receiver.deliveries]
        assert [(one["measure"], one["consumed_units"], one["balance"]) for one in data] == [("usage", 8, 2)]
        await told.use("b3", "b4")
        await told.arrived(2)
        assert told.receiver.deliveries[1].event["data"]["balance"] == -1
        await told.credit(customer, meter, 90)  # both lines are behind
        await told.settled()
        await told.use(*(f"c{number}" for number in range(69)))
        await told.arrived(3)
        tenant.server.now += timedelta(seconds=1)
        await told.ask("POST", f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
        await told.settled()
        measures = [delivery.event["data"]["measure"] for delivery in told.receiver.deliveries]
        assert measures == ["usage", "balance", "usage", "balance"]  # the new cycle begins with nothing left
        assert len({delivery.headers["webhook-id"] for delivery in told.receiver.deliveries}) == 4

    live(tenant, story)


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1/", "https://localhost/", "https://10.0.0.7/", "https://169.254.169.254/latest", "https://[::1]/",
     "https://[::ffff:192.168.0.1]/", "http://example.com/", "ftp://example.com/", "https://user:pw@example.com/",
     "https://[64:ff9b::a00:1]/", "https://[2002:a00:1::]/", "https://[fec0::1]/", "https://[::a00:1]/",
     "https://224.0.0.1/", "https:///x", "https://0.0.0.0/", "https://100.64.0.1/",
     "https://example.com:99999/", "https://a b/"],
)  # fmt: skip
def test_private_and_strange_targets_are_refused(url: str) -> None:
    """Nothing inside the operator's network is reached by who has only a token."""
    assert targets.refusal(url, private_allowed=False) is not None


def test_a_name_that_leads_inside_is_found_out_at_delivery(server: Server) -> None:
    """What a name means is asked for each delivery, and the connection goes to what was checked."""
    look_up = partial(Names().addresses, "organization")
    with pytest.raises(targets.Forbidden):
        server.run(targets.resolve("https://localhost:1/", look_up, private_allowed=False))
    target = server.run(targets.resolve("http://localhost:81/x?y=1", look_up, private_allowed=True))
    assert target.host == "localhost:81"
    assert target.url in ("http://127.0.0.1:81/x?y=1", "http://[::1]:81/x?y=1")
    for url in ("https://example.com/hook", "https://8.8.8.8/", "https://[2606:4700::1]:8443/", "https://[64:ff9b::808:808]/"):
        assert targets.refusal(url, private_allowed=False) is None


def test_a_store_made_anew_does_not_tell_the_past_again(server: Server, tmp_path: Path) -> None:
    """How far everybody was told is in the log, so only what came after it gives a new store something to tell."""
    tenant = server.tenant()

    async def story(told: Told) -> None:
        await told.listen()
        await told.customer()
        await told.use("a")
        await told.arrived(1)
        await told.settled()
        events = format_position(server.aggregator.as_of)
        settled = server.aggregator.catalogue.webhooks.settled
        await until(lambda: told.endpoint_id in settled and settled[told.endpoint_id].events == events)

    live(tenant, story)
    assert caused_anew(server, tenant, tmp_path) == set()


def test_a_store_made_anew_tells_what_nobody_was_told(server: Server, tmp_path: Path) -> None:
    """Usage and credits that came while nobody could tell of them, though endpoint and customer are read with them."""
    tenant = server.tenant()
    tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/", "events": ["customer.state_changed"]})
    customer, meter = tenant.customer(external_id="ann"), tenant.meter()
    tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 5})
    tenant.event("one", external_customer_id="bob")

    assert caused_anew(server, tenant, tmp_path) == {(customer, None), (None, "bob")}


def test_polars_news_are_told_on(tenant: Tenant) -> None:
    """What Polar decides changes the state, and the state is told."""
    polar = Polar(tenant)
    polar.mirrored_meter()

    async def story(told: Told) -> None:
        await told.listen("customer.state_changed")

    live(tenant, story)
    polar.deliver("benefit_grant.created", polar.grant(tenant.server.now), "1")
    with tenant.server.aggregator.outbox() as connection:
        taken = webhook_outbox.take_causes(connection)
        causes = [cause.customer_id for cause in taken if cause.organization_id == tenant.id]
    assert polar.customer_id in causes
