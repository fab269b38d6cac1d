"""What is told is believed and read by Polar's own Python clients, of both generations."""

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aggregator.messages import messages_of
from aggregator.sender import signed_headers
from aggregator.webhooks import outbox
from tests.aggregator.serving import Server, Tenant, serving
from tests.sdk.interpreters import interpreter

VERIFIERS = {"0.32.0": "verify_0_32.py", "1.0.2": "verify_1_0.py"}


@pytest.fixture(scope="module")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    """A tenant on a server whose clock is right, because clients look at theirs."""
    with serving(tmp_path_factory.mktemp("webhooks")) as server:
        server.now = datetime.now(UTC)
        yield server.tenant()


@pytest.fixture(scope="module")
def delivery(tenant: Tenant) -> dict[str, object]:
    """A state that is told of a customer with 50 units: body, headers, secret."""
    server: Server = tenant.server
    made = tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/", "events": ["customer.state_changed"]})
    customer, meter = tenant.customer(external_id="ann"), tenant.meter()
    properties = {"meter_id": meter, "units": 50, "rollover": False}
    body = {"type": "meter_credit", "description": "Units", "properties": properties}
    benefit = tenant.post("/v1/benefits/", body)["id"]
    tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": customer})
    with server.aggregator.outbox() as connection:
        causes = outbox.take_causes(connection)
    telling = server.run(messages_of(server.app.state.desk, causes, server.now.replace(tzinfo=None)))
    (message,) = telling.messages
    endpoint = server.aggregator.catalogue.webhooks.endpoints[made["id"]]
    headers = signed_headers(endpoint, message, server.now)
    return {"body": message.body, "headers": headers, "secret": made["secret"]}


@pytest.mark.timeout(1200)  # the first test may have to install both clients
@pytest.mark.parametrize("version", VERIFIERS)
def test_a_client_of_polar_believes_and_reads_a_webhook(delivery: dict[str, object], version: str) -> None:
    """The signature is one that it takes, and the payload has all that it insists on."""
    done = subprocess.run(
        [interpreter(version), Path(__file__).parent / VERIFIERS[version]], input=json.dumps(delivery),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["ann", 50, 50]
