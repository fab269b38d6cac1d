"""Definitions of answers that only one module of routes builds: usage, charges, metrics, feed, portal and webhooks.

``aggregator.service.answers`` has the field types, and the objects that several routes and webhooks share.
"""

from datetime import date
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, UnsetType

from aggregator.service.answers import (
    EXAMPLE_ID,
    Answer,
    Balance,
    BenefitProperties,
    Cents,
    Consumed,
    Count,
    Credited,
    Currency,
    Customer,
    Description,
    EndTime,
    ExternalId,
    GrantProperties,
    Id,
    MeterNumbers,
    Number,
    PortalCustomer,
    Position,
    Stamped,
    Time,
    Uncounted,
    Warnings,
    Witness,
)
from aggregator.service.polar_inbox import Outcome
from aggregator.store.webhook_outbox import Status
from meters.ledger.benefits import METER_CREDIT
from meters.ledger.ledger import Cause
from meters.meter import Unit
from meters.webhooks import API_VERSION, EventType


class Readiness(Answer):
    """The service is ready, and has counted the log up to these positions."""

    status: Literal["ready"]
    as_of: Annotated[dict[str, int], Meta(description="The offset of each partition.", examples=[{"0": 18}])]
    log_clock_ahead_s: Annotated[
        float,
        Meta(
            description="Seconds by which the newest time in the log is ahead of this machine's clock, 0 where it is "
            "not. Until then new events and decisions have that time, too.",
            examples=[0.0],
        ),
    ]


class Quantity(Answer):
    """What a meter counted in one interval."""

    timestamp: Time
    quantity: Number


class Quantities(Answer):
    """What a meter counted, interval by interval."""

    quantities: list[Quantity]
    total: Number


class Usage(Answer):
    """One customer's total of a meter."""

    meter_id: Id
    customer_id: str | None
    external_customer_id: ExternalId | None
    value: Annotated[str, Meta(description="The total, with all its digits.", examples=["812"])]
    count: Annotated[Count, Meta(description="Events that count; for ``unique``, the distinct values.")]


Amount = Annotated[str, Meta(description="A decimal as text, with all its digits.", examples=["812"])]


class ShownMeter(Answer):
    """The name and the unit of a meter."""

    id: Id
    name: Annotated[str, Meta(examples=["Tokens"])]
    unit: Annotated[Unit, Meta(examples=["token"])]
    custom_label: str | None
    custom_multiplier: int | None


class UsageRow(Answer):
    """The usage of one group in one calendar unit, cut to the range."""

    meter_id: Id
    group: Annotated[dict[str, str | None], Meta(
        description="The value of each key of `group_by`; null where events have none. Empty without `group_by`.",
        examples=[{"metadata.model": "gpt-5"}],
    )]  # fmt: skip
    start: Time
    end: Annotated[Time, Meta(description="Not included.")]
    value: Amount


class UsageRemainder(Answer):
    """The usage of all groups that `top` left out."""

    meter_id: Id
    start: Time
    end: Annotated[Time, Meta(description="Not included.")]
    value: Amount


class UsageTotal(Answer):
    """The usage of the whole range."""

    meter_id: Id
    value: Amount
    adds_up: Annotated[bool, Meta(
        description="Whether rows and remainder add up to the value: `count` and `sum` do, the others need not.",
        examples=[True],
    )]  # fmt: skip


class UsageAnswer(Answer):
    """The usage of meters in a range, by calendar unit and group."""

    as_of: Annotated[str, Meta(description="The log positions that it is true for.", examples=["0:18,1:7"])]
    meters: list[ShownMeter]
    rows: list[UsageRow]
    remainder: Annotated[list[UsageRemainder], Meta(description="Empty without `top`.")]
    totals: list[UsageTotal]


class TopCustomer(Answer):
    """What a meter would count of one customer."""

    customer_id: str | None
    external_customer_id: ExternalId | None
    quantity: Number


