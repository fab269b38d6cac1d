"""The OpenAPI document, and the page at ``/docs`` that shows it.

``install_pages`` serves both. FastAPI's document is completed with the schemas of bodies and answers
(``schemas.py``), the gateway's ingestion route and the kind of credential.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from html import escape
from inspect import cleandoc
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Depends, FastAPI, Response
from msgspec import UNSET, Meta, Struct, UnsetType

from aggregator.api.requests import known_only
from aggregator.api.schemas import DEFINITIONS, Key, Moment, PolarBody, Schema, ref, response
from aggregator.service.answers import REF_TEMPLATE, Answer, Count, Error, ExternalId, Invalid, Scalar
from meters.errors import NAME_LENGTH_MAX

# The ingestion route, which the gateway answers: clients need one document for both processes.
#
# The gateway checks events with ``meters.event.check_event`` and shares no code with this package. So these
# definitions only describe its bodies and answers; tests compare them with the gateway.

PATH = "/v1/events/ingest"
Tokens = Annotated[int | str, Meta(examples=[812])]


class Cost(Struct):
    """What an event cost its sender. The amount is in cents: a number, or the text of one."""

    amount: Annotated[Any, Meta(extra_json_schema={"type": ["number", "string"]}, examples=[0.0425])]
    currency: Literal["usd"]


class LLM(Struct):
    """What a language model did."""

    vendor: Annotated[str, Meta(examples=["openai"])]
    model: Annotated[str, Meta(examples=["gpt-5"])]
    input_tokens: Tokens
    output_tokens: Tokens
    total_tokens: Tokens
    cached_input_tokens: Tokens | UnsetType = UNSET
    prompt: str | UnsetType | None = UNSET
    response: str | UnsetType | None = UNSET


_RESERVED = {"properties": {"_cost": ref(Cost), "_llm": ref(LLM)}}


class EventCreate(PolarBody):
    """One event. It names its customer by ``external_customer_id`` or ``customer_id``."""

    name: Annotated[str, Meta(max_length=NAME_LENGTH_MAX, examples=["llm.call"])]
    customer_id: Key | UnsetType = UNSET
    external_customer_id: ExternalId | UnsetType = UNSET
    timestamp: Annotated[Moment | UnsetType, Meta(description="The time of arrival where this is left out.")] = UNSET
    external_id: Annotated[
        str | UnsetType | None, Meta(description="Makes a repetition harmless.", examples=["call-1"])
    ] = UNSET
    metadata: Annotated[
        dict[str, Scalar] | UnsetType, Meta(extra_json_schema=_RESERVED, examples=[{"tokens": 812}])
    ] = UNSET
    parent_id: Annotated[str | UnsetType | None, Meta(description="The id or external id of its parent.")] = UNSET
    member_id: Key | UnsetType | None = UNSET
    external_member_id: str | UnsetType | None = UNSET
    organization_id: Key | UnsetType | None = UNSET


class EventsIngest(PolarBody):
    """Events to store."""

    events: list[EventCreate]


class EventRejected(Answer):
    """Why an event was rejected."""

    index: Count
    type: str
    loc: list[str | int]
    msg: str


class EventVerdict(Answer):
    """What became of an event."""

    index: Count
    verdict: Annotated[str, Meta(examples=["accepted"])]
    external_id: str | None


class EventsIngested(Answer):
    """What became of the events of a request."""

    inserted: Count
    duplicates: Annotated[Count, Meta(examples=[0])]
    rejected: Annotated[
        list[EventRejected] | UnsetType, Meta(description="With ``Prefer: handling=lenient``.")
    ] = UNSET
    events: Annotated[
        list[EventVerdict] | UnsetType, Meta(description="With ``Prefer: return=representation``.")
    ] = UNSET


_ABOUT_INGESTION = """Send events. Every one of them is on disk when this is answered.

An event names its customer, by `external_customer_id` or `customer_id`. Give it an `external_id`: it makes a repetition
harmless. Without a `timestamp` it is of the time at which it arrives. `Log-Position` in the answer says where it is.

