"""Quantities by day and customer: what moved from one customer to another changes no count and no sum of a day.

A customer's days cost a request for each meter, so those with most events are compared, as many as the requests allow.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from aggregator.reconcile.own_usage import OwnUsage
from aggregator.reconcile.report import Counted
from aggregator.reconcile.upstream_scope import (
    DAY,
    POINTS_AT_ONCE,
    Both,
    Part,
    Reader,
    Scope,
    Series,
    asked,
    near,
    since,
)

REQUESTS_MAX = 300  # for them, of one run: a minute of the usual limit


class Used(NamedTuple):
    """What a customer used of a meter, by day, on both sides."""

    both: Both
    who: str
    here: Series
    there: Series

    def differing(self) -> Iterator[tuple[datetime, Decimal, Decimal]]:
        """Days, ours and theirs, where they are not the same."""
        for day, ours in self.here.items():
            theirs = self.there.get(day, Decimal(0))
            if not near(ours, theirs):
                yield day, ours, theirs


class Customers:
    """See the module. ``used`` is what was compared, ``notes`` say what was not."""

    def __init__(self, here: Reader, there: Reader, scope: Scope) -> None:
        self._here, self._there, self._scope = here, there, scope
        self.used: list[Used] = []
        self.notes: list[str] = []

    def compare(self, meters: Sequence[Both]) -> Counted:
        """Ask both sides. A meter of which only a part is forwarded is left out."""
        range_ = Part(self._scope.since, self._scope.until)
        whole = [both for both in meters if self._ours(both).is_whole(both.here, range_)]
        left_out = [both.here.name for both in meters if both not in whole]
        if left_out:
            self.notes.append(
                f"{', '.join(left_out)}: not compared customer by customer, because only a part is forwarded"
            )
        for both, who in self._wanted(whole, range_):
            there = asked(self._there, both.there, range_, "day", who)[0]
            here = asked(self._here, both.here.id, range_, "day", who)[0]
            self.used.append(Used(both, who, since(here, self._ours(both).began), there))
        days = sum(len(used.here) for used in self.used)
        different = sum(1 for used in self.used for _ in used.differing())
        return Counted("quantities, by day and customer", days, different)

    def _wanted(self, meters: Sequence[Both], range_: Part) -> list[tuple[Both, str]]:
        if not meters:
            return []
        requests = len(meters) * -(-(range_.until - range_.since) // (POINTS_AT_ONCE * DAY))
        most = max(REQUESTS_MAX // requests, 1)
        names, count = self._ours(meters[0]).customers(range_, most)
        if len(names) < count:
            self.notes.append(f"compared customer by customer: the {len(names):,} with most events, of {count:,}")
        return [(both, who) for both in meters for who in names]

    def _ours(self, both: Both) -> OwnUsage:
        return OwnUsage(self._here, self._scope.forwarded(both))