class Preview(Answer):
    """What a meter would count of the events that are stored."""

    total: Number
    events: Count
    customers: Count
    first_seen: Time | None
    last_seen: Time | None
    top_customers: list[TopCustomer]
    unmatched: Uncounted
    warnings: Warnings


class Charge(Answer):
    """What one meter comes to in the running period. Credits are used first.

    The price is the newest one; ``unit_amount`` and ``amount`` are null where a price of the period is not known.
    """

    meter_id: Id
    unit_amount: Annotated[str | None, Meta(description="Cents, with all digits.", examples=["0.002"])]
    cap_amount: Annotated[Cents, Meta(description="The most that a period costs, in cents.")] | None
    currency: Currency | None
    product_id: Annotated[str | None, Meta(description="The product whose price it is; null for the meter's own.")]
    meter_name: Annotated[str, Meta(examples=["Tokens"])]
    period_start: Time | None
    consumed_units: Consumed
    credited_units: Credited
    billed_units: Annotated[Number, Meta(examples=[0])]
    amount: Annotated[Cents, Meta(examples=[0])] | None


class Charges(Answer):
    """What a customer's running period comes to. An estimate: it bills nobody.

    ``amount`` is null where it is not known: a price is missing, or nothing that was used has one.
    """

    customer_id: Id
    items: list[Charge]
    amount: Annotated[Cents, Meta(examples=[0])] | None
    currency: Currency | None


class MetricInfo(Answer):
    """How a metric is shown."""

    slug: Annotated[str, Meta(examples=["costs"])]
    display_name: Annotated[str, Meta(examples=["Costs"])]
    type: Annotated[str, Meta(examples=["currency_sub_cent"])]


class Metrics(Answer):
    """Metrics period by period, and over the whole range. Amounts are in cents."""

    periods: list[Annotated[dict[str, Time | Number], Meta(
        description="``timestamp`` is the period's start; every other field is a metric.",
        examples=[{"timestamp": "2026-03-01T00:00:00Z", "costs": 12.5}],
        extra_json_schema={"required": ["timestamp"]},
    )]]  # fmt: skip
    totals: Annotated[dict[str, Number], Meta(examples=[{"costs": 12.5}])]
    metrics: Annotated[dict[str, MetricInfo], Meta(
        examples=[{"costs": {"slug": "costs", "display_name": "Costs", "type": "currency_sub_cent"}}]
    )]  # fmt: skip


class IntervalLimits(Answer):
    """How many days a range may have."""

    min_days: Count
    max_days: Count


class MetricsLimits(Answer):
    """The ranges that metrics can be asked for."""

    min_date: Annotated[date, Meta(examples=["2023-01-01"])]
    intervals: Annotated[dict[str, IntervalLimits], Meta(examples=[{"day": {"min_days": 0, "max_days": 367}}])]


class FeedEvent(Answer, kw_only=True):
    """An event as it can be sent on: with one of the two names of its customer."""

    name: Annotated[str, Meta(examples=["llm.call"])]
    timestamp: Time
    external_id: Annotated[str, Meta(examples=["call-1"])]
    customer_id: str | UnsetType = UNSET
    external_customer_id: ExternalId | UnsetType = UNSET
    member_id: str | UnsetType = UNSET
    external_member_id: str | UnsetType = UNSET
    parent_id: str | UnsetType = UNSET
    metadata: Annotated[Raw, Meta(extra_json_schema={"type": "object"}, examples=[{"tokens": 812}])]


class FeedItem(Answer):
    """An event and its place in the log."""

    place: Position
    ingested_at: Time
    event: FeedEvent


class FeedPage(Answer):
    """The next events of the log."""

    items: list[FeedItem]
    position: Position
    witness: Witness


class FeedPosition(Answer):
    """A position of the feed, and of which log it is."""

    position: Position
    witness: Witness
    ingested_at: Annotated[Time | None, Meta(description="When the newest of your events before it came in.")]


class FeedBacklog(Answer):
    """How many events stand behind a position."""

    events: Count
    oldest_ingested_at: Time | None


