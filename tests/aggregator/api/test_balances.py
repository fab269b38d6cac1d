"""Customer meters, credits, resets, prices and customers that change, over HTTP."""

import asyncio
import threading
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from aggregator.api.customer_meters import SORTINGS
from meters.ledger.ledger import customer_meter_id
from meters.ledger.statement import statement
from tests.support.records import line
from tests.support.servers.query_api import Server, Tenant, exact
from tests.support.waiting import eventually

NOWHERE = "00000000-0000-4000-8000-00000000ffff"


@pytest.fixture(scope="module")
def known(server: Server) -> Tenant:
    """Ann used 5 tokens in 2 calls and was given 20 tokens; bob made a call; a third meter is archived."""
    tenant = server.tenant()
    tenant.customer(external_id="ann", name="Ann")
    tenant.customer(external_id="bob", name="Bob")
    tenant.customer(external_id="cid", name="Cid")
    tenant.meter(func="sum", property="tokens")
    for name in ("Calls", "Old"):
        filter = {"conjunction": "and", "clauses": []}
        made = tenant.post("/v1/meters/", {"name": name, "filter": filter, "aggregation": {"func": "count"}})
    tenant.patch(f"/v1/meters/{made['id']}", {"is_archived": True})
    tenant.send(line("a", metadata={"tokens": 2}), line("b", metadata={"tokens": 3}))
    server.now += timedelta(minutes=1)
    tenant.send(line("c", external_customer_id="bob"))
    server.now += timedelta(minutes=1)
    give(tenant, "ann", "Tokens", 20)
    return tenant


def id_of(tenant: Tenant, kind: str, name: str) -> str:
    """A customer's id by the external id, or a meter's by its name."""
    if kind == "customer":
        made: str = tenant.get(f"/v1/customers/external/{name}")["id"]
        return made
    found: str = next(m["id"] for m in tenant.get("/v1/meters/", limit=100)["items"] if m["name"] == name)
    return found


def give(tenant: Tenant, customer: str, meter: str, units: int, **more: Any) -> Any:
    """Credit units."""
    body = {"meter_id": id_of(tenant, "meter", meter), "units": units, **more}
    return tenant.post(f"/v1/customers/{id_of(tenant, 'customer', customer)}/credits", body)


def listed(tenant: Tenant, **asked: Any) -> list[str]:
    """Customer meters as customer/meter, in the order of the answer."""
    items = tenant.get("/v1/customer-meters/", **asked)["items"]
    return [f"{item['customer']['external_id']}/{item['meter']['name']}" for item in items]


@pytest.mark.parametrize("pairs_at_once", [0, 100])
def test_a_row_is_not_modified_before_it_is_made(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, pairs_at_once: int
) -> None:
    """Usage that came before the meter and the customer were made counts, and its time is theirs at the least."""
    monkeypatch.setattr("aggregator.api.customer_meters.PAIRS_AT_ONCE", pairs_at_once)
    for name in ("ann", "bob"):
        tenant.event(external_customer_id=name)
        tenant.server.now += timedelta(hours=1)
    tenant.customer(external_id="bob")
    tenant.server.now += timedelta(hours=1)
    tenant.meter()
    tenant.server.now += timedelta(hours=1)
    tenant.customer(external_id="ann")
    path = "/v1/customer-meters/"
    eventually(lambda: tenant.ask("GET", path).is_success)  # 503 while the new meter's history is counted
    rows = tenant.get(path, sorting="modified_at")["items"]
    assert [row["customer"]["external_id"] for row in rows] == ["bob", "ann"]
    assert [row["modified_at"] for row in rows] == [row["created_at"] for row in rows]
    tenant.event(external_customer_id="bob")
    [newest, _] = tenant.get("/v1/customer-meters/", sorting="-modified_at")["items"]
    assert newest["created_at"] <= newest["modified_at"]


