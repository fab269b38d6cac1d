"""Customers and dead letters over HTTP."""

import csv
import io
import json
import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch
from urllib.parse import quote
from uuid import uuid4

import pytest

from aggregator.engine import supervisor
from aggregator.store.store import Store
from meters import exact
from meters.catalogue.catalogue import Customer, CustomerCreated
from tests.support.polar.organization import Polar
from tests.support.records import line
from tests.support.servers.query_api import Server, Tenant

NOWHERE = "00000000-0000-4000-8000-00000000ffff"


def test_a_customer_is_shown_with_all_that_clients_insist_on(tenant: Tenant) -> None:
    """Every field of Polar's is there, what is not known is null, and either id finds it."""
    body = {"email": "ann@example.com", "external_id": "a/b", "name": "Ann", "metadata": {"seats": 3}}
    made = tenant.post("/v1/customers/", body)
    unknown = ["modified_at", "deleted_at", "first_user_event_at", "avatar_url", "billing_name", "billing_address"]
    unknown += ["tax_id", "locale", "default_payment_method_id"]
    assert made == body | dict.fromkeys(unknown) | {
        "id": made["id"],
        "created_at": "2026-03-01T12:00:00Z",
        "email_verified": False,
        "type": "individual",
        "organization_id": tenant.id,
    }
    assert tenant.get(f"/v1/customers/{made['id']}") == made
    other = tenant.post("/v1/customers/", {"email": "bob@example.com", "external_id": "bob"})
    assert tenant.get("/v1/customers/external/bob") == other


@pytest.mark.parametrize("name", ["acme/", "acme/state", "acme/eu", "/", "acme%2Feu", "100%", "%2F", "\u00e4 +?#/"])
def test_an_external_id_in_a_path_is_one_name_whatever_it_holds(tenant: Tenant, name: str) -> None:
    """A slash that was sent encoded leads to nobody else: not by another route, not by a redirect."""
    acme, other = tenant.customer(external_id="acme"), tenant.customer(external_id=name)
    path = f"/v1/customers/external/{quote(name, safe='')}"
    assert tenant.get(path)["id"] == tenant.get(f"{path}/state")["id"] == other
    assert tenant.patch(path, {"name": "Other"})["id"] == other
    assert tenant.ask("DELETE", path).status_code == 204
    assert [customer["id"] for customer in tenant.get("/v1/customers/")["items"]] == [acme]
    redirected = tenant.ask("GET", f"{path}/")
    assert (redirected.status_code, redirected.headers["location"]) == (307, path.replace("%2B", "+"))


def test_lists_of_customers(tenant: Tenant) -> None:
    """Customers are found by text, address and metadata, newest first or as asked."""
    for name, plan in (("Ann", "free"), ("Bob", "pro"), ("Cid", "pro")):
        tenant.customer(email=f"{name}@Example.com", external_id=name, name=name, metadata={"plan": plan})

    def found(**asked: Any) -> list[str]:
        return [customer["name"] for customer in tenant.get("/v1/customers/", **asked)["items"]]

    assert found(sorting="name") == ["Ann", "Bob", "Cid"]
    assert found(query="bO") == ["Bob"]
    assert found(email="cid@example.com") == ["Cid"]
    assert sorted(found(**{"metadata[plan]": "pro"})) == ["Bob", "Cid"]
    assert tenant.get("/v1/customers/", limit=2)["pagination"] == {"total_count": 3, "max_page": 2}
    assert len(found(organization_id=tenant.id)) == 3
    assert found(organization_id=NOWHERE) == []


def test_active_customers_are_those_with_a_subscription_that_goes_on(tenant: Tenant) -> None:
    """Also one on trial, or whose payment is late; everybody else is not active."""
    polar, start = Polar(tenant), datetime(2026, 2, 1, tzinfo=UTC)
    tenant.customer(name="Bob")

    def found(**asked: Any) -> list[str]:
        return [customer["name"] for customer in tenant.get("/v1/customers/", sorting="name", **asked)["items"]]

    for status in ("active", "trialing", "past_due", "canceled"):
        start += timedelta(days=1)
        polar.deliver("subscription.updated", polar.subscription(start, status=status), status)
        assert found() == ["Ann", "Bob"]
        active = [] if status == "canceled" else ["Ann"]
        assert found(active="true") == active, status
        assert found(active="false") == [name for name in ("Ann", "Bob") if name not in active], status


