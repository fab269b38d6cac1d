"""Events over HTTP: which are listed, in which order, and what each looks like."""

import json
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from tests.conformance.cases import cases
from tests.support.records import NOW, line
from tests.support.servers.query_api import Server, Tenant

LISTS = cases("list_events")


def at(hours: float) -> str:
    """A time so many hours from now."""
    return (NOW + timedelta(hours=hours)).isoformat()


def names(page: Any) -> list[str]:
    """Names of the events on a page."""
    return [item["name"] for item in page["items"]]


def family(tenant: Tenant) -> None:
    """A root, its child and its grandchild, and a root without children."""
    tenant.event("root", name="root", timestamp=at(-5), metadata='{"tokens":1.5}')
    tenant.event("child", name="child", timestamp=at(-4), parent_id="root", metadata='{"tokens":2}')
    tenant.event("leaf", name="leaf", timestamp=at(-3), parent_id="child", metadata='{"plan":"free"}')
    tenant.event("alone", name="alone", timestamp=at(-2))


@pytest.mark.parametrize("case", LISTS, ids=[case["id"] for case in LISTS])
def test_lists_are_those_of_polar(tenant: Tenant, case: dict[str, Any]) -> None:
    """Depth, parents and order select the events that Polar's own tests expect."""
    params = case["when"]["params"]
    for event in params["events"]:
        parent = {"parent_id": event["parent"]} if "parent" in event else {}
        tenant.event(event["id"], name=event["id"], timestamp=at(event["h"]), **parent)
    query = dict(params["query"])
    if "parent_id" in query:
        query["parent_id"] = tenant.id_of(query["parent_id"])
    page = tenant.get("/v1/events/", **query, limit=100)
    assert names(page) == case["then"]["ids"]
    counts = {item["name"]: item["child_count"] for item in page["items"]}
    assert case["then"].get("child_count", {}).items() <= counts.items()


def test_an_event_has_every_field_that_clients_insist_on(tenant: Tenant) -> None:
    """The shape is Polar's: digits and order of metadata as sent, the cost's amount a string, unknown keys gone."""
    cost = '"_cost": {"amount": 4.250e-2, "currency": "usd", "x": 1}'
    model = '"_llm": {"vendor": "v", "model": "m", "input_tokens": "7", "output_tokens": 2, "total_tokens": 9.0}'
    sent = f'{{"z": 1.50, "big": 12345678901234567890.5, "ok": true, {cost}, {model}}}'
    id = tenant.event("e", metadata=sent, timestamp="2026-02-01T12:00:00.5+02:00", external_member_id="seat")
    response = tenant.ask("GET", f"/v1/events/{id}")
    assert json.loads(response.content) == {
        "id": id,
        "timestamp": "2026-02-01T10:00:00.500000Z",
        "organization_id": tenant.id,
        "customer_id": None,
        "customer": None,
        "external_customer_id": "ann",
        "member_id": None,
        "external_member_id": "seat",
        "child_count": 0,
        "parent_id": None,
        "label": "call",
        "source": "user",
        "name": "call",
        "metadata": {
            "z": 1.5,
            "big": 12345678901234567890.5,
            "ok": True,
            "_cost": {"amount": "0.0425", "currency": "usd"},
            "_llm": {"vendor": "v", "model": "m", "input_tokens": 7, "output_tokens": 2, "total_tokens": 9},
        },
    }
    assert b'"z":1.50,"big":12345678901234567890.5' in response.content.replace(b" ", b"")


def test_numbers_in_text_are_shown_as_numbers_however_they_are_written(tenant: Tenant) -> None:
    """A JSON escape stands for a digit, a point, a sign as good as for a letter: .NET writes a plus sign so."""
    model = r'"vendor":"v","model":"m","input_tokens":"1E\u002B3","output_tokens":"\u0037","total_tokens":7'
    tenant.event("e", metadata=rf'{{"_cost":{{"amount":"1.5E\u002B2","currency":"usd"}},"_llm":{{{model}}}}}')
    (event,) = tenant.get("/v1/events/")["items"]
    tokens = {"input_tokens": 1000, "output_tokens": 7, "total_tokens": 7}
    assert event["metadata"] == {
        "_cost": {"amount": "150.0", "currency": "usd"}, "_llm": {"vendor": "v", "model": "m", **tokens},
    }  # fmt: skip
    (summed,) = tenant.get("/v1/events/", aggregate_fields="_cost.amount")["items"]
    assert summed["metadata"]["_cost"]["amount"] == "150.0"


