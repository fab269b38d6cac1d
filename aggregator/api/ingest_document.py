"""The gateway's one route in the document of the API: whoever reads it cannot know that two processes answer.

The gateway checks events with ``meters.event.check_event`` and shares no code with this package, so these definitions
only describe what it takes and answers; tests hold them to it.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from aggregator.api.schemas import Key, Moment, PolarBody, Schema, ref, response
from aggregator.service.answers import Answer, Count, Error, ExternalId, Invalid, Scalar
from meters.refusal import NAME_LENGTH_MAX

PATH = "/v1/events/ingest"
Tokens = Annotated[int, Meta(extra_json_schema={"type": ["integer", "string"]}, examples=[812])]


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


_ABOUT = """Send events. Every one of them is on disk when this is answered.

An event names its customer, by `external_customer_id` or `customer_id`. Give it an `external_id`: it makes a repetition
harmless. Without a `timestamp` it is of the time at which it arrives. `Log-Position` in the answer says where it is.

With `Prefer: handling=lenient` the good events of a request are kept and `rejected` names the others; otherwise one
that is refused refuses all. With `Prefer: return=representation` the answer says of each event what became of it. A
body may be compressed (`Content-Encoding: gzip` or `zstd`)."""


OPERATION: Schema = {
    "tags": ["events"],
    "summary": "Ingest Events",
    "description": _ABOUT,
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
