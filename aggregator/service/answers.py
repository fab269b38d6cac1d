"""Definitions of the API's answers: one struct for each object that several routes or webhooks return.

``serializers.py`` and the routes build these structs, and the OpenAPI document is generated from them
(``aggregator.api.schemas``). Answers that only one module of routes builds are in ``aggregator.api.route_answers``. A
field of an answer is always present, unless its type allows ``UnsetType``. The order of the fields is the order in
the JSON.
"""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from meters.aggregation import Aggregation
from meters.filters import Conjunction, Operator
from meters.ledger.benefits import METER_CREDIT
from meters.ledger.ledger import UNITS_MAX, Cause
from meters.ledger.statement import Why
from meters.meter import NAME_LENGTH_MIN, Unit

T = TypeVar("T")

EXAMPLE_ID = "5c9f4d1e-8e0b-4f7a-9c63-0d6a3e1b7f42"

DESCRIPTION_LENGTH_MIN, DESCRIPTION_LENGTH_MAX = 3, 42
"""Characters of a benefit's description (Polar's limits)."""

REF_TEMPLATE = "#/components/schemas/{name}"
"""Where the OpenAPI document has the schema of a struct."""

Id = Annotated[str, Meta(extra_json_schema={"format": "uuid"}, examples=[EXAMPLE_ID])]
Time = Annotated[datetime, Meta(tz=True, examples=["2026-03-01T12:00:00Z"])]
EndTime = Annotated[Time | None, Meta(examples=[None])]
"""A time that most objects do not have."""

Count = Annotated[int, Meta(ge=0, examples=[3])]
Number = Annotated[Raw, Meta(extra_json_schema={"type": "number"}, examples=[12.5])]
"""A JSON number with all digits of a decimal, written by ``aggregator.service.serializers.number``."""

Consumed = Annotated[Number, Meta(description="Units used since the newest reset.", examples=[812])]
Credited = Annotated[Number, Meta(description="Units credited since the newest reset.", examples=[1000])]
Balance = Annotated[Number, Meta(description="Credited less consumed units; may be negative.", examples=[188])]

Scalar = Annotated[Any, Meta(extra_json_schema={"type": ["string", "number", "boolean"]}, examples=["free"])]
"""A value of metadata or of a filter. ``Any``, because msgspec has no union of text and decimals."""

Metadata = Annotated[dict[str, Scalar], Meta(examples=[{"plan": "free"}])]
Object = Annotated[dict[str, Any], Meta(examples=[{}])]
ExternalId = Annotated[str, Meta(description="The organization's own id of the customer.", examples=["ada"])]
Cents = Annotated[int, Meta(ge=0, description="In cents.", examples=[250])]
Currency = Annotated[str, Meta(description="An ISO code in lower case.", examples=["usd"])]
MeterName = Annotated[str, Meta(min_length=NAME_LENGTH_MIN, examples=["Tokens"])]
Multiplier = Annotated[int, Meta(gt=0, examples=[1000])]
Units = Annotated[int, Meta(gt=0, le=UNITS_MAX, examples=[1000])]
Description = Annotated[
    str,
    Meta(min_length=DESCRIPTION_LENGTH_MIN, max_length=DESCRIPTION_LENGTH_MAX, examples=["1000 tokens a month"]),
]  # fmt: skip
Position = Annotated[str, Meta(description="A place in the log, to go on from.", examples=["0:18:0,1:7:2"])]
Witness = Annotated[
    str,
    Meta(
        description="Tells the log of the position from another one with the same places; send it with the position.",
        examples=["0:5f1d20c7a6b94e83,1:90ab34c1d27f5e60"],
    ),
]


class Answer(Struct):
    """Base of every answer."""


class Pagination(Answer):
    """How many items a list has, over all pages."""

    total_count: Count
    max_page: Annotated[Count, Meta(examples=[1])]


class ListResource(Answer, Generic[T]):
    """One page of a list."""

    items: list[T]
    pagination: Pagination


class CursorPagination(Answer):
    """Whether the list goes on after this page."""

    has_next_page: bool


class ListResourceWithCursorPagination(Answer, Generic[T]):
    """One page of a list whose items are not counted."""

    items: list[T]
    pagination: CursorPagination