@pytest.mark.parametrize(
    ("sent", "shown"),
    [("100", "100.0"), ('"100"', "100.0"), ("0", "0.0"), ("-5.00", "-5.0"), ("4.250e-2", "0.0425"),
     ("1E-12", "0.000000000001")],
)  # fmt: skip
def test_a_cost_is_a_text_with_at_least_one_decimal(tenant: Tenant, sent: str, shown: str) -> None:
    """As Polar, which keeps doubles, writes a whole number; in plain digits, whether it is added up or not."""
    tenant.event(metadata=f'{{"_cost":{{"amount":{sent},"currency":"usd"}}}}')
    pages = tenant.get("/v1/events/"), tenant.get("/v1/events/", aggregate_fields="_cost.amount")
    assert [page["items"][0]["metadata"]["_cost"]["amount"] for page in pages] == [shown, shown]


def test_an_event_shows_the_customer_it_names_by_either_name(tenant: Tenant) -> None:
    """The customer is found by its id and by its external id, and asking for one finds events under the other."""
    id = tenant.customer(external_id="ann")
    tenant.event(name="by external id")
    tenant.send(line("x", name="by id", customer_id=id).replace(b'"external_customer_id": "ann", ', b""))
    tenant.event(name="another", external_customer_id="bob")
    for asked in ({"customer_id": id}, {"external_customer_id": "ann"}):
        page = tenant.get("/v1/events/", **asked)
        assert sorted(names(page)) == ["by external id", "by id"]
        assert {item["customer"]["id"] for item in page["items"]} == {id}


def test_a_parent_may_be_named_by_its_id_in_any_case(tenant: Tenant) -> None:
    """As ids in paths may be, whichever comes first."""
    root = tenant.event("root", name="root")
    child = tenant.event("child", name="child", parent_id=root.upper())
    assert tenant.get(f"/v1/events/{child}")["parent_id"] == root


def test_a_text_is_found_however_its_sender_wrote_it(tenant: Tenant) -> None:
    """Escaped or not, in capitals or not, in any alphabet; an escape's own letters are no text."""
    tenant.event("plain", name="plain", metadata='{"city":"Köln"}')
    tenant.event("escaped", name="escaped", metadata=r'{"city":"K\u00f6ln"}')
    tenant.event("greek", name="ΟΔΟΣ")
    assert sorted(names(tenant.get("/v1/events/", query="KÖLN"))) == ["escaped", "plain"]
    assert names(tenant.get("/v1/events/", query="00f6")) == []
    for asked in ("ΟΔΟΣ", "οδοσ"):
        assert names(tenant.get("/v1/events/names", query=asked)) == ["ΟΔΟΣ"], asked


def test_events_whose_parents_never_complete_can_be_listed(tenant: Tenant) -> None:
    """A parent that never comes, an event that is its own, and a circle: they count, and ``pending`` shows them."""
    meter = tenant.meter()
    parents = {"orphan": "nowhere", "below": "orphan", "own": "own", "a": "b", "b": "c", "c": "a"}
    for place, (name, parent) in enumerate(parents.items()):
        tenant.event(name, name=name, timestamp=at(-place), parent_id=parent)
    tenant.event("root", name="root", timestamp=at(-9))
    assert [row["name"] for row in tenant.get("/v1/events/")["items"]] == ["root"]
    found = tenant.get("/v1/events/", pending=True)
    assert [row["name"] for row in found["items"]] == [*parents, "root"]
    assert found["pagination"]["total_count"] == 7
    assert {row["parent_id"] for row in found["items"]} == {None}
    assert tenant.get(f"/v1/meters/{meter}/usage", external_customer_id="ann")["count"] == 7


def test_an_event_that_waits_for_its_parent_is_not_shown(tenant: Tenant) -> None:
    """Until the chain of parents is complete an event is in no list, has no name and cannot be fetched."""
    id = tenant.event("early", name="early", parent_id="late")
    assert tenant.get("/v1/events/")["items"] == tenant.get("/v1/events/names")["items"] == []
    assert tenant.ask("GET", f"/v1/events/{id}").status_code == 404
    late = tenant.event("late", name="late")
    assert tenant.get(f"/v1/events/{id}")["parent_id"] == late


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, ["alone", "leaf", "child", "root"]),
        ({"sorting": "timestamp"}, ["root", "child", "leaf", "alone"]),
        ({"depth": 0}, ["alone", "root"]),
        ({"depth": 1}, ["alone", "child", "root"]),
        ({"name": ["leaf", "root"]}, ["leaf", "root"]),
        ({"source": "system"}, []),
        ({"start_timestamp": at(-4)}, ["alone", "leaf"]),
        ({"end_timestamp": at(-4)}, ["root"]),
        ({"query": "OOT"}, ["root"]),
        ({"query": '"PLAN"'}, ["leaf"]),
        ({"metadata[plan]": "free"}, ["leaf"]),
        ({"metadata[tokens]": ["2", "1.5"]}, ["child", "root"]),
        ({"metadata[tokens]": "2", "metadata[plan]": "free"}, []),
        ({"external_customer_id": ["nobody"]}, []),
        ({"limit": 2, "page": 2}, ["child", "root"]),
        ({"limit": 2, "page": 9}, []),
        (
            {"filter": '{"conjunction":"and","clauses":[{"property":"tokens","operator":"gt","value":1.5}]}'},
            ["child"],
        ),
        ({"filter": '{"conjunction":"or","clauses":[]}', "name": "alone"}, ["alone"]),
    ],
)
def test_parameters_select_events(family_of_four: Tenant, asked: dict[str, Any], found: list[str]) -> None:
    """Each parameter narrows the list down, timestamps are exclusive, and pages follow one another."""
    assert names(family_of_four.get("/v1/events/", **asked)) == found


