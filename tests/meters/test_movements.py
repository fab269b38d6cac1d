"""Movements told late and side by side, against a bookkeeper who states the rule and knows nothing of the ledger.

The bookkeeper waits until everything is known, goes through it in the order of time and keeps a list of lots. The
ledger hears of it in any order, and with each movement of the usage that resets carry over by.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from meters.aggregation import Aggregation, exact_sum
from meters.catalogue.catalogue import decode_change, encode_change
from meters.ledger.ledger import Account, CreditGranted, Ledger, MeterReset, WindowUsage, uncounted
from meters.ledger.statement import statement

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CUSTOMER, METER = "992fae2a-2a17-4b7a-8d9e-e287cf90131b", "d49a2c1e-54d3-4e0a-9f6a-0b6a5a1f0c11"
MINUTES = st.integers(0, 19)


class Given(NamedTuple):
    """A credit; ``back`` is when it is taken back, at whatever time."""

    at: int
    units: int
    rollover: bool
    back: int | None
    is_polars: bool = False


class World(NamedTuple):
    """What happened: credits, the minutes of resets, and usage by the minute in which it arrived."""

    credits: list[Given]
    cuts: list[int]
    usage: list[tuple[int, Decimal]]

    def used(self, since: int | None, until: int | None) -> Decimal:
        """The usage that arrived from one minute to before another."""
        return exact_sum(
            units for at, units in self.usage if (since is None or at >= since) and (until is None or at < until)
        )


USAGE = st.lists(st.tuples(MINUTES, st.decimals(-20, 90, places=1)), max_size=8)
GIVEN = st.builds(Given, MINUTES, st.integers(1, 100), st.booleans(), st.none() | MINUTES, st.just(False))
CREDITS = st.lists(GIVEN, min_size=1, max_size=7)
WORLDS = st.builds(World, CREDITS, st.lists(MINUTES, max_size=4), USAGE)


class Lot:
    """Units of one credit, as far as they are there."""

    def __init__(self, place: int, units: Decimal, rollover: bool) -> None:
        self.place, self.units, self.rollover = place, units, rollover


def by_the_rule(world: World) -> Decimal:
    """What is credited in the end, of credits that were given here."""
    lots: list[Lot] = []
    cuts, begun = set(world.cuts), None
    for minute in range(20):
        if minute in cuts:
            lots = _carried(lots, world.used(begun, minute))
            begun = minute
        for place, one in enumerate(world.credits):
            if one.at == minute:
                lots.append(Lot(place, Decimal(one.units), one.rollover))
        gone = {  # a take-back that states a time before its credit comes right after it
            place for place, one in enumerate(world.credits) if one.back is not None and max(one.back, one.at) == minute
        }
        lots = [lot for lot in lots if lot.place not in gone]
    return exact_sum(lot.units for lot in lots)


def _carried(lots: list[Lot], used: Decimal) -> list[Lot]:
    """Plain units are used first, then those that roll over, the oldest first. Whole units go on."""
    there = exact_sum(lot.units for lot in lots)
    rolling = [Lot(lot.place, lot.units, True) for lot in lots if lot.rollover]
    most = exact_sum(lot.units for lot in rolling)
    whole = min(max(Decimal(int(there - used)), Decimal(0)), most)
    burnt = most - whole
    for lot in rolling:
        step = min(burnt, lot.units)
        lot.units, burnt = lot.units - step, burnt - step
    return [lot for lot in rolling if lot.units]


def as_at_polar(world: World) -> Decimal:
    """What Polar credits: a running sum that never falls below zero, and kinds apart for what rolls over."""
    credited, kinds, begun = Decimal(0), {True: Decimal(0), False: Decimal(0)}, None
    for minute in range(20):
        if minute in set(world.cuts):
            left = Decimal(int(exact_sum(kinds.values()) - world.used(begun, minute)))
            credited = max(Decimal(0), min(left, kinds[True]))
            kinds, begun = {True: credited, False: Decimal(0)}, minute
        steps = [(one.units, one.rollover) for one in world.credits if one.at == minute]
        steps += [(-one.units, one.rollover) for one in world.credits if one.back == minute]
        for units, rollover in steps:
            credited = max(Decimal(0), credited + units)
            kinds[rollover] = max(Decimal(0), kinds[rollover] + units)
    return credited


def decisions(world: World) -> list[CreditGranted | MeterReset]:
    """The world as decisions."""
    found: list[CreditGranted | MeterReset] = [
        MeterReset(id=f"cut {at}", organization_id="o", customer_id=CUSTOMER, meter_ids=[METER], at=_at(at))
        for at in dict.fromkeys(world.cuts)
    ]
    for place, one in enumerate(world.credits):
        id = f"polar:{place:02}" if one.is_polars else f"credit {place:02}"
        found.append(_credit(id, one.at, one.units, one.rollover, of=id if one.is_polars else None))
        if one.back is not None and one.is_polars:
            found.append(_credit(f"{id}:back", one.back, -one.units, one.rollover, of=id))
        elif one.back is not None:
            found.append(_credit(f"{id}-revoked", one.back, -one.units, one.rollover, takes=id))
    return found


def _credit(
    id: str, at: int, units: int, rollover: bool, *, takes: str | None = None, of: str | None = None
) -> CreditGranted:
    return CreditGranted(
        id=id, organization_id="o", customer_id=CUSTOMER, meter_id=METER, units=Decimal(units), at=_at(at),
        rollover=rollover, takes=takes, reference=takes or of, cause="revoke" if units < 0 else "credit",
    )  # fmt: skip


def _at(minute: int) -> datetime:
    return NOON + timedelta(minutes=minute)


def told(world: World, order: Sequence[CreditGranted | MeterReset]) -> tuple[Account, list[bytes]]:
    """The account after these decisions, each with the usage that it makes necessary, and the log of all of them."""
    ledger, log = Ledger(), list[bytes]()

    def decide(change: CreditGranted | MeterReset) -> None:
        log.append(encode_change(change))
        ledger.apply(decode_change(log[-1]))

    for change in order:
        decide(change)
        while ending := uncounted(ledger.account(CUSTOMER, METER) or Account(), change.at):
            since = None if ending.since is None else (ending.since - NOON) // timedelta(minutes=1)
            used = world.used(since, (ending.reset.at - NOON) // timedelta(minutes=1))
            decide(MeterReset(
                id=ending.reset.id, organization_id="o", customer_id=CUSTOMER, meter_ids=[METER], at=ending.reset.at,
                used={METER: WindowUsage(ending.since, used)},
            ))  # fmt: skip
    return ledger.account(CUSTOMER, METER) or Account(), log


@given(WORLDS, st.randoms(use_true_random=False))
def test_movements_told_in_any_order_come_to_what_the_rule_says(world: World, chance: Random) -> None:
    """The balance is a function of what happened: a rebuild from the log, and the statement, say the same."""
    order = decisions(world)
    chance.shuffle(order)
    account, log = told(world, order)
    assert account.credited == by_the_rule(world)
    assert exact_sum(entry.units for entry in statement(Aggregation("count", None), account, [])) == account.credited
    rebuilt = Ledger()
    with rebuilt.loading():
        for line in [*log, *log]:
            rebuilt.apply(decode_change(line))
    assert (rebuilt.account(CUSTOMER, METER) or Account()).credited == account.credited


@given(WORLDS, st.randoms(use_true_random=False))
def test_polars_credits_keep_polars_numbers(world: World, chance: Random) -> None:
    """Taken back in whatever window, from one running sum."""
    polars = world._replace(credits=[
        one._replace(is_polars=True, back=None if one.back is None else max(one.back, one.at))
        for one in world.credits
    ])  # fmt: skip
    order = decisions(_apart(polars))
    chance.shuffle(order)
    assert told(_apart(polars), order)[0].credited == as_at_polar(_apart(polars))


def _apart(world: World) -> World:
    """Whoever takes back does so in another minute than anything is given: at one instant ids would decide."""
    return world._replace(credits=[one._replace(back=None if one.back is None else one.back + 1) if (
        one.back is not None and one.back + 1 not in {other.at for other in world.credits} and one.back < 19
    ) else one._replace(back=None) for one in world.credits])  # fmt: skip


@given(WORLDS, WORLDS, st.randoms(use_true_random=False))
def test_what_polar_takes_leaves_what_was_given_here(ours: World, theirs: World, chance: Random) -> None:
    """Without usage, both together are what each is alone."""
    polars = World([one._replace(is_polars=True) for one in theirs.credits], ours.cuts, [])
    both = World([*ours.credits, *polars.credits], ours.cuts, [])
    order = decisions(both)
    chance.shuffle(order)
    alone = [told(world, decisions(world))[0].credited for world in (ours._replace(usage=[]), polars)]
    assert told(both, order)[0].credited == exact_sum(alone)


OLD = [
    b'{"type":"credit.granted","id":"g:0:grant","organization_id":"o","customer_id":"c","meter_id":"m","units":100,'
    b'"at":"2026-03-01T12:00:00Z","cause":"grant","reference":"g"}',
    b'{"type":"credit.granted","id":"x","organization_id":"o","customer_id":"c","meter_id":"m","units":50,'
    b'"at":"2026-03-01T12:01:00Z","rollover":true}',
    b'{"type":"meter.reset","id":"r","organization_id":"o","customer_id":"c","meter_ids":["m"],'
    b'"at":"2026-03-02T12:00:00Z","rollover":{"m":50}}',
    b'{"type":"credit.granted","id":"g:t:revoke","organization_id":"o","customer_id":"c","meter_id":"m","units":-100,'
    b'"at":"2026-03-03T12:00:00Z","cause":"revoke","reference":"g"}',
]


def test_what_an_older_version_decided_keeps_its_meaning() -> None:
    """Its take-backs name no credit: they lower the sum of all. What a reset carried is what its record says."""
    ledger, credited = Ledger(), []
    for line in OLD:
        ledger.apply(decode_change(line))
        account = ledger.account("c", "m")
        credited.append(account.credited if account else None)
    assert credited == [100, 150, 50, 0]
