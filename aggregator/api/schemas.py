"""Definitions of request bodies, and the helpers that describe a route in the OpenAPI document.

A body is a struct based on ``PolarBody``, which passes over unknown fields as Polar does, or on ``OwnBody``.
``bodies.py`` checks requests by these structs. Meters and prices are checked in ``meters``, which knows Polar's words
for each place in a filter; their structs here only describe them. A route states its body with ``takes``, its answers
with ``gives`` and ``page_of``, its errors with ``refuses``. ``openapi.py`` generates the schemas with examples.
"""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from aggregator.service.answers import (
    EXAMPLE_ID,
    REF_TEMPLATE,
    Aggregated,
    Answer,
    Clause,
    Description,
    Error,
    ExternalId,
    Filter,
    Id,
    Invalid,
    ListResource,
    MeterName,
    Multiplier,
    Scalar,
    Units,
)
from aggregator.webhooks.targets import URL_LENGTH_MAX
from meters.aggregation import parse_aggregation
from meters.errors import Detail, detail
from meters.event import is_storable
from meters.filters import parse_filter
from meters.ledger.ledger import UNITS_MAX
from meters.ledger.price import CAP_AMOUNT_MAX
from meters.meter import KEY_LENGTH_MAX, KEYS_MAX, STRING_LENGTH_MAX, Unit, parse_metadata
from meters.webhooks import STATE_CHANGED, EventType

Schema = dict[str, Any]
T = TypeVar("T", bound=Answer)

TEXT_LENGTH_MAX = 500
"""Characters of a customer's texts: an address has 254 by its standard; names and ids are no longer than metadata."""

NAME_LENGTH_MAX = 100
"""Characters of the name of an endpoint or a source."""

OBJECTS_MAX = 100
"""Objects of Polar's in one request: a page of Polar's API. Each is a decision of its own."""

SECRET_LENGTH_MIN, SECRET_LENGTH_MAX = 16, 200
"""Characters of another system's secret: fewer can be guessed, and Polar's have 49."""


class PolarBody(Struct):
    """Base of the bodies of Polar's routes. Unknown fields are passed over, as in Polar's API, and counted."""


class OwnBody(Struct, forbid_unknown_fields=True):
    """Base of the bodies of routes that Polar does not have. Unknown fields are refused: they would be another wish."""


def _email(value: str, loc: tuple[str | int, ...]) -> str | list[Detail]:
    if "@" in value.strip("@") and not any(mark.isspace() for mark in value):
        return value
    return [detail("value_error", loc, "value is not a valid email address: it has no name or no domain", value)]


def _external_id(value: str, loc: tuple[str | int, ...]) -> str | list[Detail]:
    """A customer's external id, which events have to be able to name."""
    if not value:
        message = "String should have at least 1 character: leave it out or say null"
        return [detail("string_too_short", loc, message, value)]
    if not is_storable(value):
        reason = "has the character U+0000 or half of a surrogate pair, so no event could name it: leave them out"
        return [detail("value_error", loc, f"external_id {reason}", None)]
    return value


def _units(value: object, loc: tuple[str | int, ...]) -> int | list[Detail]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= UNITS_MAX:
        return value
    return [detail("value_error", loc, f"Input should be a whole number from 1 to {UNITS_MAX}", value)]


Key = Annotated[UUID, Meta(examples=[EXAMPLE_ID])]
Moment = Annotated[datetime, Meta(extra_json_schema={"format": "date-time"})]
Begun = Annotated[
    Moment | None,
    Meta(
        description="Now where this is left out; send it to make a retry safe.", examples=["2026-03-01T12:00:00Z"]
    ),
]  # fmt: skip
Metadata = Annotated[
    dict[str, Any],
    Meta(
        extra={"parse": parse_metadata},
        examples=[{"plan": "free"}],
        extra_json_schema=msgspec.json.schema(
            Annotated[
                dict[Annotated[str, Meta(min_length=1, max_length=KEY_LENGTH_MAX)], Annotated[Scalar, Meta(
                    extra_json_schema={"minLength": 1, "maxLength": STRING_LENGTH_MAX}
                )]],
                Meta(max_length=KEYS_MAX),
            ]
        ),
    ),
]  # fmt: skip
Name = Annotated[str, Meta(max_length=NAME_LENGTH_MAX, examples=["Production"])]
Matching = Annotated[Filter, Meta(description="Which events count.", extra={"parse": parse_filter})]
Aggregating = Annotated[Aggregated, Meta(description="What is counted of them.", extra={"parse": parse_aggregation})]


