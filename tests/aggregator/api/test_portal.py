"""The customer portal: one customer's own numbers, for an hour."""

from datetime import timedelta
from decimal import Decimal

from aggregator.api.portal import percentage, slug
from tests.conformance.cases import Case, named
from tests.support.servers.query_api import Tenant


def session(tenant: Tenant, customer: str) -> str:
    """A customer's token."""
    made = tenant.post("/v1/customer-sessions/", {"customer_id": customer, "return_url": "https://app.example.com/"})
    secret: str = made["token"]
    assert secret.startswith("polar_cst_")
    assert made["customer"]["id"] == customer
    return secret


def meter(tenant: Tenant, name: str) -> str:
    """A meter that counts everything; its id."""
    every = {"conjunction": "and", "clauses": []}
    made: str = tenant.post("/v1/meters/", {"name": name, "filter": every, "aggregation": {"func": "count"}})["id"]
    return made


@named("portal")
def test_meters_are_found_as_polar_finds_them(case: Case, tenant: Tenant) -> None:
    """By a part of the name, whatever its case, and with no wildcards."""
    asked = case["when"]["params"]
    customer = tenant.customer()
    for name in asked["meters"]:
        body = {"meter_id": meter(tenant, name), "units": 1}
        tenant.post(f"/v1/customers/{customer}/credits", body)
    found = tenant.ask(
        "GET", "/v1/customer-portal/meters/", params={"query": asked["query"]}, secret=session(tenant, customer)
    ).json()  # fmt: skip
    assert [one["meter"]["name"] for one in found["items"]] == case["then"]["names"]