class Error(Answer):
    """Why a request failed. A missing or insufficient token has an ``error_description``, everything else a
    ``detail``.
    """

    error: Annotated[str, Meta(description="The name of the error.", examples=["ResourceNotFound"])]
    detail: Annotated[Any, Meta(examples=["Not found"])] | UnsetType = UNSET
    error_description: str | UnsetType = UNSET


class Complaint(Answer):
    """One thing that is wrong with a request."""

    type: Annotated[str, Meta(examples=["missing"])]
    loc: Annotated[list[str | int], Meta(description="Where it is wrong.", examples=[["body", "name"]])]
    msg: Annotated[str, Meta(examples=["Field required"])]
    input: Annotated[Any, Meta(description="The value that is wrong; null where it is long.", examples=[{}])] = None
    ctx: Object | UnsetType = UNSET


class Invalid(Answer):
    """Everything that is wrong with a request."""

    error: Annotated[str, Meta(examples=["RequestValidationError"])]
    detail: list[Complaint]


class Stamped(Answer):
    """Base of what has an id and is made and changed at some time."""

    id: Id
    created_at: Time
    modified_at: Time | None


class Clause(Answer):
    """One question to an event. ``value`` is a list for ``in`` alone, and true or false for ``exists``."""

    property: Annotated[
        str,
        Meta(
            description="``name``, ``source``, ``timestamp`` or a key of the metadata; dots lead into objects. A key "
            'in double quotes is taken literally, such as ``"gen_ai.usage.input_tokens"``.',
            examples=["name"],
        ),
    ]
    operator: Annotated[str, Meta(extra_json_schema={"enum": list(Operator)})]
    value: Annotated[Any, Meta(
        extra_json_schema={"type": ["string", "number", "boolean", "array"],
                           "items": {"type": ["string", "number", "boolean"]}},
        examples=["llm.call"],
    )]  # fmt: skip


_PARTS = [{"$ref": REF_TEMPLATE.format(name=name)} for name in ("Clause", "Filter")]


class Filter(Answer):
    """Clauses and filters, of which all (``and``) or at least one (``or``) must hold.

    ``meters.filters.Filter`` is this in memory. msgspec cannot describe it: a clause and a filter have no tag.
    """

    conjunction: Conjunction
    clauses: Annotated[
        list[Annotated[Any, Meta(extra_json_schema={"anyOf": _PARTS})]],
        Meta(examples=[[{"property": "name", "operator": "eq", "value": "llm.call"}]]),
    ]


Aggregated = Annotated[Aggregation, Meta(examples=[{"func": "sum", "property": "tokens"}])]


class Meter(Answer, kw_only=True):
    """A meter. The fields are those of ``meters.catalogue.catalogue.meter_json``."""

    id: Id
    organization_id: Id
    name: MeterName
    filter: Filter
    aggregation: Aggregated
    created_at: Time
    unit: Annotated[Unit, Meta(examples=["token"])]
    custom_label: str | None
    custom_multiplier: Multiplier | None
    metadata: Metadata
    modified_at: Time | None
    archived_at: EndTime


class UncountedExample(Answer):
    """An event that adds nothing to a meter's value."""

    event_id: Id
    timestamp: Time
    name: Annotated[str, Meta(examples=["llm.call"])]
    value: Annotated[str, Meta(description="The value as JSON, perhaps cut.", examples=['"812"'])]


class Uncounted(Answer):
    """Events that a meter's filter lets through and that add nothing to its value."""

    no_number: Annotated[Count, Meta(
        description="Their property holds no number; for ``unique``, an object or an array.", examples=[2],
    )]  # fmt: skip
    absent: Annotated[Count, Meta(description="They have no such property, or null.", examples=[0])]
    example: Annotated[UncountedExample | None, Meta(description="The newest of ``no_number``.")]


Warnings = Annotated[list[str], Meta(
    description="What may be meant otherwise: names and keys that no recent event has, and values that add nothing.",
    examples=[["No event of the last 7 days with events is named 'llm_call'; did you mean 'llm.call'?"]],
)]  # fmt: skip


class CheckedMeter(Meter, kw_only=True):
    """A meter with what it passes over in the newest seven days of events.

    ``unmatched`` and ``warnings`` are left out where there is nothing to say, and both are left out where looking would
    take longer than a second.
    """

    unmatched: Uncounted | UnsetType = UNSET
    warnings: Warnings | UnsetType = UNSET