With `Prefer: handling=lenient` the good events of a request are kept and `rejected` names the others; otherwise one
that is refused refuses all. With `Prefer: return=representation` the answer says of each event what became of it. A
body may be compressed (`Content-Encoding: gzip` or `zstd`)."""


OPERATION: Schema = {
    "tags": ["events"],
    "summary": "Ingest Events",
    "description": _ABOUT_INGESTION,
    "operationId": "ingest_events_v1_events_ingest_post",
    "parameters": [
        {
            "name": "prefer", "in": "header", "required": False, "schema": {"type": "string"},
            "description": "handling=lenient, return=representation, or both with a comma between them",
        }
    ],
    "requestBody": {"required": True, "content": {"application/json": {"schema": ref(EventsIngest)}}},
    "responses": {
        "200": response("The answer", ref(EventsIngested)),
        **{str(status): response("Error", ref(Error)) for status in (400, 401, 403, 413, 503)},
        "422": response("Invalid", ref(Invalid)),
        "429": response("Too many requests of this token; Retry-After says when there is room again"),
    },
}  # fmt: skip


# The page: generated from the OpenAPI document, without scripts or external resources.

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
code { font: 14px/1.4 ui-monospace, monospace } summary { cursor: pointer; padding: .2rem 0 }
table { border-collapse: collapse; margin: .3rem 0 1rem 1rem } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
.method { display: inline-block; width: 4rem; font-weight: 600 } .muted { color: #666 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } .muted { color: #999 } }
"""
_POLICY = "default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_ABOUT = """Usage metering that counts every event exactly once. The paths and shapes are those of Polar's metering API.

Send `Authorization: Bearer <token>`. Every answer about usage says in `As-Of` which log position it is true for. To
read what was just written, send the `Log-Position` of the ingestion's answer back with `Prefer: wait=5`; when the time
is up before the view is there, the answer comes all the same and its `As-Of` says how far it got.

Lists take `page` and `limit`; events, quantities, meters, customers and benefits take `metadata[key]=value`,
repeatable.

