"""What a request says and nobody reads is refused or counted: query parameters and fields, on every operation."""

from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aggregator.api import create_app, openapi, strictness
from aggregator.api.fast_reads import AtOnce
from aggregator.api.strictness import POLARS
from meters.errors import COMPLAINTS_MAX
from meters.fast_paths import FastRead
from tests.support.servers.query_api import Server, Tenant

DOCUMENT: Any = create_app(None, None, None).openapi()  # type: ignore[arg-type]  # nothing is asked of them
NOBODYS = "nobody_reads_this"
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    if path != openapi.PATH  # which the gateway answers
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


class World(NamedTuple):
    """A tenant with something of everything."""

    tenant: Tenant
    ids: dict[str, str]
    session: str

    def ask(self, name: str, **more: Any) -> Any:
        """What an operation answers about something that there is; what it would delete is not there."""
        method, path = name.split(" ")
        ids = {} if method == "DELETE" else self.ids
        begins = [resource for resource in ids if path.startswith(f"/v1/{resource}/{{id}}")]
        path = path.replace("{id}", ids[begins[0]] if begins else "00000000-0000-4000-8000-00000000ffff")
        path = path.format(external_id="ann" if ids else "nobody", credit_id="x", entry_id="x")
        secret = self.session if "customer-portal" in path else self.tenant.secret
        return self.tenant.ask(method, path, secret=secret, **more)

    def complaints(self, name: str, **more: Any) -> list[tuple[str, ...]]:
        """What is refused because nobody knows it: where it stood, and its name."""
        response = self.ask(name, **more)
        details = response.json()["detail"] if response.status_code == 422 else []
        return [tuple(entry["loc"]) for entry in details if entry["type"] == "extra_forbidden"]


@pytest.fixture(scope="module")
def world(server: Server) -> World:
    """What the bodies of the document's examples need."""
    tenant = server.tenant()
    ids = {"customers": tenant.customer(external_id="ann"), "meters": tenant.meter(func="sum", property="tokens")}
    properties = {"meter_id": ids["meters"], "units": 5, "rollover": False}
    body = {"type": "meter_credit", "description": "Units", "properties": properties}
    ids["benefits"] = tenant.post("/v1/benefits/", body)["id"]
    body = {"customer_id": ids["customers"]}
    ids["benefit-grants"] = tenant.post(f"/v1/benefits/{ids['benefits']}/grants", body)["id"]
    ids["webhooks/endpoints"] = tenant.post("/v1/webhooks/endpoints", {"url": "https://example.com/"})["id"]
    return World(tenant, ids, tenant.post("/v1/customer-sessions/", body)["token"])


def passed_over(server: Server) -> dict[str, float]:
    """What ``/metrics`` says was passed over, by where it was."""
    families = text_string_to_metric_families(server.ask("GET", "/metrics").text)
    return {
        sample.labels["where"]: sample.value
        for family in families
        if family.name == "meterstream_passed_over"
        for sample in family.samples
        if sample.name.endswith("_total")
    }


# Query parameters.


@each_operation
def test_a_parameter_that_nobody_knows_is_refused(world: World, name: str) -> None:
    """On every operation, by its name; also an object's without its key, which nothing reads."""
    assert world.complaints(name, params={NOBODYS: "1"}) == [("query", NOBODYS)]
    assert world.complaints(name, params={"metadata": "x", "": "y"}) == [("query", "metadata"), ("query", "")]


@each_operation
def test_a_parameter_that_the_document_describes_is_known(world: World, name: str) -> None:
    """Each by itself: right or wrong in its value, it is never called unknown."""
    for parameter in OPERATIONS[name].get("parameters", ()):
        if parameter["in"] == "query":
            key = f"{parameter['name']}[key]" if parameter.get("style") == "deepObject" else parameter["name"]
            assert world.complaints(name, params={key: "1"}) == []


@pytest.mark.parametrize("name", [name for name in POLARS if name != f"POST {openapi.PATH}"])
def test_a_parameter_that_polars_clients_send_is_known(world: World, name: str) -> None:
    """Of any generation; what is not read here is counted."""
    names = [one for names in POLARS[name].values() for one in names.split()]
    own = {one["name"].removesuffix("[key]") for one in OPERATIONS[name].get("parameters", ()) if one["in"] == "query"}
    unread = [one for one in names if one.removesuffix("[key]") not in own and one != "exernal_customer_id"]
    before = passed_over(world.tenant.server).get(name, 0)
    assert world.complaints(name, params=dict.fromkeys(names, "1")) == []
    assert passed_over(world.tenant.server).get(name, 0) - before == len(unread)


