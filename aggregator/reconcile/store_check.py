"""Check a store against itself: identities, sequence numbers and tallies, and totals in memory against raw events.

``check_store`` recounts every meter for every customer: first by blocks of customers, then customer by customer
inside a block that differs, then by hour, down to a single event that explains the difference. ``TotalsSide`` is the
port to the totals of a running server; ``StoppedTotals`` builds them from the file of a stopped one.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Protocol

import duckdb
import msgspec

from aggregator.reconcile.lines import StoppedStore, StoreSide
from aggregator.reconcile.report import Cause, Check, Counted, Difference, Repair, Worth
from aggregator.store.meter_sql import Measured
from aggregator.store.queries import audit
from aggregator.store.queries.audit import BLOCK, SEQ_BLOCK, SLICES, Part, Which
from aggregator.store.store import Store
from aggregator.totals.running import RunningTotals
from aggregator.view import Total
from meters.catalogue.catalogue import Catalogue, MeterCreated, OrganizationCreated
from meters.event import event_id
from meters.exact import EXACT, amount_text
from meters.meter import Meter
from meters.timestamps import KEPT_FROM

# The check. Running totals are what customers see and what balances are made of, so each one is recounted.

LOOKS = 3  # at what differs, before it is called a difference
SHOWN_MAX = 1_000  # repeated identities and gaps that are named
_HOUR = timedelta(hours=1)


class Both(msgspec.Struct, frozen=True):
    """One meter, twice: what is kept in memory and what the raw events say, by block of customers and by hour."""

    blocks: list[tuple[Total, Measured]]
    hours: list[tuple[datetime, Total, Measured]]


def both_of(parts: Sequence[Part], place: int, blocks: Sequence[Total], hours: Mapping[datetime, Total]) -> Both:
    """A recount beside totals, of which ``hours`` has those by hour; ``place`` is the meter's among those counted."""
    raw = {part.block: part.measured[place] for part in parts if part.block is not None}
    timed = sorted((part.hour, part.measured[place]) for part in parts if part.hour in hours and part.hour is not None)
    return Both(
        [(total, raw.get(block, Measured(0))) for block, total in enumerate(blocks)],
        [(hour, hours[hour], measured) for hour, measured in timed],
    )


def customers_of(store: StoreSide) -> int:
    """How many customer numbers were given."""
    return int(store.ask("customers").to_pylist()[0]["customers"])


class TotalsSide(Protocol):
    """What is kept in memory, and the raw events that it should be made of."""

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """The running total of some customers together; None when there is none to compare."""
        ...

    def both(self, meters: Sequence[Meter]) -> Iterable["Both"]:
        """What is kept of some meters of one organization and what the raw events make, in the meters' order."""
        ...

    def by_customer(self, meter: Meter, block: int) -> list[tuple[int, Measured]]:
        """The customers of a block."""
        ...

    def by_hour(self, meter: Meter, subject: int) -> list[tuple[datetime, Measured]]:
        """The hours of a customer; they begin in UTC."""
        ...

    def same_moment(self, meter: Meter, which: Which) -> tuple[Total, Measured] | None:
        """Total and recount of one customer or hour that are true for one position; None where that cannot be had."""
        ...


def check_store(store: StoreSide, totals: TotalsSide, catalogue: Catalogue, worth: Worth) -> Check:
    """Everything that a store says about itself."""
    check = Check(name="store", sides="totals and raw events, and the store's own bookkeeping")
    _identities(check, store)
    check_rows(check, store)
    for organization_id in catalogue.organizations:
        meters = [meter for meter in catalogue.meters_of(organization_id) if _is_kept(check, totals, meter)]
        if meters:
            _compare(check, store, totals, meters, worth)
    return check


def check_rows(check: Check, store: StoreSide) -> None:
    """Compare the numbers of rows, decisions and dead letters with what the store says that it has."""
    _sequence(check, store)
    _bookkeeping(check, store)
    _kin(check, store)


