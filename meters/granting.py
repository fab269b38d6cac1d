"""What granting, renewing and taking back a benefit does to the ledger (the table of section 6 of Polar's contract).

Ids are made of what makes a step the one that it is: the grant of the benefit and the customer, its first credit of
nothing else, a renewal's of its time, the credit of a grant that is given again of when it was taken back, and what is
taken back of when that was credited. So deciding the same step twice decides it once, also by someone who has not heard
of the first time.
"""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID, uuid5

from msgspec.structs import replace

from meters.benefits import Benefit, Grant
from meters.credit import Cause, CreditGranted, MeterReset
from meters.ledger import Account, in_window

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
    return f"{grant_id}:{at.isoformat(timespec='microseconds') if at else '0'}:{what}"


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
    """The end of a grant: what it credited last is taken back, if it ever credited, from the units of its kind.

    That is after it was given or carried over, also where the clock has gone back: before it, there is nothing to take.
    The benefit may have been edited since: whether it rolls over now says nothing of what was given.
    """
    held = replace(grant, revoked_at=at, modified_at=at)
    if grant.last_credited_units is None or grant.last_credited_meter_id is None:
        return Step(held, [])
    rollover = benefit.rollover if grant.last_credited_rollover is None else grant.last_credited_rollover
    given = [known for known in (grant.last_credited_at, account.since if account else None) if known is not None]
    back = CreditGranted(
        id=movement_id(grant.id, grant.last_credited_at, "revoke"), organization_id=grant.organization_id,
        customer_id=grant.customer_id, meter_id=grant.last_credited_meter_id, units=-Decimal(grant.last_credited_units),
        at=max([at, *(known + INSTANT for known in given)]), rollover=rollover, cause="revoke", reference=grant.id,
    )  # fmt: skip
    return Step(held, [back])
