"""Running totals of a server that does not run: counted as its next start would, from the file as it lies there."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import duckdb

from aggregator.reconcile.questions import StoppedStore
from aggregator.reconcile.store_check import Both, both_of
from aggregator.running import RunningTotals
from aggregator.store.queries import recount
from aggregator.store.queries.recount import BLOCK, Which
from aggregator.store.sql import Measured
from aggregator.store.store import Store
from aggregator.view import Total
from meters.catalogue import Catalogue, MeterCreated, OrganizationCreated
from meters.meter import Meter
from meters.window import KEPT_FROM

HOUR = timedelta(hours=1)


class StoppedTotals:
    """See the module. Takes part in ``store_check``; ``close`` ends its threads."""

    def __init__(self, stopped: StoppedStore, catalogue: Catalogue) -> None:
        self._connection = stopped.connection
        store = Store(stopped.connection, 0)  # nothing is written: the file is open for reading only
        self._directory = store.directory()
        self._totals = RunningTotals(store, self._directory, _summable(catalogue))
        self._totals.start()

    def close(self) -> None:
        """Give up what is still being counted."""
        self._totals.stop()

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """The total that the next start would show; None when it cannot be counted."""
        self._totals.wait()
        return self._totals.total(meter.id, subjects)

    def both(self, meters: Sequence[Meter]) -> Iterator[Both]:
        """What the next start would keep, and the raw events: counted for all meters in one pass."""
        with self._cursor(meters[0]) as (cursor, number):
            parts = list(recount.everything(cursor, meters, number))
        blocks = range(-(-self._directory.subjects_count // BLOCK))
        hours = sorted(part.hour for part in parts if part.hour is not None and part.hour >= KEPT_FROM)
        for place, meter in enumerate(meters):
            totals = [self.total(meter, list(range(block * BLOCK, (block + 1) * BLOCK))) for block in blocks]
            known = [total for total in totals if total is not None]
            kept = self._hours(meter, hours) or []
            yield both_of(parts, place, known, dict(zip(hours, kept, strict=False)))

    def _hours(self, meter: Meter, hours: Sequence[datetime]) -> list[Total] | None:
        return self._totals.by_quarters(meter.id, [(hour, hour + HOUR) for hour in hours])

    def by_customer(self, meter: Meter, block: int) -> list[tuple[int, Measured]]:
        """The customers of a block."""
        with self._cursor(meter) as (cursor, number):
            return recount.by_customer(cursor, meter, number, block)

    def by_hour(self, meter: Meter, subject: int) -> list[tuple[datetime, Measured]]:
        """The hours of a customer."""
        with self._cursor(meter) as (cursor, number):
            return recount.by_hour(cursor, meter, number, subject)

    def same_moment(self, meter: Meter, which: Which) -> tuple[Total, Measured] | None:
        """Nothing moves here."""
        if which.subject is not None:
            total = self.total(meter, [which.subject])
        else:
            assert which.hour is not None
            found = self._hours(meter, [which.hour])
            total = found[0] if found else None
        with self._cursor(meter) as (cursor, number):
            return (total, recount.part(cursor, meter, number, which)) if total is not None else None

    @contextlib.contextmanager
    def _cursor(self, meter: Meter) -> Iterator[tuple[duckdb.DuckDBPyConnection, int]]:
        organization = self._directory.organizations.get(meter.organization_id)
        with contextlib.closing(self._connection.cursor()) as cursor:
            yield cursor, organization.number if organization else -1


def _summable(catalogue: Catalogue) -> Catalogue:
    """The meters that are compared: those of distinct values would keep every value in memory, for nobody."""
    meters = [meter for meter in catalogue.meters.values() if meter.aggregation.func != "unique"]
    return Catalogue([*map(OrganizationCreated, catalogue.organizations.values()), *map(MeterCreated, meters)])