def test_a_session_ends_after_an_hour(tenant: Tenant) -> None:
    """To the second; introspection says when. An organization's token is no session."""
    secret = session(tenant, tenant.customer())
    path = "/v1/customer-portal/customer-session/introspect"
    expires = (tenant.server.now + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    shown = tenant.ask("GET", path, secret=secret).json()
    assert shown == {"expires_at": expires, "return_url": "https://app.example.com/"}
    assert tenant.ask("GET", path).status_code == 401
    tenant.server.now += timedelta(minutes=59, seconds=59)
    assert tenant.ask("GET", path, secret=secret).status_code == 200
    tenant.server.now += timedelta(seconds=1)
    assert tenant.ask("GET", path, secret=secret).json()["error"] == "invalid_token"


def test_a_session_ends_with_its_customer(tenant: Tenant) -> None:
    """Who was deleted sees nothing any more."""
    customer = tenant.customer()
    secret = session(tenant, customer)
    assert tenant.ask("GET", "/v1/customer-portal/customers/me", secret=secret).json()["id"] == customer
    tenant.ask("DELETE", f"/v1/customers/{customer}")
    assert tenant.ask("GET", "/v1/customer-portal/customers/me", secret=secret).status_code == 401


def test_customers_see_of_themselves_what_is_theirs(tenant: Tenant) -> None:
    """What Polar's clients insist on, and none of the names and notes that the organization has for them."""
    notes = {"external_id": "account 4711", "metadata": {"risk": "high"}}
    customer = tenant.customer(email="ann@example.com", name="Ann", **notes)
    shown = tenant.ask("GET", "/v1/customer-portal/customers/me", secret=session(tenant, customer)).json()
    unknown = ("modified_at", "billing_name", "billing_address", "tax_id", "default_payment_method_id", "locale")
    assert shown == {
        "id": customer, "created_at": tenant.server.now.isoformat().replace("+00:00", "Z"), "name": "Ann",
        "email": "ann@example.com", "email_verified": False, "type": "individual", "oauth_accounts": {},
        **dict.fromkeys(unknown),
    }  # fmt: skip


def test_only_what_the_customer_has_is_shown(tenant: Tenant) -> None:
    """A meter that was used and never credited or paid for is not; nor is one of a benefit that was taken back."""
    customer = tenant.customer(external_id="ann")
    used, given, lost = (meter(tenant, name) for name in ("Used", "Given", "Lost"))
    tenant.event("e1", external_customer_id="ann")
    secret = session(tenant, customer)
    grants = {}
    for id in (given, lost):
        body = {"type": "meter_credit", "description": "units",
                "properties": {"meter_id": id, "units": 5, "rollover": False}}  # fmt: skip
        benefit = tenant.post("/v1/benefits/", body)["id"]
        grants[id] = tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": customer})["id"]
    tenant.post(f"/v1/benefit-grants/{grants[lost]}/revoke", {})
    shown = tenant.ask("GET", "/v1/customer-portal/meters/", secret=secret).json()["items"]
    assert [(one["meter_id"], one["balance"]) for one in shown] == [(given, 4)]
    one = tenant.ask("GET", f"/v1/customer-portal/meters/{shown[0]['id']}", secret=secret).json()
    assert one == shown[0]
    assert set(one["meter"]) == {"id", "created_at", "modified_at", "name"}
    assert "customer" not in one
    ids = {row["meter_id"]: row["id"] for row in tenant.get("/v1/customer-meters/")["items"]}
    assert tenant.ask("GET", f"/v1/customer-portal/meters/{ids[used]}", secret=secret).status_code == 404


def test_the_part_that_is_used_keeps_its_digits() -> None:
    """Of the widest amounts, too."""
    consumed = Decimal("12345678901234567890123456.789012345678")
    assert percentage(consumed, Decimal(1)) == Decimal("1234567890123456789012345678.90")


def test_the_usage_display_says_what_a_portal_shows(tenant: Tenant) -> None:
    """Usage, limit, part used, period, cents beyond the credits, and the history of credits, newest first."""
    customer = tenant.customer(external_id="ann")
    calls = meter(tenant, "Calls")
    tenant.ask("PUT", f"/v1/meters/{calls}/price", json={"unit_amount": "50"})
    tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": calls, "units": 3})
    for number in range(4):
        tenant.event(f"u{number}", external_customer_id="ann")
    secret = session(tenant, customer)

    def display() -> dict[str, object]:
        (shown,) = tenant.ask("GET", "/v1/customer-portal/usage", secret=secret).json()["items"]
        history = [(one["units"], one["cause"]) for one in shown.pop("credits")]
        return shown | {"meter": shown["meter"]["name"], "credits": history}

    assert display() == {
        "meter": "Calls", "usage": 4, "limit": 3, "balance": -1, "percentage": 133.33, "amount": 50, "currency": "usd",
        "period": {"start": None, "end": None}, "credits": [(3, "credit")],
    }  # fmt: skip
    tenant.server.now += timedelta(minutes=1)
    since = tenant.server.now.isoformat().replace("+00:00", "Z")
    tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": calls, "units": 8})
    assert display() == {
        "meter": "Calls", "usage": 0, "limit": 8, "balance": 8, "percentage": 0, "amount": 0, "currency": "usd",
        "period": {"start": since, "end": None}, "credits": [(8, "credit"), (3, "credit")],
    }  # fmt: skip


def test_customers_see_their_own_grants(tenant: Tenant) -> None:
    """With the benefit and the organization, and without what the organization keeps about them."""
    customer, other = tenant.customer(email="ann@example.com"), tenant.customer()
    properties = {"meter_id": meter(tenant, "Calls"), "units": 5, "rollover": True}
    body = {"type": "meter_credit", "description": "Five calls", "properties": properties, "metadata": {"margin": "9"}}
    benefit = tenant.post("/v1/benefits/", body)["id"]
    ids = [tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": one})["id"] for one in (customer, other)]
    path, secret = "/v1/customer-portal/benefit-grants/", session(tenant, customer)
    (one,) = tenant.ask("GET", path, secret=secret).json()["items"]
    assert (one["id"], one["customer"]["email"], one["is_granted"]) == (ids[0], "ann@example.com", True)
    assert (one["benefit"]["description"], one["benefit"]["properties"]) == ("Five calls", properties)
    assert "metadata" not in one["benefit"]
    assert one["benefit"]["organization"]["id"] == tenant.id
    assert one["properties"]["last_credited_units"] == 5
    assert tenant.ask("GET", path + ids[0], secret=secret).json() == one
    assert tenant.ask("GET", path + ids[1], secret=secret).status_code == 404
    for asked in ({"query": "six"}, {"type": "custom"}, {"benefit_id": ids[0]}, {"member_id": ids[0]}):
        assert tenant.ask("GET", path, secret=secret, params=asked).json()["items"] == []
    for asked in ({"query": "FIVE"}, {"type": "meter_credit"}, {"benefit_id": benefit}, {"sorting": "-granted_at"}):
        assert tenant.ask("GET", path, secret=secret, params=asked).json()["items"] == [one]


def test_a_name_becomes_a_slug() -> None:
    """Small letters and digits, with one hyphen for whatever is between them."""
    assert [slug(name) for name in ("Acme, Inc.", "a  b", "é")] == ["acme-inc", "a-b", ""]


def test_history_is_the_customers_own_usage(tenant: Tenant) -> None:
    """The rows of ``GET /v1/usage`` for this customer alone, of meters that are theirs to see, without groups."""
    customer = tenant.customer(external_id="ann")
    given = meter(tenant, "Given")
    meter(tenant, "Used")
    tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": given, "units": 5})
    for id, who, when in (("e1", "ann", "01T23:00"), ("e2", "bob", "01T23:00"), ("e3", "ann", "02T00:00")):
        tenant.event(id, external_customer_id=who, timestamp=f"2026-02-{when}:00Z")
    path, secret = "/v1/customer-portal/usage/history", session(tenant, customer)
    asked = {"start": "2026-02-01T12:00:00Z", "end": "2026-02-02T12:00:00Z", "interval": "day"}
    shown = tenant.ask("GET", path, params=asked, secret=secret).json()
    assert shown == tenant.get("/v1/usage", **asked, meter_id=given, customer_id=customer)
    assert [(row["start"], row["value"]) for row in shown["rows"]] == [
        ("2026-02-01T12:00:00Z", "1"), ("2026-02-02T00:00:00Z", "1"),
    ]  # fmt: skip
    for unknown in ({"group_by": "customer_id"}, {"external_customer_id": "bob"}):
        assert tenant.refusal("GET", path, params=asked | unknown, secret=secret)[2][0][0] == "extra_forbidden"
