"""Running totals of a server that does not run: counted as its next start would, from the file as it lies there."""

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime

from aggregator.reconcile.questions import StoppedStore
from aggregator.running import RunningTotals
from aggregator.store.queries import recount
from aggregator.store.sql import Measured
from aggregator.store.store import Store
from aggregator.view import Total
from meters.catalogue import Catalogue
from meters.meter import Meter

LOOK_S = 0.05  # how often a count under way is looked at


class StoppedTotals:
    """See the module. Takes part in ``store_check``; ``close`` ends its threads."""

    def __init__(self, stopped: StoppedStore, catalogue: Catalogue) -> None:
        self._connection = stopped.connection
        store = Store(stopped.connection, 0)  # nothing is written: the file is open for reading only
        self._directory = store.directory()
        self._totals = RunningTotals(store, self._directory, catalogue)
        self._totals.start()
        self._names = {
            number: name for organization in self._directory.organizations.values()
            for names in (organization.external, organization.customer) for name, number in names.items()
        }  # fmt: skip

    def close(self) -> None:
        """Give up what is still being counted."""
        self._totals.stop()

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """The total that the next start would show; None when it cannot be counted."""
        while (found := self._totals.total(meter.id, subjects)) is None and _is_counting():
            time.sleep(LOOK_S)
        return found if found is not None else self._totals.total(meter.id, subjects)

    def by_customer(self, meter: Meter) -> Iterator[tuple[int, Measured]]:
        """The recount."""
        organization = self._directory.organizations.get(meter.organization_id)
        if organization is None:
            return
        with contextlib.closing(self._connection.cursor()) as cursor:
            yield from recount.by_customer(cursor, meter, organization.number)

    def by_hour(self, meter: Meter, subject: int) -> list[tuple[datetime, Measured]]:
        """The recount of one customer."""
        organization = self._directory.organizations[meter.organization_id]
        with contextlib.closing(self._connection.cursor()) as cursor:
            return recount.by_hour(cursor, meter, organization.number, subject)

    def customers(self) -> int:
        """How many numbers were given."""
        return self._directory.subjects_count

    def who(self, subject: int) -> str:
        """The customer's name."""
        return self._names.get(subject, f"number {subject}")

    def same_moment(self, meter: Meter, subject: int) -> tuple[Total, Measured] | None:
        """Nothing moves here."""
        total = self.total(meter, [subject])
        found = [measured for number, measured in self.by_customer(meter) if number == subject]
        return (total, found[0] if found else Measured(0)) if total is not None else None


def _is_counting() -> bool:
    return any(thread.name == "history" and thread.is_alive() for thread in threading.enumerate())
