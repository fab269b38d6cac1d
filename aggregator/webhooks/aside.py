"""Customers whose state cannot be told yet: each is asked about again after a growing pause, and nobody waits for them.

One cause of each stays in the outbox and stands for all that come after it. Which one, and for how long, is known here
alone: after a restart everybody is asked about at once.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import NamedTuple

from meters.catalogue import Customer

PAUSE_S_MAX = 300.0
"""Between two questions that have no answer, each of which may take as long as the store lets it."""


class Waiting(NamedTuple):
    """A customer to be told of later, by a cause that stays; ``since`` when the organization lacks it."""

    cause: int
    organization_id: str
    since: datetime
    pause_s: float
    again_s: float


class Aside:
    """Those customers. The first pause is ``pause_s``; each is twice the one before. ``now_s`` is a steady clock's."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._waiting: dict[str, Waiting] = {}

    def resting(self, now_s: float) -> dict[str, int]:
        """Who is not to be asked about yet, each with the cause that stays."""
        return {id: one.cause for id, one in self._waiting.items() if one.again_s > now_s}

    def note(self, asked: Collection[int], kept: Mapping[int, Customer], now: datetime, now_s: float) -> None:
        """Take in what came of causes: the customers of those that are kept wait, the others are told."""
        before = self._waiting
        self._waiting = {id: one for id, one in before.items() if one.cause not in asked}
        for cause, customer in kept.items():
            last = before.get(customer.id)
            pause_s = min(2 * last.pause_s, PAUSE_S_MAX) if last else self._pause_s
            since = last.since if last else now
            self._waiting[customer.id] = Waiting(cause, customer.organization_id, since, pause_s, now_s + pause_s)

    def since(self) -> dict[str, datetime]:
        """From when on organizations were not told everything; those that were are left out."""
        found: dict[str, datetime] = {}
        for one in self._waiting.values():
            found[one.organization_id] = min(one.since, found.get(one.organization_id, one.since))
        return found
