"""A Polar organization that tells a tenant what it decided: payloads of its types, signed as it signs them."""

import json
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import httpx

from meters.webhooks import keys, signature
from tests.support.servers.query_api import Tenant

Json = dict[str, Any]
Delivery = tuple[str, Json]
BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
INSTANT = timedelta(milliseconds=3)
_numbers = count(1)


def text(at: datetime) -> str:
    """An instant as Polar writes it."""
    return at.isoformat().replace("+00:00", "Z")


def signed(body: bytes, id: str, at_s: int, key: bytes) -> dict[str, str]:
    """The headers of a delivery."""
    stamp = str(at_s)
    return {"webhook-id": id, "webhook-timestamp": stamp, "webhook-signature": signature(key, id, stamp, body)}


class Polar:
    """One organization of Polar's, with one customer, one meter, one benefit and one subscription."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.secret = f"whsec_secret_of_a_polar_organization_{next(_numbers)}"
        self.customer_id, self.benefit_id, self.grant_id, self.subscription_id = (
            f"{digit * 8}{tenant.id[8:]}" for digit in "1234"
        )
        self.meter_id = f"polar-{tenant.id}"
        tenant.post("/v1/webhooks/sources", {"secret": self.secret})

    def deliver(self, kind: str, data: Json, id: str) -> httpx.Response:
        """Send a webhook, now."""
        body = json.dumps({"type": kind, "timestamp": "2026-03-01T00:00:00Z", "data": data}).encode()
        headers = signed(body, id, int(self.tenant.server.now.timestamp()), keys(self.secret)[0])
        return self.tenant.server.ask("POST", "/webhooks/polar", headers=headers, content=body)

    def mirrored_meter(self) -> str:
        """A meter of the tenant that says which one of Polar's it is; its id."""
        body = {"name": "Tokens", "filter": {"conjunction": "and", "clauses": []},
                "aggregation": {"func": "count"}, "metadata": {"polar_meter_id": self.meter_id}}  # fmt: skip
        made: str = self.tenant.post("/v1/meters/", body)["id"]
        return made

    def customer(self, at: datetime = BEGINNING, **fields: Any) -> Json:
        """The customer, as changed at a time."""
        known = {"id": self.customer_id, "created_at": text(BEGINNING), "modified_at": text(at), "external_id": "ann",
                 "email": "ann@example.com", "name": "Ann", "metadata": {}, "type": "individual"}  # fmt: skip
        return known | fields

    def grant(self, at: datetime, *, units: int = 100, rollover: bool = False) -> Json:
        """The grant of a meter_credit benefit, after it credited its units at a time."""
        benefit = {"id": self.benefit_id, "type": "meter_credit", "description": "Tokens", "metadata": {},
                   "created_at": text(BEGINNING), "modified_at": None,
                   "properties": {"meter_id": self.meter_id, "units": units, "rollover": rollover}}  # fmt: skip
        properties = {"last_credited_meter_id": self.meter_id, "last_credited_units": units,
                      "last_credited_at": text(at)}  # fmt: skip
        return {"id": self.grant_id, "created_at": text(BEGINNING), "modified_at": text(at), "is_granted": True,
                "granted_at": text(BEGINNING), "is_revoked": False, "revoked_at": None, "order_id": None,
                "customer_id": self.customer_id, "customer": self.customer(), "benefit_id": self.benefit_id,
                "subscription_id": self.subscription_id, "benefit": benefit, "properties": properties}  # fmt: skip

    def revoked(self, grant: Json, at: datetime, *, kept: bool = False) -> Json:
        """The grant after it ended. Its units were taken back just before, or kept where the benefit is held twice."""
        before = grant["properties"]
        taken = {"last_credited_units": -before["last_credited_units"], "last_credited_at": text(at - INSTANT)}
        return grant | {"is_granted": False, "is_revoked": True, "revoked_at": text(at),
                        "modified_at": text(at + INSTANT), "previous_properties": before,
                        "properties": before if kept else before | taken}  # fmt: skip

    def another(self, grant: Json, *, of: str | None = None) -> Json:
        """A second grant beside one, of the same benefit or ``of`` another one."""
        benefit = grant["benefit"] | ({} if of is None else {"id": of})
        return grant | {"id": f"5555{grant['id'][4:]}", "benefit_id": benefit["id"], "benefit": benefit}

    def price(self, unit_amount: str | None, **fields: Any) -> Json:
        """A product's price for a unit of the meter, in cents."""
        known = {"id": f"price-{unit_amount}", "amount_type": "metered_unit", "meter_id": self.meter_id,
                 "unit_amount": unit_amount, "cap_amount": None, "price_currency": "usd"}  # fmt: skip
        return known | fields

    def subscription(self, start: datetime, **fields: Any) -> Json:
        """The subscription, with a price for the meter, in the month that begins at a time."""
        price = self.price("10.0")
        known = {"id": self.subscription_id, "created_at": text(BEGINNING), "modified_at": text(start), "meters": [],
                 "status": "active", "amount": 1000, "currency": "usd", "recurring_interval": "month",
                 "current_period_start": text(start), "current_period_end": text(start + timedelta(days=30)),
                 "customer_id": self.customer_id, "customer": self.customer(), "product_id": "product",
                 "metadata": {}, "prices": [price]}  # fmt: skip
        return known | fields


def state(polar: Polar) -> Json:
    """What is known of the customer."""
    found: Json = polar.tenant.get("/v1/customers/external/ann/state")
    return found


def numbers(polar: Polar) -> list[tuple[int, int, int]]:
    """Credited, consumed and left, meter by meter."""
    names = ("credited_units", "consumed_units", "balance")
    return [tuple(meter[name] for name in names) for meter in state(polar)["active_meters"]]