class FeedCustomer(Answer, kw_only=True):
    """How many events a customer has, by one of the two names."""

    customer_id: str | UnsetType = UNSET
    external_customer_id: ExternalId | UnsetType = UNSET
    events: Count


class FeedCustomers(Answer):
    """The customers with most events behind a position, and how many customers there are."""

    items: list[FeedCustomer]
    count: Count


class FeedGroup(Answer, kw_only=True):
    """What the events of one meter, customer and window of time add up to."""

    meter_id: Id
    customer_id: str | UnsetType = UNSET
    external_customer_id: ExternalId | UnsetType = UNSET
    window: Time
    count: Count
    sum: Number


class FeedRollup(Answer):
    """What the events behind a position add up to."""

    items: list[FeedGroup]
    position: Position
    witness: Witness


class FeedTrafficRollup(Answer):
    """How many events a rollup would make of a meter's events."""

    meter_id: Id
    events: Count


class FeedTraffic(Answer):
    """What came in since a time."""

    events: Count
    metadata_bytes: Count
    busiest_minute: Annotated[Count, Meta(description="Events of the minute that had most of them.")]
    rollups: list[FeedTrafficRollup]


class CustomerSession(Stamped, kw_only=True):
    """A session of a customer. The portal is the application's own: the path is that of its numbers."""

    expires_at: Time
    return_url: str | None
    customer_portal_url: str = "/v1/customer-portal/usage"
    customer_id: Id
    customer: Customer
    token: Annotated[str, Meta(description="Opens the portal; shown here alone.", examples=["polar_cst_..."])]


class PortalMeterName(Stamped):
    """The name of a meter."""

    name: Annotated[str, Meta(examples=["Tokens"])]


class PortalMeter(MeterNumbers):
    """The viewer's balance of one meter."""

    customer_id: Id
    balance: Balance
    meter: PortalMeterName


class PortalSession(Answer):
    """Until when a session is valid."""

    expires_at: Time
    return_url: str | None


class PortalOrganization(Stamped, kw_only=True):
    """The organization, as its customers see it. It has no picture, and nothing is sold here."""

    name: str
    slug: str
    avatar_url: str | None = None
    proration_behavior: Literal["prorate"] = "prorate"
    allow_customer_updates: bool = False


class PortalBenefit(Stamped, kw_only=True):
    """A benefit, without what the organization keeps about it."""

    type: Literal["meter_credit"] = METER_CREDIT
    description: Description
    selectable: bool = True
    deletable: bool = True
    is_deleted: Annotated[bool, Meta(examples=[False])]
    organization_id: Id
    organization: PortalOrganization
    properties: BenefitProperties


class PortalBenefitGrant(Stamped, kw_only=True):
    """A grant of the customer who asks. There are no orders and no members here."""

    granted_at: Time
    revoked_at: EndTime
    customer_id: Id
    member_id: str | None = None
    benefit_id: Id
    subscription_id: str | None
    order_id: str | None = None
    is_granted: bool
    is_revoked: Annotated[bool, Meta(examples=[False])]
    error: str | None = None
    customer: PortalCustomer
    benefit: PortalBenefit
    properties: GrantProperties


class PortalPeriod(Answer):
    """The running period; without an end where no subscription has one."""

    start: Time | None
    end: Time | None


class PortalCredit(Answer):
    """Units that were credited, or taken back where they are negative."""

    at: Time
    units: Number
    cause: Cause
    rollover: bool


class PortalUsageItem(Answer):
    """What a portal shows of one meter."""

    meter: ShownMeter
    usage: Consumed
    limit: Annotated[Credited, Meta(description="The units credited; null without credits.")] | None
    balance: Balance
    percentage: Annotated[
        Annotated[Number, Meta(examples=[81.2])] | None, Meta(description="The part of the limit that is used.")
    ]
    period: PortalPeriod
    amount: Annotated[Cents, Meta(description="What the period costs so far, in cents; null without a price.")] | None
    currency: Currency | None
    credits: list[PortalCredit]


class PortalUsage(Answer):
    """What a portal shows."""

    customer_id: Id
    items: list[PortalUsageItem]