@pytest.fixture(scope="module")
def family_of_four(server: Server) -> Tenant:
    """A tenant with a small family of events."""
    tenant = server.tenant()
    family(tenant)
    return tenant


def test_children_and_descendants(family_of_four: Tenant) -> None:
    """``parent_id`` alone gives children, with ``depth`` what hangs below down to it; counts are of all below."""
    root = family_of_four.id_of("root")
    assert names(family_of_four.get("/v1/events/", parent_id=root)) == ["child"]
    assert names(family_of_four.get("/v1/events/", parent_id=root, depth=2)) == ["leaf", "child"]
    assert names(family_of_four.get("/v1/events/", parent_id=root, depth=0)) == []
    assert family_of_four.get(f"/v1/events/{root}")["child_count"] == 2


def test_fields_are_added_up_along_a_trace(family_of_four: Tenant) -> None:
    """An aggregated field holds the event's own number and those of all below it; where there is none, nothing."""
    page = family_of_four.get("/v1/events/", aggregate_fields=["tokens", "_cost.amount"], sorting="timestamp")
    assert [item["metadata"].get("tokens") for item in page["items"]] == [Decimal("3.5"), 2, None, None]
    family_of_four.event("paid", name="paid", parent_id="leaf", metadata='{"_cost":{"amount":"0.10","currency":"usd"}}')
    leaf = family_of_four.get(f"/v1/events/{family_of_four.id_of('leaf')}", aggregate_fields="_cost.amount")
    assert leaf["metadata"]["_cost"] == {"amount": "0.1", "currency": "usd"}


@pytest.mark.parametrize("field", ["timestamp", "name", "source"])
def test_a_field_that_is_added_up_is_the_metadatas(tenant: Tenant, field: str) -> None:
    """Also one that is called as a field of the event itself: its clock, say, is no part of a sum."""
    tenant.event("root", name="root", metadata=f'{{"{field}":5}}')
    tenant.event("child", name="child", parent_id="root", metadata=f'{{"{field}":10,"tokens":1}}')
    tenant.event("leaf", name="leaf", parent_id="child", metadata=f'{{"{field}":"none"}}')
    page = tenant.get("/v1/events/", aggregate_fields=field, depth=2)
    shown = {item["name"]: item["metadata"] for item in page["items"]}
    assert shown == {"root": {field: 15}, "child": {field: 10, "tokens": 1}, "leaf": {field: "none"}}


def test_a_meter_selects_what_it_counts(tenant: Tenant) -> None:
    """``meter_id`` adds the meter's filter and its demand for a number; an unknown one is refused."""
    for text in ('{"tokens":1}', '{"tokens":"1"}', "{}"):
        tenant.event(metadata=text)
    meter = tenant.meter(func="sum", property="tokens")
    assert [item["metadata"] for item in tenant.get("/v1/events/", meter_id=meter)["items"]] == [{"tokens": 1}]
    unknown = {"meter_id": "00000000-0000-4000-8000-00000000ffff"}
    expected = (422, "PolarRequestValidationError", [("meter_id", ["query", "meter_id"])])
    assert tenant.refusal("GET", "/v1/events/", params=unknown) == expected


def test_pages_can_go_without_a_count(tenant: Tenant) -> None:
    """Cursor pagination says only whether there is more, so nothing has to be counted."""
    for number in range(3):
        tenant.event(name=f"{number}", timestamp=at(-number))
    first, last = (tenant.get("/v1/events/", cursor_pagination=True, limit=2, page=page) for page in (1, 2))
    assert (names(first), first["pagination"]) == (["0", "1"], {"has_next_page": True})
    assert (names(last), last["pagination"]) == (["2"], {"has_next_page": False})


def test_names_of_events(tenant: Tenant) -> None:
    """Names come with how often and when they were seen, in the order asked for."""
    for name, hours in (("b", -3), ("a", -2), ("b", -1), ("50%", -9)):
        tenant.event(name=name, timestamp=at(hours))
    page = tenant.get("/v1/events/names")
    assert [item["name"] for item in page["items"]] == ["b", "a", "50%"]
    first = page["items"][0]
    assert (first["label"], first["source"], first["occurrences"]) == ("b", "user", 2)
    assert (first["first_seen"], first["last_seen"]) == ("2026-03-01T09:00:00Z", "2026-03-01T11:00:00Z")
    assert names(tenant.get("/v1/events/names", sorting="name")) == ["50%", "a", "b"]
    assert names(tenant.get("/v1/events/names", query="%")) == ["50%"]
    past_the_end = tenant.get("/v1/events/names", page=9)
    assert past_the_end == {"items": [], "pagination": {"total_count": 3, "max_page": 1}}


