"""The gateway's one route in the document of the API: whoever reads it cannot know that two processes answer.

Described here and not where it is answered, because the document is made in this process.
"""

from typing import Any

from aggregator.api.schemas import COUNT, ID, METADATA, OBJECT, TEXT, TIME, many, nullable, one_of, record, ref

PATH = "/v1/events/ingest"

_RESERVED = {
    "_cost": record({"amount": {"type": ["number", "string"]}, "currency": one_of("usd")}),
    "_llm": OBJECT,
}
_EVENT = {
    "name": TEXT,
    "customer_id": ID,
    "external_customer_id": TEXT,
    "timestamp": TIME,
    "external_id": nullable(TEXT),
    "metadata": METADATA | {"properties": _RESERVED},
    "parent_id": nullable(TEXT),
    "member_id": nullable(ID),
    "external_member_id": nullable(TEXT),
    "organization_id": nullable(ID),
}
_ANSWER = record(
    {
        "inserted": COUNT,
        "duplicates": COUNT,
        "rejected": many(record({"index": COUNT, "type": TEXT, "loc": many({}), "msg": TEXT})),
        "events": many(record({"index": COUNT, "verdict": TEXT, "external_id": nullable(TEXT)})),
    },
    "rejected", "events",
)
SCHEMAS: dict[str, Any] = {
    "EventCreate": record(_EVENT, *(name for name in _EVENT if name != "name")),
    "EventsIngest": record({"events": many(ref("EventCreate"))}),
    "EventsIngested": _ANSWER,
}
_ABOUT = """Send events. Every one of them is on disk when this is answered.

An event names its customer, by `external_customer_id` or `customer_id`. Give it an `external_id`: it makes a repetition
harmless. Without a `timestamp` it is of the time at which it arrives. `Log-Position` in the answer says where it is.

With `Prefer: handling=lenient` the good events of a request are kept and `rejected` names the others; otherwise one
that is refused refuses all. With `Prefer: return=representation` the answer says of each event what became of it. A
body may be compressed (`Content-Encoding: gzip` or `zstd`)."""


def _answered(description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": description} | ({"content": {"application/json": {"schema": schema}}} if schema else {})


OPERATION: dict[str, Any] = {
    "tags": ["events"],
    "summary": "Ingest Events",
    "description": _ABOUT,
    "operationId": "ingest_events_v1_events_ingest_post",
    "parameters": [
        {
            "name": "prefer", "in": "header", "required": False, "schema": TEXT,
            "description": "handling=lenient, return=representation, or both with a comma between them",
        }
    ],
    "requestBody": {"required": True, "content": {"application/json": {"schema": ref("EventsIngest")}}},
    "responses": {
        "200": _answered("The answer", ref("EventsIngested")),
        **{str(status): _answered("Error", ref("Error")) for status in (400, 401, 403, 413, 503)},
        "422": _answered("Invalid", ref("Invalid")),
        "429": _answered("Too many requests of this token; Retry-After says when there is room again"),
    },
}  # fmt: skip