def test_a_row_is_there_for_usage_or_credits_and_for_nothing_else(known: Tenant) -> None:
    """Latest change first; an archived meter hides unless it is asked for."""
    assert listed(known) == ["ann/Tokens", "bob/Calls", "ann/Calls"]
    old = id_of(known, "meter", "Old")
    assert sorted(listed(known, meter_id=old)) == ["ann/Old", "bob/Old"]


def test_rows_are_filtered(known: Tenant) -> None:
    """By either name of a customer, by meter, by organization."""
    ann, bob = id_of(known, "customer", "ann"), id_of(known, "customer", "bob")
    assert listed(known, customer_id=bob) == ["bob/Calls"]
    assert listed(known, external_customer_id=["ann", "nobody"]) == ["ann/Tokens", "ann/Calls"]
    assert listed(known, customer_id=[ann, ann, bob]) == ["ann/Tokens", "bob/Calls", "ann/Calls"]
    assert listed(known, meter_id=id_of(known, "meter", "Calls"), sorting="customer_name") == ["ann/Calls", "bob/Calls"]
    assert listed(known, organization_id=NOWHERE) == []
    assert listed(known, organization_id=known.id, limit=1, page=2) == ["bob/Calls"]


def test_two_names_mean_who_has_both(known: Tenant) -> None:
    """As at Polar, each filter leaves fewer rows: two that mean different customers leave none."""
    ann, bob = id_of(known, "customer", "ann"), id_of(known, "customer", "bob")
    assert listed(known, customer_id=[ann, NOWHERE], external_customer_id="ann") == ["ann/Tokens", "ann/Calls"]
    both = listed(known, external_customer_id=["ann", "bob"])
    assert listed(known, customer_id=ann, external_customer_id="bob") == both
    assert listed(known, customer_id=[ann, bob], external_customer_id="bob") == both


@pytest.mark.parametrize(
    ("sorting", "first"),
    [
        ("modified_at", "ann/Calls"), ("-modified_at", "ann/Tokens"), ("customer_name", "ann"),
        ("-customer_name", "bob"), ("meter_name", "/Calls"), ("-meter_name", "ann/Tokens"),
        ("consumed_units", "bob/Calls"),
        ("-consumed_units", "ann/Tokens"), ("-credited_units", "ann/Tokens"), ("balance", "ann/Calls"),
        ("-balance", "ann/Tokens"), ("created_at", ""), ("customer_id", "ann"), ("-meter_id", "/Calls"),
    ],
)  # fmt: skip
def test_rows_are_sorted(known: Tenant, sorting: str, first: str) -> None:
    """By each of Polar's criteria, both ways."""
    assert first in listed(known, sorting=sorting)[0]


@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("by", SORTINGS)
def test_long_lists_are_like_short_ones(known: Tenant, monkeypatch: pytest.MonkeyPatch, by: str, sign: str) -> None:
    """Rows that are found as arrays are those found one by one, equal ones in the same order: so pages go on alike."""
    short = [shown(known, by, sorting=sign + by), shown(known, by, sorting=sign + by, limit=2, page=2)]
    monkeypatch.setattr("aggregator.api.customer_meters.PAIRS_AT_ONCE", 0)
    long = [shown(known, by, sorting=sign + by), shown(known, by, sorting=sign + by, limit=2, page=2)]
    assert short == long


@pytest.mark.parametrize("sorting", ["consumed_units", "-balance"])
def test_long_lists_know_windows_and_both_names(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, sorting: str
) -> None:  # fmt: skip
    """After resets, under two names, for functions that do not add up: the same order as one by one."""
    for func in ("sum", "avg", "unique", "max", "min"):
        tenant.meter(func=func, property="tokens")
    for name, first, second in (("ann", 5, 2.5), ("bob", 3, 4), ("cid", 1, 12345678901234)):
        customer = tenant.customer(external_id=name)
        tenant.send(line(f"{name} 1", external_customer_id=name, metadata={"tokens": first}))
        tenant.server.now += timedelta(minutes=1)
        if name != "bob":
            tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
        named = f'"customer_id": "{customer}"'.encode()
        sent = line(f"{name} 2", metadata={"tokens": second}).replace(b'"external_customer_id": "ann"', named)
        tenant.send(sent, line(f"{name} 3", external_customer_id=name, metadata={"tokens": 1}))
    by = sorting.lstrip("-")
    short = shown(tenant, by, sorting=sorting, limit=100)
    monkeypatch.setattr("aggregator.api.customer_meters.PAIRS_AT_ONCE", 0)
    long = shown(tenant, by, sorting=sorting, limit=100)
    assert short == long
    assert len(long) == 15


