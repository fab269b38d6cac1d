"""The statement of an account: every movement of a balance in order, with its cause and the balance after it.

``statement`` merges the ledger's credits and resets with the usage of each quarter hour (``Usage``) into a list of
``Entry``. A credit moves the balance by as much as it moves the floored sum, a reset removes the whole balance, and
usage moves it by the change of the meter's value (for a maximum, most usage moves nothing). So the movements always
add up to the balance.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import msgspec

from meters.aggregation import Aggregation, mean
from meters.exact import EXACT
from meters.ledger.ledger import ZERO, Account, Cause, Credit, Reset, floored
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
    moves: list[tuple[datetime, int, str, Reset | Credit | Usage]] = [
        *((reset.at, 0, reset.id, reset) for reset in account.resets),
        *((credit.at, 1, credit.id, credit) for credit in account.credits),
        *((usage.last_at, 2, "", usage) for usage in usages),
    ]
    running = _Running(aggregation)
    return [running.moved(move) for *_, move in sorted(moves, key=lambda move: move[:3])]


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

    def moved(self, move: Reset | Credit | Usage) -> Entry:
        """The entry of a movement that is next."""
        before = self._balance
        what: dict[str, Any]
        match move:
            case Reset():
                self._begin()
                what = {"id": move.id, "at": move.at, "cause": "reset", "reference": move.reference}
            case Credit():
                self._credited = floored((self._credited, move.units))
                what = {"id": move.id, "at": move.at, "cause": move.cause, "stated": move.units,
                        "rollover": move.rollover, "reference": move.reference}  # fmt: skip
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
