"""Beginning a customer's meters anew: what every renewal does, whoever asks for it.

The units that are carried over are worked out here, once, from all that arrived before the cut; they are part of the
decision. So the view waits until it has read whatever the log had when the cut was asked for.
"""

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal

from aggregator.api.balances import consumed_between, customer_meter
from aggregator.api.desk import Desk
from meters.catalogue import Customer
from meters.credit import MeterReset
from meters.ledger import ZERO, Account, rollover_units
from meters.meter import Meter


async def reset(
    desk: Desk, customer: Customer, meters: Iterable[Meter], *, id: str, at: datetime,
    reference: str | None = None,
) -> MeterReset:  # fmt: skip
    """The decision to begin the meters anew at a time. The caller holds ``desk.deciding`` and decides it.

    ``id`` makes it one decision however often it is taken: derive it from what caused it.
    """
    meters = list(meters)
    carried = {meter.id: await _carried(desk, customer, meter, at) for meter in meters}
    return MeterReset(
        id=id, organization_id=customer.organization_id, customer_id=customer.id, meter_ids=list(carried), at=at,
        rollover={meter_id: units for meter_id, units in carried.items() if units > 0}, reference=reference,
    )  # fmt: skip


async def _carried(desk: Desk, customer: Customer, meter: Meter, at: datetime) -> Decimal:
    account = desk.view.ledger.account(customer.id, meter.id)
    if account is None or not _has_rollover(account, at):
        return ZERO
    now = await customer_meter(desk, customer, meter)
    consumed = now.consumed
    if now.consumption.last_at is None or now.consumption.last_at >= at:
        consumed = await consumed_between(desk, customer, meter, account.since, at)
    return rollover_units(account, consumed, until=at)


def _has_rollover(account: Account, at: datetime) -> bool:
    return any(credit.rollover and credit.at < at for credit in account.window())