@pytest.mark.parametrize(
    ("params", "error", "complaint"),
    [
        ({"filter": "{"}, "RequestValidationError", ("json_invalid", ["query", "filter"])),
        ({"filter": "[]"}, "RequestValidationError", ("model_attributes_type", ["query", "filter"])),
        ({"sorting": "name"}, "RequestValidationError", ("enum", ["query", "sorting"])),
        ({"source": "robot"}, "RequestValidationError", ("enum", ["query", "source"])),
        ({"event_type_id": "any"}, "RequestValidationError", ("extra_forbidden", ["query", "event_type_id"])),
        ({"start_timestamp": "2026-01-01"}, "RequestValidationError", ("timezone_aware", ["query", "start_timestamp"])),
        (
            {"end_timestamp": "0001-01-01T00:00:00+14:00"},
            "RequestValidationError",
            ("value_error", ["query", "end_timestamp"]),
        ),
        ({"depth": 6}, "RequestValidationError", ("less_than_equal", ["query", "depth"])),
        ({"page": 0}, "RequestValidationError", ("greater_than_equal", ["query", "page"])),
        ({"query": "ab"}, "RequestValidationError", ("string_too_short", ["query", "query"])),
        (
            {"aggregate_fields": "a;b"},
            "RequestValidationError",
            ("string_pattern_mismatch", ["query", "aggregate_fields", 0]),
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tenant: Tenant, params: dict[str, Any], error: str, complaint: tuple[str, list[Any]]
) -> None:
    """A parameter that makes no sense is named in a 422, in Polar's shape."""
    assert tenant.refusal("GET", "/v1/events/", params=params) == (422, error, [complaint])


def test_one_tenant_never_sees_anothers_events(server: Server, tenant: Tenant) -> None:
    """Lists, names, single events and families end at the organization of the token."""
    other = server.tenant()
    id = other.event("theirs")
    assert tenant.get("/v1/events/", organization_id=other.id)["items"] == []
    assert tenant.get("/v1/events/")["items"] == tenant.get("/v1/events/names")["items"] == []
    assert tenant.ask("GET", f"/v1/events/{id}").status_code == 404
    tenant.event("mine", parent_id=id)
    assert other.get(f"/v1/events/{id}")["child_count"] == 0


def test_a_day_of_events_begins_at_its_midnight(tenant: Tenant) -> None:
    """``since`` and ``until`` leave no moment out and show none twice; both of Polar's ends leave theirs out."""
    tenant.event("early", timestamp="2026-02-01T23:59:59.999999Z")
    tenant.event("midnight", timestamp="2026-02-02T00:00:00Z")
    tenant.event("next", timestamp="2026-02-03T00:00:00Z")
    bounds = [f"2026-02-0{day}T00:00:00Z" for day in range(1, 5)]

    def days(start: str, end: str) -> list[list[str]]:
        pages = [tenant.get("/v1/events/", **{start: first, end: last}) for first, last in pairwise(bounds)]
        return [[item["id"] for item in page["items"]] for page in pages]

    early, midnight, following = (tenant.id_of(name) for name in ("early", "midnight", "next"))
    assert days("since", "until") == [[early], [midnight], [following]]
    assert days("start_timestamp", "end_timestamp") == [[early], [], []]
    both = tenant.get("/v1/events/", since=bounds[1], start_timestamp=bounds[1], until=bounds[3])
    assert [item["id"] for item in both["items"]] == [following]
    both = tenant.get("/v1/events/", since=bounds[0], until=bounds[3], end_timestamp=bounds[1])
    assert [item["id"] for item in both["items"]] == [early]
    (name,) = tenant.get("/v1/events/names", since=bounds[1], until=bounds[2])["items"]
    assert name["occurrences"] == 1


def test_names_of_two_customers_mean_both(tenant: Tenant) -> None:
    """By id, by external id, or one of each: the events of either."""
    ann, bob = tenant.customer(external_id="ann"), tenant.customer(external_id="bob")
    for name in ("ann", "bob", "eve"):
        tenant.event(external_customer_id=name)
    for asked in ({"customer_id": [ann, bob]}, {"customer_id": ann, "external_customer_id": "bob"},
                  {"external_customer_id": ["ann", "bob"]}):  # fmt: skip
        assert tenant.get("/v1/events/", **asked)["pagination"]["total_count"] == 2
