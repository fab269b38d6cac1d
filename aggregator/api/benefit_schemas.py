"""Bodies of benefits, sessions, states and webhooks as JSON Schema, beside those of ``schemas``."""

from typing import get_args

from aggregator.api.benefits import DESCRIPTION_LENGTH_MAX, DESCRIPTION_LENGTH_MIN
from aggregator.api.schemas import (
    BOOLEAN,
    COUNT,
    ID,
    METADATA,
    NUMBER,
    OBJECT,
    TEXT,
    TIME,
    UNKNOWN_CUSTOMER_FIELDS,
    Schema,
    many,
    nullable,
    one_of,
    record,
    ref,
)
from aggregator.api.webhook_rules import SECRET_LENGTH_MAX, SECRET_LENGTH_MIN
from aggregator.webhooks.outbox import Status
from meters.credit import UNITS_MAX
from meters.webhooks import EVENT_TYPES

_STAMPS: Schema = {"created_at": TIME, "modified_at": nullable(TIME)}
_METER: Schema = {"id": ID, **_STAMPS, "meter_id": ID, "consumed_units": NUMBER, "credited_units": NUMBER}
_BALANCE: Schema = _METER | {"balance": NUMBER}
_PERIOD: Schema = {"current_period_start": TIME, "current_period_end": nullable(TIME)}
_TRIAL: Schema = {"trial_start": nullable(TIME), "trial_end": nullable(TIME)}
_END: Schema = {"cancel_at_period_end": BOOLEAN, "canceled_at": nullable(TIME), "ends_at": nullable(TIME)}
_SUBSCRIPTION: Schema = record(
    {"id": ID, **_STAMPS, "metadata": OBJECT, "custom_field_data": OBJECT, "status": TEXT, "amount": COUNT}
    | {"currency": TEXT, "recurring_interval": TEXT, **_PERIOD, **_TRIAL, **_END, "started_at": nullable(TIME)}
    | {"product_id": TEXT, "price_id": nullable(TEXT), "discount_id": nullable(TEXT), "seats": nullable(COUNT)}
    | {"units": nullable(COUNT), "meters": many(record(_METER | {"amount": COUNT}))}
)
_GRANTED: Schema = record(
    {"id": ID, **_STAMPS, "granted_at": TIME, "benefit_id": ID, "benefit_type": TEXT, "benefit_metadata": OBJECT}
    | {"properties": OBJECT}
)
_CREDIT: Schema = record({"at": TIME, "units": NUMBER, "cause": TEXT, "rollover": BOOLEAN})
_DISPLAY: Schema = record(
    {"meter": OBJECT, "usage": NUMBER, "limit": nullable(NUMBER), "balance": NUMBER, "percentage": nullable(NUMBER)}
    | {"period": record({"start": nullable(TIME), "end": nullable(TIME)}), "amount": nullable(COUNT)}
    | {"credits": many(_CREDIT)}
)
_UNITS: Schema = {"type": "integer", "exclusiveMinimum": 0, "maximum": UNITS_MAX}
_PROPERTIES: Schema = record({"meter_id": ID, "units": _UNITS, "rollover": BOOLEAN})
_DESCRIPTION: Schema = {"type": "string", "minLength": DESCRIPTION_LENGTH_MIN, "maxLength": DESCRIPTION_LENGTH_MAX}
_BENEFIT: Schema = {"type": one_of("meter_credit"), "description": _DESCRIPTION, "properties": _PROPERTIES}
_ENDPOINT: Schema = {"url": TEXT, "events": many(one_of(*EVENT_TYPES)), "name": nullable(TEXT)}
_ENDPOINT_SHOWN: Schema = (
    {"id": ID, "organization_id": ID, **_STAMPS, **_ENDPOINT, "enabled": BOOLEAN, "format": TEXT, "secret": TEXT}
    | {"api_version": TEXT, "uses_standard_webhook_signature": BOOLEAN}
    | {"disabled_at": nullable(TIME), "disabled_reason": nullable(TEXT), "deleted_at": nullable(TIME)}
)
_TOLD: Schema = record(
    {"id": TEXT, **_STAMPS, "type": one_of(*EVENT_TYPES), "api_version": TEXT, "customer_id": ID}
    | {"status": one_of(*get_args(Status)), "skipped": BOOLEAN, "is_archived": BOOLEAN, "payload": TEXT}
)
_THRESHOLD: Schema = {
    "meter_id": ID,
    "measure": one_of("usage", "balance"),
    "value": NUMBER,
    "unit": one_of("units", "percent"),
    "customer_id": nullable(ID),
}
_SECRET: Schema = {"type": "string", "minLength": SECRET_LENGTH_MIN, "maxLength": SECRET_LENGTH_MAX}
_WHOSE: Schema = {"customer_id": nullable(ID), "external_customer_id": nullable(TEXT)}