def shown(tenant: Tenant, by: str, **asked: Any) -> list[tuple[Any, str]]:
    """What sorts each row, and its id."""
    items = tenant.get("/v1/customer-meters/", **asked)["items"]
    names = {"customer_name": ("customer", "name"), "meter_name": ("meter", "name")}
    return [(item[names[by][0]][names[by][1]] if by in names else item[by], item["id"]) for item in items]


def test_an_unknown_sorting_is_refused(known: Tenant) -> None:
    """With Polar's complaint."""
    refusal = known.refusal("GET", "/v1/customer-meters/", params={"sorting": "size"})
    assert refusal == (422, "RequestValidationError", [("enum", ["query", "sorting"])])


def test_a_row_has_all_that_clients_insist_on(known: Tenant) -> None:
    """Numbers with their digits, credits as a whole number, customer and meter whole; found by its id again."""
    (row,) = known.get("/v1/customer-meters/", meter_id=id_of(known, "meter", "Tokens"))["items"]
    ann, meter = id_of(known, "customer", "ann"), id_of(known, "meter", "Tokens")
    numbers = {"consumed_units": 5, "credited_units": 20, "balance": 15}
    assert numbers.items() <= row.items()
    assert isinstance(row["credited_units"], int)
    assert (row["customer_id"], row["meter_id"]) == (ann, meter)
    assert row["customer"] == known.get(f"/v1/customers/{ann}")
    shown = known.get(f"/v1/meters/{meter}")
    assert row["meter"] | {"unmatched": shown["unmatched"]} == shown
    assert known.get(f"/v1/customer-meters/{row['id']}") == row
    assert row["created_at"] <= row["modified_at"]


