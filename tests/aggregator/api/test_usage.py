"""How much was used, over HTTP: quantities, running totals and previews."""

import threading
from decimal import Decimal
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import pytest

from meters.catalogue.catalogue import Customer, CustomerCreated
from tests.conformance.cases import cases, same_number
from tests.conformance.differences import DIFFERENCES
from tests.support.records import NOW, line
from tests.support.servers.query_api import Tenant, exact

DAY = {"start_timestamp": "2026-02-01T00:00:00Z", "end_timestamp": "2026-02-01T00:00:00Z", "interval": "day"}
NEARLY_EVERYTHING = '{"tokens":99999999999999999999999999.999999999999}'
NAMED = {case["id"]: case for case in cases("quantities")}
LIMITS = {case["id"]: case for case in cases("quantities_limits")}


def customer_id(tenant: Tenant, name: str) -> str:
    """A UUID for the symbolic customer of a case."""
    return str(UUID(int=uuid5(NAMESPACE_URL, tenant.id + name).int, version=4))


def send_all(tenant: Tenant, case: dict[str, Any]) -> None:
    """The customers and events of a case."""
    for known in case["given"]["customers"]:
        made = Customer(
            id=customer_id(tenant, known["id"]),
            organization_id=tenant.id,
            external_id=known["external_id"],
            created_at=NOW,
        )
        tenant.server.decide(CustomerCreated(made))
    for entry in case["given"]["events"]:
        for _ in range(entry.get("repeat", 1)):
            event = entry.get("event", entry)
            who = {"customer_id": customer_id(tenant, event["customer"])} if event.get("customer") else {}
            if event.get("external_customer_id") is not None:
                who = {"external_customer_id": event["external_customer_id"]}
            tenant.send(nobodys(name=event["name"], timestamp=event["timestamp"], metadata=event["metadata"], **who))


def nobodys(**fields: Any) -> bytes:
    """An event for the customer that the fields name, and for nobody else."""
    sent = line(**fields)
    named = "external_customer_id" in fields
    return sent if named else sent.replace(b'"external_customer_id": "ann", ', b"")


@pytest.mark.parametrize("id", NAMED)
def test_quantities_are_polars(tenant: Tenant, id: str) -> None:
    """Every conformance case of quantities holds from the log to the answer, save for the declared differences."""
    case = NAMED[id]
    if any(event.get("event", event).get("source") == "system" for event in case["given"]["events"]):
        assert id not in DIFFERENCES  # system events are not ingested; the reference covers these cases
        return
    send_all(tenant, case)
    meter = tenant.meter(case["given"]["meter"]["filter"], **case["given"]["meter"]["aggregation"])
    params = dict(case["when"]["params"])
    params["customer_id"] = [customer_id(tenant, name) for name in params.get("customer_id") or ()]
    for key, value in (params.pop("metadata", None) or {}).items():
        params[f"metadata[{key}]"] = value
    answer = tenant.get(f"/v1/meters/{meter}/quantities", **{name: v for name, v in params.items() if v is not None})
    then = case["then"]
    ours = [*(point["quantity"] for point in answer["quantities"]), answer["total"]]
    theirs = [*then["quantities"], then["total"]]
    same = len(ours) == len(theirs) and all(map(same_number, map(Decimal, ours), theirs))
    assert same is (id not in DIFFERENCES), ours
    if "timestamps" in then:
        assert [point["timestamp"] for point in answer["quantities"]] == then["timestamps"]


@pytest.mark.parametrize("id", LIMITS)
def test_ranges_are_limited_as_polars_are(tenant: Tenant, id: str) -> None:
    """A range with too many intervals, or one that ends before it starts, is refused after the meter was found."""
    refusal = tenant.refusal("GET", f"/v1/meters/{tenant.meter()}/quantities", params=LIMITS[id]["when"]["params"])
    assert refusal == (422, "PolarRequestValidationError", [("value_error", ["query"])])


@pytest.mark.parametrize(
    ("end", "points"), [("2026-01-08T23:00:00-05:00", 7 * 24 + 1), ("2026-01-09T04:00:00+00:00", None)]
)
def test_days_are_counted_as_each_bound_is_written(tenant: Tenant, end: str, points: int | None) -> None:
    """Where it is still the eighth, a week ends; the same moment in UTC is of the ninth, a day too much."""
    asked = {"start_timestamp": "2026-01-01T23:00:00-05:00", "end_timestamp": end, "interval": "hour"}
    path = f"/v1/meters/{tenant.meter()}/quantities"
    if points is not None:
        assert len(tenant.get(path, **asked)["quantities"]) == points
    else:
        assert tenant.refusal("GET", path, params=asked)[0] == 422


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"timezone": "Mars/Olympus"}, ("value_error", ["query", "timezone"])),
        ({"timezone": "right/Europe/Berlin"}, ("value_error", ["query", "timezone"])),
        ({"interval": "minute"}, ("enum", ["query", "interval"])),
        ({"start_timestamp": "2026-02-01T00:00:00"}, ("timezone_aware", ["query", "start_timestamp"])),
        ({"customer_aggregation_function": "median"}, ("literal_error", ["query", "customer_aggregation_function"])),
        ({"customer_id": "x"}, ("uuid_parsing", ["query", "customer_id", 0])),
    ],
)
def test_a_question_without_sense_is_refused(
    tenant: Tenant, asked: dict[str, str], complaint: tuple[str, list[Any]]
) -> None:
    """A parameter that cannot be is named."""
    refusal = tenant.refusal("GET", f"/v1/meters/{tenant.meter()}/quantities", params=DAY | asked)
    assert refusal == (422, "RequestValidationError", [complaint])


