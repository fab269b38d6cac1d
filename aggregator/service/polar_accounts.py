"""Settle customers' accounts to match Polar's webhooks: credits, revocations and resets with rollover.

``settle`` compares what all known facts call for (``meters.catalogue.polar_facts``) with what the ledger holds. It
decides the missing movements and withdraws those that later facts contradict. So the result does not depend on the
order of the webhooks, and settling again changes nothing. ``settle_meter`` does this for a meter that was linked to
one of Polar's meters only later.
"""

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal

from msgspec.structs import replace

from aggregator.service.cuts import counted
from aggregator.service.errors import CHANGES_AT_ONCE
from aggregator.service.service import Desk
from meters.catalogue.catalogue import Customer
from meters.catalogue.polar_facts import Given, Wanted
from meters.ledger.ledger import POLARS, Account, Cause, Credit, CreditGranted, MeterReset, MovementWithdrawn, Reset
from meters.meter import Meter
from meters.polar_webhooks import METER_KEY, meter_of
from meters.timestamps import sortable_text

CUSTOMERS_AT_ONCE = 50
"""Customers that are settled together: their other movements wait meanwhile."""

Movement = CreditGranted | MeterReset


async def settle(desk: Desk, organization_id: str, customer_ids: Iterable[str | None]) -> None:
    """Bring customers' accounts to what the facts call for, as far as their meters are known here.

    The caller holds the customers' turn.
    """
    changes: list[Movement | MovementWithdrawn] = []
    for customer_id in customer_ids:
        customer = desk.catalogue.customer(organization_id, customer_id or "")
        if customer is None or customer.id != customer_id:
            continue  # an id that names another customer, who is settled under the customer's own id
        for meter_id, polar_ids in _concerned(desk, customer).items():
            wanted = desk.catalogue.mirror.wanted(customer.id, *polar_ids)
            changes += await _movements(desk, customer, desk.catalogue.meters[meter_id], wanted)
        if len(changes) >= CHANGES_AT_ONCE:
            await desk.decide(*changes)
            changes = []
    if changes:
        await desk.decide(*changes)


async def settle_meter(desk: Desk, meter: Meter) -> None:
    """Credit what Polar told of a meter before it was known which one it is, and take from it what is another's."""
    names = {meter.id, str(meter.metadata.get(METER_KEY))}
    waiting = {customer_id for name in names for customer_id in desk.catalogue.mirror.customers(name)}
    accounts = list(desk.view.ledger.of_meter(meter.id).items())  # the writer goes on meanwhile
    waiting.update(customer_id for customer_id, account in accounts if _has_ours(account))
    every = sorted(waiting)
    for place in range(0, len(every), CUSTOMERS_AT_ONCE):
        some = every[place : place + CUSTOMERS_AT_ONCE]
        async with desk.turn(meter.organization_id, *some):
            await settle(desk, meter.organization_id, some)


def _concerned(desk: Desk, customer: Customer) -> dict[str, list[str]]:
    """The meters that have something of Polar's or should, each with what Polar calls it, if it still does.

    Of a customer who was joined with another one these are all that have an account.
    """
    meters, joined = desk.catalogue.meters_of(customer.organization_id), _is_joined(desk, customer)
    accounts = ((meter.id, desk.view.ledger.account(customer.id, meter.id)) for meter in meters)
    found: dict[str, list[str]] = {id: [] for id, account in accounts if account and (joined or _has_ours(account))}
    for polar_id in desk.catalogue.mirror.meters(customer.id):
        meter = meter_of(desk.catalogue, customer.organization_id, polar_id)
        if meter is not None:
            found.setdefault(meter.id, []).append(polar_id)
    return found


async def _movements(
    desk: Desk, customer: Customer, meter: Meter, wanted: Wanted
) -> list[Movement | MovementWithdrawn]:
    """What has to be decided so that the account holds what is wanted and nothing else of ours."""
    account = desk.view.ledger.account(customer.id, meter.id) or Account()
    should = {credit.id: credit for given in wanted.given for credit in _credits(customer, meter, given)}
    made = {reset.at: reset for reset in reversed(account.resets) if _is_ours(reset)}
    cuts = {at: _cut(customer, meter, at) for at in wanted.cuts if at not in made}
    kept = should.keys() | {reset.id for at, reset in made.items() if at in wanted.cuts}
    moved = [one for one in account.credits if one.cause != "rollover"] + account.resets
    have = {one.id: one.at for one in moved if _is_ours(one)}
    gone = [
        MovementWithdrawn(
            id=id, organization_id=customer.organization_id, customer_id=customer.id, meter_id=meter.id
        )
        for id in sorted(have.keys() - kept)
    ]  # fmt: skip
    credits = [credit for id, credit in should.items() if id not in have]
    changes: list[Movement | MovementWithdrawn] = [*gone, *credits, *cuts.values()]
    times = [*(have[one.id] for one in gone), *(one.at for one in credits), *cuts]
    if _is_joined(desk, customer):  # usage that resets state was counted of one of the two
        times += [reset.at for reset in account.resets]
    if not times:
        return []
    since = min(times)
    found = await counted(desk, customer, meter, changes, since)
    resets = [found.added_to(reset, meter.id) for reset in cuts.values()]
    return [*gone, *credits, *resets, *found.of_others(*resets)]


def _cut(customer: Customer, meter: Meter, at: datetime) -> MeterReset:
    return MeterReset(
        id=f"{POLARS}{customer.id}:{meter.id}:{sortable_text(at)}", organization_id=customer.organization_id,
        customer_id=customer.id, meter_ids=[meter.id], at=at,
    )  # fmt: skip


def _credits(customer: Customer, meter: Meter, given: Given) -> list[CreditGranted]:
    fact = given.fact
    cause: Cause = "revoke" if fact.units < 0 else "cycle" if given.is_cycle else "grant"
    name = f"{POLARS}{fact.grant_id}:{sortable_text(fact.at)}:{fact.units}{'r' if fact.rollover else ''}"
    credit = CreditGranted(
        id=name, organization_id=customer.organization_id, customer_id=customer.id, meter_id=meter.id, at=fact.at,
        units=Decimal(fact.units), rollover=fact.rollover, cause=cause, reference=fact.grant_id,
    )  # fmt: skip
    if given.revoked is None:
        return [credit]
    back = f"{name}:{sortable_text(given.revoked)}"
    taken = replace(credit, id=back, units=-credit.units, at=given.revoked, cause="revoke")
    return [credit, taken]


def _is_joined(desk: Desk, customer: Customer) -> bool:
    return len(desk.catalogue.names_of(customer).ids) > 1


def _has_ours(account: Account) -> bool:
    return any(map(_is_ours, account.credits)) or any(map(_is_ours, account.resets))


def _is_ours(one: Credit | Reset) -> bool:
    return one.id.startswith(POLARS)
