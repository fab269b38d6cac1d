"""The same journey with polar-sdk 1.0, which has no ingestion helper: ``python journey_1_0.py URL TOKEN``.

This client insists on exact types, and on fields that the older one lets go. Prints what it made of the answers.
"""

import dataclasses
import json
import sys
from typing import Any

import httpx
import story
from polar.base import PolarClientError
from polar.v2026_10 import Polar
from polar.v2026_10.errors import HTTPValidationError, ResourceNotFound
from polar.v2026_10.outputs import MetricPeriod

Json = dict[str, Any]
PATIENCE_S = 60  # the client's own five seconds are few on a busy machine
plain = dataclasses.asdict


def customers(polar: Polar) -> tuple[str, Json]:
    """Make one, and find it."""
    made = polar.customers.create(**story.CUSTOMER)
    found = [polar.customers.get(made.id), *polar.customers.iter_list(email=story.CUSTOMER["email"])]
    found.append(polar.customers.get_external("acme"))
    return made.id, {
        "made": story.shown(plain(made), *story.CUSTOMER, "type", "deleted_at"),
        "found": [customer == made for customer in found],
    }


def ingestion(polar: Polar, customer_id: str) -> Json:
    """A batch with every kind of event, a repetition, and nothing at all."""
    return {
        "batch": plain(polar.events.ingest(events=story.batch(customer_id))),
        "again": plain(polar.events.ingest(events=[story.ROOT])),
        "nothing": plain(polar.events.ingest(events=[])),
    }


def events(polar: Polar, meter_id: str, customer_id: str) -> Json:
    """Lists, one event, and names."""
    def ids(**params: Any) -> list[str]:
        return [event.id for event in polar.events.list(sorting=["timestamp"], **params).items]

    story.eventually(lambda: polar.events.list(name="ping").pagination.total_count == 1)
    chats = polar.events.list(name=["chat.session", "chat.completion"], sorting=["timestamp"])
    root, step, _ = chats.items
    names = polar.events.list_names(sorting=["name"])
    return {
        "chats": [story.event_shown(plain(event)) for event in chats.items],
        "pages": plain(chats.pagination),
        "one": polar.events.get(step.id) == step,
        "filter": ids(filter=json.dumps(story.LARGE)),
        "metadata": ids(metadata={"model": ["large"]}),
        "external_customer_id": ids(external_customer_id="acme"),
        "customer_id": ids(customer_id=customer_id),
        "meter_id": ids(meter_id=meter_id),
        "roots": ids(depth=0, name=["chat.session", "chat.completion"]),
        "below": ids(parent_id=root.id, depth=1),
        "between": ids(start_timestamp=root.timestamp, end_timestamp=story.BY_ID["timestamp"]),
        "second_page": len(polar.events.list(page=2, limit=2).items),
        "names": [story.shown(plain(name), "name", "label", "source", "occurrences") for name in names.items],
    }


def meters(polar: Polar) -> tuple[str, Json]:
    """Make one, find it, change it."""
    made = polar.meters.create(**story.METER)
    found = [polar.meters.get(made.id), *polar.meters.iter_list(query="toke")]
    changed = polar.meters.update(made.id, **story.CHANGED)
    return made.id, {
        "made": story.shown(plain(made), *story.METER, "unit", "metadata"),
        "found": [meter == made for meter in found],
        "changed": story.shown(plain(changed), *story.METER, "metadata"),
        "is_modified": changed.modified_at is not None,
    }


def quantities(polar: Polar, meter_id: str) -> Json:
    """A meter's days: all of them, one customer's, and by customer."""
    def ask(**params: Any) -> Json:
        return plain(polar.meters.quantities(meter_id, **story.DAYS, **params))

    return {
        "all": ask(),
        "acme": ask(external_customer_id="acme")["total"],
        "globex": ask(external_customer_id=["globex"])["total"],
        "small": ask(metadata={"model": "small"})["total"],
        "largest_customer": ask(customer_aggregation_function="max")["total"],
        "berlin": [point["timestamp"] for point in ask(timezone="Europe/Berlin")["quantities"]],
    }