def test_digits_survive_to_the_answer(tenant: Tenant) -> None:
    """Sums far beyond a double, and beyond a 38-digit decimal, are answered with every digit."""
    for text in (NEARLY_EVERYTHING, NEARLY_EVERYTHING, '{"tokens":0.1}'):
        tenant.event(metadata=text, timestamp=DAY["start_timestamp"])
    meter = tenant.meter(func="sum", property="tokens")
    answer = tenant.ask("GET", f"/v1/meters/{meter}/quantities", params=DAY)
    assert b'"total":200000000000000000000000000.099999999998}' in answer.content
    usage = tenant.get(f"/v1/meters/{meter}/usage", external_customer_id="ann")
    assert (usage["value"], usage["count"]) == ("200000000000000000000000000.099999999998", 3)


FUNCTIONS = {
    "count": "4",
    "sum": "3.3",
    "avg": "1.1",
    "min": "-0.1",
    "max": "2.4",
    "unique": "4",
}


@pytest.mark.parametrize("func", FUNCTIONS)
def test_a_customers_total_is_exact_and_joins_both_names(tenant: Tenant, func: str) -> None:
    """The total since the beginning is over events under either name, whether from memory or from the store."""
    id = tenant.customer(external_id="ann")
    tenant.event(metadata='{"tokens":2.4}')
    tenant.event(metadata='{"tokens":1}')
    tenant.event(metadata='{"tokens":"many"}')
    tenant.send(nobodys(customer_id=id, metadata='{"tokens":-0.1}'))
    tenant.event(external_customer_id="bob", metadata='{"tokens":1000}')
    meter = tenant.meter(func=func) if func == "count" else tenant.meter(func=func, property="tokens")
    for asked in ({"customer_id": id}, {"external_customer_id": "ann"}):
        usage = tenant.get(f"/v1/meters/{meter}/usage", **asked)
        assert (usage["value"], usage["meter_id"]) == (FUNCTIONS[func], meter)
    nobody = tenant.get(f"/v1/meters/{meter}/usage", external_customer_id="")
    assert (nobody["value"], nobody["count"], nobody["external_customer_id"]) == ("0", 0, "")