def test_a_slip_of_the_pen_is_told_what_was_meant(world: World) -> None:
    """What is near to a name that the operation knows is answered with that name."""
    asked = {"start_timestmap": "2026-01-01T00:00:00Z", "colour": "red"}
    (near, far) = world.ask("GET /v1/events/", params=asked).json()["detail"]
    assert near["msg"] == "Extra inputs are not permitted: did you mean 'start_timestamp'?"
    assert far["msg"] == "Extra inputs are not permitted"


def test_a_customers_name_as_an_old_client_spells_it_is_read(world: World) -> None:
    """Polar's Python client 0.16 says ``exernal_customer_id``: passed over, everybody's usage would be ann's."""
    tenant = world.tenant
    tenant.event(external_customer_id="ann", metadata='{"tokens":3}')
    tenant.event(external_customer_id="bob", metadata='{"tokens":40}')
    day = {"start_timestamp": "2026-03-01T00:00:00Z", "end_timestamp": "2026-03-01T23:00:00Z", "interval": "day"}
    path = f"/v1/meters/{world.ids['meters']}/quantities"
    assert tenant.get(path, **day)["total"] == 43
    assert tenant.get(path, **day, exernal_customer_id="ann")["total"] == 3


def test_whoever_has_no_token_hears_only_that(world: World) -> None:
    """The token is looked at before the parameters."""
    assert world.tenant.ask("GET", f"/v1/meters/?{NOBODYS}=1", secret="nobodys").status_code == 401


@pytest.mark.parametrize("read", FastRead)
def test_a_fast_read_leaves_unknown_parameters_to_its_endpoint(world: World, read: FastRead) -> None:
    """Which refuses them: without them the same read is answered at once."""
    ids = {"id": world.ids["meters" if read is FastRead.USAGE else "customers"], "external_id": "ann"}
    asked = {FastRead.CUSTOMER_METERS: "external_customer_id=ann&", FastRead.USAGE: "external_customer_id=ann&"}
    if read is FastRead.CUSTOMER_METER:
        ids["id"] = world.tenant.get("/v1/customer-meters/", external_customer_id="ann")["items"][0]["id"]
    path = f"{read.value.format(**ids)}?{asked.get(read, '')}"
    headers = [(b"authorization", b"Bearer " + world.tenant.secret.encode())]
    at_once = AtOnce(world.tenant.server.app.state.desk)
    assert at_once.answer(path.encode(), headers) is not None
    assert at_once.answer(f"{path}{NOBODYS}=1".encode(), headers) is None
    assert world.tenant.ask("GET", f"{path}{NOBODYS}=1").status_code == 422


# Bodies.

BODILESS = [
    name for name, operation in OPERATIONS.items()
    if not name.startswith("GET") and "requestBody" not in operation and name not in POLARS
]  # fmt: skip


@pytest.mark.parametrize("name", BODILESS)
def test_a_body_where_none_is_taken_is_refused(world: World, name: str) -> None:
    """``revoke`` with a time would revoke now. An empty object says nothing, and is none."""
    assert world.complaints(name, json={"at": "2026-01-01T00:00:00Z"}) == [("body",)]
    if name.startswith("DELETE"):  # which finds nothing, as nothing is there
        assert world.ask(name, json={}).status_code == 404


