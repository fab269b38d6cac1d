"""Single findings told together: those of one cause, one hour and one tenant are one difference. Pure.

A missing hour is one line of a report and not a hundred thousand; a single event is named.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from aggregator.reconcile.report import MEANING, SHOWN_EVENTS_MAX, Cause, Difference, Repair
from aggregator.reconcile.worth import Worth, add

_HOUR = timedelta(hours=1)
_Key = tuple[Cause, int, datetime, str]


class _Group:
    def __init__(self) -> None:
        self.count = 0
        self.events: list[str] = []
        self.details: list[str] = []
        self.quantities: dict[str, Decimal] = {}


class Findings:
    """What differs between the log and the store, event by event."""

    def __init__(self) -> None:
        self._groups: dict[_Key, _Group] = {}

    def note(
        self, cause: Cause, partition: int, when: datetime, organization_id: str, event: str,
        quantities: Mapping[str, Decimal], detail: str = "",
    ) -> None:  # fmt: skip
        """One event. ``when`` is its ingestion (naive means UTC), ``quantities`` are store minus log."""
        hour = (when if when.tzinfo else when.replace(tzinfo=UTC)).replace(minute=0, second=0, microsecond=0)
        group = self._groups.setdefault((cause, partition, hour, organization_id), _Group())
        group.count += 1
        add(group.quantities, quantities)
        if len(group.events) < SHOWN_EVENTS_MAX:
            group.events.append(event)
            if detail and detail not in group.details:
                group.details.append(detail)

    def differences(self, worth: Worth) -> Iterator[Difference]:
        """Everything noted, in order of time."""
        for key, group in sorted(self._groups.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])):
            cause, partition, hour, _ = key
            window = f"partition {partition}, {hour:%Y-%m-%d %H}:00 UTC"
            yield Difference(
                check="log",
                cause=cause,
                where=f"event {group.events[0]}" if group.count == 1 else window,
                what="; ".join(group.details) or MEANING[cause],
                repair=Repair.REBUILD,
                count=group.count,
                window=(hour, hour + _HOUR),
                events=group.events,
                quantities=worth.named({id: amount for id, amount in group.quantities.items() if amount}),
                cents=worth.cents(group.quantities),
            )