class MeterDefinition(OwnBody):
    """What a meter would count."""

    filter: Matching
    aggregation: Aggregating


class MeterCreate(PolarBody, kw_only=True):
    """A new meter. Checked by ``meters.meter.new_meter``."""

    name: MeterName
    filter: Matching
    aggregation: Aggregating
    unit: Annotated[Unit, Meta(description="For display.")] = "scalar"
    custom_label: Annotated[str | None, Meta(description="What the unit ``custom`` is called.")] = None
    custom_multiplier: Multiplier | None = None
    metadata: Metadata = {}


class MeterUpdate(PolarBody):
    """Changes of a meter; null leaves a field as it is, but for the two that it clears.

    Checked by ``meters.meter.updated_meter``.
    """

    name: Annotated[MeterName | UnsetType | None, Meta(examples=["Tokens"])] = UNSET
    filter: Matching | UnsetType | None = UNSET
    aggregation: Aggregating | UnsetType | None = UNSET
    unit: Unit | UnsetType | None = UNSET
    custom_label: Annotated[str | UnsetType | None, Meta(description="Cleared by null.")] = UNSET
    custom_multiplier: Annotated[Multiplier | UnsetType | None, Meta(description="Cleared by null.")] = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    is_archived: bool | UnsetType | None = UNSET


class PriceSet(OwnBody):
    """What a unit of a meter costs. Checked by ``meters.ledger.price.parse_price``."""

    unit_amount: Annotated[
        Decimal, Meta(description="Cents, above 0, with at most 12 decimals.", examples=["0.002"])
    ]
    cap_amount: Annotated[
        Annotated[int, Meta(ge=0, le=CAP_AMOUNT_MAX)] | None,
        Meta(description="The most that a period costs, in cents.", examples=[10_000]),
    ] = None
    currency: Annotated[
        str | None,
        Meta(description="An ISO code. An organization has one currency, usd without a word.", examples=["usd"]),
    ] = None


class CustomerUpdate(PolarBody):
    """Changes of a customer; null leaves a field as it is, but for ``name``, which it clears.

    An external id can be given once. A team stays a team.
    """

    type: Literal["individual", "team"] | UnsetType | None = UNSET
    email: Annotated[
        Annotated[str, Meta(max_length=TEXT_LENGTH_MAX, extra={"parse": _email})] | UnsetType | None,
        Meta(description="Required where ``type`` is not ``team``.", examples=["ada@example.com"]),
    ] = UNSET
    external_id: Annotated[
        Annotated[ExternalId, Meta(min_length=1, max_length=TEXT_LENGTH_MAX, extra={"parse": _external_id})]
        | UnsetType
        | None,
        Meta(examples=["ada"]),
    ] = UNSET
    name: Annotated[
        Annotated[str, Meta(max_length=TEXT_LENGTH_MAX)] | UnsetType | None, Meta(examples=["Ada"])
    ] = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class CustomerCreate(CustomerUpdate):
    """A new customer; null is the same as leaving a field out."""


class CreditCreate(OwnBody):
    """Units to give to a customer."""

    meter_id: Annotated[Any, Meta(extra_json_schema=msgspec.json.schema(Id))]  # any other value is an unknown meter
    units: Annotated[Units, Meta(extra={"parse": _units})]
    rollover: Annotated[
        bool, Meta(description="What is left at a reset goes into the next window.", examples=[True])
    ] = False


class ResetCreate(OwnBody):
    """Which meters begin anew, and when."""

    meter_ids: Annotated[
        list[Key] | Literal["all"], Meta(description="``all``: every meter that is not archived.", examples=["all"])
    ]
    at: Begun = None


class CustomerSessionCreate(PolarBody):
    """Whose session: one of the three names. ``customer_external_id`` is another word for ``external_customer_id``."""

    customer_id: UUID | None = None
    external_customer_id: Annotated[str | None, Meta(examples=["ada"])] = None
    customer_external_id: str | None = None
    return_url: Annotated[str, Meta(max_length=URL_LENGTH_MAX)] | None = None


class BenefitPropertiesCreate(PolarBody):
    """What a ``meter_credit`` benefit gives."""

    meter_id: Key
    units: Units
    rollover: bool


class BenefitCreate(PolarBody):
    """A new benefit."""

    type: Literal["meter_credit"]
    description: Description
    properties: BenefitPropertiesCreate
    metadata: Metadata = {}