class Customer(Stamped, kw_only=True):
    """A customer. Billing details are always null: nothing bills here."""

    metadata: Metadata
    external_id: ExternalId | None
    email: Annotated[str | None, Meta(examples=["ada@example.com"])]
    email_verified: bool = False
    type: Literal["individual", "team"]
    name: Annotated[str | None, Meta(examples=["Ada"])]
    organization_id: Id
    deleted_at: EndTime
    first_user_event_at: Time | None = None
    avatar_url: str | None = None
    billing_name: str | None = None
    billing_address: str | None = None
    tax_id: str | None = None
    locale: str | None = None
    default_payment_method_id: str | None = None


class PortalCustomer(Stamped, kw_only=True):
    """The viewer, without what the organization keeps about its customer."""

    email: Annotated[str | None, Meta(examples=["ada@example.com"])]
    email_verified: bool
    type: Literal["individual", "team"]
    name: Annotated[str | None, Meta(examples=["Ada"])]
    billing_name: str | None
    billing_address: str | None
    tax_id: str | None
    locale: str | None
    default_payment_method_id: str | None
    oauth_accounts: Object = {}


class CustomerMeter(Stamped):
    """One customer's balance of one meter: ``balance`` is ``credited_units`` less ``consumed_units``."""

    customer_id: Id
    meter_id: Id
    consumed_units: Consumed
    credited_units: Credited
    balance: Balance
    customer: Customer
    meter: Annotated[Raw, Meta(extra_json_schema={"$ref": REF_TEMPLATE.format(name="Meter")})]  # encoded once


class LedgerEntry(Answer):
    """One movement of a balance. The movements add up to the balance."""

    id: Annotated[str, Meta(examples=[EXAMPLE_ID])]
    at: Time
    cause: Why
    units: Annotated[Number, Meta(description="What the balance changed by.")]
    balance: Annotated[Balance, Meta(description="The balance after this movement.")]
    stated_units: Annotated[Number, Meta(description="The units of a credit as they were decided.")] | None
    rollover: bool | None
    reference: Annotated[str | None, Meta(description="The grant, or the credit that was revoked.")]
    events: Annotated[Count, Meta(description="How many events this usage is made of.")] | None
    arrived_from: EndTime
    arrived_until: EndTime


class Credit(Answer):
    """Units that a customer was credited; negative where they were taken back."""

    id: Annotated[str, Meta(examples=[EXAMPLE_ID])]
    at: Time
    customer_id: Id
    meter_id: Id
    units: Number
    rollover: Annotated[bool, Meta(description="What is left of them at a reset goes into the next window.")]
    cause: Cause
    reference: Annotated[str | None, Meta(description="The grant, or the credit that was revoked.")]


class Reset(Answer):
    """Where a customer's meters begin anew."""

    id: Annotated[str, Meta(examples=[EXAMPLE_ID + ":2026-03-01T12:00:00.000000+00:00"])]
    at: Time
    customer_id: Id
    meter_ids: list[Id]
    rollover: Annotated[dict[str, Number], Meta(
        description="The units that are carried over, by meter.",
        examples=[{EXAMPLE_ID: 12.5}],
    )]  # fmt: skip


class Price(Answer):
    """What a unit of a meter costs."""

    meter_id: Id
    unit_amount: Annotated[str, Meta(description="Cents, with all digits.", examples=["0.002"])]
    cap_amount: Annotated[Cents, Meta(description="The most that a period costs, in cents.")] | None
    currency: Currency


class Event(Answer):
    """An event as it is stored."""

    id: Id
    timestamp: Time
    organization_id: Id
    customer_id: str | None
    customer: Customer | None
    external_customer_id: ExternalId | None
    member_id: str | None
    external_member_id: str | None
    child_count: Annotated[Count, Meta(description="How many events are below this one in its trace.")]
    parent_id: Id | None
    label: Annotated[str, Meta(examples=["llm.call"])]
    source: Annotated[str, Meta(examples=["user"])]
    name: Annotated[str, Meta(examples=["llm.call"])]
    metadata: Annotated[Raw, Meta(extra_json_schema={"type": "object"}, examples=[{"tokens": 812}])]


