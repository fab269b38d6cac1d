"""One organization that uses every route of the API: each answer with the operation of the document that gave it."""

from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import httpx

from aggregator.store import webhook_outbox
from aggregator.store.queries.scope import naive
from aggregator.store.webhook_outbox import Attempt, Message
from meters.webhooks import STATE_CHANGED
from tests.support.polar.organization import BEGINNING, Polar
from tests.support.servers.query_api import Server, Tenant

Json = Any
EVERYTHING = {"conjunction": "and", "clauses": []}
NESTED = {"conjunction": "or", "clauses": [
    {"property": "name", "operator": "eq", "value": "root"},
    {"conjunction": "and", "clauses": [{"property": "tokens", "operator": "in", "value": [1, 2.5, "x", True]}]},
]}  # fmt: skip
RANGE = {"start_timestamp": "2026-03-01T00:00:00Z", "end_timestamp": "2026-03-02T00:00:00Z", "interval": "hour"}
DAYS = {"start_date": "2026-02-28", "end_date": "2026-03-01", "interval": "day"}


class Told(NamedTuple):
    """An answer, and which operation of the document gave it."""

    operation: str
    response: httpx.Response


class Story:
    """The organization, and every answer that it got."""

    def __init__(self, server: Server) -> None:
        self.told: list[Told] = []
        self.server, self.tenant = server, server.tenant()
        self.polar = Polar(self.tenant)

    def ask(self, method: str, template: str, *, secret: str | None = None, **more: Any) -> Json:
        """Ask an operation, whose path's names are among ``more``; its answer, which has to be a good one."""
        names = {name: more.pop(name) for name in ("id", "external_id", "credit_id", "entry_id") if name in more}
        path = template.format(**names)
        response = self.tenant.ask(method, path, secret=secret or self.tenant.secret, **more)
        assert response.is_success, f"{method} {path}: {response.text}"
        self.told.append(Told(f"{method} {template}", response))
        return response.json() if response.content and "json" in response.headers["content-type"] else None

    def get(self, template: str, **more: Any) -> Json:
        """Ask for something."""
        return self.ask("GET", template, **more)


def every_answer(server: Server) -> list[Told]:
    """The story, told to its end."""
    story = Story(server)
    _make(story)
    _send(story)
    _read(story)
    _take_back(story)
    return story.told


def _make(story: Story) -> None:
    """Customers, meters, prices, credits, benefits and webhooks."""
    made = {"email": "ann@example.com", "external_id": "ann", "name": "Ann", "metadata": {"plan": "free", "seats": 3}}
    ann = story.ask("POST", "/v1/customers/", json=made)["id"]
    story.ask("POST", "/v1/customers/", json={"type": "team", "name": "Team"})
    body = {"name": "Calls", "filter": EVERYTHING, "aggregation": {"func": "count"}}
    calls = story.ask("POST", "/v1/meters/", json=body)["id"]
    custom = {"unit": "custom", "custom_label": "k", "custom_multiplier": 1000, "metadata": {"a": 1.5, "b": True}}
    body = {"name": "Tokens", "filter": NESTED, "aggregation": {"func": "sum", "property": "tokens"}, **custom}
    tokens = story.ask("POST", "/v1/meters/", json=body)["id"]
    story.ask("PATCH", "/v1/meters/{id}", id=tokens, json={"metadata": {"a": 2}})
    story.ask("PUT", "/v1/meters/{id}/price", id=calls, json={"unit_amount": "0.50", "cap_amount": 900})
    credit = {"meter_id": calls, "units": 10, "rollover": True}
    story.ask("POST", "/v1/customers/{id}/credits", id=ann, json=credit)
    once = {"Idempotency-Key": "key"}
    taken = story.ask("POST", "/v1/customers/{id}/credits", id=ann, json=credit | {"units": 3}, headers=once)["id"]
    story.ask("DELETE", "/v1/customers/{id}/credits/{credit_id}", id=ann, credit_id=taken)
    properties = {"meter_id": tokens, "units": 5, "rollover": True}
    body = {"type": "meter_credit", "description": "Units", "properties": properties, "metadata": {"a": "b"}}
    benefit = story.ask("POST", "/v1/benefits/", json=body)["id"]
    story.ask("PATCH", "/v1/benefits/{id}", id=benefit, json={"description": "More units"})
    grant = story.ask("POST", "/v1/benefits/{id}/grants", id=benefit, json={"customer_id": ann})["id"]
    story.server.now += timedelta(seconds=1)  # a cycle that begins with the grant would credit nothing
    story.ask("POST", "/v1/benefit-grants/{id}/cycle", id=grant)
    endpoint = story.ask("POST", "/v1/webhooks/endpoints", json={"url": "https://example.com/", "name": "ours"})["id"]
    deliver(story.tenant, endpoint, ann)
    body = {"meter_id": calls, "measure": "usage", "value": 1.50}
    story.ask("POST", "/v1/webhooks/thresholds", json=body)
    body = {"meter_id": calls, "measure": "balance", "value": "10", "unit": "percent", "customer_id": ann}
    story.ask("POST", "/v1/webhooks/thresholds", json=body)
    story.ask("POST", "/v1/webhooks/sources", json={"secret": "whsec_0123456789abcdef" + story.tenant.id})
    _polar(story)