def test_what_memory_does_not_have_is_counted_from_the_store(known: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a meter's history is still being counted, the numbers are the same and only slower."""
    asked = {"sorting": "meter_name", "customer_id": id_of(known, "customer", "ann")}
    before = known.get("/v1/customer-meters/", **asked)["items"]
    monkeypatch.setattr(known.server.aggregator.totals, "consumed", lambda *_: None)
    after = known.get("/v1/customer-meters/", **asked)["items"]
    assert [one | {"modified_at": None} for one in before] == [one | {"modified_at": None} for one in after]
    assert known.get(f"/v1/customer-meters/{before[0]['id']}")["balance"] == before[0]["balance"]


def test_a_ledger_is_unfolded_where_it_holds_nobody_up(known: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the event loop: a year of usage has 35,000 entries."""
    threads: list[threading.Thread] = []

    def unfolded(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return statement(*arguments)

    monkeypatch.setattr("aggregator.api.customer_meters.statement", unfolded)
    one = customer_meter_id(id_of(known, "customer", "ann"), id_of(known, "meter", "Tokens"))
    assert known.get(f"/v1/customer-meters/{one}/ledger")["pagination"]["total_count"] == 2
    assert threads
    assert threading.current_thread() not in threads  # which the event loop of these tests runs in


def test_a_row_that_is_not_there_is_not_found(known: Tenant) -> None:
    """Neither an id of nothing nor that of a customer who did nothing."""
    idle = customer_meter_id(id_of(known, "customer", "cid"), id_of(known, "meter", "Tokens"))
    for id in (NOWHERE, idle):
        assert known.ask("GET", f"/v1/customer-meters/{id}").status_code == 404
        assert known.ask("GET", f"/v1/customer-meters/{id}/ledger").status_code == 404


def test_reading_needs_the_one_scope_there_is(known: Tenant) -> None:
    """A meters scope is not enough, as with Polar."""
    other = known.token("meters:read", "customers:read", "meters:write")
    assert known.ask("GET", "/v1/customer-meters/", secret=other).status_code == 403
    assert known.ask("GET", "/v1/customer-meters/", secret=known.token("customer_meters:read")).is_success


def test_one_customer_under_two_names(tenant: Tenant) -> None:
    """Usage under the id and under the external id is one balance, also when the customer comes last."""
    tenant.meter(func="sum", property="tokens")
    tenant.send(line("early", external_customer_id="late", metadata={"tokens": 2}))
    assert listed(tenant) == []
    customer = tenant.customer(external_id="late")
    tenant.send(line("by id", metadata={"tokens": 3}).replace(
        b'"external_customer_id": "ann"', f'"customer_id": "{customer}"'.encode()
    ))  # fmt: skip
    (row,) = tenant.get("/v1/customer-meters/", customer_id=customer)["items"]
    assert row["consumed_units"] == 5


def test_a_reset_holds_for_usage_that_is_claimed_later(tenant: Tenant) -> None:
    """An external id that is given to a customer brings its usage along, from the newest reset on."""
    meter = tenant.meter(func="sum", property="tokens")
    customer = tenant.customer()
    tenant.send(line("before", external_customer_id="claimed", metadata={"tokens": 100}))
    tenant.server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    tenant.send(line("after", external_customer_id="claimed", metadata={"tokens": 7}))
    tenant.patch(f"/v1/customers/{customer}", {"external_id": "claimed"})
    assert tenant.get(f"/v1/customer-meters/{customer_meter_id(customer, meter)}")["consumed_units"] == 7


def test_a_request_with_a_key_is_decided_once(tenant: Tenant) -> None:
    """The stored answer for the same body, 422 for another one; for another customer it is another request."""
    meter, customer = tenant.meter(), tenant.customer(external_id="ann")
    path, headers = f"/v1/customers/{customer}/credits", {"Idempotency-Key": uuid4().hex}
    body = {"meter_id": meter, "units": 5, "rollover": True}

    async def at_once() -> list[Any]:
        authorized = headers | {"Authorization": f"Bearer {tenant.secret}"}
        http = tenant.server.http
        return await asyncio.gather(*(http.post(path, headers=authorized, json=body) for _ in range(4)))

    first = tenant.server.run(at_once())
    assert {answer.status_code for answer in first} <= {201, 409}
    (made,) = {answer.content for answer in first if answer.status_code == 201}
    again = tenant.ask("POST", path, headers=headers, json=dict(reversed(body.items())))
    assert (again.status_code, again.content) == (201, made)
    assert tenant.refusal("POST", path, headers=headers, json=body | {"units": 6}) == (
        422, "PolarRequestValidationError", [("idempotency_key", ["header", "Idempotency-Key"])]
    )  # fmt: skip
    other = tenant.customer()
    assert tenant.ask("POST", f"/v1/customers/{other}/credits", headers=headers, json=body).status_code == 201
    assert [credit["units"] for credit in tenant.get(path)["items"]] == [5]


@pytest.mark.parametrize(
    ("body", "complaints"),
    [
        ({}, [("missing", ["body", "meter_id"]), ("missing", ["body", "units"])]),
        ({"meter_id": NOWHERE, "units": 0}, [("value_error", ["body", "units"])]),
        ({"meter_id": NOWHERE, "units": 1.5}, [("value_error", ["body", "units"])]),
        ({"meter_id": NOWHERE, "units": True}, [("value_error", ["body", "units"])]),
        ({"meter_id": NOWHERE, "units": 2**31}, [("value_error", ["body", "units"])]),
        ({"meter_id": NOWHERE, "units": 1, "rollover": "yes"}, [("bool_type", ["body", "rollover"])]),
        ({"meter_id": NOWHERE, "units": 1}, [("meter_id", ["body", "meter_id"])]),
        ([], [("model_attributes_type", ["body"])]),
    ],
)
def test_credits_that_make_no_sense_are_refused(known: Tenant, body: Any, complaints: list[Any]) -> None:
    """Each field is complained about at its place."""
    path = f"/v1/customers/{id_of(known, 'customer', 'cid')}/credits"
    status, _, found = known.refusal("POST", path, json=body)
    assert (status, found) == (422, complaints)


def test_a_request_with_a_key_names_the_credit_that_counts(tenant: Tenant) -> None:
    """Also when nobody here heard of the first one before the second was decided; another body is refused even then."""
    meter, customer = tenant.meter(), tenant.customer()
    path, headers = f"/v1/customers/{customer}/credits", {"Idempotency-Key": uuid4().hex}
    with tenant.server.unheard():
        assert tenant.ask("POST", path, headers=headers, json={"meter_id": meter, "units": 5}).status_code == 503
        again = tenant.ask("POST", path, headers=headers, json={"meter_id": meter, "units": 5})
    assert again.status_code == 201
    assert [credit["id"] for credit in tenant.get(path)["items"]] == [again.json()["id"]]
    assert tenant.ask("DELETE", f"{path}/{again.json()['id']}").status_code == 200
    headers = {"Idempotency-Key": uuid4().hex}
    with tenant.server.unheard():
        assert tenant.ask("POST", path, headers=headers, json={"meter_id": meter, "units": 7}).status_code == 503
        assert tenant.ask("POST", path, headers=headers, json={"meter_id": meter, "units": 8}).status_code == 422
    assert sorted(credit["units"] for credit in tenant.get(path)["items"]) == [-5, 5, 7]


def test_a_credit_is_taken_back_once(tenant: Tenant) -> None:
    """Also when nobody here heard of it before it was asked for again."""
    meter, customer = tenant.meter(), tenant.customer()
    path = f"/v1/customers/{customer}/credits"
    made = tenant.post(path, {"meter_id": meter, "units": 5})
    tenant.post(path, {"meter_id": meter, "units": 9})
    with tenant.server.unheard():
        assert tenant.ask("DELETE", f"{path}/{made['id']}").status_code == 503
        tenant.server.now += timedelta(minutes=1)
        assert tenant.ask("DELETE", f"{path}/{made['id']}").status_code == 200
    assert sorted(credit["units"] for credit in tenant.get(path)["items"]) == [-5, 5, 9]


def test_what_went_with_a_reset_cannot_be_taken_back(tenant: Tenant) -> None:
    """Taking it back now would take units of the new window."""
    meter, customer = tenant.meter(), tenant.customer()
    made = tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": 5})
    tenant.server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": [meter]})
    path = f"/v1/customers/{customer}/credits/{made['id']}"
    assert tenant.refusal("DELETE", path)[2] == [("value_error", ["path", "credit_id"])]
    assert tenant.ask("DELETE", f"/v1/customers/{customer}/credits/nothing").status_code == 404


def test_a_reset_that_is_repeated_is_answered_as_the_first_time(tenant: Tenant) -> None:
    """What it carried over is part of the decision, also after later resets; a meter named besides begins anew too."""
    tokens, calls, customer = tenant.meter(), tenant.meter(), tenant.customer()
    for meter, units in ((tokens, 30), (calls, 20)):
        tenant.post(f"/v1/customers/{customer}/credits", {"meter_id": meter, "units": units, "rollover": True})
    tenant.server.now += timedelta(days=1)
    path, body = f"/v1/customers/{customer}/resets", {"meter_ids": [tokens], "at": tenant.server.now.isoformat()}
    tenant.server.now += timedelta(days=1)
    first = tenant.post(path, body)
    assert first["rollover"] == {tokens: 30}
    assert tenant.post(path, body) == first
    assert tenant.post(path, body | {"meter_ids": [tokens, calls]})["rollover"] == {tokens: 30, calls: 20}
    tenant.post(path, {"meter_ids": "all"})
    assert tenant.post(path, body) == first
    units = [one["units"] for one in tenant.get(f"/v1/customers/{customer}/credits", limit=100)["items"]]
    assert sorted(units) == [20, 20, 20, 30, 30, 30]


def test_a_reset_in_the_future_is_refused(tenant: Tenant) -> None:
    """And so is one without a time zone, and one of somebody else's meter."""
    path = f"/v1/customers/{tenant.customer()}/resets"
    later = (tenant.server.now + timedelta(seconds=1)).isoformat()
    for at, complaint in ((later, "value_error"), (later[:-6], "timezone_aware")):
        body = {"meter_ids": "all", "at": at}
        assert tenant.refusal("POST", path, json=body)[2] == [(complaint, ["body", "at"])]
    assert tenant.refusal("POST", path, json={"meter_ids": [NOWHERE]})[2] == [("meter_id", ["body", "meter_ids"])]


def test_charges_take_credits_first_and_add_up(known: Tenant) -> None:
    """Every meter with a price, in cents, and all of them together."""
    ann, calls = id_of(known, "customer", "ann"), id_of(known, "meter", "Calls")
    tokens = id_of(known, "meter", "Tokens")
    for meter, price in ((calls, {"unit_amount": "12.5"}), (tokens, {"unit_amount": 3, "cap_amount": 100})):
        exact(known.ask("PUT", f"/v1/meters/{meter}/price", json=price))
    charges = known.get(f"/v1/customers/{ann}/charges")
    amounts = {item["meter_name"]: (item["billed_units"], item["amount"]) for item in charges["items"]}
    assert amounts == {"Calls": (2, 25), "Tokens": (0, 0)}
    assert charges["amount"] == 25
    price = {"meter_id": calls, "unit_amount": "12.5", "cap_amount": None, "currency": "usd"}
    assert known.get(f"/v1/meters/{calls}/price") == price


def test_customers_change_and_go(tenant: Tenant) -> None:
    """What is named changes, by either id; an external id is given once; the deleted one's names are free again."""
    first = tenant.post("/v1/customers/", {"email": "a@example.com", "name": "A", "metadata": {"plan": "free"}})
    path = f"/v1/customers/{first['id']}"
    changed = tenant.patch(path, {"external_id": "x", "name": "B", "email": None})
    assert changed == first | {"external_id": "x", "name": "B", "modified_at": changed["modified_at"]}
    assert changed["modified_at"] is not None
    assert tenant.refusal("PATCH", path, json={"external_id": "y"})[2] == [("value_error", ["body", "external_id"])]
    assert tenant.patch("/v1/customers/external/x", {"metadata": {}, "external_id": "x"})["metadata"] == {}
    tenant.customer(email="b@example.com", external_id="z")
    assert tenant.refusal("PATCH", path, json={"email": "B@example.com"})[2] == [("value_error", ["body", "email"])]
    assert tenant.ask("DELETE", "/v1/customers/external/x").status_code == 204
    for method, where in (("GET", path), ("PATCH", path), ("DELETE", path), ("GET", "/v1/customers/external/x")):
        assert tenant.ask(method, where, json={} if method == "PATCH" else None).status_code == 404
    assert tenant.customer(email="a@example.com", external_id="x") != first["id"]


def test_a_deleted_customers_usage_begins_anew_with_the_next_of_that_name(tenant: Tenant) -> None:
    """Usage belongs to whoever has the external id; credits belonged to the one who is gone."""
    meter = tenant.meter()
    gone = tenant.customer(external_id="ann")
    tenant.send(line("a"), line("b"))
    tenant.post(f"/v1/customers/{gone}/credits", {"meter_id": meter, "units": 9})
    tenant.server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{gone}/resets", {"meter_ids": "all"})
    assert tenant.ask("DELETE", f"/v1/customers/{gone}").status_code == 204
    assert listed(tenant) == []
    tenant.customer(external_id="ann")
    (row,) = tenant.get("/v1/customer-meters/")["items"]
    assert (row["consumed_units"], row["credited_units"]) == (2, 0)
    assert Decimal(row["balance"]) == -2
