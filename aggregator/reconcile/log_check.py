"""Check the log against the store: every line is a stored event, a duplicate or a dead letter, exactly once.

``LogCheck.run`` walks the log a few megabytes at a time (``Stretches``) and asks the store for the places and
fingerprints of the same stretch. Equal stretches need no further work. Other lines and rows are compared field by
field (``report.py``), and lines without a row at their place are looked up by identity (``Elsewhere``). What still
differs is reported, grouped by kind and hour. Memory use is bounded, however long the log is.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.reconcile.lines import (
    HOUR_US,
    LINE_BITS,
    Heaps,
    HourSums,
    Integers,
    LineReader,
    Lines,
    Rows,
    StoreSide,
    Words,
    place_of,
    sort_out,
)
from aggregator.reconcile.report import (
    Bucket,
    Cause,
    Check,
    Counted,
    Difference,
    Findings,
    Reading,
    Repair,
    Worth,
    between,
    changes,
    facts_of_row,
    is_repetition,
    read_line,
    row_name,
)
from meters.errors import Refusal
from meters.log import USAGE_EVENTS, Log, PositionLost, Record, TryAgain, lines_of
from meters.timestamps import instant_of

# Stretches of the log. Two threads prepare lines while the previous stretch is compared, because half of that work
# runs inside DuckDB, outside the interpreter's lock.

STRETCH_BYTES = 8_000_000
READERS = 2
PATIENCE_S = 30.0  # a broker that is busy or changes its leader answers sooner


class Stretches:
    """Reads one partition after another."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._readers: SimpleQueue[LineReader] = SimpleQueue()
        for _ in range(READERS):
            self._readers.put(LineReader())

    def close(self) -> None:
        """Let go of the readers."""
        while not self._readers.empty():
            self._readers.get().close()

    def read(
        self, partition: int, start: int, end: int, takes: Callable[[int], bool]
    ) -> Iterator[tuple[list[Record], Lines]]:
        """Consecutive records from ``start`` to ``end``, and the lines of those whose time of ingestion is taken.

        Raises PositionLost, TryAgain.
        """
        waiting: deque[tuple[list[Record], Future[Lines]]] = deque()
        with ThreadPoolExecutor(READERS) as pool:
            for records in self._records(partition, start, end):
                taken = [record for record in records if takes(record.timestamp_us)]
                waiting.append((records, pool.submit(self._lines, taken)))
                if len(waiting) > READERS:
                    first, lines = waiting.popleft()
                    yield first, lines.result()
            for first, lines in waiting:
                yield first, lines.result()

    def _records(self, partition: int, position: int, end: int) -> Iterator[list[Record]]:
        while position < end:
            here = {partition: position}
            records = self._log.read(USAGE_EVENTS, here, bytes_max=STRETCH_BYTES, wait_s=PATIENCE_S)
            inside = [record for record in records if record.offset < end]
            if not records:
                raise TryAgain(f"partition {partition} gives no records from {position} on, and ends at {end}")
            if not inside:
                return  # a transaction's marker is all that was left; another hole would be PositionLost
            yield inside
            position = inside[-1].offset + 1

    def _lines(self, records: list[Record]) -> Lines:
        reader = self._readers.get()
        try:
            return reader.read(records)
        finally:
            self._readers.put(reader)


# Lines without a row at their place: duplicates of an event stored elsewhere, or lost.
#
# There may be as many as there are lines. So each waits here as six numbers in arrays, and the store is asked for the
# identities of a quarter of a million at a time. The few that need a closer look are read from the log again.

WAITING_MAX = 250_000  # lines of one question: 12 MB, and as much again for the answer
NOWHERE = -1


class Waiting(NamedTuple):
    """Lines of one partition that have no row of their own."""

    partition: int
    keys: Integers
    prints: Words
    hi: Words
    lo: Words
    content: Words
    ingested_us: Integers


class Firsts(NamedTuple):
    """For each of some lines the stored event of its identity: partition (or NOWHERE), place and content hash."""

    partitions: npt.NDArray[np.int32]
    keys: Integers
    content: Words


