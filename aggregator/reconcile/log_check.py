"""The log against the store: every line is a stored event, a repetition of one, or a dead letter, exactly once.

The log is walked a few megabytes at a time, and the store is asked for the places and fingerprints of the same
stretch. Equal stretches cost nothing more. Elsewhere lines and rows are read with care (``evidence``), and only what
still differs is a difference; differences of one kind within an hour are told as one. Memory holds a few stretches and
a bounded number of lines that have no row of their own (``elsewhere``), however long the log is.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from aggregator.reconcile.elsewhere import NOWHERE, Elsewhere, Firsts, LineAgain, Waiting
from aggregator.reconcile.evidence import (
    Reading,
    changes,
    facts_of_row,
    is_repetition,
    read_line,
    row_name,
)
from aggregator.reconcile.findings import Findings
from aggregator.reconcile.lines import HOUR_US, LINE_BITS, Lines, place_of
from aggregator.reconcile.matching import Heaps, HourSums, Rows, sort_out
from aggregator.reconcile.questions import StoreSide
from aggregator.reconcile.report import Bucket, Cause, Check, Counted, Difference, Repair
from aggregator.reconcile.stretches import Stretches
from aggregator.reconcile.worth import Worth, between
from meters.log import USAGE_EVENTS, Log, PositionLost, Record
from meters.refusal import Refusal
from meters.timestamp import instant_of

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
