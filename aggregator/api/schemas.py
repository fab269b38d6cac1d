"""Bodies as JSON Schema, for the OpenAPI document; tests hold the answers against it."""

from typing import Any

from meters.aggregation import FUNCTIONS
from meters.catalogue import INDIVIDUAL, TEAM
from meters.credit import CAUSES, UNITS_MAX
from meters.filter import Operator
from meters.meter import NAME_LENGTH_MIN, UNITS

Schema = dict[str, Any]
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ID: Schema = {"type": "string", "format": "uuid"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
TEXT: Schema = {"type": "string"}
TIME: Schema = {"type": "string", "format": "date-time"}


def ref(name: str) -> Schema:
    """The schema of this name."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": schema}


def record(properties: Schema, *optional: str) -> Schema:
    """An object that has all of these but the optional ones."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def one_of(*names: str) -> Schema:
    """One of these texts."""
    return {"type": "string", "enum": list(names)}


def page_of(name: str) -> Schema:
    """A list in Polar's envelope."""
    return record({"items": many(ref(name)), "pagination": ref("Pagination")})


_SCALAR: Schema = {"type": ["string", "number", "boolean"]}
METADATA: Schema = {"type": "object", "additionalProperties": _SCALAR}
_METER: Schema = {
    "name": {"type": "string", "minLength": NAME_LENGTH_MIN},
    "filter": ref("Filter"),
    "aggregation": ref("Aggregation"),
    "unit": one_of(*UNITS),
    "custom_label": nullable(TEXT),
    "custom_multiplier": nullable({"type": "integer", "exclusiveMinimum": 0}),
    "metadata": METADATA,
}
_CUSTOMER: Schema = {
    "type": one_of(INDIVIDUAL, TEAM),
    "email": nullable(TEXT),
    "external_id": nullable(TEXT),
    "name": nullable(TEXT),
    "metadata": METADATA,
}
_UNITS: Schema = {"type": "integer", "minimum": 1, "maximum": UNITS_MAX}
_PRICE: Schema = {"unit_amount": TEXT, "cap_amount": nullable(COUNT)}
UNKNOWN_CUSTOMER_FIELDS = ("billing_name", "billing_address", "tax_id", "locale", "default_payment_method_id")
_NAMED: Schema = {"customer_id": nullable(TEXT), "external_customer_id": nullable(TEXT)}
_COUNTED: Schema = COUNT | {"description": "Events that count; for a meter of `unique`, its distinct values"}

SCHEMAS: Schema = {
    "Filter": record(
        {"conjunction": one_of("and", "or"), "clauses": many({"anyOf": [ref("Clause"), ref("Filter")]})}
    ),
    "Clause": record(
        {
            "property": TEXT,
            "operator": one_of(*Operator),
            "value": {"anyOf": [_SCALAR, many(_SCALAR)]},
        }
    ),
    "Aggregation": record({"func": one_of(*FUNCTIONS), "property": TEXT}, "property"),
    "MeterCreate": record(_METER, *(name for name in _METER if name not in ("name", "filter", "aggregation"))),
    "MeterUpdate": record(_METER | {"is_archived": BOOLEAN}, *_METER, "is_archived"),
    "MeterDefinition": record({"filter": ref("Filter"), "aggregation": ref("Aggregation")}),
    "Meter": record(
        {"id": ID, "organization_id": ID, **_METER}
        | {"created_at": TIME, "modified_at": nullable(TIME), "archived_at": nullable(TIME)}
    ),
    "Quantities": record(
        {"quantities": many(record({"timestamp": TIME, "quantity": NUMBER})), "total": NUMBER}
    ),
    "Usage": record({"meter_id": ID, **_NAMED, "value": TEXT, "count": _COUNTED}),
    "Preview": record(
        {"total": NUMBER, "events": COUNT, "customers": COUNT}
        | {"first_seen": nullable(TIME), "last_seen": nullable(TIME)}
        | {"top_customers": many(record({**_NAMED, "quantity": NUMBER}))}
    ),
    "CustomerCreate": record(_CUSTOMER, *_CUSTOMER),
    "Customer": record(
        {"id": ID, "organization_id": ID, **_CUSTOMER}
        | {"created_at": TIME, "modified_at": nullable(TIME), "deleted_at": nullable(TIME)}
        | {"first_user_event_at": nullable(TIME), "email_verified": BOOLEAN, "avatar_url": nullable(TEXT)}
        | dict.fromkeys(UNKNOWN_CUSTOMER_FIELDS, nullable(TEXT))
    ),
    "CustomerUpdate": record(_CUSTOMER, *_CUSTOMER),
    "CustomerMeter": record(
        {"id": ID, "created_at": TIME, "modified_at": nullable(TIME), "customer_id": ID, "meter_id": ID}
        | {"consumed_units": NUMBER, "credited_units": NUMBER, "balance": NUMBER}
        | {"customer": ref("Customer"), "meter": ref("Meter")}
    ),
    "LedgerEntry": record(
        {"id": TEXT, "at": TIME, "cause": one_of(*CAUSES, "usage", "reset"), "units": NUMBER, "balance": NUMBER}
        | {"stated_units": nullable(NUMBER), "rollover": nullable(BOOLEAN), "reference": nullable(TEXT)}
        | {"events": nullable(COUNT), "arrived_from": nullable(TIME), "arrived_until": nullable(TIME)}
    ),
    "CreditCreate": record({"meter_id": ID, "units": _UNITS, "rollover": BOOLEAN}, "rollover"),
    "Credit": record(
        {"id": TEXT, "at": TIME, "customer_id": ID, "meter_id": ID, "units": NUMBER, "rollover": BOOLEAN}
        | {"cause": one_of(*CAUSES), "reference": nullable(TEXT)}
    ),
    "ResetCreate": record({"meter_ids": many(ID), "at": TIME}, "meter_ids", "at"),
    "Reset": record({"id": TEXT, "at": TIME, "customer_id": ID, "meter_ids": many(ID), "rollover": OBJECT}),
    "PriceSet": record(
        {"unit_amount": {"type": ["string", "number"]}, "cap_amount": nullable({"type": "integer", "minimum": 0})},
        "cap_amount",
    ),
    "Price": record({"meter_id": ID, **_PRICE}),
    "Charges": record(
        {"customer_id": ID, "amount": COUNT, "items": many(record(
            {"meter_id": ID, **_PRICE, "meter_name": TEXT, "period_start": nullable(TIME), "consumed_units": NUMBER}
            | {"credited_units": NUMBER, "billed_units": NUMBER, "amount": COUNT}
        ))}
    ),
    "Event": record(
        {"id": ID, "timestamp": TIME, "organization_id": ID, **_NAMED, "customer": nullable(ref("Customer"))}
        | {"member_id": nullable(TEXT), "external_member_id": nullable(TEXT), "child_count": COUNT}
        | {"parent_id": nullable(ID), "label": TEXT, "source": TEXT, "name": TEXT, "metadata": OBJECT}
    ),
    "EventName": record(
        {"name": TEXT, "label": TEXT, "source": TEXT, "occurrences": COUNT, "first_seen": TIME, "last_seen": TIME}
    ),
    "Metrics": record({"periods": many(OBJECT), "totals": OBJECT, "metrics": OBJECT}),
    "MetricsLimits": record({"min_date": {"type": "string", "format": "date"}, "intervals": OBJECT}),
    "DeadLetter": record(
        {"id": TEXT, "log_partition": COUNT, "log_offset": COUNT, "line": COUNT, "organization_id": nullable(TEXT)}
        | {"is_own": BOOLEAN, "reason": TEXT, "detail": TEXT, "raw": TEXT, "is_cut": BOOLEAN, "ingested_at": TIME}
        | {"replayed_at": nullable(TIME)}
    ),
    "FeedPage": record(
        {"items": many(record({"place": TEXT, "ingested_at": TIME, "event": OBJECT})), "position": TEXT}
    ),
    "FeedBacklog": record({"events": COUNT, "oldest_ingested_at": nullable(TIME)}),
    "FeedCustomers": record({"items": many(record({**_NAMED, "events": COUNT}, *_NAMED)), "count": COUNT}),
    "FeedRollup": record(
        {
            "items": many(
                record({"meter_id": ID, **_NAMED, "window": TIME, "count": COUNT, "sum": NUMBER}, *_NAMED)
            ),
            "position": TEXT,
        }
    ),
    "FeedTraffic": record(
        {"events": COUNT, "metadata_bytes": COUNT, "busiest_minute": COUNT}
        | {"rollups": many(record({"meter_id": ID, "events": COUNT}))}
    ),
    "Readiness": record({"status": TEXT, "as_of": OBJECT}),
    "Pagination": record(
        {"total_count": COUNT, "max_page": COUNT, "has_next_page": BOOLEAN},
        "total_count", "max_page", "has_next_page",
    ),
    "Error": record({"error": TEXT, "detail": {}, "error_description": TEXT}, "detail", "error_description"),
    "Invalid": record({"error": TEXT, "detail": many(record({"type": TEXT, "loc": many({}), "msg": TEXT}))}),
}  # fmt: skip


def takes(name: str) -> dict[str, Any]:
    """What a route says in ``openapi_extra`` about its request's body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(name)}}}}


def gives(schema: Schema | None, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """What a route says in ``responses`` about its answers; no ``schema`` where there is no body."""
    refusals = {401: "Error", 403: "Error", 404: "Error", 422: "Invalid", 503: "Error", 504: "Error"}
    found: dict[int | str, dict[str, Any]] = {
        code: {"description": name, "content": {"application/json": {"schema": ref(name)}}}
        for code, name in refusals.items()
    }
    found[status] = {"description": "The answer"}
    if schema is not None:
        found[status]["content"] = {"application/json": {"schema": schema}}
    return found
