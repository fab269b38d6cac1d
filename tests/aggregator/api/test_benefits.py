"""Benefits and grants over HTTP: every step once, however often it is asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta, timezone
from typing import Any
from unittest.mock import patch

import pytest

from aggregator.service import service
from meters.log import Entry, Refused, TryAgain
from tests.support.servers.query_api import Json, Tenant

DAY = timedelta(days=1)
NOBODY = "00000000-0000-4000-8000-00000000dead"


def benefit(tenant: Tenant, meter: str, **fields: Any) -> str:
    """A benefit of 100 units; its id."""
    properties = {"meter_id": meter, "units": 100, "rollover": False} | fields.pop("properties", {})
    body = {"type": "meter_credit", "description": "100 units", "properties": properties, **fields}
    made: str = tenant.post("/v1/benefits/", body)["id"]
    return made


def credits(tenant: Tenant, customer: str) -> list[tuple[str, int]]:
    """Every movement of credits, oldest first."""
    items = tenant.get(f"/v1/customers/{customer}/credits", limit=100)["items"]
    return [(one["cause"], one["units"]) for one in reversed(items)]


@contextmanager
def failing(tenant: Tenant, after: int, error: Exception) -> Iterator[None]:
    """The log takes so many more records, and then none."""
    append, left = tenant.server.log.append, [None] * after

    async def fail(stream: str, entries: Sequence[Entry]) -> list[int]:
        if not left:
            raise error
        left.pop()
        return await append(stream, entries)

    with patch.object(tenant.server.log, "append", fail):
        yield


def test_a_benefit_is_made_found_changed_and_ended(tenant: Tenant) -> None:
    """What is shown is what was said; an end takes the units back from who has it."""
    meter = tenant.meter()
    id = benefit(tenant, meter, metadata={"plan": "pro"})
    assert tenant.get(f"/v1/benefits/{id}")["properties"] == {"meter_id": meter, "units": 100, "rollover": False}
    assert [one["id"] for one in tenant.get("/v1/benefits/", **{"metadata[plan]": "pro"})["items"]] == [id]
    assert tenant.get("/v1/benefits/", query="nothing of the kind")["items"] == []
    changed = tenant.patch(f"/v1/benefits/{id}", {"description": "200 units"})
    assert (changed["description"], changed["metadata"]) == ("200 units", {"plan": "pro"})
    customer = tenant.customer()
    tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})
    assert tenant.ask("DELETE", f"/v1/benefits/{id}").status_code == 204
    assert credits(tenant, customer) == [("grant", 100), ("revoke", -100)]
    assert tenant.ask("GET", f"/v1/benefits/{id}").status_code == 404


def test_benefits_are_those_of_the_organization_that_is_asked_for(tenant: Tenant) -> None:
    """Another organization has none that this token may see."""
    id = benefit(tenant, tenant.meter())
    assert [one["id"] for one in tenant.get("/v1/benefits/", organization_id=tenant.id)["items"]] == [id]
    assert [one["id"] for one in tenant.get("/v1/benefits/", organization_id=[NOBODY, tenant.id])["items"]] == [id]
    assert tenant.get("/v1/benefits/", organization_id=NOBODY)["items"] == []


def test_benefits_are_found_and_left_out_by_their_ids(tenant: Tenant) -> None:
    """Both parameters are repeated, as Polar's clients repeat them."""
    meter = tenant.meter()
    ids = [benefit(tenant, meter) for _ in range(3)]

    def listed(**asked: list[str]) -> set[str]:
        return {one["id"] for one in tenant.get("/v1/benefits/", **asked)["items"]}

    assert listed(id=[ids[0], ids[2], NOBODY]) == {ids[0], ids[2]}
    assert listed(exclude_id=ids[:2]) == {ids[2]}
    assert listed(id=ids[:2], exclude_id=ids[1:]) == {ids[0]}


def test_benefits_come_in_every_order_of_polars(tenant: Tenant) -> None:
    """By time, by text, by type (there is one), and as their ids are asked for."""
    meter = tenant.meter()
    made = []
    for description in ("beta", "alpha", "gamma"):
        made.append(benefit(tenant, meter, description=description))
        tenant.server.now += timedelta(seconds=1)

    def found(sorting: str, **asked: Any) -> list[int]:
        return [made.index(one["id"]) for one in tenant.get("/v1/benefits/", sorting=sorting, **asked)["items"]]

    assert found("created_at") == found("-created_at")[::-1] == [0, 1, 2]
    assert found("description") == [1, 0, 2]
    assert sorted(found("type")) == sorted(found("-type")) == sorted(found("user_order")) == [0, 1, 2]
    asked = [made[2], made[0]]
    assert (found("user_order", id=asked), found("-user_order", id=asked)) == ([2, 0], [0, 2])