def test_ids_in_bodies_mind_no_case(tenant: Tenant) -> None:
    """As in paths; what is no id at all is told as such."""
    customer, meter = tenant.customer(), tenant.meter()

    def bodies(customer: str, meter: str) -> list[tuple[str, dict[str, Any]]]:
        properties = {"meter_id": meter, "units": 5, "rollover": False}
        return [
            ("/v1/customer-sessions/", {"customer_id": customer}),
            ("/v1/benefits/", {"type": "meter_credit", "description": "five", "properties": properties}),
            ("/v1/webhooks/thresholds", {"meter_id": meter, "measure": "usage", "value": 1, "customer_id": customer}),
            (f"/v1/customers/{tenant.customer()}/resets", {"meter_ids": [meter]}),
        ]

    for path, body in bodies(customer.upper(), meter.upper()):
        assert tenant.ask("POST", path, json=body).status_code == 201, path
    assert tenant.get("/v1/benefits/")["items"][0]["properties"]["meter_id"] == meter
    for path, body in bodies("ann", "tokens"):
        status, _, ((kind, _), *_) = tenant.refusal("POST", path, json=body)
        assert (status, kind) == (422, "uuid_parsing"), path


def test_any_number_in_metadata_is_looked_for_exactly(tenant: Tenant) -> None:
    """An integer as it is, whatever its size; a number that is too wide to write out by its exponent."""
    metadata = [9007199254740993, 10**400, Decimal("1E+999999"), True, 5, Decimal("5.0"), Decimal("1e2")]
    for place, number in enumerate(metadata):
        made = {"email": f"{place}@example.com", "name": str(number)[:9], "metadata": {"n": number}}
        assert tenant.ask("POST", "/v1/customers/", content=exact.encode(made)).status_code == 201

    def found(text: str) -> list[str]:
        return [customer["name"] for customer in tenant.get("/v1/customers/", **{"metadata[n]": text})["items"]]

    assert [found(text) for text in ("9007199254740993", "9007199254740992", "1E+999999", "true")] == [
        ["900719925"], [], ["1E+999999"], ["True"]
    ]  # fmt: skip
    assert [found(text) for text in ("5", "5.0", "100", "100.0")] == [["5"], ["5.0"], [], ["1E+2"]]
    assert [len(found(text)) for text in (str(10**399), "1" + 400 * "0")] == [0, 1]


@pytest.mark.parametrize(
    ("body", "complaints"),
    [
        ({}, [("missing", ["body", "email"])]),
        ({"type": "individual"}, [("missing", ["body", "email"])]),
        ({"email": "a@b", "type": "crew"}, [("enum", ["body", "type"])]),
        ({"email": "ann"}, [("value_error", ["body", "email"])]),
        ({"email": "a@b", "name": 5}, [("string_type", ["body", "name"])]),
        ({"email": "a@b", "external_id": "x" * 501}, [("string_too_long", ["body", "external_id"])]),
        ({"email": "a@b", "metadata": {"k": None}}, [("string_type", ["body", "metadata", "k"])]),
        (5, [("model_attributes_type", ["body"])]),
    ],
)
def test_a_customer_that_makes_no_sense_is_refused(tenant: Tenant, body: Any, complaints: list[Any]) -> None:
    """Each field is complained about at its place."""
    assert tenant.refusal("POST", "/v1/customers/", json=body) == (422, "RequestValidationError", complaints)


def test_the_line_of_a_threshold_is_written_in_digits(tenant: Tenant) -> None:
    """A text is a number as in JSON, or refused: 1_0 is no ten."""
    body = {"meter_id": tenant.meter(), "measure": "balance"}
    for text in ("1_0", " 1", "+1", "\u0661", "NaN", "1."):
        status, _, complaints = tenant.refusal("POST", "/v1/webhooks/thresholds", json=body | {"value": text})
        assert (status, complaints) == (422, [("value_error", ["body", "value"])]), text
    for text, value in (("-1.5", Decimal("-1.5")), ("1e2", 100)):
        assert tenant.post("/v1/webhooks/thresholds", body | {"value": text})["value"] == value
    assert len(tenant.get("/v1/webhooks/thresholds")["items"]) == 2


def test_null_in_a_change_clears_a_name_and_nothing_else(tenant: Tenant) -> None:
    """As with Polar, an address and metadata stay, and an external id that was given cannot be taken away."""
    made = tenant.post("/v1/customers/", {"email": "a@b", "name": "Ann", "metadata": {"k": 1}})
    path = f"/v1/customers/{made['id']}"
    changed = tenant.patch(path, dict.fromkeys(("email", "external_id", "name", "metadata")))
    assert changed == made | {"modified_at": changed["modified_at"], "name": None} == tenant.get(path)
    assert tenant.patch(path, {"external_id": "ann"})["external_id"] == "ann"
    refusal = tenant.refusal("PATCH", path, json={"external_id": None})
    assert refusal == (422, "PolarRequestValidationError", [("value_error", ["body", "external_id"])])