def _is_kept(check: Check, totals: TotalsSide, meter: Meter) -> bool:
    if meter.aggregation.func == "unique":
        check.notes.append(f"{meter.name}: distinct values do not add up; they are counted when asked for")
        return False
    if totals.total(meter, [0]) is None:
        check.notes.append(f"{meter.name}: its history is still being counted")
        return False
    return True


def _identities(check: Check, store: StoreSide) -> None:
    found = 0
    for slice_ in range(SLICES):
        for row in store.ask("repeated_identities", slice=slice_, most=SHOWN_MAX).to_pylist():
            found += 1
            check.add(_broken(
                Cause.DOUBLED, f"event {event_id(row['id_hi'], row['id_lo'])}", f"stored {row['times']} times",
                row["times"] - 1,
            ))  # fmt: skip
    stored = store.ask("stored").to_pylist()[0]["stored"]
    check.counted.append(Counted("identities, each once", stored, found))


def _sequence(check: Check, store: StoreSide) -> None:
    """Numbers of rows are 0, 1, 2, ...: by blocks, each of which has one possible sum."""
    blocks = store.ask("seq_blocks").to_pylist()
    broken = 0
    for expected, block in enumerate(blocks):
        full = SEQ_BLOCK if expected < len(blocks) - 1 else block["last"] % SEQ_BLOCK + 1
        if (block["block"], block["rows"], block["sum"]) != (expected, full, full * (full - 1) // 2):
            broken += 1
            if broken <= SHOWN_MAX:
                cause = Cause.DOUBLED if block["rows"] > full else Cause.LOST
                what = f"{block['rows']} rows where {full} are numbered"
                where = f"sequence numbers from {expected * SEQ_BLOCK}"
                check.add(_broken(cause, where, what, abs(full - block["rows"]) or 1))
                if block["block"] != expected:
                    break
    check.counted.append(Counted("rows numbered without a gap", sum(block["rows"] for block in blocks), broken))


def _broken(cause: Cause, where: str, what: str, count: int = 1) -> Difference:
    return Difference(check="store", cause=cause, where=where, what=what, repair=Repair.REBUILD, count=count)


def _bookkeeping(check: Check, store: StoreSide) -> None:
    """Positions, tallies and small numbers."""
    before = check.differences_count
    partitions = store.ask("bookkeeping").to_pylist()
    for row in partitions:
        _partition(check, row)
    for name, what in (("dead_numbers", "dead letters"), ("control_numbers", "decisions")):
        (row,) = store.ask(name).to_pylist()
        if row["rows"] and (row["first"], row["last"]) != (0, row["rows"] - 1):
            check.add(_broken(Cause.LOST, what, f"{row['rows']} of them, numbered {row['first']} to {row['last']}"))
    for row in store.ask("numbers").to_pylist():
        if not row["rows"] == row["numbers"] == row["texts"]:
            check.add(_broken(Cause.DOUBLED, row["name"], "a number or a name was given twice"))
    (row,) = store.ask("strays").to_pylist()
    for name in ("organizations", "subjects"):
        if row[name]:
            check.add(_broken(Cause.UNFOUNDED, "events", f"{row[name]} rows belong to nobody ({name})", row[name]))
    check.counted.append(Counted("partitions and small tables", len(partitions) + 6, check.differences_count - before))


_KIN = {
    "lost": (Cause.LOST, "it names a parent, and is neither below it nor waiting for it"),
    "wrong": (Cause.CHANGED, "it is not where its parent's place puts it"),
    "strange": (Cause.UNFOUNDED, "it is below a parent that no event of this id names"),
}


def _kin(check: Check, store: StoreSide) -> None:
    """Every event that names a parent is below it, or waits for it."""
    found = store.ask("kin", most=SHOWN_MAX).to_pylist()
    for row in found:
        cause, what = _KIN[row["what"]]
        check.add(_broken(cause, f"hierarchy, event {event_id(row['id_hi'], row['id_lo'])}", what))
    check.counted.append(Counted("events below their parents", 1, len(found)))


def _partition(check: Check, row: dict[str, Any]) -> None:
    where = f"partition {row['partition']}"
    if row["next_offset"] is None or row["stored"] is None:
        check.add(_broken(Cause.UNFOUNDED, where, "rows of a partition that the store does not follow"))
        return
    if row["ends"] > row["next_offset"]:
        what = f"rows up to offset {row['ends'] - 1}, and the position is {row['next_offset']}"
        check.add(_broken(Cause.DOUBLED, where, f"{what}: the rest would be counted again"))
    for name in ("stored", "conflicts", "dead"):
        said, have = row[name], row[f"{name}_rows"]
        if have != said:
            cause = Cause.LOST if have < said else Cause.DOUBLED
            check.add(_broken(cause, where, f"the tally of {name} says {said}, there are {have}", abs(have - said)))


def _compare(check: Check, store: StoreSide, totals: TotalsSide, meters: Sequence[Meter], worth: Worth) -> None:
    """All meters of an organization: blocks of customers, then hours."""
    customers = customers_of(store)
    for meter, both in zip(meters, totals.both(meters), strict=True):
        found: list[Difference] = []
        for block, (total, raw) in enumerate(both.blocks):
            if not _agree(meter, total, raw):
                found += _inside(store, totals, meter, block, worth)
        check.counted.append(Counted(f"customers, {meter.name}", customers, len(found)))
        hours = [hour for hour, total, raw in both.hours if not _agree(meter, total, raw)]
        found_hours = [difference for hour in hours if (difference := _hour(totals, meter, hour, worth)) is not None]
        if both.hours:
            check.counted.append(Counted(f"hours, {meter.name}", len(both.hours), len(found_hours)))
        for difference in [*found, *found_hours]:
            check.add(difference)


def _hour(totals: TotalsSide, meter: Meter, hour: datetime, worth: Worth) -> Difference | None:
    again = _still_differs(totals, meter, Which(hour=hour))
    where = f"{meter.name}, {hour:%Y-%m-%d %H}:00 UTC, everybody"
    return _explained(meter, where, again, (hour, hour + _HOUR), worth) if again else None


def _still_differs(totals: TotalsSide, meter: Meter, which: Which) -> tuple[Total, Measured] | None:
    """The two once more, for one moment and more than once: a running server moves on while it is asked."""
    again = None
    for _ in range(LOOKS):
        again = totals.same_moment(meter, which)
        if again is None or _agree(meter, *again):
            return None
    return again


def _agree(meter: Meter, total: Total | None, raw: Measured) -> bool:
    if total is None or total.count != raw.count:
        return False
    match meter.aggregation.func:
        case "count":
            return True
        case "min":
            return total.min == raw.min
        case "max":
            return total.max == raw.max
        case _:
            return total.sum == raw.total


def _inside(store: StoreSide, totals: TotalsSide, meter: Meter, block: int, worth: Worth) -> Iterator[Difference]:
    """The customers of a block that differ."""
    counted = dict(totals.by_customer(meter, block))
    for subject in range(block * BLOCK, (block + 1) * BLOCK):
        if _agree(meter, totals.total(meter, [subject]), counted.get(subject, Measured(0))):
            continue
        again = _still_differs(totals, meter, Which(subject=subject))
        if again is not None:
            where = f"{meter.name}, customer {_who(store, subject)}"
            yield _explained(meter, where, again, _hour_of(totals, meter, subject, again), worth)


def _who(store: StoreSide, subject: int) -> str:
    found = store.ask("subject", number=subject).to_pylist()
    return str(found[0]["text"]) if found else f"number {subject}"


def _hour_of(
    totals: TotalsSide, meter: Meter, subject: int, both: tuple[Total, Measured]
) -> tuple[datetime, datetime] | None:
    """The hour of the one event that explains the difference, if only one can."""
    amount, count = _gap(meter, *both)
    if abs(count) != 1:
        return None
    size = amount.copy_abs()
    fitting = [hour for hour, part in totals.by_hour(meter, subject) if part.count == 1 and part.total == size]
    return (fitting[0], fitting[0] + _HOUR) if len(fitting) == 1 else None


def _gap(meter: Meter, running: Total, raw: Measured) -> tuple[Decimal, int]:
    """What the running total has more: an amount, and a number of events."""
    count = running.count - raw.count
    return (Decimal(count) if meter.aggregation.func == "count" else EXACT.subtract(running.sum, raw.total)), count


def _explained(
    meter: Meter, where: str, both: tuple[Total, Measured], window: tuple[datetime, datetime] | None, worth: Worth
) -> Difference:
    running, raw = both
    amount, count = _gap(meter, running, raw)
    cause = Cause.CHANGED if count == 0 else Cause.LOST if count < 0 else Cause.DOUBLED
    quantities = {meter.id: amount} if meter.aggregation.func in ("count", "sum") else {}
    return Difference(
        check="store", cause=cause, where=where, repair=Repair.RESTART, count=abs(count) or 1, window=window,
        what=f"the running total says {_shown(meter, running.count, running.sum, running.min, running.max)}, "
             f"the raw events {_shown(meter, raw.count, raw.total, raw.min, raw.max)}",
        quantities=worth.named(quantities), cents=worth.cents(quantities),
    )  # fmt: skip


def _shown(meter: Meter, count: int, total: Decimal, least: Decimal | None, most: Decimal | None) -> str:
    extreme = {"min": least, "max": most}.get(meter.aggregation.func)
    amount = total if extreme is None else extreme
    return f"{count} events" if meter.aggregation.func == "count" else f"{amount_text(amount)} in {count} events"


# Totals of a stopped server: counted from the file as its next start would count them.

HOUR = timedelta(hours=1)


class StoppedTotals:
    """Totals counted from the file of a stopped server. A ``TotalsSide``; ``close`` ends its threads."""

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
        return self._totals.total(meter, subjects)

    def both(self, meters: Sequence[Meter]) -> Iterator[Both]:
        """What the next start would keep, and the raw events: counted for all meters in one pass."""
        with self._cursor(meters[0]) as (cursor, number):
            parts = list(audit.everything(cursor, meters, number))
        blocks = range(-(-self._directory.subjects_count // BLOCK))
        hours = sorted(part.hour for part in parts if part.hour is not None and part.hour >= KEPT_FROM)
        for place, meter in enumerate(meters):
            totals = [self.total(meter, list(range(block * BLOCK, (block + 1) * BLOCK))) for block in blocks]
            known = [total for total in totals if total is not None]
            kept = self._hours(meter, hours) or []
            yield both_of(parts, place, known, dict(zip(hours, kept, strict=False)))

    def _hours(self, meter: Meter, hours: Sequence[datetime]) -> list[Total] | None:
        return self._totals.by_quarters(meter, [(hour, hour + HOUR) for hour in hours])

    def by_customer(self, meter: Meter, block: int) -> list[tuple[int, Measured]]:
        """The customers of a block."""
        with self._cursor(meter) as (cursor, number):
            return audit.by_customer(cursor, meter, number, block)

    def by_hour(self, meter: Meter, subject: int) -> list[tuple[datetime, Measured]]:
        """The hours of a customer."""
        with self._cursor(meter) as (cursor, number):
            return audit.by_hour(cursor, meter, number, subject)

    def same_moment(self, meter: Meter, which: Which) -> tuple[Total, Measured] | None:
        """Nothing moves here."""
        if which.subject is not None:
            total = self.total(meter, [which.subject])
        else:
            assert which.hour is not None
            found = self._hours(meter, [which.hour])
            total = found[0] if found else None
        with self._cursor(meter) as (cursor, number):
            return (total, audit.part(cursor, meter, number, which)) if total is not None else None

    @contextlib.contextmanager
    def _cursor(self, meter: Meter) -> Iterator[tuple[duckdb.DuckDBPyConnection, int]]:
        organization = self._directory.organizations.get(meter.organization_id)
        with contextlib.closing(self._connection.cursor()) as cursor:
            yield cursor, organization.number if organization else -1


def _summable(catalogue: Catalogue) -> Catalogue:
    """The meters that are compared: those of distinct values would keep every value in memory, for nobody."""
    meters = [meter for meter in catalogue.meters.values() if meter.aggregation.func != "unique"]
    return Catalogue([*map(OrganizationCreated, catalogue.organizations.values()), *map(MeterCreated, meters)])
