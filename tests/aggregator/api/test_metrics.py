"""Costs and customers over HTTP, against Polar's cases and the calendar."""

from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from aggregator.api.metrics import days
from meters.timestamps import Interval, units
from tests.aggregator.api.test_usage import customer_id, nobodys, send_all
from tests.conformance.cases import cases, same_number
from tests.support.servers.query_api import Tenant

CASES = {case["id"]: case for case in cases("metrics")}
JANUARY = {"start_date": "2024-01-01", "end_date": "2024-01-31", "interval": "month"}


def spend(tenant: Tenant, cost: object, timestamp: str, **who: str) -> None:
    """An event that cost something."""
    metadata = {"_cost": {"amount": str(cost), "currency": "usd"}}
    tenant.send(nobodys(metadata=metadata, timestamp=timestamp, **who))


@pytest.mark.parametrize("id", CASES)
def test_metrics_are_polars(tenant: Tenant, id: str) -> None:
    """Every conformance case of metrics holds; numbers that need subscriptions are not compared."""
    params = CASES[id]["when"]["params"]
    send_all(tenant, {"given": {"customers": params.get("customers", ()), "events": ()}})
    for event in params["events"]:
        external = {"external_customer_id": event["external_customer_id"]} if "external_customer_id" in event else {}
        who = external or {"customer_id": customer_id(tenant, event["customer"])}
        spend(tenant, event["cost"], event["timestamp"], **who)
    asked = {name: params[name] for name in ("start_date", "end_date", "interval")}
    asked["customer_id"] = [customer_id(tenant, name) for name in params.get("customer_id", ())]
    answer = tenant.get("/v1/metrics/", **asked)
    then = CASES[id]["then"]
    assert len(answer["periods"]) == len(then["periods"])
    expected = [*then["periods"], then.get("totals", {})]
    for ours, theirs in zip([*answer["periods"], answer["totals"]], expected, strict=True):
        assert all(same_number(Decimal(ours[slug]), number) for slug, number in theirs.items()), (ours, theirs)


def test_costs_accumulate_from_the_beginning_and_are_cut_to_the_range(tenant: Tenant) -> None:
    """Cumulative costs include history; a period's own value only what lies within the dates, in local time."""
    spend(tenant, "0.1", "2020-05-05T00:00:00Z", external_customer_id="ann")
    spend(tenant, "0.2", "2024-01-09T22:59:59Z", external_customer_id="ann")  # still 9 January in Berlin
    spend(tenant, "0.000000000001", "2024-01-09T23:00:00Z", external_customer_id="bob")
    spend(tenant, "4", "2024-02-01T00:00:00Z", external_customer_id="bob")
    asked = JANUARY | {"start_date": "2024-01-10", "timezone": "Europe/Berlin"}
    answer = tenant.get("/v1/metrics/", **asked)
    assert answer["periods"] == [
        {
            "timestamp": "2023-12-31T23:00:00Z",
            "costs": Decimal("0.000000000001"),
            "cumulative_costs": Decimal("0.300000000001"),
            "active_user_by_event": 1,
            "cost_per_user": Decimal("0.000000000001"),
        }
    ]
    assert answer["totals"]["cumulative_costs"] == Decimal("0.300000000001")


def test_only_what_is_asked_for_and_known_is_answered(tenant: Tenant) -> None:
    """Metrics that need revenue are absent, others come when they are named, and unknown names are refused."""
    answer = tenant.get("/v1/metrics/", **JANUARY, metrics=["costs", "gross_margin"])
    assert answer == {
        "periods": [{"timestamp": "2024-01-01T00:00:00Z", "costs": 0}],
        "totals": {"costs": 0},
        "metrics": {"costs": {"slug": "costs", "display_name": "Costs", "type": "currency_sub_cent"}},
    }
    refusal = tenant.refusal("GET", "/v1/metrics/", params=JANUARY | {"metrics": "happiness"})
    assert refusal == (422, "PolarRequestValidationError", [("value_error", ["query", "metrics"])])


