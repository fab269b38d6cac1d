"""Customers' meters on both sides: what was credited, and what was used since the last reset."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from aggregator.reconcile.own_usage import OwnUsage
from aggregator.reconcile.report import Cause, Counted, Difference, Repair
from aggregator.reconcile.upstream_scope import Both, Reader, Scope, near
from aggregator.reconcile.worth import Worth
from meters.amount import EXACT, amount_text

NAMED_MAX = 5  # balances that a note names
_PARTS = ("credited_units", "consumed_units")
_Rows = Mapping[tuple[str, str], dict[str, Any]]  # by the customer's external id (or id) and the meter's name


class Balances:
    """See the module. ``notes`` say what was not compared."""

    def __init__(self, here: Reader, there: Reader, scope: Scope, worth: Worth) -> None:
        self._here, self._there, self._scope, self._worth = here, there, scope, worth
        self._unjudged: Counter[str] = Counter()
        self.counted = Counted("customers' meters", 0)
        self.notes: list[str] = []

    def compare(self, meters: Sequence[Both], moved: Callable[[Both, str], Decimal]) -> list[Difference]:
        """What differs. ``moved`` is what events that differ make of a customer's usage of a meter."""
        here, there = _rows(self._here), _rows(self._there)
        known = {both.here.name: both for both in meters}
        keys = sorted(key for key in here.keys() & there.keys() if key[1] in known)
        found: list[Difference] = []
        for who, name in keys:
            ours, theirs = here[who, name], there[who, name]
            found += self._compare(known[name], who, (ours, theirs), moved(known[name], who))
        self.counted = Counted("customers' meters", len(keys), len(found))
        why = "which says nothing, because not all that this meter counts here is forwarded"
        self.notes += [
            f"{name}: in {count} balances the usage is another one over there, {why}"
            for name, count in self._unjudged.items()
        ]
        self.notes += [*_alone("here", here, there, known), *_alone("over there", there, here, known)]
        return found

    def _compare(
        self, both: Both, who: str, rows: tuple[dict[str, Any], dict[str, Any]], moved: Decimal
    ) -> Iterator[Difference]:
        name = both.here.name
        for part in _PARTS:
            ours, theirs = (Decimal(str(row[part])) for row in rows)
            is_usage = part == "consumed_units"
            if is_usage and self._scope.settles and _moved_since(self._scope.arrived_before, *rows):
                continue  # usage is on its way, or Polar has yet to add it up
            explained = EXACT.add(ours, moved) if is_usage else ours
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
            quantities = {name: EXACT.subtract(theirs, explained)}
            yield Difference(
                check="upstream", cause=cause, where=f"{name}, customer {who}", what=what, repair=repair,
                quantities=quantities, cents=self._worth.cents(self._scope.organization_id, quantities),
            )  # fmt: skip


def _rows(side: Reader) -> _Rows:
    rows = side.pages("/v1/customer-meters/")
    return {(str(row["customer"].get("external_id") or row["customer_id"]), row["meter"]["name"]): row for row in rows}


def _moved_since(instant: datetime, *sides: dict[str, Any]) -> bool:
    """Whether either side's balance moved at this time or later."""
    return any(datetime.fromisoformat(side["modified_at"]) >= instant for side in sides if side.get("modified_at"))


def _alone(where: str, mine: _Rows, others: _Rows, names: Container[str]) -> Iterator[str]:
    """What to say of balances that stand on one side only: the customer is unknown on the other one, or used nothing
    that it counts."""
    keys = sorted(key for key in mine.keys() - others.keys() if key[1] in names)
    keys = [key for key in keys if any(Decimal(str(mine[key][part])) for part in _PARTS)]
    if keys:
        named = ", ".join(f"{name} of {who}" for who, name in keys[:NAMED_MAX])
        more = f" and {len(keys) - NAMED_MAX} more" if len(keys) > NAMED_MAX else ""
        yield f"balances that stand {where} alone, and are not compared: {named}{more}"
