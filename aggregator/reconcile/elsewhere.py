"""Lines of the log without a row at their place: repetitions of an event that is stored elsewhere, or lost.

There may be as many of them as there are lines, so a line waits here as six numbers, in arrays, and the store is asked
for the identities of a quarter of a million at a time. The few that have to be looked at are read from the log again.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aggregator.reconcile.evidence import Reading, read_line
from aggregator.reconcile.lines import Integers, Lines, Words, place_of
from aggregator.reconcile.matching import Rows
from aggregator.reconcile.questions import StoreSide
from aggregator.reconcile.stretches import PATIENCE_S
from meters.log import USAGE_EVENTS, Log, PositionLost, Record, lines_of
from meters.refusal import Refusal

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
