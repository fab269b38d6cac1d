"""Polar's cases through the public port of a running server, from the request that sends events to the answer.

What no request can say (see ``requests.way``) is asked of the function that decides it. Nothing is passed over, and
where this product differs on purpose ``differences.py`` says so.
"""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from meters import exact
from meters.aggregation import considers, is_summable
from meters.catalogue.access import reference_refusals
from meters.catalogue.catalogue import Catalogue, Organization, OrganizationCreated
from meters.event import Event, check_event
from meters.filters import matches
from tests.conformance.cases import (
    ORGANIZATION,
    Case,
    agree,
    clause_of,
    facts_of,
    filled_in,
    meter_of,
    named,
    same_number,
)
from tests.conformance.conftest import World
from tests.conformance.requests import API, way
from tests.support.servers.multi_tenant_server import Tenant

EVERYTHING = {"conjunction": "and", "clauses": []}
YEARS = {"start_timestamp": "2023-01-01T00:00:00Z", "end_timestamp": "2025-01-01T00:00:00Z", "interval": "year"}
PAGE = 100
Json = Any


@named("filter")
def test_filters_let_through_what_polars_do(case: Case, world: World) -> None:
    """A filter shows exactly the events that Polar's shows, and a preview counts as many."""
    if way(case) != API:
        meter = meter_of(case)
        ours = [event["id"] for event in case["given"]["events"] if matches(meter.filter, facts_of(event))]
        agree(case, ours == case["then"]["matched"], ours)
        return
    tenant, filter = world.tenants[case["id"]], case["given"]["meter"]["filter"]
    params = {"filter": exact.encode(filter).decode(), "limit": PAGE}
    if "error" in case["then"]:
        answer = tenant.ask("GET", "/v1/events/", params=params)
        assert answer.status_code in (422, 500)
        agree(case, answer.status_code == 500, answer.text)
        return
    shown = {event["id"] for event in tenant.get("/v1/events/", **params)["items"]}
    ours = [event["id"] for event in case["given"]["events"] if tenant.public_id(event["id"]) in shown]
    preview = tenant.read("POST", "/v1/meters/preview", body={"filter": filter, "aggregation": {"func": "count"}})
    assert (preview["total"], len(shown)) == (len(ours), len(ours))
    agree(case, ours == case["then"]["matched"], ours)


@named("filter_validation")
def test_clauses_are_taken_and_refused_as_polar_does(case: Case, world: World) -> None:
    """A meter with the clause is made, and shows the value that Polar keeps, or it is refused."""
    filter = {"conjunction": "and", "clauses": [clause_of(case)]}
    body = {"name": "meter", "filter": filter, "aggregation": {"func": "count"}}
    answer = world.tenants[case["id"]].ask("POST", "/v1/meters/", body=body)
    agree(case, answer.status_code == (201 if case["then"]["accepted"] else 422), answer.text)
    if "stored_value" in case["then"]:
        value, expected = answer.json()["filter"]["clauses"][0]["value"], case["then"]["stored_value"]
        assert (type(value), value) == (type(expected), expected)


@named("aggregation")
def test_aggregations_give_polars_value(case: Case, world: World) -> None:
    """A preview, the quantities and the running total give the same value, and it is Polar's."""
    if way(case) != API:
        aggregation, events = meter_of(case).aggregation, case["given"]["events"]
        summable = case["when"]["op"] == "is_summable"
        ours = is_summable(aggregation) if summable else considers(aggregation, facts_of(events[0]))
        agree(case, ours is case["then"]["summable" if summable else "accepted"], ours)
        return
    tenant = world.tenants[case["id"]]
    meter = tenant.make_meter(**case["given"]["meter"])
    if case["when"]["op"] == "accepts_event":
        shown = tenant.get("/v1/events/", meter_id=meter)["items"]
        agree(case, bool(shown) is case["then"]["accepted"], shown)
        return
    values = values_of(tenant, meter, case)
    assert len(set(values)) == 1
    agree(case, same_number(values[0], case["then"]["value"]), values)


