"""The statement of an account: every movement of a balance in order, with its cause and the balance after it.

``statement`` merges the ledger's credits and resets with the usage of each quarter hour (``Usage``) into a list of
``Entry``. A credit moves the balance by as much as it moves the credited
units, a take-back by what it takes, a reset removes the whole balance, and
usage moves it by the change of the meter's value (for a maximum, most usage moves nothing). So the movements always
add up to the balance.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import msgspec

from meters.aggregation import Aggregation, mean
from meters.exact import EXACT
from meters.ledger.ledger import ZERO, Account, Cause, Credit, Move, Reset, moves
from meters.log import is_count
from meters.timestamps import instant_of, microseconds_of

QUARTER = timedelta(minutes=15)
"""Usage is summed up by the quarter hour in which it arrived."""

DIGITS_MAX = 17
"""Of a time in microseconds: a thousand years."""

Why = Cause | Literal["usage", "reset"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What arrived in a quarter hour, as far as it lies in one window.

    ``sum``, ``min`` and ``max`` are of the amounts; ``distinct`` counts values that the window had not seen before.
    """

    arrived_from: datetime
    arrived_until: datetime
    last_at: datetime
    count: int
    sum: Decimal = ZERO
    min: Decimal | None = None
    max: Decimal | None = None
    distinct: int = 0


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A movement: ``units`` is what the balance changed by, ``balance`` what it was then.

    ``stated`` are the units of a credit as they were decided. ``usage`` is what a movement by usage is made of.
    """

    id: str
    at: datetime
    cause: Why
    units: Decimal
    balance: Decimal
    stated: Decimal | None = None
    rollover: bool | None = None
    reference: str | None = None
    usage: Usage | None = None


def statement(aggregation: Aggregation, account: Account, usages: Iterable[Usage]) -> list[Entry]:
    """Every movement, oldest first. Of one instant: the reset, then credits, then usage."""
    told, at = list[tuple[datetime, bool, int, Move | Usage]](), datetime.min.replace(tzinfo=UTC)
    for place, move in enumerate(moves(account)):
        at = max(at, move.movement.at)  # what takes a credit back is not before the credit
        told.append((at, False, place, move))
    told += [(usage.last_at, True, place, usage) for place, usage in enumerate(usages)]
    running = _Running(aggregation)
    return [running.moved(move) for *_, move in sorted(told, key=lambda move: move[:3])]


class _Running:
    """The balance on its way through the statement."""

    def __init__(self, aggregation: Aggregation) -> None:
        self._aggregation = aggregation
        self._begin()

    def _begin(self) -> None:
        self._credited = self._consumed = self._total = ZERO
        self._count = self._distinct = 0
        self._extremes: list[Decimal] = []

    @property
    def _balance(self) -> Decimal:
        return EXACT.subtract(self._credited, self._consumed)

    def moved(self, move: Move | Usage) -> Entry:
        """The entry of a movement that is next."""
        before = self._balance
        what: dict[str, Any]
        match move:
            case Move(Reset() as reset):
                self._begin()
                what = {"id": reset.id, "at": reset.at, "cause": "reset", "reference": reset.reference}
            case Move(Credit() as credit, credited):
                self._credited = credited
                what = {"id": credit.id, "at": credit.at, "cause": credit.cause, "stated": credit.units,
                        "rollover": credit.rollover, "reference": credit.reference}  # fmt: skip
            case Usage():
                self._use(move)
                what = {"id": usage_id(move), "at": move.last_at, "cause": "usage", "usage": move}
        return Entry(units=EXACT.subtract(self._balance, before), balance=self._balance, **what)

    def _use(self, usage: Usage) -> None:
        self._count += usage.count
        self._distinct += usage.distinct
        self._total = EXACT.add(self._total, usage.sum)
        match self._aggregation.func:
            case "count":
                self._consumed = Decimal(self._count)
            case "unique":
                self._consumed = Decimal(self._distinct)
            case "sum":
                self._consumed = self._total
            case "avg":
                self._consumed = mean(self._total, self._count)
            case "min" | "max" as function:
                found = usage.min if function == "min" else usage.max
                self._extremes += [] if found is None else [found]
                self._extremes = [min(self._extremes) if function == "min" else max(self._extremes)]
                self._consumed = self._extremes[0]


def usage_id(usage: Usage) -> str:
    """What an entry of usage is called: the stretch in which it arrived, in microseconds since 1970."""
    return "-".join(str(microseconds_of(instant)) for instant in (usage.arrived_from, usage.arrived_until))


def parse_usage_id(id: str) -> tuple[datetime, datetime] | None:
    """The stretch that an entry of usage is called by, or None for another text."""
    parts = id.split("-")
    if len(parts) != 2 or not all(is_count(part, DIGITS_MAX) for part in parts):
        return None
    start, end = (instant_of(int(part)) for part in parts)
    return start, end
