"""The usage that resets need: what rolls over at a reset follows from it, and from the credits of the window it ends.

A reset that is told late divides a window. The reset after it then carries over something else, so the usage of both
parts is counted from the store and decided together with the reset.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from msgspec.structs import replace

from aggregator.service.balances import consumed_between
from aggregator.service.service import Desk
from meters.aggregation import Aggregation
from meters.catalogue.catalogue import Customer, Names
from meters.filters import Filter
from meters.ledger.ledger import ZERO, Account, CreditChange, MeterReset, WindowUsage, uncounted
from meters.meter import Meter


class Basis(NamedTuple):
    """What usage is counted by, and the account that asks for it."""

    account: Account | None
    names: Names
    filter: Filter
    aggregation: Aggregation

    def holds(self, desk: Desk, customer: Customer, meter: Meter) -> bool:
        """Return true while the numbers that were counted by it are those that would be counted now."""
        now = basis(desk, customer, meter)
        return now.account is self.account and now[1:] == self[1:]


class Counted(NamedTuple):
    """Usage for resets of one meter, as decisions to be made with the changes, and the account after all of them."""

    usage: list[MeterReset]
    account: Account
    basis: Basis

    def added_to(self, reset: MeterReset, meter_id: str) -> MeterReset:
        """Return the reset with its own usage of the meter and what it carries over."""
        own = [one.used[meter_id] for one in self.usage if one.id == reset.id]
        carried = next((credit.units for credit in self.account.credits if credit.id == reset.id), ZERO)
        return replace(
            reset,
            used=reset.used | ({meter_id: own[0]} if own else {}),
            rollover=reset.rollover | ({meter_id: carried} if carried else {}),
        )

    def of_others(self, *resets: MeterReset) -> list[MeterReset]:
        """Return the usage that belongs to resets that were decided before."""
        ids = {reset.id for reset in resets}
        return [one for one in self.usage if one.id not in ids]


def basis(desk: Desk, customer: Customer, meter: Meter) -> Basis:
    """Return what the usage of a customer's meter is counted by now."""
    account = desk.view.ledger.account(customer.id, meter.id)
    return Basis(account, desk.catalogue.names_of(customer), meter.filter, meter.aggregation)


async def counted(
    desk: Desk, customer: Customer, meter: Meter, changes: Sequence[CreditChange], since: datetime
) -> Counted:
    """Count the usage of every window that ends at ``since`` or later and carries units by it, after the changes.

    This waits for the store, so it is done before ``desk.deciding`` is held, for which every tenant waits.
    Raises Unavailable.
    """
    known, trial = basis(desk, customer, meter), desk.view.ledger.trial(customer.id, meter.id)
    found: list[MeterReset] = []
    for change in changes:
        trial.apply(change)
    while ending := uncounted(trial.account(customer.id, meter.id) or Account(), since):
        units = await consumed_between(desk, customer, meter, ending.since, ending.reset.at)
        usage = MeterReset(
            id=ending.reset.id, organization_id=customer.organization_id, customer_id=customer.id,
            meter_ids=[meter.id], at=ending.reset.at, used={meter.id: WindowUsage(ending.since, units)},
            reference=ending.reset.reference,
        )  # fmt: skip
        trial.apply(usage)
        found.append(usage)
    return Counted(found, trial.account(customer.id, meter.id) or Account(), known)