SCHEMAS: Schema = {
    "CustomerState": {
        "allOf": [
            ref("Customer"),
            record(
                {"active_subscriptions": many(_SUBSCRIPTION), "granted_benefits": many(_GRANTED)}
                | {"active_meters": many(record(_BALANCE))}
            ),
        ]
    },
    "CustomerSessionCreate": record(
        {**_WHOSE, "customer_external_id": nullable(TEXT), "return_url": nullable(TEXT)},
        *_WHOSE, "customer_external_id", "return_url",
    ),
    "CustomerSession": record(
        {"id": ID, **_STAMPS, "token": TEXT, "expires_at": TIME, "return_url": nullable(TEXT)}
        | {"customer_portal_url": TEXT, "customer_id": ID, "customer": ref("Customer")}
    ),
    "PortalMeter": record(_BALANCE | {"customer_id": ID, "meter": record({"id": ID, **_STAMPS, "name": TEXT})}),
    "PortalCustomer": record(
        {"id": ID, **_STAMPS, "email": nullable(TEXT), "email_verified": BOOLEAN, "type": TEXT, "name": nullable(TEXT)}
        | {"oauth_accounts": OBJECT} | dict.fromkeys(UNKNOWN_CUSTOMER_FIELDS, nullable(TEXT))
    ),
    "PortalSession": record({"expires_at": TIME, "return_url": nullable(TEXT)}),
    "PortalUsage": record({"customer_id": ID, "items": many(_DISPLAY)}),
    "BenefitCreate": record(_BENEFIT | {"metadata": METADATA}, "metadata"),
    "BenefitUpdate": record(_BENEFIT | {"metadata": METADATA}, *_BENEFIT, "metadata"),
    "Benefit": record(
        {"id": ID, "organization_id": ID, **_STAMPS, **_BENEFIT, "metadata": METADATA, "selectable": BOOLEAN}
        | {"deletable": BOOLEAN, "is_deleted": BOOLEAN, "visibility": TEXT, "visibility_configurable": BOOLEAN}
    ),
    "BenefitGrantCreate": record(_WHOSE, *_WHOSE),
    "BenefitGrantStep": record({"at": nullable(TIME)}, "at"),
    "BenefitGrant": record(
        {"id": ID, **_STAMPS, "granted_at": TIME, "is_granted": BOOLEAN, "revoked_at": nullable(TIME)}
        | {"is_revoked": BOOLEAN, "customer_id": ID, "benefit_id": ID, "customer": ref("Customer")}
        | {"benefit": ref("Benefit"), "properties": OBJECT}
    ),
    "WebhookEndpointCreate": record(_ENDPOINT | {"format": one_of("raw")}, "events", "name", "format"),
    "WebhookEndpointUpdate": record(_ENDPOINT | {"enabled": BOOLEAN}, *_ENDPOINT, "enabled"),
    "WebhookEndpoint": record(_ENDPOINT_SHOWN),
    "MeterThresholdCreate": record(_THRESHOLD, "unit", "customer_id"),
    "MeterThreshold": record(
        {"id": ID, "organization_id": ID, **_THRESHOLD, "created_at": TIME, "deleted_at": nullable(TIME)}
    ),
    "WebhookDelivery": record(
        {"id": TEXT, **_STAMPS, "succeeded": BOOLEAN, "http_code": nullable(COUNT), "response": nullable(TEXT)}
        | {"outcome": TEXT, "took_ms": COUNT, "attempt": COUNT, "endpoint_id": ID, "webhook_event": _TOLD}
    ),
    "WebhookRedelivery": record({"id": TEXT, "endpoints": COUNT}),
    "WebhookAccepted": record({"status": one_of("accepted", "repeated", "ignored")}),
    "WebhookSourceCreate": record({"secret": _SECRET, "name": nullable(TEXT)}, "name"),
    "WebhookSource": record(
        {"id": ID, "organization_id": ID, "name": nullable(TEXT), "created_at": TIME, "deleted_at": nullable(TIME)}
    ),
}  # fmt: skip