class Elsewhere:
    """Collects such lines. Ask ``is_full`` and then take them out with ``resolve``."""

    def __init__(self, store: StoreSide) -> None:
        self._store = store
        self._waiting: list[Waiting] = []
        self._count = 0

    @property
    def is_full(self) -> bool:
        """Whether they should be resolved now."""
        return self._count >= WAITING_MAX

    def add(self, partition: int, lines: Lines, rows: Rows) -> None:
        """Some of the lines."""
        self._waiting.append(Waiting(
            partition, lines.keys[rows], lines.prints[rows], lines.hi[rows], lines.lo[rows], lines.content[rows],
            lines.ingested_us[rows],
        ))  # fmt: skip
        self._count += len(rows)

    def resolve(self) -> Iterator[tuple[Waiting, Firsts]]:
        """Everything that waits, with what the store has of the same identities."""
        waiting, self._waiting, self._count = self._waiting, [], 0
        if not waiting:
            return
        firsts = self._firsts(waiting)
        start = 0
        for lines in waiting:
            end = start + len(lines.keys)
            yield lines, Firsts(firsts.partitions[start:end], firsts.keys[start:end], firsts.content[start:end])
            start = end

    def _firsts(self, waiting: list[Waiting]) -> Firsts:
        hi, lo = np.concatenate([lines.hi for lines in waiting]), np.concatenate([lines.lo for lines in waiting])
        asked = pa.table({"number": np.arange(len(hi)), "id_hi": hi, "id_lo": lo})
        known = self._store.ask("known", asked)
        count, numbers = len(hi), known["number"].to_numpy()
        firsts = Firsts(np.full(count, NOWHERE, np.int32), np.zeros(count, np.int64), np.zeros(count, np.uint64))
        firsts.partitions[numbers] = known["partition"].to_numpy()
        firsts.keys[numbers] = known["key"].to_numpy()
        firsts.content[numbers] = known["content"].to_numpy()
        return firsts