def _polar(story: Story) -> None:
    """What Polar tells: a customer with a subscription and a grant, and a type that means nothing here."""
    polar = story.polar
    polar.mirrored_meter()
    deliveries = [
        ("customer.created", polar.customer(external_id="bob", email="bob@example.com")),
        ("subscription.created", polar.subscription(BEGINNING)),
        ("benefit_grant.created", polar.grant(BEGINNING + timedelta(minutes=5))),
        ("benefit_grant.created", polar.grant(BEGINNING + timedelta(minutes=5))),
        ("checkout.created", {"id": "x"}),
    ]
    for number, (kind, data) in enumerate(deliveries):
        response = polar.deliver(kind, data, f"delivery {min(number, 3)}")
        assert response.is_success, response.text
        story.told.append(Told("POST /webhooks/polar", response))


def deliver(tenant: Tenant, endpoint: str, customer: str) -> None:
    """A webhook that an endpoint answered, and one for which it was not there."""
    now, id = naive(tenant.server.now), str(uuid5(UUID(tenant.id), "message"))
    message = Message(id, endpoint, tenant.id, STATE_CHANGED, customer, "{}", now, now, now)
    tries = [
        Attempt(f"try {number} {tenant.id}", id, endpoint, tenant.id, number, now, 5, status, "as it went")
        for number, status in enumerate((None, 200), 1)
    ]
    with tenant.server.aggregator.outbox() as connection:
        webhook_outbox.put_messages(connection, [message], [])
        webhook_outbox.mark(connection, [message._replace(status="delivered", settled_at=now)], tries)


def _send(story: Story) -> None:
    """A trace, events of every kind of customer, and a line that is no event."""
    tenant = story.tenant
    costs = '{"tokens":1.50,"_cost":{"amount":"0.10","currency":"usd"},"_llm":{"vendor":"v","model":"m",' \
            '"input_tokens":"7","output_tokens":1,"total_tokens":8}}'  # fmt: skip
    tenant.event("root", name="root", metadata=costs)
    tenant.event("child", metadata='{"tokens":2e0,"deep":"x"}', parent_id="root", external_member_id="seat")
    customers = tenant.get("/v1/customers/")["items"]
    team = next(one["id"] for one in customers if one["type"] == "team")
    tenant.event("team", name="root", customer_id=team, external_customer_id=None, metadata={"tokens": 0.25})
    tenant.event("nobody", external_customer_id="nobody")
    tenant.send(b"{", admitted=False)


def _read(story: Story) -> None:
    """Everything that can be asked."""
    _read_usage(story)
    _read_customers(story)
    _read_events(story)
    _read_lists(story)
    _read_portal(story)
    for path in ("/livez", "/readyz", "/metrics"):
        story.get(path)


