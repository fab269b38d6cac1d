"""Benefits, their grants to customers, subscriptions and renewals.

A ``meter_credit`` benefit gives units of a meter to every customer it is granted to, again in every cycle.
``Benefits`` folds the decisions ``BenefitSet``, ``GrantSet`` and ``SubscriptionSet``. ``granted``, ``cycled`` and
``revoked`` return a ``Step``: the ledger movements that a grant, a renewal or a revocation causes.

Editing a benefit changes what later grants and cycles credit, and nothing that was credited before. Subscriptions are
decided where the customer pays and mirrored here: they say which meters are paid for, and for which period.
"""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID, uuid5

import msgspec
from msgspec.structs import replace

from meters.ledger.joined import CustomersJoined, Joined
from meters.ledger.ledger import Account, Cause, Credit, CreditGranted, MeterReset, in_window
from meters.timestamps import sortable_text

# State. A grant keeps its last credit, because that is the amount that a revocation takes back. Decisions from Polar
# use Polar's ids of meters (``meters.polar_webhooks``).

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
    """A customer pays for a product, period by period. ``meter_ids`` are those with a price in it.

    ``current_meter_period_*`` is the period of usage, where it is another one than that of the payments.
    """

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
    current_meter_period_start: datetime | None = None
    current_meter_period_end: datetime | None = None
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
        self._joined = Joined()

    def apply(self, change: object) -> None:
        """Take in one change; others than the above are somebody else's."""
        match change:
            case BenefitSet(benefit):
                self.benefits[benefit.id] = benefit
            case GrantSet(grant):
                _put(self._placed(grant), self.grants, self._grants_of)
            case SubscriptionSet(subscription):
                _put(self._placed(subscription), self.subscriptions, self._subscriptions_of)
            case CustomersJoined(id=id):
                if self._joined.join(change) is not None:
                    for grant in self.grants_of(id):
                        _put(self._placed(grant), self.grants, self._grants_of)
                    for subscription in self.subscriptions_of(id):
                        _put(self._placed(subscription), self.subscriptions, self._subscriptions_of)

    def _placed(self, thing: T) -> T:
        """Return the grant or subscription with the customer that its customer's id names by now."""
        whose = self._joined.customer_of(thing.organization_id, thing.customer_id)
        return thing if whose == thing.customer_id else replace(thing, customer_id=whose)

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

    def active_subscriptions(self, organization_id: str) -> list[Subscription]:
        """Return the active subscriptions of the organization's customers, oldest first."""
        every = list(self.subscriptions.values())
        return [one for one in every if one.organization_id == organization_id and one.is_active]

    def priced_meters(self, organization_id: str) -> set[str]:
        """The meters that an active subscription of one of the organization's customers has a price for."""
        return {id for one in self.active_subscriptions(organization_id) for id in one.meter_ids}

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


# Ledger movements, by section 6 of Polar's contract. The id of a movement is derived from its cause: a first credit
# from the grant and the customer; a renewal also from its time; the credit of a repeated grant from the time of the
# revocation before it; a revocation from the time of the credit that it takes back. So deciding a step twice adds one
# movement, also when the second decision is made without knowledge of the first.

INSTANT = timedelta(microseconds=1)
"""The least by which one movement is after another: at one time their ids would decide."""


class Step(NamedTuple):
    """The grant as it is afterwards, and the movements that come with it, in their order."""

    grant: Grant
    movements: list[CreditGranted | MeterReset]


def grant_id(benefit_id: str, customer_id: str) -> str:
    """The id of the grant of a benefit to a customer: there is one, that may be taken back and given again."""
    return str(uuid5(UUID(benefit_id), customer_id))


def movement_id(grant_id: str, at: datetime | None, what: str) -> str:
    """The id of a movement: one of a kind for a grant and an instant, or for the beginning, before every instant."""
    return f"{grant_id}:{sortable_text(at) if at else '0'}:{what}"


