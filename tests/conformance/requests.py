"""The conformance cases as requests: what each one sends, and whether requests can say it at all."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.conformance.cases import Case, filled_in
from tests.support.servers.multi_tenant_server import Tenant, uuid_text

LLM = {"vendor": "v", "model": "m", "input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
"""What ``_llm`` must at least have; cases name only the keys that they are about."""

API = "through the API"
FUNCTION = "by the function that decides"
Json = Any


def way(case: Case) -> str:
    """Through the API, unless no request can say what the case states."""
    params = case["when"]["params"]
    match case["when"]["op"]:
        case "is_summable":
            sayable = False
        case (
            "archive_meter" | "update_meter" | "customer_meter" | "activation" | "rollover_units" | "benefit_steps"
            | "metered_price_amount"
        ):  # fmt: skip
            sayable = True
        case "ingest":
            sayable = params["auth"] == "organization_token"
        case _:
            sayable = all(map(_can_be_sent, case["given"]["events"]))
    return API if sayable else FUNCTION


def _can_be_sent(event: Json) -> bool:
    """Whether the gateway takes such an event: from a user, and without objects other than the reserved ones."""
    metadata = event["metadata"]
    nested = {key for key, value in metadata.items() if isinstance(value, dict)}
    return event["source"] == "user" and nested <= {"_llm", "_cost"} and metadata.get("_llm", {}).keys() <= LLM.keys()


def customers_of(case: Case) -> list[tuple[str, str | None]]:
    """The customers that must exist, with their external ids: those stated, and those that events name by id."""
    params = case["when"]["params"]
    stated = [*case["given"]["customers"], *params.get("customers", ())]
    events = [*case["given"]["events"], *params.get("events", ())]
    asked = params.get("customer_id") or ()
    implied = dict.fromkeys([*(event["customer"] for event in events if event.get("customer")), *asked])
    if case["group"] == "ingest":
        implied["OWN_CUSTOMER"] = None
    return list((implied | {customer["id"]: customer["external_id"] for customer in stated}).items())


def batches_of(case: Case, tenant: Tenant) -> list[list[Json]]:
    """The events of the case, as the bodies of its requests in their order."""
    params = case["when"]["params"]
    match case["when"]["op"]:
        case "ingest":
            return [[filled_in(event, _symbols(tenant)) for event in params["events"]]]
        case "ingest_batches":
            return [[_nobodys(event) for event in batch] for batch in params["batches"]]
        case "list_events":
            return [list(_hours(params["events"]))]
        case "metrics":
            return [[_costing(event, tenant) for event in params["events"]]]
        case _:
            events = case["given"]["events"]
            return [[_given(event, tenant) for event in events]] if events else []


def _symbols(tenant: Tenant) -> dict[str, str]:
    now = datetime.now(UTC)
    shifted = {f"NOW{days:+}d": (now + timedelta(days=days)).isoformat() for days in (1, -1)}
    return shifted | tenant.ids | {"ORG": tenant.id, "RANDOM_UUID": uuid_text()}


def _nobodys(event: Json) -> Json:
    return {"name": "step", "external_customer_id": "somebody", **event}


def _hours(events: list[Json]) -> Iterator[Json]:
    now = datetime.now(UTC)
    for event in events:
        sent = {"external_id": event["id"], "timestamp": (now + timedelta(hours=event["h"])).isoformat()}
        yield _nobodys(sent | ({"parent_id": event["parent"]} if "parent" in event else {}))


def _costing(event: Json, tenant: Tenant) -> Json:
    cost = {"_cost": {"amount": event["cost"], "currency": "usd"}}
    return {"name": "spent", "timestamp": event["timestamp"], "metadata": cost, **_who(event, tenant)}


def _given(event: Json, tenant: Tenant) -> Json:
    metadata = dict(event["metadata"])
    if "_llm" in metadata:
        metadata["_llm"] = LLM | metadata["_llm"]
    sent = {"name": event["name"], "timestamp": event["timestamp"], "external_id": event["id"], "metadata": metadata}
    return sent | _who(event, tenant)


def _who(event: Json, tenant: Tenant) -> Json:
    if event.get("customer"):
        return {"customer_id": tenant.ids[event["customer"]]}
    return {"external_customer_id": event["external_customer_id"]}
