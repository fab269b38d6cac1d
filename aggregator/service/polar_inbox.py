"""What became of Polar's incoming webhooks, and what of them waits for a meter.

``Inbox`` keeps the newest deliveries of each organization in memory and counts all of them. Deliveries that were
applied are also in the log, so ``received`` shows those from before a restart, too. ``waiting`` lists Polar's meters
that no meter here is linked to, with the credits that wait for the link.
"""

from collections import Counter, deque
from datetime import datetime
from typing import Literal, NamedTuple

from meters.catalogue.catalogue import Catalogue
from meters.catalogue.polar_facts import RECENT_MAX
from meters.polar_webhooks import meter_of

TEXT_LENGTH_MAX = 300
"""Characters of a text that a sender chose: an id or a type of Polar's has fewer than 60."""

REASONS_MAX = 20
"""Reasons of one delivery: a product with more metered prices is unusual, and the first ones say what is wrong."""

Outcome = Literal["applied", "known", "ignored", "refused", "failed", "unsigned"]
OUTCOMES: tuple[Outcome, ...] = ("applied", "known", "ignored", "refused", "failed", "unsigned")


class Received(NamedTuple):
    """A delivery, and what became of it: ``reasons`` says why, and what of it is not taken or waits."""

    delivery_id: str
    type: str
    at: datetime
    outcome: Outcome
    reasons: list[str]


class Waiting(NamedTuple):
    """A meter of Polar's without a meter here: credits of customers wait for it."""

    polar_meter_id: str
    customers: int
    credits: int
    units: int
    since: datetime
    until: datetime


class Inbox:
    """The newest deliveries by organization. ``counts`` is of all since the process started."""

    def __init__(self) -> None:
        self.counts: Counter[Outcome] = Counter()
        self._received: dict[str, deque[Received]] = {}

    def note(self, organization_id: str, received: Received) -> None:
        """Remember a delivery whose signature was right. The oldest one beyond RECENT_MAX is forgotten."""
        self.counts[received.outcome] += 1
        reasons = [reason[:TEXT_LENGTH_MAX] for reason in received.reasons[:REASONS_MAX]]
        cut = received._replace(
            delivery_id=received.delivery_id[:TEXT_LENGTH_MAX], type=received.type[:TEXT_LENGTH_MAX], reasons=reasons
        )
        self._received.setdefault(organization_id, deque(maxlen=RECENT_MAX)).appendleft(cut)

    def received(self, catalogue: Catalogue, organization_id: str) -> list[Received]:
        """Return the organization's newest deliveries, newest first, with applied ones from before a restart."""
        found = list(self._received.get(organization_id, ()))
        seen = {one.delivery_id for one in found}
        before = [
            Received(applied.delivery_id, applied.kind, applied.at, "applied", [])
            for applied in catalogue.mirror.recent(organization_id)
            if applied.delivery_id[:TEXT_LENGTH_MAX] not in seen
        ]
        return sorted([*found, *before], key=lambda one: one.at, reverse=True)[:RECENT_MAX]

    def metrics(self, catalogue: Catalogue | None) -> bytes:
        """Return the counts in Prometheus' text format, and the credits that wait, where the catalogue is there."""
        name, gauge = "meterstream_polar_webhooks_total", "meterstream_polar_waiting_credits"
        lines = [f"# HELP {name} Polar's incoming webhooks by what became of them", f"# TYPE {name} counter"]
        lines += [f'{name}{{outcome="{outcome}"}} {self.counts[outcome]}' for outcome in OUTCOMES]
        if catalogue is None:
            return "".join(f"{line}\n" for line in lines).encode()
        credits = sum(one.credits for organization_id in list(catalogue.organizations)
                      for one in waiting(catalogue, organization_id))  # fmt: skip
        lines += [f"# HELP {gauge} Credits of Polar's for meters that no meter here is linked to"]
        lines += [f"# TYPE {gauge} gauge", f"{gauge} {credits}"]
        return "".join(f"{line}\n" for line in lines).encode()


def waiting(catalogue: Catalogue, organization_id: str) -> list[Waiting]:
    """Return Polar's meters that no meter here is linked to, with what waits for them, in the order of their ids."""
    found = []
    for polar_id in sorted(catalogue.mirror.credited_meters(organization_id)):
        if meter_of(catalogue, organization_id, polar_id) is None:
            facts = catalogue.mirror.credits(organization_id, polar_id)
            whom = {fact.polar_customer_id for fact in facts}
            times, units = [fact.at for fact in facts], sum(fact.units for fact in facts)
            found.append(Waiting(polar_id, len(whom), len(facts), units, min(times), max(times)))
    return found