def values_of(tenant: Tenant, meter: str, case: Case) -> list[Decimal]:
    """One aggregation seen in three ways."""
    preview = tenant.read("POST", "/v1/meters/preview", body=case["given"]["meter"])
    quantities = tenant.get(f"/v1/meters/{meter}/quantities", **YEARS)
    (customer,) = tenant.ids.values() or [None]  # who sent everything
    who = {"customer_id": customer} if customer else {"external_customer_id": "nobody"}
    usage = tenant.get(f"/v1/meters/{meter}/usage", **who)
    return [Decimal(value) for value in (preview["total"], quantities["total"], usage["value"])]


@named("quantities")
def test_quantities_are_polars(case: Case, world: World) -> None:
    """Every point, every quantity and the total."""
    tenant, params, then = world.tenants[case["id"]], dict(case["when"]["params"]), case["then"]
    if "customer_id" in params:
        params["customer_id"] = [tenant.ids[symbol] for symbol in params["customer_id"]]
    for key, values in params.pop("metadata", {}).items():
        params[f"metadata[{key}]"] = values
    ours = tenant.get(f"/v1/meters/{tenant.make_meter(**case['given']['meter'])}/quantities", **params)
    points = [point["timestamp"] for point in ours["quantities"]]
    assert points == then.get("timestamps", points)
    pairs = zip(ours["quantities"], then["quantities"], strict=True)
    same = all(same_number(Decimal(point["quantity"]), theirs) for point, theirs in pairs)
    agree(case, same and same_number(Decimal(ours["total"]), then["total"]), ours)


@named("quantities_limits")
def test_ranges_are_refused_as_polar_does(case: Case, world: World) -> None:
    """The status for a range."""
    tenant = world.tenants[case["id"]]
    meter = tenant.make_meter(EVERYTHING, {"func": "count"})
    answer = tenant.ask("GET", f"/v1/meters/{meter}/quantities", params=case["when"]["params"])
    agree(case, answer.status_code == case["then"]["status"], answer.text)


@named("ingest")
def test_events_are_taken_and_refused_as_polar_does(case: Case, world: World) -> None:
    """The status, the counts, the errors in their order; and what is refused leaves nothing behind."""
    then = case["then"]
    if way(case) != API:
        types = types_for_a_user(case)
        agree(case, (types, len(types)) == (then["error_types"], then["error_count"]), types)
        return
    (answer,) = world.answers[case["id"]]
    body, tenant = answer.json(), world.tenants[case["id"]]
    types = [entry["type"] for entry in body.get("detail", ())]
    same = (
        answer.status_code == then["status"]
        and body == then.get("body", body)
        and types == then.get("error_types", types)
        and len(types) == then.get("error_count", len(types))
    )
    agree(case, same, answer.text)
    visible = tenant.get("/v1/events/")["pagination"]["total_count"]
    assert visible == body.get("inserted", 0)


def types_for_a_user(case: Case) -> list[str]:
    """What is wrong with events of a token that belongs to a person, who says of each event whose it is."""
    known = Organization(ORGANIZATION, "own", datetime.now(UTC))
    catalogue = Catalogue([OrganizationCreated(known)])
    symbols = {"OWN_ORG": ORGANIZATION, "FOREIGN_ORG": ORGANIZATION.replace("1db1", "2db2")}
    found = []
    for index, stated in enumerate(case["when"]["params"]["events"]):
        event = check_event(exact.encode(filled_in(stated, symbols)), now=datetime.now(UTC))
        assert isinstance(event, Event)
        found += reference_refusals(event, catalogue, token_organization_id=None, index=index)
    return [refusal.type for refusal in found]