def test_a_team_may_have_no_address_and_stays_a_team(tenant: Tenant) -> None:
    """As with Polar: who was an individual may become one, and nobody the other way round."""
    team = tenant.post("/v1/customers/", {"type": "team", "name": "Crew", "external_id": "crew"})
    assert (team["type"], team["email"]) == ("team", None)
    assert tenant.get("/v1/customers/external/crew/state")["type"] == "team"
    session = tenant.post("/v1/customer-sessions/", {"customer_id": team["id"]})["token"]
    shown = tenant.ask("GET", "/v1/customer-portal/customers/me", secret=session).json()
    assert (shown["type"], shown["email"]) == ("team", None)
    ann = tenant.post("/v1/customers/", {"email": "ann@example.com"})
    assert ann["type"] == "individual"
    assert tenant.patch(f"/v1/customers/{ann['id']}", {"type": "team"})["type"] == "team"
    refusal = tenant.refusal("PATCH", f"/v1/customers/{ann['id']}", json={"type": "individual"})
    assert refusal == (422, "PolarRequestValidationError", [("value_error", ["body", "type"])])
    assert tenant.patch(f"/v1/customers/{ann['id']}", {"type": "team", "name": "Ann"})["name"] == "Ann"


def test_names_of_customers_are_taken_once_in_an_organization(server: Server, tenant: Tenant) -> None:
    """An external id and an address belong to one customer of a tenant; other tenants are free to use them."""
    tenant.customer(email="ann@example.com", external_id="ann")
    for body, field in (
        ({"email": "new@example.com", "external_id": "ann"}, "external_id"),
        ({"email": "ANN@example.com"}, "email"),
    ):
        refusal = tenant.refusal("POST", "/v1/customers/", json=body)
        assert refusal == (422, "PolarRequestValidationError", [("value_error", ["body", field])])
    theirs = server.tenant().customer(email="ann@example.com", external_id="ann")
    assert tenant.ask("GET", f"/v1/customers/{theirs}").status_code == 404
    assert tenant.ask("GET", "/v1/customers/external/nobody").status_code == 404


def test_an_address_that_two_customers_have_stays_theirs(server: Server, tenant: Tenant) -> None:
    """As Polar tells of them: each may be written back as it was read, and nobody else is given it."""
    ann = tenant.customer(email="ann@example.com", external_id="ann")
    other = Customer(
        id=str(uuid4()), organization_id=tenant.id, created_at=server.now, external_id="other", email="ann@example.com"
    )
    server.decide(CustomerCreated(other))
    for id in (ann, other.id):
        assert tenant.patch(f"/v1/customers/{id}", {"email": "Ann@example.com", "name": "n"})["name"] == "n"
    assert tenant.ask("DELETE", f"/v1/customers/{ann}").status_code == 204
    refusal = tenant.refusal("POST", "/v1/customers/", json={"email": "ann@example.com"})
    assert refusal == (422, "PolarRequestValidationError", [("value_error", ["body", "email"])])
    assert tenant.ask("DELETE", f"/v1/customers/{other.id}").status_code == 204
    assert tenant.post("/v1/customers/", {"email": "ann@example.com"})["email"] == "ann@example.com"


def dead(tenant: Tenant) -> dict[str, Any]:
    """The only dead letter of the tenant."""
    (letter,) = tenant.get("/v1/dead-letters/")["items"]
    found: dict[str, Any] = letter
    return found


def test_a_customer_asked_for_again_is_one_customer(server: Server, tenant: Tenant) -> None:
    """After a 503 for a decision that is durable and not applied yet, the next one waits until it is."""
    body, applied, informed = {"email": "ann@example.com"}, threading.Event(), server.aggregator.informed
    commit = Store.commit

    def slowly(*arguments: Any) -> Any:
        assert applied.wait(30)
        return commit(*arguments)

    async def asked(timeout_s: float) -> bool:
        applied.set()
        return await informed(timeout_s)

    with (
        patch.object(Store, "commit", slowly),
        patch.object(supervisor, "DECISION_TIMEOUT_S", 0.01),
        patch.object(server.aggregator, "informed", asked),
    ):
        assert tenant.ask("POST", "/v1/customers/", json=body).status_code == 503
        again = tenant.ask("POST", "/v1/customers/", json=body)
        applied.set()
    assert again.status_code == 422
    assert again.json()["detail"][0]["loc"] == ["body", "email"]
    assert len(tenant.get("/v1/customers/")["items"]) == 1


@pytest.mark.parametrize(
    ("event", "detail"),
    [
        (b'{"external_customer_id":"a"}', "name: Field required"),
        (b'{"name":"a","external_customer_id":"a","metadata":{"x":[]}}', "metadata.x: Input should be a string, "),
        (b'{"name":"a","external_customer_id":"a","metadata":{"%s":[]}}' % (b"x" * 9000), f"metadata.{'x' * 191}: "),
        (b'{"name":"a","external_customer_id":"a","metadata":{"\\ud800":[]}}', "Input should be valid unicode: "),
        (b"{", "JSON decode error"),
    ],
    ids=["missing", "metadata", "long", "surrogate", "malformed"],
)
def test_a_dead_letter_names_the_field(tenant: Tenant, event: bytes, detail: str) -> None:
    """Where there is one, as far as its beginning tells, whatever its key is made of."""
    tenant.send(event, admitted=False)
    assert dead(tenant)["detail"].startswith(detail)


