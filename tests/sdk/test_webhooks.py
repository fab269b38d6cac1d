"""What is told is believed and read by Polar's own Python clients, of both generations."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregator.engine.change_events import review_of
from aggregator.store import webhook_outbox
from aggregator.webhooks.messages import messages_of
from aggregator.webhooks.sender import signed_headers
from tests.support.environments import interpreter, reported
from tests.support.polar.organization import Polar
from tests.support.servers.query_api import Server, Tenant, serving

VERIFIERS = {"0.32.0": "verify_0_32.py", "1.0.2": "verify_1_0.py"}


TIME_LIMIT = pytest.mark.timeout(1200)  # the first test may have to install both clients


@pytest.fixture
def tenant(tmp_path: Path) -> Iterator[Tenant]:
    """A tenant on a server whose clock is right, because clients look at theirs."""
    for version in VERIFIERS:
        interpreter(version)  # may take minutes, in which a signature would grow too old
    with serving(tmp_path) as server:
        server.now = datetime.now(UTC)
        yield server.tenant()


def delivery(tenant: Tenant) -> dict[str, object]:
    """What is told of the customer who moved last: body, headers, secret."""
    server: Server = tenant.server
    with server.aggregator.outbox() as connection:
        causes = [cause for cause in webhook_outbox.take_causes(connection) if review_of(cause) is None]
    telling = server.run(messages_of(server.app.state.desk, causes, server.now.replace(tzinfo=None)))
    message = telling.messages[-1]
    endpoint = server.aggregator.catalogue.webhooks.endpoints[message.endpoint_id]
    headers = signed_headers(endpoint, message, server.now)
    return {"body": message.body, "headers": headers, "secret": endpoint.secrets[0].value}


@TIME_LIMIT
def test_clients_of_polar_believe_and_read_a_webhook(tenant: Tenant) -> None:
    """The signature is one that each takes, and the payload has all that it insists on."""
    tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/", "events": ["customer.state_changed"]})
    customer, meter = tenant.customer(external_id="bob"), tenant.meter()
    properties = {"meter_id": meter, "units": 50, "rollover": False}
    body = {"type": "meter_credit", "description": "Units", "properties": properties}
    benefit = tenant.post("/v1/benefits/", body)["id"]
    tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": customer})
    told = delivery(tenant)
    assert [reported(version, script, told) for version, script in VERIFIERS.items()] == [["bob", 50, 50, []]] * 2


@TIME_LIMIT
def test_a_subscription_is_read_too(tenant: Tenant) -> None:
    """By the older client; the newer one has the states of license keys for those of subscriptions, and reads none."""
    tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/", "events": ["customer.state_changed"]})
    polar = Polar(tenant)
    polar.mirrored_meter()
    polar.deliver("benefit_grant.created", polar.grant(tenant.server.now), "1")
    polar.deliver("subscription.created", polar.subscription(tenant.server.now - timedelta(days=1)), "2")
    assert reported("0.32.0", VERIFIERS["0.32.0"], delivery(tenant)) == ["ann", 100, 100, ["product"]]
