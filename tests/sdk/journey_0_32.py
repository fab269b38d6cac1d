"""A journey with polar-sdk 0.32, the last with the ingestion helper: ``python journey_0_32.py URL TOKEN``.

Prints what the client made of the answers, as JSON.
"""

import json
import sys
from datetime import date, datetime
from typing import Any

import httpx
import story
from polar_sdk import Polar
from polar_sdk.ingestion import Ingestion
from polar_sdk.models import (
    CustomerPortalBenefitGrantsListSecurity,
    CustomerPortalCustomerMetersListSecurity,
    CustomerPortalCustomersGetSecurity,
    HTTPValidationError,
    MetricPeriod,
    ResourceNotFound,
    SDKError,
)

Json = dict[str, Any]


def plain(model: Any) -> Any:
    """A model of the client as JSON, with the names of the wire."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=False)


def timed(event: Json) -> Json:
    """The client wants times as times."""
    return event | {name: datetime.fromisoformat(event[name]) for name in ("timestamp",) if name in event}


def customers(polar: Polar) -> tuple[str, Json]:
    """Make one, and find it in three ways."""
    made = polar.customers.create(request=story.CUSTOMER)
    found = [polar.customers.get(id=made.id), polar.customers.get_external(external_id="acme")]
    found += polar.customers.list(email=story.CUSTOMER["email"]).result.items
    return made.id, {
        "made": story.shown(plain(made), *story.CUSTOMER, "type", "deleted_at"),
        "found": [plain(customer) == plain(made) for customer in found],
    }


def ingestion(polar: Polar, customer_id: str) -> Json:
    """A batch with every kind of event, a repetition, and nothing at all."""
    batch = [timed(event) for event in story.batch(customer_id)]
    return {
        "batch": plain(polar.events.ingest(request={"events": batch})),
        "again": plain(polar.events.ingest(request={"events": [timed(story.ROOT)]})),
        "nothing": plain(polar.events.ingest(request={"events": []})),
    }


def events(polar: Polar, meter_id: str, customer_id: str) -> Json:
    """Lists, one event, and names."""
    def ids(**params: Any) -> list[str]:
        return [event.id for event in polar.events.list(sorting=["timestamp"], **params).items]

    story.eventually(lambda: polar.events.list(name="ping").pagination.total_count == 1)
    chats = polar.events.list(name=["chat.session", "chat.completion"], sorting=["timestamp"])
    root, step, _ = chats.items
    names = polar.events.list_names(sorting=["name"]).result
    return {
        "chats": [story.event_shown(plain(event)) for event in chats.items],
        "pages": plain(chats.pagination),
        "one": plain(polar.events.get(id=step.id)) == plain(step) | {"child_count": 0},
        "filter": ids(filter_=json.dumps(story.LARGE)),
        "metadata": ids(metadata={"model": ["large"]}),
        "external_customer_id": ids(external_customer_id="acme"),
        "customer_id": ids(customer_id=customer_id),
        "meter_id": ids(meter_id=meter_id),
        "roots": ids(depth=0, name=["chat.session", "chat.completion"]),
        "below": ids(parent_id=root.id, depth=1),
        "between": ids(start_timestamp=root.timestamp, end_timestamp=datetime.fromisoformat(story.BY_ID["timestamp"])),
        "second_page": len(polar.events.list(page=2, limit=2).items),
        "names": [story.shown(plain(name), "name", "label", "source", "occurrences") for name in names.items],
    }


def meters(polar: Polar) -> tuple[str, Json]:
    """Make one, find it, change it."""
    made = polar.meters.create(request=story.METER)
    got, listed = polar.meters.get(id=made.id), polar.meters.list(query="toke").result.items
    changed = polar.meters.update(id=made.id, meter_update=story.CHANGED)
    return made.id, {
        "made": story.shown(plain(made), *story.METER, "unit", "metadata"),
        "found": [plain(meter) == plain(made) for meter in (got, *listed)],
        "changed": story.shown(plain(changed), *story.METER, "metadata"),
        "is_modified": changed.modified_at is not None,
    }


def quantities(polar: Polar, meter_id: str) -> Json:
    """A meter's days: all of them, one customer's, and by customer."""
    bounds = ("start_timestamp", "end_timestamp")
    days = story.DAYS | {name: datetime.fromisoformat(story.DAYS[name]) for name in bounds}

    def ask(**params: Any) -> Json:
        return plain(polar.meters.quantities(id=meter_id, **days, **params))

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
    dates = story.DATES | {name: date.fromisoformat(story.DATES[name]) for name in ("start_date", "end_date")}
    found = polar.metrics.get(**dates, metrics=story.METRICS)
    slugs = [name for name in MetricPeriod.model_fields if name != "timestamp"]
    every = polar.metrics.get(**dates, metrics=slugs)
    return {
        "periods": [story.shown(plain(period), "timestamp", *story.METRICS) for period in found.periods],
        "totals": story.shown(plain(found.totals), *story.METRICS),
        "kinds": {slug: plain(found.metrics)[slug]["type"] for slug in story.METRICS},
        "limits": plain(polar.metrics.limits()),
        "told_of_all": sorted(name for name, value in plain(every.periods[0]).items() if value is not None),
    }


def balances(polar: Polar, url: str, token: str, meter_id: str, customer_id: str) -> Json:
    """Credits by a benefit, and what is left, seen by the organization and by its customer."""
    benefit = polar.benefits.create(request=story.BENEFIT | {"properties": {"meter_id": meter_id, **story.CREDITS}})
    httpx.post(f"{url}/v1/benefits/{benefit.id}/grants", json={"customer_id": customer_id},
               headers={"Authorization": f"Bearer {token}"}, timeout=60).raise_for_status()  # fmt: skip
    state, by_name = polar.customers.get_state(id=customer_id), polar.customers.get_state_external(external_id="acme")
    meters = polar.customer_meters.list(external_customer_id="acme", meter_id=meter_id).result.items
    one = polar.customer_meters.get(id=meters[0].id)
    session = polar.customer_sessions.create(request={"external_customer_id": "acme"})
    security = CustomerPortalCustomerMetersListSecurity(customer_session=session.token)
    portal = polar.customer_portal.customer_meters.list(security=security).result.items
    visitor = CustomerPortalCustomersGetSecurity(customer_session=session.token)
    myself = plain(polar.customer_portal.customers.get(security=visitor))
    listed = polar.benefit_grants.list(external_customer_id="acme", sorting=["-granted_at"]).result.items
    viewer = CustomerPortalBenefitGrantsListSecurity(customer_session=session.token)
    own = polar.customer_portal.benefit_grants.list(security=viewer).result.items
    return {
        "benefit": plain(polar.benefits.get(id=benefit.id)) == plain(benefit),
        "states": plain(state) == plain(by_name),
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
        polar.meters.get(id=story.NOBODY)
    except ResourceNotFound as error:
        found["unknown"] = [error.status_code, json.loads(error.body)["error"], error.data.detail]
    try:
        polar.events.ingest(request={"events": [timed(story.ROOT) | {"external_id": "bad", "name": "x" * 129}]})
    except HTTPValidationError as error:
        found["malformed"] = [error.status_code, "name" in str(error.data.detail[0].loc)]
    try:
        Polar(access_token="polar_oat_unknown", server_url=url).events.list()
    except SDKError as error:
        found["stranger"] = [error.status_code, json.loads(error.body)["error"]]
    return found


def helper(polar: Polar, url: str, token: str) -> Json:
    """The background ingestion: it stamps events and sends them on its own, the rest when it is closed."""
    with_helper = Ingestion(token, server_url=url, flush_interval=0.01, max_batch_size=2)
    for number in range(5):
        with_helper.ingest({"name": "helped", "external_customer_id": "acme", "metadata": {"i": number}})
    with_helper.close()
    story.eventually(lambda: polar.events.list(name="helped").pagination.total_count == 5)
    helped = polar.events.list(name="helped").items
    return {"numbers": sorted(plain(event)["metadata"]["i"] for event in helped)}


def main(url: str, token: str) -> None:
    """The whole journey."""
    with Polar(access_token=token, server_url=url) as polar:
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
            "helper": helper(polar, url, token),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