def test_a_dead_letter_says_what_arrived_and_why_it_does_not_count(server: Server, tenant: Tenant) -> None:
    """Reason, place and bytes are shown to its tenant and to nobody else."""
    position = tenant.send(line("good"), b'{"name": "\xff"}', admitted=False)
    letter = dead(tenant)
    offset = int(position.split(":")[1]) - 1
    assert (letter["id"], letter["raw"]) == (f"0-{offset}-1", '{"name": "\\xff"}')
    assert (letter["ingested_at"], letter["replayed_at"]) == ("2026-03-01T12:00:00Z", None)
    assert letter["reason"]
    assert tenant.get(f"/v1/dead-letters/{letter['id']}") == letter
    other = server.tenant()
    assert other.get("/v1/dead-letters/")["items"] == []
    assert other.ask("POST", f"/v1/dead-letters/{letter['id']}/replay").status_code == 404


def test_a_dead_letter_that_was_taken_care_of_leaves_the_list(tenant: Tenant) -> None:
    """Marking is a decision in the log; doing it twice is doing it once, and nothing is lost by it."""
    tenant.send(b"{", admitted=False)
    path = f"/v1/dead-letters/{dead(tenant)['id']}"
    marked = tenant.post(f"{path}/replay", {})
    assert marked["replayed_at"] == "2026-03-01T12:00:00Z"
    assert tenant.post(f"{path}/replay", {}) == marked == tenant.get(path)
    assert tenant.get("/v1/dead-letters/") == {"items": [], "pagination": {"total_count": 0, "max_page": 0}}
    assert tenant.get("/v1/dead-letters/", include_replayed=True)["items"] == [marked]


def test_an_event_sent_with_the_mark_is_not_taken_for_sent(tenant: Tenant) -> None:
    """There is one door for events; marking a letter with a body that would be lost is refused, and marks nothing."""
    tenant.send(b"{", admitted=False)
    path = f"/v1/dead-letters/{dead(tenant)['id']}/replay"
    refusal = tenant.refusal("POST", path, json={"event": {"name": "mended"}})
    assert refusal == (422, "RequestValidationError", [("extra_forbidden", ["body"])])
    assert dead(tenant)["replayed_at"] is None


@pytest.mark.parametrize("id", ["x", "1-2", "0-0--1", "0-0-9", "1-" + "9" * 30 + "-1", "²-0-0"])
def test_a_dead_letter_that_is_not_there(tenant: Tenant, id: str) -> None:
    """A place where nothing lies, and what is no place, are 404."""
    assert tenant.ask("GET", f"/v1/dead-letters/{id}").status_code == 404


def test_customers_are_exported_as_a_file(tenant: Tenant) -> None:
    """Every living customer of the organization, oldest first, with quotes where a text needs them."""
    ann = tenant.customer(email="ann@example.com", external_id='a,"b"', name="Ann\nLee", metadata={"seats": 3})
    tenant.server.now += timedelta(minutes=1)
    bob, gone = tenant.customer(email="bob@example.com"), tenant.customer()
    tenant.ask("DELETE", f"/v1/customers/{gone}")
    file = tenant.ask("GET", "/v1/customers/export")
    assert file.headers["content-type"].startswith("text/csv")
    assert list(csv.reader(io.StringIO(file.text, newline=""))) == [
        ["ID", "External ID", "Created At", "Email", "Name", "Metadata"],
        [ann, 'a,"b"', "2026-03-01T12:00:00Z", "ann@example.com", "Ann\nLee", '{"seats":3}'],
        [bob, "", "2026-03-01T12:01:00Z", "bob@example.com", "", ""],
    ]
    other = tenant.ask("GET", "/v1/customers/export", params={"organization_id": NOWHERE})
    assert other.text.splitlines() == ["ID,External ID,Created At,Email,Name,Metadata"]


@pytest.mark.parametrize("external_id", ["", "a\0b", "\ud800"])
def test_an_external_id_that_no_event_can_name_is_refused(tenant: Tenant, external_id: str) -> None:
    """When the customer is created and when it is changed."""
    customer = tenant.customer()
    content = json.dumps({"email": "b@example.com", "external_id": external_id}).encode()
    for method, path in (("POST", "/v1/customers/"), ("PATCH", f"/v1/customers/{customer}")):
        answer = tenant.ask(method, path, content=content)
        assert answer.status_code == 422
    assert [one["external_id"] for one in tenant.get("/v1/customers/")["items"]] == [None]