class LineAgain:
    """Single lines of the log. The record that was read last is kept, because neighbors are asked for in turn."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._record: Record | None = None

    def read(self, partition: int, key: int) -> Reading | Refusal | None:
        """The line at a place; None when the log does not have it, or not any more. Raises TryAgain."""
        offset, number = place_of(key)
        record = self._record
        if record is None or (record.partition, record.offset) != (partition, offset):
            record = self._record = self._read(partition, offset)
        raws = lines_of(record.value) if record is not None else []
        if record is None or number >= len(raws):
            return None
        return read_line(raws[number], record.organization_id, record.timestamp_us, f"{partition}:{offset}:{number}")

    def _read(self, partition: int, offset: int) -> Record | None:
        starts, ends = self._log.starts(USAGE_EVENTS), self._log.ends(USAGE_EVENTS)
        if not starts.get(partition, 0) <= offset < ends.get(partition, 0):
            return None  # dropped by retention, or never written
        with contextlib.suppress(PositionLost):
            (record, *_) = self._log.read(USAGE_EVENTS, {partition: offset}, bytes_max=1, wait_s=PATIENCE_S)
            return record
        return None


# The check.

ROWS_AT_ONCE = 5_000  # differing rows read in one question
LOST_MAX = 200_000  # lost identities that are remembered, so that a repetition of one is not lost once more
WORTH_MAX = 20_000  # differing events that are valued one by one; beyond that a report says "at least"
_COUNTED = ("lines", "stored", "duplicates", "dead")


class Range(NamedTuple):
    """Half-open, by time of ingestion; None has no end."""

    since: datetime | None = None
    until: datetime | None = None

    def takes(self, us: int) -> bool:
        """Whether a record of that time belongs to it."""
        instant = instant_of(us)
        return (self.since is None or instant >= self.since) and (self.until is None or instant < self.until)


class LogCheck:
    """One run."""

    def __init__(self, log: Log, store: StoreSide, worth: Worth, range_: Range) -> None:
        self._log, self._store, self._worth, self._range = log, store, worth, range_
        self.check = Check(name="log", sides="log and store")
        self._findings = Findings()
        self._stretches = Stretches(log)
        # by partition: lines with a row, rows, dead letters, repetitions, and lines that are nowhere
        self._lines: dict[int, HourSums] = {}
        self._rows: dict[int, HourSums] = {}
        self._dead: dict[int, HourSums] = {}
        self._repeated: dict[int, HourSums] = {}
        self._missing: dict[int, HourSums] = {}
        self._elsewhere = Elsewhere(store)
        self._again, self._originals = LineAgain(log), LineAgain(log)
        self._lost: set[tuple[int, int]] = set()
        self._valued = 0
        self._starts: Mapping[int, int] = {}  # by partition: the oldest record

    def run(self) -> Check:
        """Compare everything that the store says it has read."""
        tallies = self._store.ask("tallies").to_pylist()
        self._starts, ends = self._log.starts(USAGE_EVENTS), self._log.ends(USAGE_EVENTS)
        try:
            for tally in tallies:
                partition, position = tally["log_partition"], tally["next_offset"]
                if position > ends.get(partition, 0):
                    self._past_the_end(partition, position, ends.get(partition, 0))
                self._walk(partition, min(position, ends.get(partition, 0)))
                behind = ends.get(partition, 0) - position
                if behind > 0:
                    self.check.notes.append(f"partition {partition}: {behind} records are not in the store yet")
            self._resolve_elsewhere()
        finally:
            self._stretches.close()
        self._tell(tallies)
        return self.check

    # ---- walking the log

    def _walk(self, partition: int, end: int) -> None:
        for sums in (self._lines, self._rows, self._dead, self._repeated, self._missing):
            sums[partition] = HourSums()
        position: int | None = self._starts.get(partition, 0)
        while position is not None:
            position = self._walk_on(partition, position, end)

    def _walk_on(self, partition: int, position: int, end: int) -> int | None:
        """Compare from here to the end; where to go on if the log's retention took away what was to come, else None."""
        try:
            for taken, lines in self._stretches.read(partition, position, end, self._range.takes):
                self._stretch(partition, position, taken, lines)
                position = taken[-1].offset + 1
        except PositionLost as damage:
            self._starts = self._log.starts(USAGE_EVENTS)
            start = self._starts.get(partition, 0)
            if start > position:
                gone = f"offsets {position} to {min(start, end) - 1} left the log while it was read"
                self.check.notes.append(f"partition {partition}: {gone}, and are not compared")
                return start
            self.check.add(Difference(
                check="log", cause=Cause.LOST, where=f"partition {partition} from offset {position}",
                what=f"the log cannot be read on: {damage}. Restore it from a backup, as ingest/log/README.md says.",
                repair=Repair.DECIDE,
            ))  # fmt: skip
        return None

    def _past_the_end(self, partition: int, position: int, end: int) -> None:
        self.check.add(Difference(
            check="log", cause=Cause.LOST, where=f"partition {partition}, offsets {end} to {position - 1}",
            what="the store has read records that the log does not have any more: see what meterstream doctor says",
            repair=Repair.DECIDE, count=position - end,
        ))  # fmt: skip

    def _stretch(self, partition: int, since: int, records: list[Record], lines: Lines) -> None:
        until = records[-1].offset + 1
        rows = self._store.ask("rows", partition=partition, since=since, until=until)
        row_us = rows["ingested_us"].to_numpy()
        row_keys, row_prints = rows["key"].to_numpy(), rows["print"].to_numpy()
        taken = [record.offset for record in records if self._range.takes(record.timestamp_us)]
        if len(taken) < len(records):  # a range begins or ends here
            inside = np.isin(row_keys >> LINE_BITS, taken)
            row_us, row_keys, row_prints = row_us[inside], row_keys[inside], row_prints[inside]
        letters: dict[int, dict[str, Any]] = {}
        if not np.array_equal(lines.keys, row_keys):
            found = self._store.ask("dead", partition=partition, since=since, until=until).to_pylist()
            offsets = set(taken)
            letters = {letter["key"]: letter for letter in found if place_of(letter["key"])[0] in offsets}
        heaps = sort_out(lines.keys, lines.prints, row_keys, row_prints, np.array(sorted(letters), np.int64))
        self._rows[partition].add(row_us, row_prints)
        if len(heaps.changed):
            same = self._read_carefully(partition, lines, heaps.changed)
            prints = lines.prints.copy()  # both sides say the same in other words: so shall their checksums
            prints[same] = row_prints[np.searchsorted(row_keys, lines.keys[same])]
            lines = lines._replace(prints=prints)
        self._count(partition, lines, heaps)
        if len(heaps.dead) or len(heaps.doubled) or len(heaps.unfounded) or letters:
            self._look_closer(partition, lines, heaps, letters)

    def _count(self, partition: int, lines: Lines, heaps: Heaps) -> None:
        stored = np.concatenate([heaps.stored, heaps.changed])
        self._lines[partition].add(lines.ingested_us[stored], lines.prints[stored])
        self._dead[partition].add(lines.ingested_us[heaps.dead])
        if len(heaps.elsewhere):
            self._elsewhere.add(partition, lines, heaps.elsewhere)
            if self._elsewhere.is_full:
                self._resolve_elsewhere()

    # ---- where the two sides differ

    def _read_carefully(self, partition: int, lines: Lines, changed: Rows) -> list[int]:
        """Lines whose fingerprint is not their row's, compared field by field: those that say the same after all."""
        same: list[int] = []
        for start in range(0, len(changed), ROWS_AT_ONCE):
            chosen = changed[start : start + ROWS_AT_ONCE]
            rows = self._rows_at(partition, lines.keys[chosen].tolist())
            same += [
                number for number in chosen.tolist()
                if self._is_same(partition, lines, number, rows[int(lines.keys[number])][0])
            ]  # fmt: skip
        return same

    def _look_closer(self, partition: int, lines: Lines, heaps: Heaps, letters: dict[int, dict[str, Any]]) -> None:
        for cause, keys in ((Cause.DOUBLED, heaps.doubled), (Cause.UNFOUNDED, heaps.unfounded)):
            for key, rows_here in self._rows_at(partition, keys.tolist()).items():
                for row in rows_here[1:] if cause is Cause.DOUBLED else rows_here:
                    self._findings.note(
                        cause, partition, row["ingested_at"], row["organization_id"], row_name(row),
                        self._value(row["organization_id"], row=row), f"offset and line {place_of(key)}",
                    )
        for row_number in heaps.dead.tolist():
            self._check_letter(partition, lines, row_number, letters[int(lines.keys[row_number])])
        without_line = set(letters) - set(lines.keys[heaps.dead].tolist())
        for key in sorted(without_line):
            self._findings.note(
                Cause.UNFOUNDED, partition, instant_of(int(lines.ingested_us[0])), "",
                f"dead letter at {place_of(key)}", {}, "a dead letter whose line is stored, or does not exist",
            )

    def _is_same(self, partition: int, lines: Lines, number: int, row: dict[str, Any]) -> bool:
        reading = self._read(partition, lines, number)
        if isinstance(reading, Refusal):
            self._findings.note(
                Cause.UNFOUNDED, partition, row["ingested_at"], row["organization_id"], row_name(row),
                self._value(row["organization_id"], row=row), f"the line cannot be counted: {reading.msg}",
            )
        elif found := changes(reading, row):
            before = self._value(reading.organization_id, reading=reading)
            after = self._value(row["organization_id"], row=row)
            self._findings.note(
                Cause.CHANGED, partition, reading.ingested_at, reading.organization_id, reading.name,
                between(after, before), "; ".join(found),
            )
        else:
            return True
        return False

    def _check_letter(self, partition: int, lines: Lines, number: int, letter: dict[str, Any]) -> None:
        reading = self._read(partition, lines, number)
        what = ""
        if b"".join([letter["raw"], *(letter["rests"] or ())]) != lines.raws[number]:
            what = "the dead letter has other bytes than the line"
        elif isinstance(reading, Reading) and letter["reason"] != "conflict":
            what = f"the line can be counted, and is a dead letter ({letter['reason']})"
        if what:
            place = f"line at {place_of(int(lines.keys[number]))}"
            name, tenant = (reading.name, reading.organization_id) if isinstance(reading, Reading) else (place, "")
            when = instant_of(int(lines.ingested_us[number]))
            self._findings.note(Cause.CHANGED, partition, when, tenant, name, {}, what)

    def _resolve_elsewhere(self) -> None:
        """Lines without a row of their own: repetitions of an event that is stored elsewhere, or lost."""
        for lines, firsts in self._elsewhere.resolve():
            is_repeated = (firsts.partitions != NOWHERE) & (firsts.content == lines.content)
            for number in np.flatnonzero(~is_repeated).tolist():
                is_repeated[number] = self._resolve(lines, firsts, number)
            self._repeated[lines.partition].add(lines.ingested_us[is_repeated])
            self._missing[lines.partition].add(lines.ingested_us[~is_repeated], lines.prints[~is_repeated])

    def _resolve(self, lines: Waiting, firsts: Firsts, number: int) -> bool:
        """Whether the line repeats a stored event in other words, or a missing one; notes what else it may be."""
        partition, key, when = lines.partition, int(lines.keys[number]), instant_of(int(lines.ingested_us[number]))
        reading = self._again.read(partition, key)
        if not isinstance(reading, Reading):
            why = reading.msg if isinstance(reading, Refusal) else "the log has dropped it since"
            what = f"it cannot be counted ({why}), and is no dead letter"
            self._findings.note(Cause.LOST, partition, when, "", f"line at {place_of(key)}", {}, what)
            return False
        if firsts.partitions[number] != NOWHERE:
            original = self._originals.read(int(firsts.partitions[number]), int(firsts.keys[number]))
            if isinstance(original, Reading) and is_repetition(reading, original):
                return True
            what = "it contradicts the event that was stored first, and is no dead letter"
            self._findings.note(Cause.CONFLICT, partition, when, reading.organization_id, reading.name, {}, what)
            return False
        identity = int(lines.hi[number]), int(lines.lo[number])
        if identity in self._lost:
            return True  # of an event that is missing, which was said already
        if len(self._lost) < LOST_MAX:
            self._lost.add(identity)
        quantities = between({}, self._value(reading.organization_id, reading=reading))
        self._findings.note(Cause.LOST, partition, when, reading.organization_id, reading.name, quantities, "")
        return False

    def _rows_at(self, partition: int, keys: list[int]) -> dict[int, list[dict[str, Any]]]:
        if not keys:
            return {}
        partitions = pa.array([partition] * len(keys), pa.int32())
        asked = pa.table({"partition": partitions, "key": pa.array(keys, pa.int64())})
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self._store.ask("at", asked).to_pylist():
            found.setdefault(row["key"], []).append(row)
        return found

    def _read(self, partition: int, lines: Lines, number: int) -> Reading | Refusal:
        offset, line = place_of(int(lines.keys[number]))
        place = f"{partition}:{offset}:{line}"
        return read_line(lines.raws[number], lines.tenants[number], int(lines.ingested_us[number]), place)

    def _value(
        self, organization_id: str, *, reading: Reading | None = None, row: dict[str, Any] | None = None
    ) -> dict[str, Decimal]:
        self._valued += 1
        if self._valued > WORTH_MAX or not organization_id:
            return {}
        found = reading.facts if reading is not None else facts_of_row(row or {})
        return self._worth.of(organization_id, found)

    def _tell(self, tallies: list[dict[str, Any]]) -> None:
        if len(self._lost) == LOST_MAX:
            note = f"{LOST_MAX:,} events are lost, and of those beyond that number repetitions count as lost as well"
            self.check.notes.append(note)
        for difference in self._findings.differences(self._worth):
            self.check.add(difference)
        for partition in sorted(self._lines):
            self.check.buckets += list(self._buckets(partition))
        totals = {name: sum(getattr(bucket, name) for bucket in self.check.buckets) for name in _COUNTED}
        unequal = sum(bucket.log_checksum != bucket.store_checksum for bucket in self.check.buckets)
        self.check.counted += [
            Counted("lines of the log", totals["lines"], sum(d.count for d in self.check.differences)),
            Counted("hours of a partition, by checksum", len(self.check.buckets), unequal),
        ]
        if self._range == Range() and not any(self._starts.values()):
            self._compare_tallies(tallies, totals)

    def _buckets(self, partition: int) -> Iterator[Bucket]:
        lines, rows = self._lines[partition], self._rows[partition]
        dead, repeated, missing = self._dead[partition], self._repeated[partition], self._missing[partition]
        hours = sorted({hour for sums in (lines, rows, dead, repeated, missing) for hour in sums.counts})
        for hour in hours:
            stored = rows.counts.get(hour, 0)
            others = dead.counts.get(hour, 0), repeated.counts.get(hour, 0), missing.counts.get(hour, 0)
            ours = (lines.sums.get(hour, 0) + missing.sums.get(hour, 0)) % 2**64
            yield Bucket(
                partition, instant_of(hour * HOUR_US), lines.counts.get(hour, 0) + sum(others), stored, others[1],
                others[0], f"{ours:016x}", f"{rows.sums.get(hour, 0):016x}",
            )  # fmt: skip

    def _compare_tallies(self, tallies: list[dict[str, Any]], totals: Mapping[str, int]) -> None:
        """The store's own count of what became of the lines, against ours; only for a log that is whole."""
        names = ("stored", "duplicates", "conflicts", "dead")
        said = {name: sum(int(tally[name]) for tally in tallies) for name in names}
        found = {"stored": totals["stored"], "duplicates": totals["duplicates"], "dead": totals["dead"]}
        said["dead"] += said.pop("conflicts")
        self.check.counted.append(Counted("tallies of the store", len(said), sum(said[n] != found[n] for n in found)))
        if said != found and not self.check.differences_count:
            self.check.add(Difference(
                check="log", cause=Cause.UNKNOWN, where="the store's tallies", repair=Repair.REBUILD,
                what=f"the store says {said}, the log has {found}",
            ))  # fmt: skip
