"""Meters over HTTP: made, listed, changed, locked, archived."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.records import NOW
from tests.support.servers.query_api import Server, Tenant

EVERYTHING = {"conjunction": "and", "clauses": []}
NOWHERE = "00000000-0000-4000-8000-00000000ffff"


def body(**changes: Any) -> dict[str, Any]:
    """A meter that can be made."""
    return {"name": "Tokens", "filter": EVERYTHING, "aggregation": {"func": "count"}} | changes


def test_a_meter_is_shown_as_it_was_made(tenant: Tenant) -> None:
    """The answer has every field of Polar's, the prefix ``metadata.`` gone, and is the same when asked again."""
    clause = {"property": "metadata.price", "operator": "gte", "value": 1}
    made = tenant.post(
        "/v1/meters/",
        body(
            filter={"conjunction": "or", "clauses": [clause]},
            aggregation={"func": "sum", "property": "metadata.tokens"},
            unit="custom",
            custom_label="gigabyte",
            custom_multiplier=1000,
            metadata={"team": "x"},
        ),
    )
    assert made == {
        "id": made["id"],
        "created_at": "2026-03-01T12:00:00Z",
        "modified_at": None,
        "name": "Tokens",
        "unit": "custom",
        "custom_label": "gigabyte",
        "custom_multiplier": 1000,
        "filter": {"conjunction": "or", "clauses": [clause | {"property": "price"}]},
        "aggregation": {"func": "sum", "property": "tokens"},
        "metadata": {"team": "x"},
        "organization_id": tenant.id,
        "archived_at": None,
    }
    assert tenant.get(f"/v1/meters/{made['id']}") == made
    assert tenant.ask("POST", "/v1/meters/", json=body()).status_code == 201


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        ({"name": "ab"}, ("string_too_short", ["body", "name"])),
        ({"filter": {"conjunction": "xor", "clauses": []}}, ("enum", ["body", "filter", "conjunction"])),
        ({"aggregation": {}}, ("union_tag_not_found", ["body", "aggregation"])),
        ({"aggregation": {"func": "sum"}}, ("missing", ["body", "aggregation", "sum", "property"])),
        ({"unit": "custom"}, ("value_error", ["body"])),
        ({"custom_label": "x"}, ("value_error", ["body"])),
        ({"metadata": {"": "x"}}, ("string_too_short", ["body", "metadata", "", "[key]"])),
    ],
)
def test_a_meter_that_makes_no_sense_is_refused(
    tenant: Tenant, sent: dict[str, Any], complaint: tuple[str, list[Any]]
) -> None:
    """Each complaint says what is wrong and where, in Polar's shape."""
    expected = (422, "RequestValidationError", [complaint])
    assert tenant.refusal("POST", "/v1/meters/", json=body(**sent)) == expected


def test_a_token_names_its_organization_alone(tenant: Tenant) -> None:
    """Sending ``organization_id`` with an organization's token is refused, as Polar refuses it."""
    refusal = tenant.refusal("POST", "/v1/meters/", json=body(organization_id=tenant.id))
    place = ["body", "organization_id"]
    assert refusal == (422, "PolarRequestValidationError", [("organization_token", place)])
    assert tenant.ask("POST", "/v1/meters/", json=body(organization_id=None)).status_code == 201


def test_lists_of_meters(tenant: Tenant) -> None:
    """Meters are listed by name, page by page, searched, and told apart by archive and metadata."""
    ids = [tenant.post("/v1/meters/", body(name=name))["id"] for name in ("Beta 100%", "alpha", "Gamma")]
    tenant.patch(f"/v1/meters/{ids[2]}", {"is_archived": True})
    tenant.patch(f"/v1/meters/{ids[1]}", {"metadata": {"team": 7, "hot": True}})

    def found(**asked: Any) -> list[str]:
        return [meter["name"] for meter in tenant.get("/v1/meters/", **asked)["items"]]

    assert found() == ["Beta 100%", "Gamma", "alpha"]
    assert found(sorting="-name", limit=2) == ["alpha", "Gamma"]
    assert found(query="0%") == ["Beta 100%"]
    assert found(is_archived=True) == ["Gamma"]
    assert found(**{"metadata[team]": "7", "metadata[hot]": "true"}) == ["alpha"]
    assert tenant.get("/v1/meters/", limit=2, page=2)["pagination"] == {"total_count": 3, "max_page": 2}


