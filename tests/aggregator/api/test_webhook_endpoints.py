"""Lists of webhook endpoints and of what was delivered: which of them are asked for."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from aggregator.store import webhook_outbox
from meters.webhooks import EVENT_TYPES
from tests.support.servers.query_api import Server, Tenant

LETTERS = str.maketrans("0123456789", "ghijklmnop")
HOOKS = [f"00000000-0000-4000-8000-{number:012d}" for number in (901, 902)]


@pytest.fixture
def log_of_four(tenant: Tenant) -> Tenant:
    """A tenant with four attempts, a minute apart: 200 and 500 of states, 404 and silence of thresholds."""
    ours = tenant.id.translate(LETTERS)  # ids that hold no digits, in which a search for "50" finds codes alone
    noon = datetime(2026, 3, 1, 12)  # noqa: DTZ001 (as the store writes times)
    with tenant.server.aggregator.outbox() as connection:
        for number, status in enumerate((200, 500, 404, None)):
            type, at = EVENT_TYPES[number // 2], noon + timedelta(minutes=number)
            message = webhook_outbox.Message(
                f"{ours}-Message-{number}", HOOKS[number % 2], tenant.id, type, "ann", "{}", at, at, at
            )
            tried = webhook_outbox.Attempt(
                f"{ours}-try-{number}", message.id, message.endpoint_id, tenant.id, 1, at, 1, status, "answered"
            )
            webhook_outbox.put_messages(connection, [message], [])
            webhook_outbox.mark(connection, [message._replace(status="failed", settled_at=at)], [tried])
    return tenant


@pytest.mark.parametrize(
    ("asked", "codes"),
    [
        ({}, [None, 404, 500, 200]),
        ({"endpoint_id": HOOKS[0]}, [404, 200]),
        ({"endpoint_id": HOOKS}, [None, 404, 500, 200]),
        ({"succeeded": True}, [200]),
        ({"succeeded": False}, [None, 404, 500]),
        ({"http_code_class": "4xx"}, [404]),
        ({"event_type": "meter.threshold_reached"}, [None, 404]),
        ({"event_type": EVENT_TYPES}, [None, 404, 500, 200]),
        ({"start_timestamp": "2026-03-01T12:00:00Z", "end_timestamp": "2026-03-01T14:03:00+02:00"}, [404, 500]),
        ({"query": "50"}, [500]),
        ({"query": "message-3"}, [None]),
        ({"query": "TRY-0"}, [200]),
        ({"query": "%"}, []),
        ({"succeeded": False, "endpoint_id": HOOKS[1], "event_type": "customer.state_changed"}, [500]),
    ],
)
def test_the_log_of_deliveries_is_narrowed_down_as_in_polar(
    log_of_four: Tenant, asked: dict[str, Any], codes: list[int | None]
) -> None:
    """By endpoint, times (both exclusive), success, class of the code, type, and text of ids and codes."""
    page = log_of_four.get("/v1/webhooks/deliveries", **asked)
    assert [one["http_code"] for one in page["items"]] == codes
    assert page["pagination"]["total_count"] == len(codes)


@pytest.mark.parametrize(
    "asked",
    ["endpoint_id=x", "succeeded=banana", "start_timestamp=x", "end_timestamp=2026-03-01", "http_code_class=6xx",
     "event_type=order.paid"],
)  # fmt: skip
def test_a_filter_of_deliveries_that_makes_no_sense_is_refused(tenant: Tenant, asked: str) -> None:
    """It is named, like a type of which nobody is told here."""
    status, _, ((_, place), *_) = tenant.refusal("GET", f"/v1/webhooks/deliveries?{asked}")
    assert (status, place[:2]) == (422, ["query", asked.partition("=")[0]])


def test_endpoints_of_another_organization_are_none(server: Server, tenant: Tenant) -> None:
    """Who asks for them by ``organization_id`` gets no others."""
    tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/"})
    counts = [
        tenant.get("/v1/webhooks/endpoints", organization_id=asked)["pagination"]["total_count"]
        for asked in (tenant.id, server.tenant().id, [server.tenant().id, tenant.id])
    ]
    assert counts == [1, 0, 1]