def _read_usage(story: Story) -> None:
    for meter in story.get("/v1/meters/")["items"]:
        story.get("/v1/meters/{id}", id=meter["id"])
        story.get("/v1/meters/{id}/quantities", id=meter["id"], params=RANGE)
        story.get("/v1/meters/{id}/quantities", id=meter["id"], params=RANGE | {"external_customer_id": "ann"})
        story.get("/v1/meters/{id}/usage", id=meter["id"], params={"external_customer_id": "ann"})
        asked = {"meter_id": meter["id"], "start": RANGE["start_timestamp"], "end": RANGE["end_timestamp"]}
        story.get("/v1/usage", params=asked)
        story.get("/v1/usage", params=asked | {"interval": "hour", "group_by": "external_customer_id", "top": 1})
    calls = story.get("/v1/meters/", params={"query": "Calls"})["items"][0]["id"]
    story.get("/v1/meters/{id}/price", id=calls)
    body = {"filter": NESTED, "aggregation": {"func": "sum", "property": "tokens"}}
    story.ask("POST", "/v1/meters/preview", json=body)
    story.ask("POST", "/v1/meters/preview", json=body | {"filter": EVERYTHING})
    story.get("/v1/metrics/", params=DAYS)
    story.get("/v1/metrics/", params=DAYS | {"metrics": "costs"})
    story.get("/v1/metrics/limits")


def _read_customers(story: Story) -> None:
    for customer in story.get("/v1/customers/")["items"]:
        story.get("/v1/customers/{id}", id=customer["id"])
        story.get("/v1/customers/{id}/state", id=customer["id"])
        story.get("/v1/customers/{id}/credits", id=customer["id"])
        story.get("/v1/customers/{id}/charges", id=customer["id"])
    for name in ("ann", "bob"):
        story.get("/v1/customers/external/{external_id}", external_id=name)
        story.get("/v1/customers/external/{external_id}/state", external_id=name)
    for one in story.get("/v1/customer-meters/", params={"limit": 100})["items"]:
        story.get("/v1/customer-meters/{id}", id=one["id"])
        for entry in story.get("/v1/customer-meters/{id}/ledger", id=one["id"])["items"]:
            if entry["events"]:
                template = "/v1/customer-meters/{id}/ledger/{entry_id}/events"
                story.get(template, id=one["id"], entry_id=entry["id"])


def _read_events(story: Story) -> None:
    fields = {"aggregate_fields": ["tokens", "_cost.amount", "a.b"]}
    for event in story.get("/v1/events/", params=fields)["items"]:
        story.get("/v1/events/{id}", id=event["id"])
    story.get("/v1/events/", params={"cursor_pagination": True, "limit": 1})
    story.get("/v1/events/names")
    for letter in story.get("/v1/dead-letters/", params={"include_replayed": True})["items"]:
        story.get("/v1/dead-letters/{id}", id=letter["id"])
        story.ask("POST", "/v1/dead-letters/{id}/replay", id=letter["id"])
    meter, since = story.get("/v1/meters/")["items"][0]["id"], "2026-01-01T00:00:00Z"
    story.get("/v1/feed/")
    story.get("/v1/feed/backlog")
    story.get("/v1/feed/position", params={"since": since})
    story.get("/v1/feed/customers")
    story.get("/v1/feed/rollup", params={"meter_id": meter, "before": "2027-01-01T00:00:00Z"})
    story.get("/v1/feed/traffic", params={"since": since, "rollup_meter_id": meter})