@named("hierarchy")
def test_parents_and_roots_are_polars(case: Case, world: World) -> None:
    """Every event shows its parent; below each root is all that belongs to it, and nothing else is a root."""
    tenant, then = world.tenants[case["id"]], case["then"]
    ours = {event["id"]: event["parent_id"] for event in tenant.get("/v1/events/", limit=PAGE)["items"]}
    parents = {tenant.public_id(child): tenant.public_id(parent) for child, parent in then.get("parents", {}).items()}
    assert parents.items() <= ours.items()
    (root,) = {tenant.public_id(root) for root in then["roots"].values()}
    below = {event["id"] for event in tenant.get("/v1/events/", parent_id=root, depth=5)["items"]}
    roots = [event["id"] for event in tenant.get("/v1/events/", depth=0)["items"]]
    everything = {tenant.public_id(event) for event in then["roots"]} | {root}
    agree(case, (below | {root}, roots, ours.keys()) == (everything, [root], everything), ours)


@named("list_events")
def test_lists_of_events_are_polars(case: Case, world: World) -> None:
    """The events in their order, and how many are below each."""
    tenant, params = world.tenants[case["id"]], dict(case["when"]["params"]["query"])
    if "parent_id" in params:
        params["parent_id"] = tenant.public_id(params["parent_id"])
    items = tenant.get("/v1/events/", **params)["items"]
    same = [event["id"] for event in items] == [tenant.public_id(id) for id in case["then"]["ids"]]
    counts = {event["id"]: event["child_count"] for event in items}
    expected = {tenant.public_id(id): count for id, count in case["then"].get("child_count", {}).items()}
    agree(case, same and expected.items() <= counts.items(), items)


@named("metrics")
def test_metrics_are_polars(case: Case, world: World) -> None:
    """The stated metrics of every period, and their totals."""
    tenant, stated, then = world.tenants[case["id"]], case["when"]["params"], case["then"]
    params = {name: stated[name] for name in ("interval", "start_date", "end_date")}
    params["metrics"] = sorted({slug for period in then["periods"] for slug in period})
    params["customer_id"] = [tenant.ids[symbol] for symbol in stated.get("customer_id", ())]
    ours = tenant.get("/v1/metrics/", **params)
    pairs = [*zip(ours["periods"], then["periods"], strict=True), (ours["totals"], then.get("totals", {}))]
    same = all(same_number(Decimal(mine[slug]), value) for mine, theirs in pairs for slug, value in theirs.items())
    agree(case, same, ours)


@named("meter_update")
def test_meters_change_as_far_as_polars_do(case: Case, world: World) -> None:
    """What is sold keeps its meter; everything else can be changed."""
    change = change_of(case)
    tenant = world.tenants[case["id"]]
    meter = tenant.make_meter(EVERYTHING, {"func": "count"})
    attach(tenant, meter, case["when"]["params"].get("attached"))
    answer = tenant.ask("PATCH", f"/v1/meters/{meter}", body=change)
    body = answer.json()
    details = body.get("detail", ())
    types, places = [entry["type"] for entry in details], [entry["loc"] for entry in details]
    then = case["then"]
    same = types == then.get("error_types", types) and places == ([then["loc"]] if "loc" in then else [])
    agree(case, answer.status_code == then["status"] and same, answer.text)
    if answer.is_success:
        assert body["archived_at"] is not None if "is_archived" in change else change.items() <= body.items()


def attach(tenant: Tenant, meter: str, what: str | None) -> None:
    """Give the meter what the case says: a price, one that is gone again, a benefit, or nothing."""
    if what in ("active_price", "archived_price"):
        tenant.read("PUT", f"/v1/meters/{meter}/price", body={"unit_amount": "1"})
    if what == "archived_price":
        assert tenant.ask("DELETE", f"/v1/meters/{meter}/price").status_code == 204
    if what == "active_benefit":
        properties = {"meter_id": meter, "units": 5, "rollover": False}
        body = {"type": "meter_credit", "description": "units", "properties": properties}
        tenant.read("POST", "/v1/benefits/", body=body)


def change_of(case: Case) -> Json:
    """The body of the PATCH."""
    if case["when"]["op"] == "archive_meter":
        return {"is_archived": True}
    clause = {"property": "name", "operator": "eq", "value": "other"}
    changes = {
        "filter": {"conjunction": "or", "clauses": [clause]},
        "aggregation": {"func": "sum", "property": "amount"},
    }
    return {case["when"]["params"]["set"]: changes[case["when"]["params"]["set"]]}
