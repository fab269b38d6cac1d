"""The OpenAPI document tells the truth: requests made up from it get the answers it promises, and never a 500."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from aggregator.api import create_app, openapi
from aggregator.api.openapi import _page, _prose
from tests.aggregator.api.every_route import deliver
from tests.support.servers.query_api import Server, Tenant

DOCUMENT: Any = create_app(None, None, None).openapi()  # type: ignore[arg-type]  # nothing is asked of them
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {
    f"{method.upper()} {path}": SCHEMA[path][method]
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
    if path.startswith("/v1") and path != openapi.PATH  # which the gateway answers
}
PORTAL = [(name, "customer") for name in OPERATIONS if "customer-portal" in name]
"""What a customer's token opens; that it opens nothing else is in test_isolation."""
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
SHORT = settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),  # the schemas' generators are slow and wasteful, and not ours to mend
)


@pytest.fixture(scope="module")
def full(server: Server) -> Tenant:
    """A tenant with something of everything, so that answers have items."""
    tenant = server.tenant()
    customer = tenant.customer(external_id="ann", name="Ann", metadata={"plan": "free", "seats": 3})
    meter = tenant.meter(func="sum", property="tokens")
    properties = {"meter_id": meter, "units": 5, "rollover": True}
    body = {"type": "meter_credit", "description": "Units", "properties": properties}
    tenant.post(f"/v1/benefits/{tenant.post('/v1/benefits/', body)['id']}/grants", {"customer_id": customer})
    deliver(tenant, tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/"})["id"], customer)
    tenant.event("root", metadata='{"tokens":1.5,"_cost":{"amount":"0.1","currency":"usd"}}')
    tenant.event("child", metadata='{"tokens":2}', parent_id="root")
    tenant.send(b"{", admitted=False)
    return tenant


def test_what_takes_metadata_says_so() -> None:
    """A client that is made from the document can filter by metadata wherever the server does."""
    takes = {
        path for path, methods in DOCUMENT["paths"].items()
        if any(one["name"] == "metadata" for one in methods.get("get", {}).get("parameters", ()))
    }  # fmt: skip
    lists = {f"/v1/{name}/" for name in ("events", "meters", "customers", "benefits")}
    assert takes == {*lists, "/v1/meters/{id}/quantities", "/v1/usage"}


@pytest.fixture(scope="module")
def session(full: Tenant) -> str:
    """The token of the customer."""
    secret: str = full.post("/v1/customer-sessions/", {"external_customer_id": "ann"})["token"]
    return secret


@pytest.mark.parametrize(("name", "who"), [*((name, "organization") for name in OPERATIONS), *PORTAL])
@pytest.mark.parametrize("mode", GenerationMode)
def test_requests_made_from_the_document_are_answered_as_it_says(
    full: Tenant, session: str, name: str, mode: GenerationMode, who: str
) -> None:
    """Right or wrong, a request gets a status and a body that the document names, whoever's token it has."""
    token = full.secret if who == "organization" else session
    opens = (who == "customer") == ("customer-portal" in name)

    @SHORT
    @given(OPERATIONS[name].as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        sent = case.as_transport_kwargs(base_url="http://meterstream.test")
        sent.pop("cookies", None)
        if "data" in sent:
            sent["content"] = sent.pop("data")
        headers = {**(sent.pop("headers", None) or {}), "Authorization": f"Bearer {token}"}
        try:
            response = full.server.run(full.server.http.request(headers=headers, **sent))
        except httpx.InvalidURL:  # longer than any client sends
            reject()
        case.validate_response(response, checks=CHECKS)
        assert opens or not response.is_success

    holds()


def test_the_document_names_every_schema_that_it_uses() -> None:
    """No reference leads nowhere, and nothing is described that nobody uses."""
    text = str(DOCUMENT)
    schemas = DOCUMENT["components"]["schemas"]
    used = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert used == set(schemas)


def test_the_page_says_what_is_sent() -> None:
    """It has the route of ingestion, the fields of bodies and the texts that they take, and types of references."""
    page = _page(DOCUMENT)

    assert "/v1/events/ingest" in page
    assert "<code>events[].external_customer_id</code>" in page
    assert "<code>filter.clauses[].operator</code><td class=muted>body required<td>eq, ne, gt" in page
    assert "<code>interval</code><td class=muted>query required<td>hour, day" in page
    assert "<code></code>" not in page


@pytest.mark.parametrize("text", ["a `b` c", "a ``b`` c"])
def test_what_stands_in_backticks_is_code(text: str) -> None:
    """In one of them or in two."""
    assert _prose(text) == "a <code>b</code> c"