class EventName(Answer):
    """A name that events go by."""

    name: Annotated[str, Meta(examples=["llm.call"])]
    label: Annotated[str, Meta(examples=["llm.call"])]
    source: Annotated[str, Meta(examples=["user"])]
    occurrences: Count
    first_seen: Time
    last_seen: Time


class DeadLetter(Answer):
    """A line of the log that could not be counted, and why."""

    id: Annotated[str, Meta(examples=["0-18-2"])]
    log_partition: Count
    log_offset: Count
    line: Count
    organization_id: Annotated[str | None, Meta(description="The organization that the record names.")]
    is_own: Annotated[bool, Meta(description="Whether the record names the organization of the token.")]
    reason: Annotated[str, Meta(examples=["json_invalid"])]
    detail: Annotated[str, Meta(examples=["JSON decode error"])]
    raw: Annotated[str, Meta(description="The line; bytes that are not UTF-8 are written as \\xNN.", examples=["{"])]
    is_cut: Annotated[bool, Meta(description="Whether ``raw`` is only the beginning of the line.")]
    ingested_at: Time
    replayed_at: EndTime


class BenefitProperties(Answer):
    """What a ``meter_credit`` benefit gives."""

    meter_id: Id
    units: Units
    rollover: bool


class Benefit(Stamped, kw_only=True):
    """A benefit: units of a meter for every customer that it is granted to."""

    type: Literal["meter_credit"] = METER_CREDIT
    description: Description
    selectable: bool = True
    deletable: bool = True
    is_deleted: Annotated[bool, Meta(examples=[False])]
    visibility: str = "public"
    visibility_configurable: bool = False
    organization_id: Id
    metadata: Metadata
    properties: BenefitProperties


class GrantProperties(Answer):
    """What a grant credited last; empty where it credited nothing yet."""

    last_credited_meter_id: Id | UnsetType | None = UNSET
    last_credited_units: int | UnsetType | None = UNSET
    last_credited_at: Time | UnsetType | None = UNSET


class BenefitGrant(Stamped, kw_only=True):
    """A customer has a benefit, until the grant is revoked. Here nobody has orders or members."""

    granted_at: Time
    is_granted: bool
    revoked_at: EndTime
    is_revoked: Annotated[bool, Meta(examples=[False])]
    subscription_id: str | None
    order_id: str | None = None
    customer_id: Id
    member_id: str | None = None
    benefit_id: Id
    error: str | None = None
    customer: Customer
    member: str | None = None
    benefit: Benefit
    properties: GrantProperties


class MeterNumbers(Stamped):
    """Base of the shapes of a customer's meter."""

    meter_id: Id
    consumed_units: Consumed
    credited_units: Credited


class CustomerStateMeter(MeterNumbers):
    """A customer's balance of one meter."""

    balance: Balance


class CustomerStateSubscriptionMeter(MeterNumbers):
    """A meter of a subscription, with cents for the period so far. One whose price is not known is left out."""

    amount: Cents


class CustomerStateSubscription(Answer):
    """What a customer pays for, as Polar's webhooks told it."""

    id: Id
    status: Annotated[str, Meta(examples=["active"])]
    created_at: Time
    amount: Cents
    currency: Annotated[str, Meta(examples=["usd"])]
    recurring_interval: Annotated[str, Meta(examples=["month"])]
    current_period_start: Time
    product_id: str
    current_period_end: Time | None
    modified_at: Time | None
    metadata: Object
    trial_start: EndTime
    trial_end: EndTime
    cancel_at_period_end: Annotated[bool, Meta(examples=[False])]
    canceled_at: EndTime
    started_at: Time | None
    ends_at: EndTime
    discount_id: str | None
    price_id: str | None
    seats: Count | None
    units: Count | None
    custom_field_data: Object
    meters: list[CustomerStateSubscriptionMeter]


class CustomerStateBenefitGrant(Stamped, kw_only=True):
    """A benefit that a customer has."""

    granted_at: Time
    benefit_id: Id
    benefit_type: Literal["meter_credit"] = METER_CREDIT
    benefit_metadata: Metadata
    properties: GrantProperties


class CustomerState(Customer, kw_only=True):
    """A customer with subscriptions, benefits and the balance of every meter."""

    active_subscriptions: list[CustomerStateSubscription]
    granted_benefits: list[CustomerStateBenefitGrant]
    active_meters: list[CustomerStateMeter]