def test_charts_are_made_beside_the_event_loop(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calendar's arithmetic for a year takes milliseconds, in which everybody else would wait."""
    totals, where = tenant.server.aggregator.totals, list[int]()
    by_quarters = totals.by_quarters

    def watched(*asked: Any) -> Any:
        where.append(threading.get_ident())
        return by_quarters(*asked)

    meter = tenant.meter(func="sum", property="n")
    tenant.event(timestamp="2026-02-01T10:00:00Z", metadata={"n": 4})
    monkeypatch.setattr(totals, "by_quarters", watched)
    assert tenant.get(f"/v1/meters/{meter}/quantities", **DAY)["total"] == 4
    assert where
    assert threading.get_ident() not in where


def test_usage_asks_for_one_customer(tenant: Tenant) -> None:
    """Neither or both names is refused: whose total is meant would be a guess."""
    path = f"/v1/meters/{tenant.meter()}/usage"
    both = {"customer_id": tenant.id, "external_customer_id": "ann"}
    for params in ({}, both):
        refusal = tenant.refusal("GET", path, params=params)
        assert refusal == (422, "PolarRequestValidationError", [("value_error", ["query"])])


def test_a_preview_says_what_a_meter_would_say(tenant: Tenant) -> None:
    """Totals, customers and times of what would be counted, without a meter being made."""
    for hour, (who, tokens) in enumerate((("ann", 5), ("bob", 7.5), ("ann", 1))):
        tenant.event(external_customer_id=who, metadata={"tokens": tokens}, timestamp=f"2026-02-01T0{hour}:00:00Z")
    text = tenant.event(name="call", metadata={"tokens": "x"}, timestamp="2026-02-01T03:00:00Z")
    definition = {
        "filter": {"conjunction": "and", "clauses": []},
        "aggregation": {"func": "sum", "property": "tokens"},
    }
    assert tenant.post("/v1/meters/preview", definition) == {
        "total": Decimal("13.5"),
        "events": 3,
        "customers": 2,
        "first_seen": "2026-02-01T00:00:00Z",
        "last_seen": "2026-02-01T02:00:00Z",
        "top_customers": [
            {"customer_id": None, "external_customer_id": "bob", "quantity": Decimal("7.5")},
            {"customer_id": None, "external_customer_id": "ann", "quantity": 6},
        ],
        "unmatched": {
            "no_number": 1, "absent": 0,
            "example": {"event_id": text, "timestamp": "2026-02-01T03:00:00Z", "name": "call", "value": '"x"'},
        },
        "warnings": [
            "1 matching events of the last 7 days with events add nothing, because 'tokens' is not a number, such as "
            f'"x" in event {text}. Send the value as a number of JSON.'
        ],
    }
    assert tenant.get("/v1/meters/")["items"] == []


@pytest.mark.parametrize(("func", "value"), [("sum", 2), ("avg", 1), ("max", 7), ("unique", 2)])
def test_a_preview_knows_a_customer_under_both_names(tenant: Tenant, func: str, value: int) -> None:
    """As the meter does, once it is made: one customer, one value; whoever has one name stays apart."""
    zed = tenant.customer(external_id="zed")
    tenant.event(external_customer_id="zed", metadata={"tokens": -5})
    tenant.event(external_customer_id=None, customer_id=zed, metadata={"tokens": 7})
    tenant.event(external_customer_id="ann", metadata={"tokens": -9})
    definition = {
        "filter": {"conjunction": "and", "clauses": []},
        "aggregation": {"func": func, "property": "tokens"},
    }

    found = tenant.post("/v1/meters/preview", definition)

    assert found["customers"] == 2
    assert found["top_customers"][0] == {"customer_id": zed, "external_customer_id": "zed", "quantity": value}
    assert found["top_customers"][1]["external_customer_id"] == "ann"
    meter = tenant.post("/v1/meters/", definition | {"name": func})["id"]
    assert Decimal(tenant.get(f"/v1/meters/{meter}/usage", customer_id=zed)["value"]) == value


@pytest.mark.parametrize(
    ("func", "amounts", "largest"),
    [
        ("sum", {"whale": [10**20], "school": [2, 2]}, ["whale", "c9", "c8"]),
        ("avg", {"many": [1] * 50, "few": [40]}, ["few", "c9", "c8"]),
        ("min", {"deep": [50, -50], "flat": [10, 10]}, ["flat", "c9", "c8"]),
        ("max", {"peak": [50, -50], "flat": [9, 9]}, ["peak", "c9", "flat"]),
    ],
)
def test_a_preview_names_the_customers_with_the_largest_values(
    tenant: Tenant, func: str, amounts: dict[str, list[int]], largest: list[str]
) -> None:
    """By the meter's own value, however large one amount is, and however many events another customer has."""
    for who, tokens in ({f"c{number}": [number] for number in range(10)} | amounts).items():
        for each in tokens:
            tenant.event(external_customer_id=who, metadata={"tokens": each})
    filter = {"conjunction": "and", "clauses": []}

    found = tenant.post(
        "/v1/meters/preview", {"filter": filter, "aggregation": {"func": func, "property": "tokens"}}
    )

    assert [one["external_customer_id"] for one in found["top_customers"][:3]] == largest
    assert len(found["top_customers"]) == 10


@pytest.mark.parametrize(
    ("definition", "complaints"),
    [
        ({}, [("missing", ["body", "filter"]), ("missing", ["body", "aggregation"])]),
        ([], [("model_attributes_type", ["body"])]),
        (
            {"filter": 1, "aggregation": {"func": "median"}},
            [("model_attributes_type", ["body", "filter"]), ("union_tag_invalid", ["body", "aggregation"])],
        ),
    ],
)
def test_a_preview_of_nonsense_is_refused(
    tenant: Tenant, definition: Any, complaints: list[tuple[str, list[Any]]]
) -> None:
    """What would be refused as a meter is refused as a preview."""
    refusal = tenant.refusal("POST", "/v1/meters/preview", json=definition)
    assert refusal == (422, "RequestValidationError", complaints)


def test_usage_is_read_with_a_reading_token(tenant: Tenant) -> None:
    """Quantities, usage and previews change nothing, so reading is enough."""
    secret = tenant.token("meters:read")
    meter = tenant.meter()
    asked = tenant.ask("GET", f"/v1/meters/{meter}/quantities", params=DAY, secret=secret)
    assert exact(asked) == {"quantities": [{"timestamp": DAY["start_timestamp"], "quantity": 0}], "total": 0}
    assert tenant.ask("PATCH", f"/v1/meters/{meter}", json={}, secret=secret).status_code == 403
