"""What both journeys do, in plain values, so that two generations of clients can be expected to read the same truth.

The journeys run under interpreters of their own: this module may import nothing but the standard library.
"""

import csv
import io
import json
import time
from collections.abc import Callable
from typing import Any

CUSTOMER = {"email": "ann@example.com", "external_id": "acme", "name": "Ann", "metadata": {"plan": "pro", "seats": 3}}

LLM = {"vendor": "acme", "model": "m-1", "input_tokens": 700, "output_tokens": 112, "total_tokens": 812}
ROOT = {
    "name": "chat.session", "external_customer_id": "acme", "external_id": "run-1",
    "timestamp": "2026-01-10T09:00:00Z", "metadata": {"model": "large", "tokens": 10},
}  # fmt: skip
STEP = {
    "name": "chat.completion", "external_customer_id": "acme", "external_id": "step-1", "parent_id": "run-1",
    "timestamp": "2026-01-10T09:01:00.25Z",
    "metadata": {
        "model": "large", "tokens": 812, "cached": False, "ratio": 0.5,
        "_cost": {"amount": 0.0425, "currency": "usd"}, "_llm": LLM,
    },
}  # fmt: skip
BY_ID = {
    "name": "chat.completion", "external_id": "step-2", "timestamp": "2026-01-11T10:00:00Z",
    "metadata": {"model": "small", "tokens": 188, "_cost": {"amount": 1.25, "currency": "usd"}},
}  # fmt: skip
"""Of the same customer, named by the id that the server gave."""
STRANGER = {"name": "api.request", "external_customer_id": "globex", "external_id": "call-1",
            "timestamp": "2026-01-12T00:00:00Z"}  # fmt: skip
NAMELESS = {"name": "ping", "external_customer_id": "globex"}
"""Without a time and without an id of its own."""

LARGE = {"conjunction": "and", "clauses": [{"property": "tokens", "operator": "gt", "value": 500}]}
METER = {
    "name": "Tokens",
    "filter": {"conjunction": "and", "clauses": [{"property": "name", "operator": "like", "value": "chat."}]},
    "aggregation": {"func": "sum", "property": "tokens"},
}
CHANGED = {"name": "All tokens", "metadata": {"team": "billing"}}
BENEFIT = {"type": "meter_credit", "description": "2,000 tokens", "metadata": {"plan": "pro"}}
CREDITS = {"units": 2000, "rollover": True}
DAYS = {"start_timestamp": "2026-01-10T00:00:00Z", "end_timestamp": "2026-01-12T00:00:00Z", "interval": "day"}
DATES = {"start_date": "2026-01-10", "end_date": "2026-01-12", "interval": "day"}
METRICS = ["costs", "cumulative_costs", "active_user_by_event", "cost_per_user"]
NOBODY = "00000000-0000-4000-8000-000000000000"
ENDPOINT = ("format", "events", "enabled", "name")
MASKED = "whsec_..."
"""Stands for the secret of an endpoint wherever it is not new."""
NOWHERE = "http://127.0.0.1:1/"
"""Nobody listens there."""

PATIENCE_S = 60.0


def batch(customer_id: str) -> list[dict[str, Any]]:
    """Every kind of event, the child before its parent."""
    return [STEP, ROOT, BY_ID | {"customer_id": customer_id}, STRANGER, NAMELESS]


def eventually(reached: Callable[[], bool]) -> None:
    """Wait as an application would: neither client can ask for an answer that knows a certain write."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not reached():
        if time.monotonic() > deadline_s:
            raise SystemExit("what was sent did not become visible")
        time.sleep(0.02)


def shown(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some fields of an answer."""
    return {name: fields[name] for name in names}


def event_shown(event: dict[str, Any]) -> dict[str, Any]:
    """What an event tells that is the same on every day. Customers are told by their address."""
    customer = event["customer"]
    metadata = {
        key: {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value
        for key, value in event["metadata"].items()
    }
    return {
        **shown(event, "id", "timestamp", "external_customer_id", "parent_id", "child_count", "source"),
        **shown(event, "name", "label"),
        "metadata": metadata,
        "customer": customer and customer["email"],
        "is_by_id": event["customer_id"] is not None,
    }


def told_shown(event: dict[str, Any]) -> dict[str, Any]:
    """What the event of a delivery says that is the same on every day."""
    told_of = json.loads(event["payload"])["data"]["external_id"]
    return {**shown(event, "type", "skipped", "is_archived"), "told_of": told_of}


def balance(meter: dict[str, Any]) -> list[Any]:
    """The numbers of a customer's meter."""
    return [meter["consumed_units"], meter["credited_units"], meter["balance"]]


def myself(customer: dict[str, Any]) -> list[Any]:
    """What customers read of themselves in the portal, beside ids and times."""
    return [customer[name] for name in ("email", "name", "type", "oauth_accounts", "billing_address")]


def exported(file: str) -> list[list[str]]:
    """The rows of the customers' file, beside ids and times."""
    return [row[3:] for row in csv.reader(io.StringIO(file))]
