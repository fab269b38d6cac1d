"""What customers are given for what they pay: benefits, grants of them, and subscriptions.

A ``meter_credit`` benefit gives units of a meter to every customer it is granted to, again in every cycle. The grant
remembers what it credited last, because that is what is taken back when it is revoked. Editing a benefit changes what
later grants and cycles give, and nothing that was given.

Subscriptions are decided elsewhere (by whoever takes the money) and mirrored here: they say which meters are paid for
and in which period a customer is. What was decided at Polar names meters as Polar does (``meters.polar_meters``).
"""

from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

METER_CREDIT: Final = "meter_credit"

ACTIVE = frozenset({"active", "trialing"})
"""States in which a subscription gives its customer anything (Polar's rule)."""


class Benefit(msgspec.Struct, frozen=True, kw_only=True):
    """Units of a meter; those with ``rollover`` that are left over go into the next cycle."""

    id: str
    organization_id: str
    description: str
    meter_id: str
    units: int
    rollover: bool
    created_at: datetime
    metadata: dict[str, Any] = {}
    modified_at: datetime | None = None
    deleted_at: datetime | None = None


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A customer has a benefit, until it is revoked. ``last_credited_*`` is what revoking takes back.

    Of a grant of Polar's it is what Polar says: once units were taken back, these, negative. Whether they roll over it
    does not say (``last_credited_rollover``): that is what the benefit says. ``is_granted`` is false where Polar could
    not give it, or not yet.
    """

    id: str
    organization_id: str
    benefit_id: str
    customer_id: str
    created_at: datetime
    granted_at: datetime
    modified_at: datetime | None = None
    revoked_at: datetime | None = None
    is_granted: bool = True
    subscription_id: str | None = None
    last_credited_meter_id: str | None = None
    last_credited_units: int | None = None
    last_credited_at: datetime | None = None
    last_credited_rollover: bool | None = None

    @property
    def is_held(self) -> bool:
        """Whether the customer has the benefit now."""
        return self.is_granted and self.revoked_at is None


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """A customer pays for a product, period by period. ``meter_ids`` are those with a price in it."""

    id: str
    organization_id: str
    customer_id: str
    status: str
    created_at: datetime
    amount: int
    currency: str
    recurring_interval: str
    current_period_start: datetime
    product_id: str
    current_period_end: datetime | None = None
    modified_at: datetime | None = None
    metadata: dict[str, Any] = {}
    trial_start: datetime | None = None
    trial_end: datetime | None = None
    cancel_at_period_end: bool = False
    canceled_at: datetime | None = None
    started_at: datetime | None = None
    ends_at: datetime | None = None
    ended_at: datetime | None = None
    discount_id: str | None = None
    price_id: str | None = None
    seats: int | None = None
    units: int | None = None
    custom_field_data: dict[str, Any] = {}
    meter_ids: list[str] = []

    @property
    def is_active(self) -> bool:
        """Whether it gives its customer anything now."""
        return self.status in ACTIVE


class BenefitSet(msgspec.Struct, frozen=True, tag_field="type", tag="benefit.set"):
    """The benefit's new state, whole."""

    benefit: Benefit


class GrantSet(msgspec.Struct, frozen=True, tag_field="type", tag="benefit_grant.set"):
    """The grant's new state, whole."""

    grant: Grant


class SubscriptionSet(msgspec.Struct, frozen=True, tag_field="type", tag="subscription.set"):
    """The subscription's new state, whole."""

    subscription: Subscription


BenefitChange = BenefitSet | GrantSet | SubscriptionSet
T = TypeVar("T", Grant, Subscription)


class Benefits:
    """The decisions above, folded. ``apply`` takes them in the order of the control stream."""

    def __init__(self) -> None:
        self.benefits: dict[str, Benefit] = {}
        self.grants: dict[str, Grant] = {}
        self.subscriptions: dict[str, Subscription] = {}
        self._grants_of: dict[str, dict[str, None]] = {}  # ids by customer, in order
        self._subscriptions_of: dict[str, dict[str, None]] = {}

    def apply(self, change: object) -> None:
        """Take in one change; others than the above are somebody else's."""
        match change:
            case BenefitSet(benefit):
                self.benefits[benefit.id] = benefit
            case GrantSet(grant):
                _put(grant, self.grants, self._grants_of)
            case SubscriptionSet(subscription):
                _put(subscription, self.subscriptions, self._subscriptions_of)

    def benefits_of(self, organization_id: str) -> list[Benefit]:
        """The organization's benefits, oldest first, without those that were deleted."""
        every = list(self.benefits.values())
        return [one for one in every if one.organization_id == organization_id and not one.deleted_at]

    def grants_by(self, benefit_id: str, *, held: bool = True) -> list[Grant]:
        """The grants of a benefit, oldest first: those that hold, or every one."""
        every = list(self.grants.values())
        return [one for one in every if one.benefit_id == benefit_id and not (held and one.revoked_at)]

    def grants_of(self, customer_id: str) -> list[Grant]:
        """Every grant of a customer, revoked ones too, oldest first."""
        return [self.grants[id] for id in list(self._grants_of.get(customer_id, ()))]

    def subscriptions_of(self, customer_id: str) -> list[Subscription]:
        """Every subscription of a customer, ended ones too, oldest first."""
        return [self.subscriptions[id] for id in list(self._subscriptions_of.get(customer_id, ()))]

    def priced_meters(self, organization_id: str) -> set[str]:
        """The meters that an active subscription of one of the organization's customers has a price for."""
        every = [one for one in list(self.subscriptions.values()) if one.organization_id == organization_id]
        return {id for one in every if one.is_active for id in one.meter_ids}

    def paid_meters(self, customer_id: str) -> set[str]:
        """The meters that a customer has by an active subscription or a grant that holds."""
        priced = {id for one in self.subscriptions_of(customer_id) if one.is_active for id in one.meter_ids}
        granted = {self.benefits[one.benefit_id].meter_id for one in self.grants_of(customer_id) if one.is_held}
        return priced | granted


def _put(thing: T, held: dict[str, T], by_customer: dict[str, dict[str, None]]) -> None:
    """In its place by id and by customer: whose it is may turn out otherwise than it was told first."""
    known = held.get(thing.id)
    if known is not None and known.customer_id != thing.customer_id:
        del by_customer[known.customer_id][thing.id]
    held[thing.id] = thing
    by_customer.setdefault(thing.customer_id, {})[thing.id] = None