Quantities are JSON numbers with all their digits: read them as decimals where that matters."""


_PLAIN = {"string": "text", "integer": 1, "number": 1, "boolean": True}
"""Examples of fields that have none."""


def describe() -> str:
    """What the document says at its head."""
    return _ABOUT


def install_pages(app: FastAPI) -> None:
    """Serve ``/docs``, and complete the document at ``/openapi.json``."""
    digest = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    headers = {"Content-Security-Policy": _POLICY.format(digest=digest), "X-Content-Type-Options": "nosniff"}

    @cache
    def page() -> bytes:
        return _page(app.openapi()).encode()

    @app.get("/docs", include_in_schema=False, dependencies=[Depends(known_only)])
    async def docs() -> Response:
        """The API as a page to read."""
        return Response(page(), media_type="text/html", headers=headers)

    made = app.openapi

    def openapi() -> dict[str, Any]:
        """The document, made when somebody asks first: a start does not wait for it."""
        return app.openapi_schema or _completed(made())

    app.openapi = openapi  # type: ignore[method-assign]  # the framework's own way to have another one


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the schemas of bodies, the gateway's route, and the kind of credential."""
    held = document.setdefault("components", {})
    made = {name: schema for name, schema in held["schemas"].items() if "ValidationError" not in name}
    held["schemas"] = made | _components()
    for operation in (one for methods in document["paths"].values() for one in methods.values()):
        operation["responses"].setdefault("429", response("Too many requests of this token", ref(Error)))
        if "requestBody" in operation:
            operation["responses"].setdefault("413", response("A body larger than is taken", ref(Error)))
    document["paths"] = {PATH: {"post": OPERATION}, **document["paths"]}
    held["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    return document


def _components() -> Schema:
    """Return the schemas of all definitions that routes refer to, with an example of each."""
    _, found = msgspec.json.schema_components(DEFINITIONS.values(), ref_template=REF_TEMPLATE)
    made = [(kind, found[kind.__name__]) for kind in _below(Answer) if kind.__name__ in found]
    for kind, schema in made:
        schema["required"] = [field.name for field in msgspec.structs.fields(kind) if field.default is not UNSET]
    for schema in found.values():
        _tidy(schema)
    for name in DEFINITIONS:
        found[name]["examples"] = [_example(found[name], found)]
    for part in (part for _, schema in made for part in schema["properties"].values()):
        part.pop("default", None)  # an answer has all its fields
    return found


def _below(kind: type[Answer]) -> Iterator[type[Answer]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def _tidy(part: object) -> None:
    """Clean the descriptions of a schema, and add the types of enumerations and decimals."""
    if isinstance(part, list):
        for one in part:
            _tidy(one)
    if isinstance(part, dict):
        for one in part.values():
            _tidy(one)
        if isinstance(part.get("description"), str):
            part["description"] = cleandoc(part["description"])
        if isinstance(part.get("enum"), list):
            part.setdefault("type", "string")
        if part.get("format") == "decimal":
            part["type"] = ["number", "string"]  # the text of a number keeps its digits in every client


def _example(schema: Schema, found: Schema) -> Any:
    """Return a value that a schema allows: its first example, or a value composed of the examples of its parts.

    An object has the fields that are required or have an example.
    """
    for key in ("examples", "enum"):
        if key in schema:
            return schema[key][0]
    if "default" in schema:
        return schema["default"]
    if "$ref" in schema:
        return _example(found[schema["$ref"].rpartition("/")[2]], found)
    if "anyOf" in schema:
        first, *others = schema["anyOf"]
        return None if {"type": "null"} in others and not {"examples", "$ref"} & set(first) else _example(first, found)
    if schema["type"] == "array":
        return [_example(schema["items"], found)]
    if schema["type"] == "object":
        parts, required = schema.get("properties", {}), schema.get("required", ())
        return {name: _example(part, found) for name, part in parts.items() if name in required or "examples" in part}
    return _PLAIN[schema["type"]]


def _page(document: dict[str, Any]) -> str:
    """The whole page."""
    title = escape(document["info"]["title"])
    about = "".join(f"<p>{_prose(part)}</p>" for part in document["info"]["description"].split("\n\n"))
    schemas = document["components"]["schemas"]
    sections: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            sections.setdefault(operation["tags"][0], []).append(_operation(method, path, operation, schemas))
    body = "".join(f"<h2>{escape(name)}</h2>{''.join(parts)}" for name, parts in sections.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<h1>{title}</h1>{about}<p>The same for machines: <a href="/openapi.json">openapi.json</a></p>{body}</html>'
    )


def _prose(text: str) -> str:
    """Paragraph text; what stands between backticks, one or two, is code."""
    return re.sub(r"(`{1,2})(.+?)\1", r"<code>\2</code>", escape(text))


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = "".join(_parameter(parameter, schemas) for parameter in operation.get("parameters", ()))
    rows += "".join(_field(*field, schemas) for field in _fields(_body(operation), schemas))
    about = "".join(f"<p>{_prose(part)}</p>" for part in operation.get("description", "").split("\n\n"))
    return (
        f'<details><summary><code><span class="method">{method.upper()}</span>{escape(path)}</code> '
        f'<span class="muted">{escape(operation["summary"])}</span></summary>{about}<table>{rows}</table></details>'
    )


def _body(operation: dict[str, Any]) -> dict[str, Any]:
    """The schema of what is sent; empty where nothing is."""
    content = operation.get("requestBody", {}).get("content", {})
    schemas: list[dict[str, Any]] = [each["schema"] for each in content.values()]
    return schemas[0] if schemas else {}


def _parameter(parameter: dict[str, Any], schemas: dict[str, Any]) -> str:
    about = parameter.get("description") or _kind(parameter["schema"], schemas)
    return _row(parameter["name"], parameter["in"], parameter.get("required", False), about)


def _field(name: str, schema: dict[str, Any], required: bool, schemas: dict[str, Any]) -> str:
    about = [_kind(schema, schemas), schema.get("description", "")]
    return _row(name, "body", required, ": ".join(filter(None, about)))


def _row(name: str, place: str, required: bool, about: str) -> str:
    must = "required" if required else ""
    return f"<tr><td><code>{escape(name)}</code><td class=muted>{place} {must}<td>{_prose(about)}</tr>"


def _fields(
    schema: dict[str, Any], schemas: dict[str, Any], prefix: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The fields of a body with the names under which they are found in it: ``filter.clauses[].property``.

    One that holds its own kind again, as a filter does, is not followed a second time.
    """
    name = schema.get("$ref", "")
    if name in above:
        return
    inside = (*above, name) if name else above
    schema = _resolved(schema, schemas)
    for part in (part for word in ("anyOf", "oneOf") for part in schema.get(word, ())):
        yield from _fields(part, schemas, prefix, inside)
    if "items" in schema:
        yield from _fields(schema["items"], schemas, f"{prefix}[]", inside)
    for field, below in schema.get("properties", {}).items():
        path = f"{prefix}.{field}" if prefix else field
        yield path, below, field in schema.get("required", ())
        yield from _fields(below, schemas, path, inside)


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for; anything else is itself."""
    found: dict[str, Any] = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return found


def _kind(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A schema in a few words."""
    schema = _resolved(schema, schemas)
    parts = schema.get("anyOf") or schema.get("oneOf")
    if parts:
        kinds = [_kind(part, schemas) for part in parts if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum") or [schema["const"]]))
    if schema.get("type") == "array":
        return f"{_kind(schema.get('items', {}), schemas)}, repeatable"
    kind = schema.get("format") or schema.get("type") or ""
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
