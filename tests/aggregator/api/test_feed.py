"""The feed gives every counted event once, in the order of the log, in a form that can be ingested elsewhere."""

import json
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from aggregator.store.queries import feed
from meters.log import format_places, parse_places
from tests.support.records import NOW, line
from tests.support.servers.query_api import Tenant

AT = "2026-02-01T10:00:30Z"


def read(tenant: Tenant, position: str = "", **params: Any) -> list[dict[str, Any]]:
    """Everything from a position on, page by page."""
    found: list[dict[str, Any]] = []
    end = tenant.get("/readyz")["as_of"]["0"]
    while parse_places(position) != {0: (end, 0)}:
        page = tenant.get("/v1/feed/", position=position, **params)
        found += page["items"]
        if page["position"] == position:
            break
        position = page["position"]
    return found


def ids(items: list[dict[str, Any]]) -> list[str]:
    """Their external ids."""
    return [item["event"]["external_id"] for item in items]


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_every_counted_event_is_there_once_in_order(tenant: Tenant, limit: int) -> None:
    """Whatever the size of the pages: no repetition, no conflict, nothing of another tenant, the log's order."""
    other = tenant.server.tenant()
    for record in range(5):
        tenant.send(*(line(f"{record}-{number}") for number in range(3)), line("0-0"))
        other.send(line(f"theirs-{record}"))
    tenant.send(line("0-1", name="contradiction"))
    assert ids(read(tenant, limit=limit)) == [f"{record}-{number}" for record in range(5) for number in range(3)]