class WebhookEndpoint(Answer, kw_only=True):
    """An address that is sent webhooks."""

    id: Id
    organization_id: Id
    url: Annotated[str, Meta(examples=["https://example.com/webhooks"])]
    events: list[EventType]
    created_at: Time
    name: str | None
    modified_at: Time | None
    disabled_at: EndTime
    disabled_reason: str | None
    deleted_at: EndTime
    enabled: bool
    format: Literal["raw"] = "raw"
    secret: Annotated[str, Meta(description="Shown when it is made, and masked afterwards.", examples=["whsec_..."])]
    api_version: str = API_VERSION
    uses_standard_webhook_signature: bool = True


class MeterThreshold(Answer):
    """A line in the usage or balance of one customer, or of every customer."""

    id: Id
    organization_id: Id
    meter_id: Id
    measure: Literal["usage", "balance"]
    unit: Literal["units", "percent"]
    value: Annotated[Number, Meta(examples=[80])]
    created_at: Time
    customer_id: Id | None
    deleted_at: EndTime


class WebhookEvent(Answer, kw_only=True):
    """What is sent to an endpoint. Nothing is skipped or archived: what is listed can be sent again."""

    id: Annotated[str, Meta(description="The ``webhook-id`` of every attempt.", examples=[EXAMPLE_ID])]
    created_at: Time
    modified_at: Time | None
    type: EventType
    api_version: str = API_VERSION
    skipped: bool = False
    is_archived: bool = False
    customer_id: Id
    status: Status
    payload: Annotated[str, Meta(examples=['{"type":"customer.state_changed"}'])]


class WebhookDelivery(Answer):
    """One attempt to deliver a webhook. ``response`` says why an endpoint did not answer: answers are not kept."""

    id: Annotated[str, Meta(examples=[EXAMPLE_ID])]
    created_at: Time
    modified_at: EndTime
    succeeded: bool
    http_code: Annotated[int, Meta(ge=0, examples=[200])] | None
    response: str | None
    outcome: Annotated[str, Meta(examples=["200 OK"])]
    took_ms: Count
    attempt: Count
    endpoint_id: Id
    webhook_event: WebhookEvent


class WebhookRedelivery(Answer):
    """How many endpoints a webhook is sent to again."""

    id: Id
    endpoints: Count


class WebhookAccepted(Answer):
    """The outcome of a webhook of Polar's. ``notes`` says which parts of an accepted one have no effect, and why."""

    status: Literal["accepted", "repeated", "ignored"]
    notes: list[str] | UnsetType = UNSET


class PolarDelivery(Answer):
    """An incoming webhook of Polar's, and what became of it."""

    delivery_id: Annotated[str, Meta(description="Polar's ``webhook-id``.", examples=[EXAMPLE_ID])]
    type: Annotated[str, Meta(examples=["benefit_grant.created"])]
    received_at: Time
    outcome: Annotated[
        Outcome,
        Meta(description="known: applied before. refused: not readable. failed: Polar sends it again."),
    ]
    reasons: Annotated[list[str], Meta(description="The reasons, and the parts that have no effect or wait.")]


class PolarObjectTaken(Answer):
    """The outcome of one object of Polar's, or of a dry run."""

    id: str
    outcome: Outcome
    reasons: list[str]


class PolarObjectsTaken(Answer):
    """The outcomes of objects of Polar's, in the order of the request."""

    items: list[PolarObjectTaken]


class PolarWaiting(Answer):
    """A meter of Polar's that no meter here is linked to, and the credits that wait for the link."""

    polar_meter_id: Annotated[str, Meta(examples=[EXAMPLE_ID])]
    customers: Count
    credits: Count
    units: Annotated[int, Meta(description="Units credited less units taken back.", examples=[100])]
    first_at: Time
    last_at: Time


class WebhookSource(Answer):
    """A Polar organization whose webhooks are accepted."""

    id: Id
    organization_id: Id
    created_at: Time
    name: str | None
    deleted_at: EndTime