def test_members_have_no_grants(tenant: Tenant) -> None:
    """Customers have them; whoever asks for a member's is not shown everybody's."""
    id = benefit(tenant, tenant.meter())
    tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": tenant.customer()})
    assert tenant.get(f"/v1/benefits/{id}/grants", member_id=NOBODY)["items"] == []


def test_grants_are_found_by_any_of_several_customers(tenant: Tenant) -> None:
    """The parameter is repeated, as Polar's clients repeat it."""
    id, customers = benefit(tenant, tenant.meter()), [tenant.customer() for _ in range(3)]
    for customer in customers:
        tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})

    def granted_to(*asked: str) -> set[str]:
        return {one["customer_id"] for one in tenant.get(f"/v1/benefits/{id}/grants", customer_id=asked)["items"]}

    assert granted_to(*customers[:2]) == set(customers[:2])
    assert granted_to(customers[2], NOBODY) == {customers[2]}
    assert granted_to(NOBODY) == set()
    assert granted_to() == set(customers)


def test_the_end_of_a_benefit_that_stops_half_way_goes_on(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it loses it in parts of a bounded size; the benefit goes last, so that a retry finds the rest."""
    monkeypatch.setattr(service, "CHANGES_AT_ONCE", 4)
    id, customers = benefit(tenant, tenant.meter()), [tenant.customer() for _ in range(5)]
    for customer in customers:
        tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})
    with failing(tenant, 1, TryAgain("the log is away")):
        assert tenant.ask("DELETE", f"/v1/benefits/{id}").status_code == 503
    assert len(tenant.get(f"/v1/benefits/{id}/grants", is_granted=False)["items"]) == 2
    assert tenant.ask("DELETE", f"/v1/benefits/{id}").status_code == 204
    assert {tuple(credits(tenant, customer)) for customer in customers} == {(("grant", 100), ("revoke", -100))}
    assert tenant.ask("GET", f"/v1/benefits/{id}").status_code == 404


def test_a_decision_that_is_too_large_for_the_log_is_refused(tenant: Tenant) -> None:
    """Nothing of it is true, and no retry would help."""
    id, customer = benefit(tenant, tenant.meter()), tenant.customer()
    with failing(tenant, 0, Refused("a value of 99 bytes is over 9")):
        answer = tenant.ask("POST", f"/v1/benefits/{id}/grants", json={"customer_id": customer})
    assert (answer.status_code, answer.json()["error"]) == (413, "DecisionTooLarge")
    assert credits(tenant, customer) == []


def test_granting_and_revoking_again_change_nothing(tenant: Tenant) -> None:
    """A retry gets the grant as it is; who lost it may be given it again."""
    id, customer = benefit(tenant, tenant.meter()), tenant.customer(external_id="ann")
    grant = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})
    assert tenant.post(f"/v1/benefits/{id}/grants", {"external_customer_id": "ann"}) == grant
    assert credits(tenant, customer) == [("grant", 100)]
    tenant.server.now += DAY
    revoked = tenant.post(f"/v1/benefit-grants/{grant['id']}/revoke", {})
    assert tenant.post(f"/v1/benefit-grants/{grant['id']}/revoke", {}) == revoked
    assert revoked["is_revoked"]
    assert tenant.refusal("POST", f"/v1/benefit-grants/{grant['id']}/cycle")[0] == 422
    tenant.server.now += DAY
    assert tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"] == grant["id"]
    assert credits(tenant, customer) == [("grant", 100), ("revoke", -100), ("grant", 100)]


def test_a_grant_that_nobody_here_heard_of_is_made_once(tenant: Tenant) -> None:
    """Each step is durable and its sender is told to try again, which finds nothing of it yet: the same ids follow."""
    id, customer = benefit(tenant, tenant.meter()), tenant.customer()
    path, body = f"/v1/benefits/{id}/grants", {"customer_id": customer}
    for times in (1, 2):
        with tenant.server.unheard():
            assert tenant.ask("POST", path, json=body).status_code == 503
            tenant.server.now += timedelta(minutes=1)
            grant = tenant.post(path, body)
        assert [one["id"] for one in tenant.get(path)["items"]] == [grant["id"]]
        assert credits(tenant, customer) == [*[("grant", 100), ("revoke", -100)] * (times - 1), ("grant", 100)]
        tenant.server.now += DAY
        with tenant.server.unheard():
            assert tenant.ask("POST", f"/v1/benefit-grants/{grant['id']}/revoke").status_code == 503
            tenant.server.now += timedelta(minutes=1)
            assert tenant.post(f"/v1/benefit-grants/{grant['id']}/revoke", {})["is_revoked"]
        assert credits(tenant, customer) == [("grant", 100), ("revoke", -100)] * times
        tenant.server.now += DAY


def test_a_benefits_credit_goes_with_its_grant_alone(tenant: Tenant) -> None:
    """Deleted as a credit by hand is, it would be taken back twice: with the grant again."""
    id, customer = benefit(tenant, tenant.meter()), tenant.customer()
    grant = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"]
    (made,) = tenant.get(f"/v1/customers/{customer}/credits")["items"]
    refusal = tenant.refusal("DELETE", f"/v1/customers/{customer}/credits/{made['id']}")
    assert refusal[2] == [("value_error", ["path", "credit_id"])]
    assert credits(tenant, customer) == [("grant", 100)]
    tenant.post(f"/v1/benefit-grants/{grant}/revoke", {})
    assert credits(tenant, customer) == [("grant", 100), ("revoke", -100)]


def test_a_cycle_that_names_its_time_happens_once(tenant: Tenant) -> None:
    """A retry changes nothing; one before the last credit would credit nothing and says so, as does one to come."""
    id, customer = benefit(tenant, tenant.meter()), tenant.customer()
    grant = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"]
    at = tenant.server.now + DAY
    tenant.server.now += 2 * DAY
    path = f"/v1/benefit-grants/{grant}/cycle"
    once = tenant.post(path, {"at": at.isoformat()})
    assert tenant.post(path, {"at": at.isoformat()}) == once
    for earlier in (at - DAY, at - 2 * DAY):
        refused = tenant.ask("POST", path, json={"at": earlier.isoformat()})
        assert (refused.status_code, "Nothing was credited" in refused.json()["detail"]) == (409, True)
    assert once["properties"]["last_credited_at"] == at.isoformat().replace("+00:00", "Z")
    assert credits(tenant, customer) == [("grant", 100), ("cycle", 100)]
    assert tenant.refusal("POST", path, json={"at": (at + 9 * DAY).isoformat()})[0] == 422
    assert tenant.refusal("POST", path, json={"at": "2026-03-01T00:00:00"})[0] == 422


@pytest.mark.parametrize("is_first_later", [True, False])
def test_cycles_of_two_benefits_count_in_either_order(tenant: Tenant, is_first_later: bool) -> None:
    """Whichever resets the meter, the other one's units are of the window that begins with it."""
    meter, customer, grants = tenant.meter(), tenant.customer(), []
    for _ in range(2):
        body = {"customer_id": customer}
        grants.append(tenant.post(f"/v1/benefits/{benefit(tenant, meter)}/grants", body)["id"])
        tenant.server.now += timedelta(seconds=10)
    begin = tenant.server.now
    tenant.server.now += 31 * DAY
    due = [(grant, begin + 30 * DAY + timedelta(seconds=10 * place)) for place, grant in enumerate(grants)]
    for grant, at in reversed(due) if is_first_later else due:
        path, body = f"/v1/benefit-grants/{grant}/cycle", {"at": at.isoformat()}
        assert tenant.post(path, body) == tenant.post(path, body)
    (balance,) = tenant.get("/v1/customer-meters/", customer_id=customer)["items"]
    assert balance["credited_units"] == 200


def test_a_cycle_is_the_same_in_every_offset(tenant: Tenant) -> None:
    """The same instant in another offset is the same movement; a time without a place in UTC is refused."""
    id, customer = benefit(tenant, tenant.meter()), tenant.customer()
    grant = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"]
    at = tenant.server.now + DAY
    tenant.server.now += 2 * DAY
    path = f"/v1/benefit-grants/{grant}/cycle"
    once = tenant.post(path, {"at": at.astimezone(timezone(timedelta(hours=5))).isoformat()})
    assert once["properties"]["last_credited_at"] == at.isoformat().replace("+00:00", "Z")
    assert tenant.post(path, {"at": at.isoformat()}) == once
    newest = tenant.get(f"/v1/customers/{customer}/credits")["items"][0]
    assert newest["id"] == f"{grant}:{at.isoformat(timespec='microseconds')}:cycle"
    for nowhere in ("9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"):
        assert tenant.refusal("POST", path, json={"at": nowhere})[2] == [("value_error", ["body", "at"])]


def test_an_edited_benefit_gives_the_new_from_then_on(tenant: Tenant) -> None:
    """What was given stays; the next cycle gives what the benefit is now; revoking takes back what came last."""
    meter = tenant.meter()
    id, customer = benefit(tenant, meter), tenant.customer()
    grant = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"]
    tenant.patch(f"/v1/benefits/{id}", {"properties": {"meter_id": meter, "units": 300, "rollover": False}})
    assert credits(tenant, customer) == [("grant", 100)]
    tenant.server.now += DAY
    tenant.post(f"/v1/benefit-grants/{grant}/cycle", {})
    tenant.patch(f"/v1/benefits/{id}", {"properties": {"meter_id": meter, "units": 7, "rollover": False}})
    tenant.server.now += DAY
    tenant.post(f"/v1/benefit-grants/{grant}/revoke", {})
    assert credits(tenant, customer) == [("grant", 100), ("cycle", 300), ("revoke", -300)]


def test_what_is_taken_back_is_of_the_kind_that_was_given(tenant: Tenant) -> None:
    """A benefit that rolled over and no longer does takes its units from those that roll over, and leaves others."""
    meter = tenant.meter()
    id, customer = benefit(tenant, meter, properties={"rollover": True}), tenant.customer()
    grant = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"]
    tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 50, "rollover": True})
    tenant.patch(f"/v1/benefits/{id}", {"properties": {"meter_id": meter, "units": 100, "rollover": False}})
    tenant.server.now += DAY
    tenant.post(f"/v1/benefit-grants/{grant}/revoke", {})
    tenant.server.now += DAY
    assert tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": [meter]})["rollover"] == {meter: 50}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"type": "meter_credit", "description": "units"}, ["body", "properties"]),
        ({"type": "discord"}, ["body", "type"]),
        ({"description": "no"}, ["body", "description"]),
        ({"properties": {"units": 0}}, ["body", "properties", "units"]),
        ({"properties": {"units": 2**31}}, ["body", "properties", "units"]),
        ({"properties": {"units": 1.5}}, ["body", "properties", "units"]),
        ({"properties": {"rollover": "yes"}}, ["body", "properties", "rollover"]),
        ({"properties": {"meter_id": NOBODY}}, ["body", "properties", "meter_id"]),
        ({"metadata": {"nested": {}}}, ["body", "metadata", "nested"]),
    ],
)
def test_a_benefit_that_cannot_be_is_refused_where_it_is_wrong(tenant: Tenant, body: Json, where: list[str]) -> None:
    """422 with the place."""
    properties = {"meter_id": tenant.meter(), "units": 1, "rollover": True}
    whole = {"type": "meter_credit", "description": "units", "properties": properties}
    if body.keys() != {"type", "description"}:
        body = whole | body | {"properties": properties | body.get("properties", {})}
    status, _, complaints = tenant.refusal("POST", "/v1/benefits/", json=body)
    assert (status, [loc for _, loc in complaints]) == (422, [where])