def test_a_page_is_bounded_in_bytes(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page ends before it gets too large, and the next goes on behind its last event."""
    monkeypatch.setattr(feed, "PAGE_BYTES_MAX", 250)
    tenant.send(*(line(f"e{n}", metadata={"text": "x" * 100}) for n in range(6)))
    first = tenant.get("/v1/feed/")
    assert ids(first["items"]) == ["e0", "e1"]
    assert ids(read(tenant)) == [f"e{n}" for n in range(6)]


def test_events_are_selected_by_name_meter_filter_and_time(tenant: Tenant) -> None:
    """All that is asked for must hold, also over spans of the log in which nothing is wanted."""
    meter = tenant.meter({"conjunction": "and", "clauses": [{"property": "m", "operator": "eq", "value": "a"}]})
    for n in range(150):  # more records than the first span
        tenant.send(line(f"e{n}", name="call" if n % 2 else "other", metadata={"m": "a" if n > 140 else "b"}))
    tenant.send(line("late", timestamp=AT, metadata={"m": "a"}))
    assert ids(read(tenant, name="call", meter_id=meter)) == ["e141", "e143", "e145", "e147", "e149", "late"]
    clause = {"conjunction": "and", "clauses": [{"property": "m", "operator": "ne", "value": "b"}]}
    assert len(read(tenant, filter=json.dumps(clause))) == 10
    assert ids(read(tenant, start_timestamp=AT, end_timestamp="2026-02-01T10:00:31Z")) == ["late"]


def test_an_event_is_said_as_it_can_be_said_elsewhere(tenant: Tenant) -> None:
    """Time is stated, numbers keep their digits; customers go by external id and parents too, where there is one."""
    known, unnamed = tenant.customer(external_id="ada"), tenant.customer()
    tenant.send(line("root", metadata='{"a":1.10,"b":12345678901234567890,"_cost":{"amount":"0.1","currency":"usd"}}'))
    plain = {"name": "call", "external_customer_id": None}
    tenant.send(line("child", parent_id=tenant.id_of("root"), **plain, customer_id=known, member_id=known))
    tenant.send(line("other", parent_id="root", timestamp=AT, **plain, customer_id=unnamed, member_id=known))
    assert tenant.ask("DELETE", f"/v1/customers/{known}").is_success
    root, child, other = (item["event"] for item in read(tenant))
    assert str(root["metadata"]["a"]) == "1.10"
    assert root["timestamp"] == NOW.isoformat().replace("+00:00", "Z")
    assert root["metadata"]["b"] == 12345678901234567890
    assert (child["external_customer_id"], child["parent_id"], "member_id" in child) == ("ada", "root", False)
    assert (other["customer_id"], other["parent_id"], other["member_id"]) == (unnamed, "root", known)
    assert other["timestamp"] == AT


def test_the_backlog_is_what_a_reader_has_not_read(tenant: Tenant) -> None:
    """Its size and the age of its oldest event, for the same selection."""
    tenant.send(*(line(f"e{n}", name="a" if n < 4 else "b") for n in range(10)))
    assert tenant.get("/v1/feed/backlog")["events"] == 10
    position = tenant.get("/v1/feed/", limit=3)["position"]
    left = tenant.get("/v1/feed/backlog", position=position, name="a")
    assert (left["events"], left["oldest_ingested_at"]) == (1, NOW.isoformat().replace("+00:00", "Z"))
    end = tenant.get("/v1/feed/")["position"]
    assert tenant.get("/v1/feed/backlog", position=end) == {"events": 0, "oldest_ingested_at": None}


def test_a_rollup_adds_up_each_window_between_two_places(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """By meter, customer and window; pieces of any size add up to the whole; what is not yet due is not in it."""
    total, calls = tenant.meter(func="sum", property="n"), tenant.meter()
    for n in range(12):
        stamp = f"2026-02-01T10:0{n % 3}:30Z"
        tenant.send(line(f"e{n}", timestamp=stamp, external_customer_id=f"c{n % 2}", metadata=f'{{"n":{n}.1}}'))
    asked = {"meter_id": [total, calls], "before": (NOW + timedelta(seconds=1)).isoformat()}
    assert tenant.get("/v1/feed/rollup", **asked | {"before": NOW.isoformat()})["items"] == []
    whole = tenant.get("/v1/feed/rollup", **asked)["items"]
    assert len(whole) == 12
    first = {"meter_id": total, "external_customer_id": "c0", "window": "2026-02-01T10:00:00Z", "count": 2}
    assert whole[0] == first | {"sum": Decimal("6.2")}
    monkeypatch.setattr(feed, "ROLLUP_EVENTS_MAX", 5)
    position, pieces = "", []
    while (page := tenant.get("/v1/feed/rollup", **asked, position=position))["position"] != position:
        pieces += page["items"]
        position = page["position"]
    assert len(pieces) > len(whole)
    for meter in (total, calls):
        assert sum(p["count"] for p in pieces if p["meter_id"] == meter) == 12
    assert sum(p["sum"] for p in pieces if p["meter_id"] == total) == Decimal("67.2")


@pytest.mark.parametrize("meters", [1, 3])
def test_an_answer_of_a_rollup_has_so_many_sums_at_most(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, meters: int
) -> None:
    """Of customers without number it ends early, inside a record if need be; the pieces add up to all of them."""
    ids = [tenant.meter(func="sum", property="n") for _ in range(meters)]
    for record in range(3):
        names = [f"c{record}-{n}" for n in range(7)]
        tenant.send(*(line(name, timestamp=AT, external_customer_id=name, metadata='{"n":1}') for name in names))
    monkeypatch.setattr(feed, "ROLLUP_GROUPS_MAX", 4 * meters)
    asked = {"meter_id": ids, "before": (NOW + timedelta(seconds=1)).isoformat()}

    position, pieces = "", []
    while (page := tenant.get("/v1/feed/rollup", **asked, position=position))["position"] != position:
        assert 0 < len(page["items"]) <= 4 * meters
        pieces += page["items"]
        position = page["position"]

    sums = [(piece["meter_id"], piece["external_customer_id"], piece["sum"]) for piece in pieces]
    customers = [f"c{record}-{n}" for record in range(3) for n in range(7)]
    assert sorted(sums) == sorted((id, customer, 1) for id in ids for customer in customers)


def test_a_rollup_of_many_meters_reads_fewer_events(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each meter reads them: the answer covers only as many as all together may read."""
    ids = [tenant.meter() for _ in range(3)]
    tenant.send(*(line(f"e{n}", timestamp=AT) for n in range(9)))
    monkeypatch.setattr(feed, "ROLLUP_READS_MAX", 12)
    asked = {"meter_id": ids, "before": (NOW + timedelta(seconds=1)).isoformat()}
    assert [item["count"] for item in tenant.get("/v1/feed/rollup", **asked)["items"]] == [4, 4, 4]


def test_a_customer_of_two_names_is_rolled_up_as_one(tenant: Tenant) -> None:
    """Named by its id and by its external id: to whoever reads, one customer with one sum."""
    meter, known = tenant.meter(func="sum", property="n"), tenant.customer(external_id="ada")
    by_id = {"external_customer_id": None, "customer_id": known}
    tenant.send(line("a", timestamp=AT, external_customer_id="ada", metadata='{"n":0.1}'))
    tenant.send(line("b", timestamp=AT, metadata='{"n":0.2}', **by_id))
    (one,) = tenant.get("/v1/feed/rollup", meter_id=meter, before=(NOW + timedelta(seconds=1)).isoformat())["items"]
    assert (one["external_customer_id"], one["count"], one["sum"]) == ("ada", 2, Decimal("0.3"))


def test_customers_are_named_by_how_many_events_they_have(tenant: Tenant) -> None:
    """Most first, as many as are asked for, of what is selected; and how many there are altogether."""
    known = tenant.customer(external_id="ada")
    tenant.send(*(line(f"b{n}", external_customer_id="bob", timestamp=AT) for n in range(3)))
    position = tenant.get("/v1/feed/")["position"]
    tenant.send(line("other", name="other", external_customer_id="cem"))
    tenant.send(*(line(f"a{n}", external_customer_id=None, customer_id=known) for n in range(2)))
    by_events = [("bob", 3), ("ada", 2), ("cem", 1)]

    found, first = tenant.get("/v1/feed/customers"), tenant.get("/v1/feed/customers", limit=1)
    selected = tenant.get("/v1/feed/customers", name="call", position=position)

    assert [(row["external_customer_id"], row["events"]) for row in found["items"]] == by_events
    assert (len(first["items"]), first["count"]) == (1, 3)
    assert [row["external_customer_id"] for row in selected["items"]] == ["ada"]
    assert tenant.get("/v1/feed/customers", name="nothing") == {"items": [], "count": 0}


def test_traffic_says_what_a_rollup_would_make_of_it(tenant: Tenant) -> None:
    """Events, bytes and the busiest minute since an instant, and the customers and windows of each meter."""
    meter = tenant.meter()
    tenant.send(*(line(f"e{n}", timestamp=AT, external_customer_id=f"c{n % 2}") for n in range(10)))
    answer = tenant.get("/v1/feed/traffic", since=NOW.isoformat(), rollup_meter_id=meter)
    assert (answer["events"], answer["busiest_minute"]) == (10, 10)
    assert answer["rollups"] == [{"meter_id": meter, "events": 2}]
    assert tenant.get("/v1/feed/traffic", since=(NOW + timedelta(days=1)).isoformat())["events"] == 0


@pytest.mark.parametrize("text", ["x", "1:2", "0:1:2,0:1:3", "0:-1:2", "0:1:٣"])
def test_a_position_is_checked(tenant: Tenant, text: str) -> None:
    """What is no position is a 422 that says so."""
    expected = (422, "RequestValidationError", [("value_error", ["query", "position"])])
    assert tenant.refusal("GET", "/v1/feed/", params={"position": text}) == expected
    assert format_places(parse_places("1:7:2,0:18:3") or {}) == "0:18:3,1:7:2"


def test_a_half_open_range_of_the_feed(tenant: Tenant) -> None:
    """``since`` and ``until`` mean the same as in lists of events; with the timestamps, both hold."""
    for day in range(1, 5):
        tenant.send(line(f"e{day}", timestamp=f"2026-02-0{day}T00:00:00Z"))
    between = {"since": "2026-02-02T00:00:00Z", "until": "2026-02-04T00:00:00Z"}
    assert ids(read(tenant, **between)) == ["e2", "e3"]
    assert ids(read(tenant, **between, start_timestamp="2026-02-03T00:00:00Z")) == ["e3"]
    assert ids(read(tenant, **between, end_timestamp="2026-02-03T00:00:00Z")) == ["e2"]
    assert tenant.get("/v1/feed/backlog", **between)["events"] == 2