def test_limits_of_metrics(tenant: Tenant) -> None:
    """The limits are Polar's, and are kept."""
    answer = tenant.get("/v1/metrics/limits")
    assert answer["min_date"] == "2023-01-01"
    assert answer["intervals"]["week"] == {"min_days": 14, "max_days": 371}
    for asked, message in (
        ({"interval": "hour"}, "The interval is too small"),
        ({"start_date": "2022-12-31"}, "start_date should be 2023-01-01 or later"),
        ({"end_date": "9999-12-31"}, "end_date should be "),
        ({"end_date": "2023-12-31"}, "start_date should be before end_date"),
    ):
        response = tenant.ask("GET", "/v1/metrics/", params=JANUARY | asked)
        assert (response.status_code, response.json()["detail"][0]["msg"][: len(message)]) == (422, message)


@pytest.mark.parametrize("timezone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
@pytest.mark.parametrize("interval", Interval)
def test_periods_cover_the_days_without_gaps(interval: Interval, timezone: str) -> None:
    """The parts of all periods follow one another from the first midnight to the last, across changing clocks."""
    start, end = days(date(2026, 3, 25), date(2026, 4, 8), timezone)
    found = [(begins, (max(begins, start), min(ends, end))) for begins, ends in units(start, end, interval, timezone)]
    bounds = [part for _, part in found]
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert all(begins <= part[0] for begins, part in found)
    hours = (bounds[-1][1] - bounds[0][0]).total_seconds() / 3600
    assert abs(hours - 15 * 24) <= 1
    assert bounds[0][0] <= datetime(2026, 3, 25, 12, tzinfo=UTC)


def test_a_half_open_range_of_costs_is_cut_to_the_second(tenant: Tenant) -> None:
    """From ``since`` until before ``until``, beside Polar's days; what was before is in the cumulative costs."""
    for cost, when in ((1, "2024-01-10T11:59:59Z"), (2, "2024-01-10T12:00:00Z"), (4, "2024-01-11T06:29:59Z"),
                       (8, "2024-01-11T06:30:00Z")):  # fmt: skip
        spend(tenant, cost, when, external_customer_id="ann")
    asked = {"since": "2024-01-10T12:00:00Z", "until": "2024-01-11T06:30:00Z", "interval": "day"}
    answer = tenant.get("/v1/metrics/", **asked, metrics=["costs", "cumulative_costs", "active_user_by_event"])
    assert answer["periods"] == [
        {"timestamp": "2024-01-10T00:00:00Z", "costs": 2, "cumulative_costs": 3, "active_user_by_event": 1},
        {"timestamp": "2024-01-11T00:00:00Z", "costs": 4, "cumulative_costs": 7, "active_user_by_event": 1},
    ]
    assert answer["totals"]["costs"] == 6
    both = tenant.get("/v1/metrics/", start_date="2024-01-10", end_date="2024-01-11", interval="day",
                      since="2024-01-10T12:00:00Z", metrics=["costs"])  # fmt: skip
    assert both["totals"]["costs"] == 14


@pytest.mark.parametrize(
    ("asked", "complaints"),
    [
        ({}, [("missing", ["query", "start_date"]), ("missing", ["query", "end_date"])]),
        ({"since": "2024-01-10T00:00:00Z"}, [("missing", ["query", "until"])]),
        ({"since": "2024-01-10T00:00:00Z", "until": "2024-01-10T00:00:00Z"}, [("value_error", ["query"])]),
        ({"since": "2024-01-11T00:00:00Z", "until": "2024-01-10T00:00:00Z"}, [("value_error", ["query"])]),
        (JANUARY | {"since": "2024-02-01T00:00:00Z"}, [("value_error", ["query"])]),
        ({"since": "2024-01-10T00:00:00Z", "end_date": "2024-01-11"}, [("missing", ["query", "start_date"])]),
    ],
)
def test_one_whole_range_of_costs_is_needed(tenant: Tenant, asked: dict[str, str], complaints: list[Any]) -> None:
    """Dates or instants, both ends of the same kind."""
    refusal = tenant.refusal("GET", "/v1/metrics/", params={"interval": "day"} | asked)
    assert (refusal[0], refusal[2]) == (422, complaints)