def test_all_grants_are_listed_together(tenant: Tenant) -> None:
    """Newest first, by customer and by whether they are held; grants of a deleted benefit are gone."""
    meter, ann, bob = tenant.meter(), tenant.customer(external_id="ann"), tenant.customer()
    first, second, gone = (benefit(tenant, meter, description=text) for text in ("first", "second", "gone"))
    made = {}
    for id, customer in ((first, ann), (first, bob), (second, ann), (gone, ann)):
        tenant.server.now += timedelta(minutes=1)
        made[id, customer] = tenant.post(f"/v1/benefits/{id}/grants", {"customer_id": customer})["id"]
    assert tenant.ask("DELETE", f"/v1/benefits/{gone}").status_code == 204
    tenant.post(f"/v1/benefit-grants/{made[first, bob]}/revoke", {})

    def found(**asked: Any) -> list[str]:
        items = tenant.get("/v1/benefit-grants/", **asked)["items"]
        assert all(one == tenant.get(f"/v1/benefit-grants/{one['id']}") for one in items)
        return [one["id"] for one in items]

    assert found() == [made[second, ann], made[first, bob], made[first, ann]]
    assert found(sorting="granted_at") == found()[::-1]
    assert found(sorting="revoked_at")[0] == made[first, bob]
    assert found(customer_id=ann) == found(external_customer_id="ann") == [made[second, ann], made[first, ann]]
    assert found(external_customer_id="nobody") == []
    assert found(external_customer_id="ann", customer_id=bob) == found()
    tenant.patch(f"/v1/customers/{bob}", {"external_id": "bob"})
    assert found(external_customer_id="bob") == [made[first, bob]]
    assert found(is_granted=False) == [made[first, bob]]
    assert found(limit=1, page=2) == [made[first, bob]]
    assert found(organization_id=NOBODY) == []
