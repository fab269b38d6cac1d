"""One definition for each body and answer: what is answered, accepted and shown is what the document says."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from aggregator.api import create_app, schemas
from aggregator.api.bodies import fields_of, known_fields, shaped
from aggregator.api.openapi import LLM, PATH, Cost, EventCreate
from aggregator.service import answers
from aggregator.service.errors import Malformed
from ingest.admission.batching import NO_PREFERENCES, Preferences, accepted
from ingest.admission.duplicates import Verdict
from ingest.admission.validate import Admitted
from meters.errors import Reason
from meters.event import _RESERVED, Event, check_event
from meters.ledger.price import Price, parse_price
from meters.meter import _PARSERS, Meter, new_meter, updated_meter
from tests.aggregator.api.every_route import EVERYTHING, Told, every_answer
from tests.support.records import NOW
from tests.support.servers.query_api import Server

DOCUMENT: Any = create_app(None, None, None).openapi()  # type: ignore[arg-type]  # nothing is asked of them
COMPONENTS: Any = DOCUMENT["components"]["schemas"]
OPERATIONS: dict[str, Any] = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    if path != PATH  # which the gateway answers
}
METER = new_meter(
    {"name": "Tokens", "filter": EVERYTHING, "aggregation": {"func": "count"}},
    id="meter", organization_id="organization", created_at=NOW,
)  # fmt: skip
BODIES: list[tuple[type[msgspec.Struct], Callable[[Any], object], type]] = [
    *((kind, lambda body, kind=kind: shaped(kind, body), kind) for kind in (
        schemas.ResetCreate, schemas.CustomerSessionCreate, schemas.BenefitCreate, schemas.BenefitUpdate,
        schemas.BenefitGrantCreate, schemas.BenefitGrantStep, schemas.WebhookEndpointCreate,
        schemas.WebhookEndpointUpdate, schemas.MeterThresholdCreate, schemas.WebhookSourceCreate,
        schemas.PolarObjects,
    )),
    *((kind, lambda body, kind=kind: fields_of(kind, body), dict) for kind in (
        schemas.CustomerCreate, schemas.CustomerUpdate, schemas.CreditCreate, schemas.MeterDefinition,
    )),
    (schemas.MeterCreate, lambda body: new_meter(body, id="", organization_id="", created_at=NOW), Meter),
    (schemas.MeterUpdate, lambda body: updated_meter(METER, body, modified_at=NOW), Meter),  # type: ignore[arg-type]
    (schemas.PriceSet, parse_price, Price),
]  # fmt: skip


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A body whose definition refuses unknown fields."""

    name: str | msgspec.UnsetType = msgspec.UNSET


class Tolerant(msgspec.Struct):
    """The same, without that."""

    name: str | msgspec.UnsetType = msgspec.UNSET


def closed(part: Any) -> Any:
    """A schema that allows no field but those it names."""
    if isinstance(part, list):
        return [closed(one) for one in part]
    if not isinstance(part, dict):
        return part
    more = {"additionalProperties": False} if part.get("type") == "object" and "properties" in part else {}
    return more | {name: closed(one) for name, one in part.items()}


def check(schema: Any, value: Any) -> None:
    """Raise what is wrong with a value, fields that its schema does not name among it."""
    whole = {**closed(schema), "components": {"schemas": closed(COMPONENTS)}}
    Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)


@pytest.fixture(scope="module")
def told(server: Server) -> list[Told]:
    """Answers of every operation."""
    return every_answer(server)


def test_the_story_asks_every_operation(told: list[Told]) -> None:
    """No route is left out of the tests below."""
    assert {one.operation for one in told} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_answer_has_the_fields_of_its_definition(told: list[Told], operation: str) -> None:
    """All of them, no others, each of its type."""
    for response in [one.response for one in told if one.operation == operation]:
        content = OPERATIONS[operation]["responses"][str(response.status_code)].get("content", {})
        schema = content.get("application/json", {}).get("schema")
        assert bool(schema) is (response.headers.get("content-type") == "application/json")
        if schema:
            check(schema, response.json())


@pytest.mark.parametrize("name", [name for name, schema in COMPONENTS.items() if "examples" in schema])
def test_an_example_is_what_its_definition_allows(name: str) -> None:
    """With no fields but those of the definition."""
    for example in COMPONENTS[name]["examples"]:
        check(COMPONENTS[name], example)


@pytest.mark.parametrize(("kind", "read", "result"), BODIES)
def test_the_example_of_a_body_is_accepted(
    kind: type[msgspec.Struct], read: Callable[[Any], object], result: type
) -> None:
    """By the check that the route makes."""
    (example,) = COMPONENTS[kind.__name__]["examples"]
    assert isinstance(read(example), result)


def test_every_body_of_the_document_has_an_example_that_is_tried() -> None:
    """So that a new route does not go without."""
    content = [one["requestBody"]["content"] for one in OPERATIONS.values() if "requestBody" in one]
    named = {one["application/json"]["schema"]["$ref"].rpartition("/")[2] for one in content}
    assert named == {kind.__name__ for kind, _, _ in BODIES}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (answers.Meter, Meter.__struct_fields__),
        (schemas.MeterCreate, _PARSERS),
        (schemas.MeterUpdate, {*_PARSERS, "is_archived"}),
        (EventCreate, Event.__struct_fields__),
        (Cost, {**_RESERVED["_cost"][0], **_RESERVED["_cost"][1]}),
        (LLM, {**_RESERVED["_llm"][0], **_RESERVED["_llm"][1]}),
    ],
)
def test_what_is_checked_elsewhere_is_described_whole(kind: type[msgspec.Struct], fields: Any) -> None:
    """A definition that only describes has the fields of what is checked."""
    assert set(kind.__struct_fields__) == set(fields)


def test_the_gateways_body_and_answers_are_as_described() -> None:
    """The example of an event is taken; answers with everything that can be preferred have the fields described."""
    (example,) = COMPONENTS["EventsIngest"]["examples"]
    assert isinstance(check_event(json.dumps(example["events"][0]).encode(), now=NOW), Event)
    refusal = Reason.MISSING.at(1, "name")
    admitted = Admitted(lines=[b"{}"], given_ids=["one"], indexes=[0], named=True, refusals=[refusal])
    for preferences in (NO_PREFERENCES, Preferences(lenient=True, representation=True)):
        answer = accepted(admitted, [Verdict.ACCEPTED], preferences, {0: 1})
        check({"$ref": "#/components/schemas/EventsIngested"}, json.loads(answer.body))


@pytest.mark.parametrize("read", [shaped, fields_of, known_fields])
def test_a_definition_says_whether_unknown_fields_are_refused(read: Callable[[Any, Any], object]) -> None:
    """However its body is checked: each is named, in pydantic's words."""
    read(Tolerant, {"name": "x", "more": 1})
    with pytest.raises(Malformed) as refused:
        read(Strict, {"name": "x", "more": 1, "and": 2})
    found = [(entry["type"], entry["loc"], entry["input"]) for entry in refused.value.details]
    assert found == [("extra_forbidden", ["body", "more"], 1), ("extra_forbidden", ["body", "and"], 2)]