def test_a_change_is_in_force_when_it_is_answered(server: Server, tenant: Tenant) -> None:
    """What is named changes, the rest stays, and quantities follow a new filter at once."""
    tenant.event(name="a", timestamp=NOW.isoformat())
    tenant.event(name="b", timestamp=NOW.isoformat())
    id = tenant.meter()
    clause = {"property": "name", "operator": "eq", "value": "a"}
    changed = tenant.patch(f"/v1/meters/{id}", {"filter": {"conjunction": "and", "clauses": [clause]}, "name": None})
    assert (changed["name"], changed["modified_at"]) == ("Tokens", "2026-03-01T12:00:00Z")
    assert tenant.get(f"/v1/meters/{id}/usage", external_customer_id="ann")["value"] == "1"


def test_archiving_and_back(tenant: Tenant) -> None:
    """An archived meter says since when; sending it again moves nothing, and it can be brought back."""
    id = tenant.meter()
    assert tenant.patch(f"/v1/meters/{id}", {"is_archived": True})["archived_at"] == "2026-03-01T12:00:00Z"
    assert tenant.patch(f"/v1/meters/{id}", {"is_archived": False})["archived_at"] is None


def priced(tenant: Tenant, meter: str) -> str:
    """Give the meter a price; where it is."""
    path = f"/v1/meters/{meter}/price"
    assert tenant.ask("PUT", path, json={"unit_amount": "1"}).is_success
    return path


def given(tenant: Tenant, meter: str) -> str:
    """Make a benefit that gives units of the meter; where it is."""
    properties = {"meter_id": meter, "units": 5, "rollover": False}
    made = tenant.post("/v1/benefits/", {"type": "meter_credit", "description": "units", "properties": properties})
    return f"/v1/benefits/{made['id']}"


@pytest.mark.parametrize("attach", [priced, given])
def test_what_is_sold_or_given_by_a_meter_keeps_it_from_the_archive(
    tenant: Tenant, attach: Callable[[Tenant, str], str]
) -> None:
    """While there is a price or a benefit; after it was deleted the meter is archived, and others were at any time."""
    meter, other = tenant.meter(), tenant.meter()
    attached = attach(tenant, meter)
    refusal = tenant.refusal("PATCH", f"/v1/meters/{meter}", json={"is_archived": True})
    assert refusal == (422, "PolarRequestValidationError", [("value_error", ["body", "is_archived"])])
    assert tenant.patch(f"/v1/meters/{other}", {"is_archived": True})["archived_at"] is not None
    assert tenant.ask("DELETE", attached).status_code == 204
    assert tenant.patch(f"/v1/meters/{meter}", {"is_archived": True})["archived_at"] is not None


def test_another_tenants_meter_does_not_exist(server: Server, tenant: Tenant) -> None:
    """Reading, changing and asking for quantities of a foreign meter is 404, like one that never was."""
    foreign = server.tenant().meter()
    for id in (foreign, NOWHERE):
        asked = {"start_timestamp": NOW.isoformat(), "end_timestamp": NOW.isoformat(), "interval": "day"}
        answers = [
            tenant.ask("GET", f"/v1/meters/{id}"),
            tenant.ask("PATCH", f"/v1/meters/{id}", json={"name": "Mine"}),
            tenant.ask("GET", f"/v1/meters/{id}/quantities", params=asked),
            tenant.ask("GET", f"/v1/meters/{id}/usage", params={"external_customer_id": "ann"}),
        ]
        assert {answer.status_code for answer in answers} == {404}
        assert answers[0].json() == {"error": "ResourceNotFound", "detail": "Not found"}
