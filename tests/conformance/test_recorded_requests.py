"""Requests as Polar's own clients sent them are answered as Polar answers them.

Each is sent twice: by the tenant whose customer and meter it names, and by one that has nothing, to whom the same ids
must mean nothing.
"""

from collections import Counter

import pytest

from tests.conformance.conftest import World
from tests.conformance.recorded import Recorded, recorded

NOT_FOUND = {"error": "ResourceNotFound", "detail": "Not found"}

EXPECTED = {
    "POST /v1/events/ingest": (200, {"inserted", "duplicates"}),
    "GET /v1/events/": (200, {"items", "pagination"}),
    "GET /v1/events/{id}": (404, NOT_FOUND.keys()),  # the recording's event is nowhere
    "GET /v1/events/names": (200, {"items", "pagination"}),
    "POST /v1/meters/": (201, {"id", "created_at", "modified_at", "name", "unit", "filter", "aggregation",
                               "metadata", "organization_id"}),
    "GET /v1/meters/": (200, {"items", "pagination"}),
    "GET /v1/meters/{id}/quantities": (200, {"quantities", "total"}),
    "GET /v1/metrics/limits": (200, {"min_date", "intervals"}),
    "GET /v1/metrics/": (200, {"periods", "totals", "metrics"}),
    "GET /v1/customer-meters/": (200, {"items", "pagination"}),
    "GET /v1/customers/external/u1/state": (200, {"id", "active_subscriptions", "granted_benefits", "active_meters"}),
}  # fmt: skip
"""Status, and what the body must at least have."""

REQUESTS = recorded()
each = pytest.mark.parametrize("sent", REQUESTS, ids=[f"{n}-{sent.route}" for n, sent in enumerate(REQUESTS)])


def test_the_recording_has_every_route_that_is_expected() -> None:
    """Forty requests of two generations of clients; no expectation is idle."""
    assert len(REQUESTS) == 40
    assert {sent.route for sent in REQUESTS} == EXPECTED.keys()
    assert set(Counter(sent.headers["user-agent"] for sent in REQUESTS)) == {
        "speakeasy-sdk/python 0.32.0 2.737.0 2026-04 polar-sdk", "python-httpx/0.28.1",
    }  # fmt: skip


@each
def test_a_recorded_request_is_answered_as_polar_would(sent: Recorded, world: World) -> None:
    """The status and the fields of Polar's answer, in the version of the API that was asked for."""
    answer = world.known.ask(sent.method, sent.target, headers=sent.headers, content=sent.content)
    assert answer.headers["polar-version"] == sent.headers.get("polar-version", "2026-04")
    status, fields = EXPECTED[sent.route]
    assert answer.status_code == status, answer.text
    assert answer.json().keys() >= fields


@each
def test_ids_of_another_tenant_mean_nothing(sent: Recorded, world: World) -> None:
    """Who does not own the customer or the meter hears that there is none, and learns nothing else."""
    answer = world.stranger.ask(sent.method, sent.target, headers=sent.headers, content=sent.content)
    if sent.route.endswith(("/quantities", "/state")):
        assert (answer.status_code, answer.json()) == (404, NOT_FOUND)
    elif any("customer_id" in event for event in sent.events):
        (entry,) = answer.json()["detail"]
        assert (answer.status_code, entry["type"], entry["msg"]) == (422, "customer_id", "Customer not found.")
        assert entry["loc"][:2] == ["body", "events"]
    else:
        status, _ = EXPECTED[sent.route]
        assert answer.status_code == status, answer.text
