"""Requests that Polar's own clients sent, byte for byte, are taken here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from meters.catalogue.catalogue import Customer, CustomerCreated
from tests.support.servers.gateway import CREATED, RunningGateway
from tests.support.waiting import eventually

RECORDED = Path(__file__).parents[2] / "conformance" / "sdk-requests.jsonl"
CUSTOMER = "00000000-0000-4000-8000-000000000003"  # the one that the recorded events name
LEFT_TO_THE_CLIENT = {"authorization", "content-length", "connection"}


def ingestions() -> list[dict[str, Any]]:
    """The recorded requests that ingest; those to a path that was made to fail are sent to the real one."""
    requests = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    return [request for request in requests if request["path"].endswith("/v1/events/ingest")]


@pytest.fixture(scope="module")
def gateway() -> Any:
    """A gateway that knows the recorded customer."""
    with RunningGateway() as running:
        running.decide(CustomerCreated(Customer(
            id=CUSTOMER, organization_id=running.organization_id, created_at=CREATED
        )))  # fmt: skip
        eventually(lambda: CUSTOMER in running.gateway.tail.catalogue.customers)
        yield running


def test_there_are_requests_of_both_generations() -> None:
    """Python clients of the 0.x and of the 1.x line are among them."""
    agents = {request["headers"]["user-agent"].partition("/")[0] for request in ingestions()}
    assert agents == {"speakeasy-sdk", "python-httpx"}


@pytest.mark.parametrize("request_", ingestions(), ids=lambda request: request["headers"]["user-agent"][:20])
def test_an_ingestion_of_a_client_is_taken(gateway: RunningGateway, request_: dict[str, Any]) -> None:
    """200, every event counted, and the version echoed that the client asked for."""
    # The clock of whoever runs this may be behind the recording's.
    content = re.sub(r"2026-11-(\d\d)T", r"2020-11-\1T", json.dumps(request_["body"])).encode()
    headers = {name: value for name, value in request_["headers"].items() if name not in LEFT_TO_THE_CLIENT}
    answer = gateway.client.post("/v1/events/ingest", content=content, headers=headers | gateway.authorization)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"inserted": len(request_["body"]["events"]), "duplicates": 0}
    assert answer.headers["polar-version"] == headers.get("polar-version", "2026-04")
