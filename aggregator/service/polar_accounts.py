"""Settle customers' accounts to match Polar's webhooks: credits, revocations and resets with rollover.

``settle`` compares what all known facts call for (``meters.catalogue.polar_facts``) with what the ledger holds. It
decides the missing movements and withdraws those that later facts contradict. So the result does not depend on the
order of the webhooks, and settling again changes nothing. ``settle_meter`` does this for a meter that was linked to
one of Polar's meters only later.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal

from msgspec.structs import replace

from aggregator.service.balances import consumed_between
from aggregator.service.errors import CHANGES_AT_ONCE
from aggregator.service.service import Desk
from meters.catalogue.catalogue import Customer, CustomerDeleted
from meters.catalogue.polar_facts import Given, Wanted
from meters.ledger.ledger import (
    ZERO,
    Account,
    Cause,
    Credit,
    CreditGranted,
    MeterReset,
    MovementWithdrawn,
    Reset,
    rollover_units,
)
from meters.meter import Meter
from meters.polar_webhooks import METER_KEY, meter_of

OURS = "polar:"
"""How the ids of movements begin that follow from what Polar told."""

Movement = CreditGranted | MeterReset


async def settle(desk: Desk, organization_id: str, customer_ids: Iterable[str | None]) -> None:
    """Bring customers' accounts to what the facts call for, as far as their meters are known here."""
    changes: list[Movement | MovementWithdrawn] = []
    for customer_id in customer_ids:
        customer = desk.catalogue.customer(organization_id, customer_id or "")
        if customer is None:
            continue
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
    await settle(desk, meter.organization_id, sorted(waiting))


async def forget(desk: Desk, organization_id: str, polar_id: str) -> None:
    """Delete the customer that was made of Polar's and turned out to be another one here.

    It stays where something else is known under its id: usage, or credits by hand.
    """
    if polar_id not in desk.catalogue.mirror.once(organization_id, polar_id)[:-1]:
        return
    async with desk.deciding:
        left = desk.catalogue.customer(organization_id, polar_id)
        if left is not None and not desk.catalogue.mirror.living(left.id) and not _has_own(desk, left):
            await desk.decide(CustomerDeleted(left.id, desk.now()))


def _has_own(desk: Desk, customer: Customer) -> bool:
    meters = desk.catalogue.meters_of(customer.organization_id)
    has_account = any(desk.view.ledger.account(customer.id, meter.id) for meter in meters)
    return has_account or bool(desk.view.directory.find(customer.organization_id, customer.external_id, customer.id))


def _concerned(desk: Desk, customer: Customer) -> dict[str, list[str]]:
    """The meters that have something of Polar's or should, each with what Polar calls it, if it still does."""
    meters = desk.catalogue.meters_of(customer.organization_id)
    accounts = ((meter.id, desk.view.ledger.account(customer.id, meter.id)) for meter in meters)
    found: dict[str, list[str]] = {id: [] for id, account in accounts if account and _has_ours(account)}
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
    have = {credit.id for credit in account.credits if _is_ours(credit)}
    have |= {reset.id for reset in account.resets if _is_ours(reset)}
    credits = [change for given in wanted.given for change in _credits(customer, meter, given)]
    kept_until = _kept_until(account, credits, wanted.cuts)
    if kept_until is None:
        return []
    resets = await _resets(desk, customer, meter, account, credits, wanted.cuts, kept_until)
    should: dict[str, Movement] = {credit.id: credit for credit in credits}
    should |= {reset.id: reset for reset in resets}
    withdrawn = [
        MovementWithdrawn(
            id=id, organization_id=customer.organization_id, customer_id=customer.id, meter_id=meter.id
        )
        for id in sorted(have - should.keys())
    ]  # fmt: skip
    return [*withdrawn, *(change for id, change in should.items() if id not in have)]


def _credits(customer: Customer, meter: Meter, given: Given) -> list[CreditGranted]:
    fact = given.fact
    cause: Cause = "revoke" if fact.units < 0 else "cycle" if given.is_cycle else "grant"
    name = f"{OURS}{fact.grant_id}:{_text(fact.at)}:{fact.units}{'r' if fact.rollover else ''}"
    credit = CreditGranted(
        id=name, organization_id=customer.organization_id, customer_id=customer.id, meter_id=meter.id, at=fact.at,
        units=Decimal(fact.units), rollover=fact.rollover, cause=cause, reference=fact.grant_id,
    )  # fmt: skip
    if given.revoked is None:
        return [credit]
    taken = replace(credit, id=f"{name}:{_text(given.revoked)}", units=-credit.units, at=given.revoked, cause="revoke")
    return [credit, taken]


def _kept_until(account: Account, credits: Sequence[CreditGranted], cuts: Sequence[datetime]) -> datetime | None:
    """The time before which the account holds what is wanted already; None where it does so altogether."""
    have = {credit.id: credit.at for credit in account.credits if _is_ours(credit) and credit.cause != "rollover"}
    should = {credit.id: credit.at for credit in credits}
    made = Counter(reset.at for reset in account.resets if _is_ours(reset))
    twice = [at for at, times in made.items() if times > 1]  # two deliveries at once may have reckoned apart
    differing = [(have | should)[id] for id in have.keys() ^ should.keys()]
    return min([*differing, *twice, *(made.keys() ^ set(cuts))], default=None)


async def _resets(
    desk: Desk, customer: Customer, meter: Meter, account: Account, credits: Sequence[CreditGranted],
    cuts: Sequence[datetime], kept_until: datetime,
) -> list[MeterReset]:  # fmt: skip
    """The cuts with what each carries over, which depends on everything before it and on nothing after it."""
    carried = {credit.id: credit.units for credit in account.credits if credit.cause == "rollover"}
    made = {reset.at: carried.get(reset.id, ZERO) for reset in account.resets if _is_ours(reset)}
    before = Account(
        [credit for credit in account.credits if not _is_ours(credit)] + [_held(credit) for credit in credits],
        [reset for reset in account.resets if not _is_ours(reset)],
    )
    found = []
    for at in cuts:
        units = made[at] if at < kept_until else await _carried(desk, customer, meter, _until(before, at), at)
        reset = MeterReset(
            id=f"{OURS}{customer.id}:{meter.id}:{_text(at)}:{units}", organization_id=customer.organization_id,
            customer_id=customer.id, meter_ids=[meter.id], at=at, rollover={meter.id: units},
        )  # fmt: skip
        found.append(reset)
        before.resets.append(Reset(at, reset.id))
        before.credits.append(Credit(at, reset.id, units, True, "rollover"))
    return found


async def _carried(desk: Desk, customer: Customer, meter: Meter, before: Account, at: datetime) -> Decimal:
    if not any(credit.rollover for credit in before.window()):
        return ZERO
    return rollover_units(before, await consumed_between(desk, customer, meter, before.since, at), until=at)


def _until(account: Account, at: datetime) -> Account:
    """The account as it was before a time."""
    return Account(
        sorted((credit for credit in account.credits if credit.at < at), key=lambda credit: credit.sort_key),
        sorted((reset for reset in account.resets if reset.at < at), key=lambda reset: reset.sort_key),
    )


def _held(credit: CreditGranted) -> Credit:
    return Credit(credit.at, credit.id, credit.units, credit.rollover, credit.cause)


def _has_ours(account: Account) -> bool:
    return any(map(_is_ours, account.credits)) or any(map(_is_ours, account.resets))


def _is_ours(one: Credit | Reset) -> bool:
    return one.id.startswith(OURS)


def _text(instant: datetime) -> str:
    return instant.isoformat(timespec="microseconds")