def metrics(polar: Polar) -> Json:
    """Costs, and the limits of ranges."""
    found = polar.metrics.get(**story.DATES, metrics=story.METRICS)
    slugs = [field.name for field in dataclasses.fields(MetricPeriod) if field.name != "timestamp"]
    every = polar.metrics.get(**story.DATES, metrics=slugs)
    return {
        "periods": [story.shown(plain(period), "timestamp", *story.METRICS) for period in found.periods],
        "totals": story.shown(plain(found.totals), *story.METRICS),
        "kinds": {slug: plain(found.metrics)[slug]["type"] for slug in story.METRICS},
        "limits": plain(polar.metrics.limits()),
        "told_of_all": sorted(name for name, value in plain(every.periods[0]).items() if value is not None),
    }


def balances(polar: Polar, url: str, token: str, meter_id: str, customer_id: str) -> Json:
    """Credits by a benefit, and what is left, seen by the organization and by its customer."""
    benefit = polar.benefits.create(**story.BENEFIT, properties={"meter_id": meter_id, **story.CREDITS})
    httpx.post(f"{url}/v1/benefits/{benefit.id}/grants", json={"customer_id": customer_id},
               headers={"Authorization": f"Bearer {token}"}, timeout=PATIENCE_S).raise_for_status()  # fmt: skip
    state, by_name = polar.customers.get_state(customer_id), polar.customers.get_state_external("acme")
    meters = polar.customer_meters.list(external_customer_id="acme", meter_id=meter_id).items
    one = polar.customer_meters.get(meters[0].id)
    session = polar.customer_sessions.create(external_customer_id="acme")
    with Polar(session.token, base_url=url, timeout=PATIENCE_S) as visitor:
        portal = visitor.customer_portal.customer_meters.list().items
        myself = plain(visitor.customer_portal.customers.get())
        own = visitor.customer_portal.benefit_grants.list().items
    listed = polar.benefit_grants.list(external_customer_id="acme", sorting=["-granted_at"]).items
    return {
        "benefit": polar.benefits.get(benefit.id) == benefit,
        "states": state == by_name,
        "grants": [story.shown(plain(grant), "benefit_type", "benefit_metadata") for grant in state.granted_benefits],
        "state": [story.balance(plain(meter)) for meter in state.active_meters],
        "customer_meters": [story.balance(plain(meter)) for meter in (*meters, one)],
        "names": [meters[0].customer.email, meters[0].meter.name],
        "session": [session.token[:10], session.customer_id == customer_id],
        "myself": [myself["id"] == customer_id, *story.myself(myself)],
        "listed": [[grant.customer.email, grant.benefit.description] for grant in listed],
        "own": [[grant.benefit.description, grant.benefit.organization.allow_customer_updates] for grant in own],
        "export": story.exported(polar.customers.export()),
        "portal": [[*story.balance(plain(meter)), meter.meter.name] for meter in portal],
    }


def refusals(polar: Polar, url: str) -> Json:
    """What the client raises."""
    found: Json = {}
    try:
        polar.meters.get(story.NOBODY)
    except ResourceNotFound as error:
        found["unknown"] = [error.status_code, error.error.error, error.error.detail]
    try:
        polar.events.ingest(events=[story.ROOT | {"external_id": "bad", "name": "x" * 129}])
    except HTTPValidationError as error:
        found["malformed"] = [error.status_code, "name" in str(error.error.detail[0].loc)]
    try:
        Polar("polar_oat_unknown", base_url=url, timeout=PATIENCE_S).events.list()
    except PolarClientError as error:
        found["stranger"] = [error.status_code, json.loads(error.error)["error"]]
    return found


def main(url: str, token: str) -> None:
    """The whole journey."""
    with Polar(token, base_url=url, timeout=PATIENCE_S) as polar:
        customer_id, seen_customers = customers(polar)
        sent = ingestion(polar, customer_id)
        meter_id, seen_meters = meters(polar)
        report = {
            "customers": seen_customers,
            "ingestion": sent,
            "meters": seen_meters,
            "events": events(polar, meter_id, customer_id),
            "quantities": quantities(polar, meter_id),
            "metrics": metrics(polar),
            "balances": balances(polar, url, token, meter_id, customer_id),
            "refusals": refusals(polar, url),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
