"""Customers' meters on both sides: what was credited, and what was used since the last reset."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from aggregator.reconcile.own_usage import OwnUsage
from aggregator.reconcile.report import Cause, Counted, Difference, Repair
from aggregator.reconcile.upstream_scope import Both, Reader, Scope, near
from aggregator.reconcile.worth import Worth
from meters.amount import EXACT, amount_text

NAMED_MAX = 5  # balances that a note names
_PARTS = ("credited_units", "consumed_units")


class _Row(NamedTuple):
    """What is kept of a balance: there is one for each customer and meter."""

    credited_units: Decimal
    consumed_units: Decimal
    modified_at: datetime | None


_Rows = Mapping[tuple[str, str], _Row]  # by the customer's external id (or id), and the id of our meter


class Balances:
    """See the module. ``notes`` say what was not compared."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, worth: Worth) -> None:
        self._here, self._there, self._scope, self._worth = here, there, scope, worth
        self._unjudged: Counter[str] = Counter()
        self.counted = Counted("customers' meters", 0)
        self.notes: list[str] = []

    def compare(self, meters: Sequence[Both], moved: Callable[[Both, str], Decimal | None]) -> list[Difference]:
        """What differs. ``moved`` is what events that differ make of a customer's usage of a meter,
        None where they make something of it and nobody can tell what."""
        known = {both.here.id: both for both in meters}
        here = _rows(self._here, {id: id for id in known})
        there = _rows(self._there, {both.there: id for id, both in known.items()})
        keys = sorted(here.keys() & there.keys(), key=lambda key: (key[0], known[key[1]].here.name, key[1]))
        found: list[Difference] = []
        for who, id in keys:
            rows = here[who, id], there[who, id]
            found += self._compare(known[id], who, rows, moved(known[id], who))
        self.counted = Counted("customers' meters", len(keys), len(found))
        names = {id: both.here.name for id, both in known.items()}
        why = "which says nothing, because not all that this meter counts here is forwarded"
        self.notes += [
            f"{name}: in {count} balances the usage is another one over there, {why}"
            for name, count in self._unjudged.items()
        ]
        self.notes += [*_alone("here", here, there, names), *_alone("over there", there, here, names)]
        return found

    def _compare(
        self, both: Both, who: str, rows: tuple[_Row, _Row], moved: Decimal | None
    ) -> Iterator[Difference]:
        name = both.here.name
        for part in _PARTS:
            ours, theirs = (getattr(row, part) for row in rows)
            is_usage = part == "consumed_units"
            if is_usage and self._scope.settles and _moved_since(self._scope.usage_before(both), *rows):
                continue  # usage is on its way, or Polar has yet to add it up
            if is_usage and moved is None:
                continue  # those events are named already, and such a value cannot be split among them
            explained = EXACT.add(ours, moved) if is_usage and moved is not None else ours
            if theirs == explained:
                continue
            if is_usage and not OwnUsage(self._here, self._scope.forwarded(both)).is_whole(both.here):
                self._unjudged[name] += 1
                continue
            what = f"{part.replace('_', ' ')}: {amount_text(theirs)} over there, {amount_text(ours)} here"
            cause, repair = (Cause.LOST if theirs < ours else Cause.DOUBLED), Repair.DECIDE
            if is_usage and near(theirs, explained):
                cause, repair = Cause.ROUNDING, Repair.NOTHING
            elif is_usage:
                cause = Cause.LATE
                what += "; no event says why: usage arrived on the other side of a reset, and counts in another period"
            quantities = {both.here.id: EXACT.subtract(theirs, explained)}
            yield Difference(
                check="upstream", cause=cause, where=f"{name}, customer {who}", what=what, repair=repair,
                quantities=self._worth.named(quantities), cents=self._worth.cents(quantities),
            )  # fmt: skip


def _rows(side: Reader, meters: Mapping[str, str]) -> _Rows:
    """One side's balances in meters that are compared: the ids of ours, by those that this side knows them by."""
    rows: dict[tuple[str, str], _Row] = {}
    for row in side.pages("/v1/customer-meters/"):
        if (id := meters.get(row["meter_id"])) is not None:
            who, modified_at = str(row["customer"].get("external_id") or row["customer_id"]), row.get("modified_at")
            credited, consumed = (Decimal(str(row[part])) for part in _PARTS)
            rows[who, id] = _Row(credited, consumed, datetime.fromisoformat(modified_at) if modified_at else None)
    return rows


def _moved_since(instant: datetime, *sides: _Row) -> bool:
    """Whether either side's balance moved at this time or later."""
    return any(side.modified_at >= instant for side in sides if side.modified_at)


def _alone(where: str, mine: _Rows, others: _Rows, names: Mapping[str, str]) -> Iterator[str]:
    """What to say of balances that stand on one side only: the customer is unknown on the other one, or used nothing
    that it counts."""
    used = [key for key in mine.keys() - others.keys() if any(getattr(mine[key], part) for part in _PARTS)]
    alone = sorted((who, names[id]) for who, id in used)
    if alone:
        named = ", ".join(f"{name} of {who}" for who, name in alone[:NAMED_MAX])
        more = f" and {len(alone) - NAMED_MAX} more" if len(alone) > NAMED_MAX else ""
        yield f"balances that stand {where} alone, and are not compared: {named}{more}"