def example(name: str) -> Any:
    """The document's example of an operation's body."""
    (content,) = OPERATIONS[name]["requestBody"]["content"].values()
    return DOCUMENT["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]["examples"][0]


WITH_BODY = [name for name, operation in OPERATIONS.items() if "requestBody" in operation]
OWN, SHARED = [[name for name in WITH_BODY if (name in POLARS) is is_polars] for is_polars in (False, True)]


@pytest.mark.parametrize("name", OWN)
def test_a_field_that_nobody_knows_is_refused_where_polar_has_no_such_route(world: World, name: str) -> None:
    """By its name, with the name that was meant; a good body beside it changes nothing."""
    body = example(name)
    assert world.complaints(name, json=body | {NOBODYS: 1}) == [("body", NOBODYS)]
    for known in body:
        (complaint,) = world.ask(name, json=body | {f"{known}_": 1}).json()["detail"]
        assert complaint["msg"] == f"Extra inputs are not permitted: did you mean '{known}'?"


@pytest.mark.parametrize("name", SHARED)
def test_a_field_that_polar_passes_over_is_counted(world: World, name: str) -> None:
    """Nobody complains of it, and ``/metrics`` says in which definition it was."""
    (content,) = OPERATIONS[name]["requestBody"]["content"].values()
    where = content["schema"]["$ref"].rpartition("/")[2]
    before = passed_over(world.tenant.server).get(where, 0)
    assert world.complaints(name, json=example(name) | {NOBODYS: 1}) == []
    assert passed_over(world.tenant.server)[where] == before + 1


def test_a_field_that_polar_passes_over_further_in_is_counted(world: World) -> None:
    """By the definition of the part that it is in."""
    before = passed_over(world.tenant.server).get("BenefitPropertiesCreate", 0)
    properties = {"meter_id": world.ids["meters"], "units": 5, "rollover": False, "expires": "never"}
    body = {"type": "meter_credit", "description": "Units", "properties": properties}
    assert world.ask("POST /v1/benefits/", json=body).status_code == 201
    assert passed_over(world.tenant.server)["BenefitPropertiesCreate"] == before + 1


HALF_UNDERSTOOD: list[tuple[str, Any]] = [
    ("POST /v1/customers/{id}/resets", {"meter_id": "M"}),
    ("POST /v1/customers/{id}/resets", {}),
    ("POST /v1/customers/{id}/resets", None),
    ("POST /v1/customers/{id}/resets", {"meter_ids": None}),
    ("PUT /v1/meters/{id}/price", {"unit_amount": "1", "cap": 5}),
    ("POST /v1/webhooks/thresholds", {"meter_id": "M", "measure": "usage", "value": 5, "customer": "C"}),
    ("POST /v1/benefit-grants/{id}/cycle", {"started_at": "2026-02-01T00:00:00Z"}),
    ("POST /v1/benefit-grants/{id}/revoke", {"at": "2026-02-01T00:00:00Z"}),
    ("POST /v1/customers/{id}/credits", {"meter_id": "M", "units": 5, "rolover": True}),
]
"""Requests that were taken for others: every meter, no cap, everybody, now, no rollover."""


@pytest.mark.parametrize(("name", "body"), HALF_UNDERSTOOD)
def test_what_is_half_understood_changes_nothing(world: World, name: str, body: Any) -> None:
    """It is refused, and balances, prices, thresholds and grants are what they were."""
    names = {"M": world.ids["meters"], "C": world.ids["customers"]}
    filled = body and {field: names.get(value, value) for field, value in body.items()}
    read = ("/v1/customer-meters/", "/v1/webhooks/thresholds", f"/v1/benefit-grants/{world.ids['benefit-grants']}")
    before = [world.tenant.get(path) for path in read]
    assert world.ask(name, json=filled).status_code == 422
    assert [world.tenant.get(path) for path in read] == before
    assert world.tenant.ask("GET", f"/v1/meters/{world.ids['meters']}/price").status_code == 404


def test_all_meters_begin_anew_by_a_word(server: Server) -> None:
    """``all`` is every meter that is not archived; a list is those meters alone."""
    tenant = server.tenant()
    customer, first, second, old = tenant.customer(), tenant.meter(), tenant.meter(), tenant.meter()
    tenant.patch(f"/v1/meters/{old}", {"is_archived": True})
    path = f"/v1/customers/{customer}/resets"
    assert tenant.post(path, {"meter_ids": [first]})["meter_ids"] == [first]
    assert sorted(tenant.post(path, {"meter_ids": "all"})["meter_ids"]) == sorted([first, second])
    assert tenant.refusal("POST", path, json={"meter_ids": "every"})[0] == 422


def test_few_of_many_unknown_fields_are_looked_at(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body has room for very many, and each costs a comparison with every known field."""
    compared: list[str] = []

    def close(name: str, known: list[str], n: int) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr(strictness, "get_close_matches", close)
    body = {f"{'x' * 1_000}{number}": number for number in range(1_000)}
    refused = world.ask("POST /v1/webhooks/thresholds", json=body)
    assert refused.status_code == 422
    assert len(compared) == len(refused.json()["detail"]) == COMPLAINTS_MAX
    assert max(map(len, compared)) <= strictness.NAME_COMPARED_MAX