def granted(grant: Grant, benefit: Benefit, at: datetime, account: Account | None) -> Step:
    """The first credit of a grant, or of one that was revoked and is given again."""
    counts_at, id = in_window(account, at), movement_id(grant.id, grant.revoked_at, "grant")
    modified_at = None if grant.created_at == at else at
    held = replace(grant, granted_at=at, is_granted=True, revoked_at=None, modified_at=modified_at)
    return _credited(held, benefit, counts_at, "grant", [], id)


def needs_reset(grant: Grant, account: Account | None) -> bool:
    """Whether a renewal has to begin the meter anew: not where something else did since the last credit."""
    since = grant.last_credited_at
    return account is None or since is None or not any(reset.at > since for reset in account.resets)


def cycled(grant: Grant, benefit: Benefit, at: datetime, reset: MeterReset | None, account: Account | None) -> Step:
    """The renewal of a grant at ``at``, after the reset that it needs.

    Where something else has begun the meter anew since then, it is that window's: before it, it would be gone.
    """
    id = movement_id(grant.id, at, "cycle")
    counts_at = at if reset is not None else in_window(account, at)
    return _credited(replace(grant, modified_at=at), benefit, counts_at, "cycle", [reset] if reset else [], id)


def _credited(
    grant: Grant, benefit: Benefit, at: datetime, cause: Cause, before: list[MeterReset], id: str
) -> Step:
    credit = CreditGranted(
        id=id, organization_id=grant.organization_id, customer_id=grant.customer_id,
        meter_id=benefit.meter_id, units=Decimal(benefit.units), at=at, rollover=benefit.rollover, cause=cause,
        reference=grant.id,
    )  # fmt: skip
    held = replace(
        grant, last_credited_meter_id=benefit.meter_id, last_credited_units=benefit.units, last_credited_at=at,
        last_credited_rollover=benefit.rollover,
    )  # fmt: skip
    return Step(held, [*before, credit])


def revoked(grant: Grant, benefit: Benefit, at: datetime, account: Account | None) -> Step:
    """The end of a grant: what it credited last is taken back, if it ever credited, as far as the window has it.

    That is after it was given or carried over, also where the clock has gone back: before it, there is nothing to take.
    The benefit may have been edited since: whether it rolls over now says nothing of what was given.
    """
    held = replace(grant, revoked_at=at, modified_at=at)
    if grant.last_credited_units is None or grant.last_credited_meter_id is None:
        return Step(held, [])
    rollover = benefit.rollover if grant.last_credited_rollover is None else grant.last_credited_rollover
    last = _last_credit(grant, account)
    given = [known for known in (grant.last_credited_at, account.since if account else None) if known is not None]
    back = CreditGranted(
        id=movement_id(grant.id, grant.last_credited_at, "revoke"), organization_id=grant.organization_id,
        customer_id=grant.customer_id, meter_id=grant.last_credited_meter_id, units=-Decimal(grant.last_credited_units),
        at=max([at, *(known + INSTANT for known in given)]), rollover=rollover, cause="revoke", reference=grant.id,
        takes=last.id if last else None,
    )  # fmt: skip
    return Step(held, [back])


def _last_credit(grant: Grant, account: Account | None) -> Credit | None:
    """Return the credit that the grant made last.

    After the clock went back that need not be its newest one, so the time that the grant names decides. If the credit
    was decided twice, the earlier time stands and the grant may name the later one: then it is the newest.
    """
    known = account.credits if account else []
    credits = [one for one in known if one.reference == grant.id and one.cause in ("grant", "cycle")]
    return next((one for one in credits if one.at == grant.last_credited_at), credits[-1] if credits else None)


def is_credited(grant: Grant, at: datetime, account: Account | None) -> bool:
    """Whether the grant was renewed as of this time."""
    id = movement_id(grant.id, at, "cycle")
    return account is not None and any(credit.id == id for credit in account.credits)