def _read_lists(story: Story) -> None:
    for benefit in story.get("/v1/benefits/")["items"]:
        story.get("/v1/benefits/{id}", id=benefit["id"])
        for grant in story.get("/v1/benefits/{id}/grants", id=benefit["id"])["items"]:
            story.get("/v1/benefit-grants/{id}", id=grant["id"])
    story.get("/v1/benefit-grants/")
    story.get("/v1/customers/export")
    for endpoint in story.get("/v1/webhooks/endpoints")["items"]:
        story.get("/v1/webhooks/endpoints/{id}", id=endpoint["id"])
    for told in story.get("/v1/webhooks/deliveries")["items"][:1]:
        story.ask("POST", "/v1/webhooks/events/{id}/redeliver", id=told["webhook_event"]["id"])
    story.get("/v1/webhooks/thresholds")
    story.get("/v1/webhooks/sources")
    story.get("/v1/webhooks/polar/deliveries")
    story.get("/v1/webhooks/polar/waiting")
    zoe = story.polar.customer(id="99999999" + story.tenant.id[8:], external_id="zoe")
    objects = [{"type": "customer", "data": zoe}]
    story.ask("POST", "/v1/webhooks/polar/objects", json={"objects": objects, "dry_run": True})


def _read_portal(story: Story) -> None:
    for name in ("ann", "bob"):
        body = {"external_customer_id": name, "return_url": "https://example.com/"}
        secret = story.ask("POST", "/v1/customer-sessions/", json=body)["token"]
        for one in story.get("/v1/customer-portal/meters/", secret=secret)["items"]:
            story.get("/v1/customer-portal/meters/{id}", id=one["id"], secret=secret)
        for one in story.get("/v1/customer-portal/benefit-grants/", secret=secret)["items"]:
            story.get("/v1/customer-portal/benefit-grants/{id}", id=one["id"], secret=secret)
        for path in ("customer-session/introspect", "customers/me", "usage"):
            story.get(f"/v1/customer-portal/{path}", secret=secret)
        asked = {"start": RANGE["start_timestamp"], "end": RANGE["end_timestamp"], "interval": "hour"}
        story.get("/v1/customer-portal/usage/history", params=asked, secret=secret)


def _take_back(story: Story) -> None:
    """What ends: resets, grants, prices, webhooks, customers."""
    ann = story.get("/v1/customers/external/{external_id}", external_id="ann")["id"]
    story.server.now += timedelta(minutes=1)
    story.ask("POST", "/v1/customers/{id}/resets", id=ann, json={"meter_ids": "all"})
    story.ask("PATCH", "/v1/customers/{id}", id=ann, json={"name": None, "metadata": {}})
    story.ask("PATCH", "/v1/customers/external/{external_id}", external_id="ann", json={"name": "Anna"})
    for benefit in story.get("/v1/benefits/", params={"query": "More"})["items"]:
        for grant in story.get("/v1/benefits/{id}/grants", id=benefit["id"])["items"]:
            story.ask("POST", "/v1/benefit-grants/{id}/revoke", id=grant["id"])
        story.ask("DELETE", "/v1/benefits/{id}", id=benefit["id"])
    for endpoint in story.get("/v1/webhooks/endpoints")["items"]:
        story.ask("PATCH", "/v1/webhooks/endpoints/{id}", id=endpoint["id"], json={"enabled": False})
        story.ask("PATCH", "/v1/webhooks/endpoints/{id}/secret", id=endpoint["id"])
        story.ask("DELETE", "/v1/webhooks/endpoints/{id}", id=endpoint["id"])
    for kind in ("thresholds", "sources"):
        for one in story.get(f"/v1/webhooks/{kind}")["items"]:
            story.ask("DELETE", f"/v1/webhooks/{kind}/{{id}}", id=one["id"])
    priced = story.get("/v1/meters/", params={"query": "Calls"})["items"][0]["id"]
    story.ask("DELETE", "/v1/meters/{id}/price", id=priced)
    story.ask("PATCH", "/v1/meters/{id}", id=priced, json={"is_archived": True})
    story.ask("DELETE", "/v1/customers/external/{external_id}", external_id="ann")
    team = next(one["id"] for one in story.get("/v1/customers/")["items"] if one["type"] == "team")
    story.ask("DELETE", "/v1/customers/{id}", id=team)