class BenefitUpdate(PolarBody):
    """Changes of a benefit. What was given stays; later grants and cycles give the new."""

    type: Literal["meter_credit"] = "meter_credit"
    description: Annotated[Description | None, Meta(examples=["2000 tokens a month"])] = None
    properties: BenefitPropertiesCreate | None = None
    metadata: Metadata | None = None


class BenefitGrantCreate(OwnBody):
    """Whom to grant a benefit to: one of the two names."""

    customer_id: UUID | None = None
    external_customer_id: Annotated[str | None, Meta(examples=["ada"])] = None


class BenefitGrantStep(OwnBody):
    """When a cycle began."""

    at: Begun = None


def _events_of_polar() -> list[EventType]:
    """What is sent where nobody says: types that Polar's clients know, so that they can read the endpoint."""
    return [STATE_CHANGED]


class WebhookEndpointCreate(PolarBody):
    """A new endpoint."""

    url: Annotated[str, Meta(examples=["https://example.com/webhooks"])]
    events: list[EventType] = msgspec.field(default_factory=_events_of_polar)
    name: Name | None = None
    format: Literal["raw"] = "raw"


class WebhookEndpointUpdate(PolarBody):
    """Changes of an endpoint."""

    url: Annotated[str | UnsetType, Meta(examples=["https://example.com/webhooks"])] = UNSET
    events: list[EventType] | UnsetType = UNSET
    name: Name | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class MeterThresholdCreate(OwnBody):
    """A line to watch: ``usage`` from below or ``balance`` from above."""

    meter_id: Key
    measure: Literal["usage", "balance"]
    value: Annotated[Decimal, Meta(examples=[80])]
    unit: Annotated[Literal["units", "percent"], Meta(description="``percent`` is of the credits.")] = "units"
    customer_id: Annotated[UUID | None, Meta(description="Every customer where this is left out.")] = None


class PolarObject(OwnBody):
    """An object as Polar's API shows it."""

    type: Literal["customer", "benefit"]
    data: Annotated[dict[str, Any], Meta(examples=[{"id": EXAMPLE_ID, "email": "ada@example.com"}])]


class PolarObjects(OwnBody):
    """Objects of Polar's to apply as webhooks are applied. With ``dry_run`` nothing changes."""

    objects: Annotated[list[PolarObject], Meta(max_length=OBJECTS_MAX)]
    dry_run: bool = False


class WebhookSourceCreate(OwnBody):
    """A Polar organization whose webhooks are accepted."""

    secret: Annotated[str, Meta(
        description="What it signs with.", min_length=SECRET_LENGTH_MIN, max_length=SECRET_LENGTH_MAX,
        examples=["whsec_0123456789abcdef"],
    )]  # fmt: skip
    name: Name | None = None


DEFINITIONS: dict[str, type[Struct]] = {"Clause": Clause}
"""The definitions in the document, by name. ``ref`` adds them; ``Filter`` refers to ``Clause`` without it."""


def ref(kind: type[Struct]) -> Schema:
    """Return a reference to the schema of a definition, and add the definition to the document."""
    name = _name(kind)
    DEFINITIONS[name] = kind
    return {"$ref": REF_TEMPLATE.format(name=name)}


def _name(kind: object) -> str:
    """Return the name that msgspec gives a definition: ``Meter``, or ``ListResource_Meter_`` for a page of them."""
    arguments = [f"_{_name(one)}_" for one in get_args(kind)]
    return str(getattr(get_origin(kind) or kind, "__name__", kind)) + "".join(arguments)


def takes(kind: type[Struct]) -> Schema:
    """Return the ``openapi_extra`` of a route with this request body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(kind)}}}}


def gives(*kinds: type[Struct], status: int = 200) -> dict[int | str, Schema]:
    """Return the ``responses`` of a route: one of these answers or no body, and the errors that every route has."""
    errors = refuses(401, 403, 404, 503, 504) | {422: response("Invalid", ref(Invalid))}
    schemas = [ref(kind) for kind in kinds]
    return errors | {status: response("The answer", *schemas)}


def refuses(*statuses: int) -> dict[int | str, Schema]:
    """Return the entries of errors in the ``responses`` of a route."""
    return {status: response("Error", ref(Error)) for status in statuses}


def response(description: str, *schemas: Schema) -> Schema:
    """Return the entry of an answer with one of these schemas, or without a body."""
    if not schemas:
        return {"description": description}
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def page_of(kind: type[T]) -> type[ListResource[T]]:
    """Return the type of a page of these answers."""
    return ListResource[kind]  # type: ignore[valid-type]  # the argument is known at run time only
