"""What is recorded: a log that is written and an aggregator that follows it, in small commits and frequent checkpoints.

    python -m tests.faults.power.workload DIRECTORY

Each append that returned is one line in DIRECTORY/acknowledged, so the recording knows what was promised when.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from aggregator.engine import pipeline
from aggregator.engine.supervisor import Aggregator
from ingest.log import open_log, sqlite_writer
from meters.log import Entry, Log
from tests.support.faults.store_checks import SEED, caught_up, ends, write_sample, write_usage
from tests.support.records import SMALL
from tests.support.waiting import eventually

STORE = "store.duckdb"
RECORDS = 12  # beside the sample
SMALL_STEPS = (
    (pipeline, "ROUND_BYTES_MAX", 1), (pipeline, "ROUND_PERIOD_S", 0), (pipeline, "QUIET_ROUND_PERIOD_S", 0),
    (pipeline, "ROWS_BETWEEN", 40), (pipeline, "AGAIN_S", 0.003), (sqlite_writer, "CHECKPOINT_BYTES", 50_000),
)


class Acknowledging:
    """A log whose every acknowledged append is a line in a file."""

    def __init__(self, log: Log, acknowledged: int) -> None:
        self._log, self._acknowledged = log, acknowledged

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)

    async def append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        """Append, and say so."""
        offsets = await self._log.append(stream, entries)
        os.write(self._acknowledged, f"{stream} {offsets[-1] + 1}\n".encode())
        return offsets


def main(directory: Path) -> None:
    """Write, follow, and end in order."""
    acknowledged = os.open(directory / "acknowledged", os.O_CREAT | os.O_WRONLY)
    with contextlib.ExitStack() as undo:
        for owner, name, value in SMALL_STEPS:
            undo.enter_context(patch.object(owner, name, value))
        log = open_log(str(directory))
        undo.callback(log.close)
        told: Log = Acknowledging(log, acknowledged)  # type: ignore[assignment]
        write_sample(told)
        aggregator = Aggregator(log, directory / STORE, SMALL)
        aggregator.start()
        undo.callback(aggregator.stop)
        for number in range(RECORDS):
            write_usage(told, 1, SEED + number, decide=False)
            eventually(lambda: caught_up(aggregator, ends(log)))
    assert aggregator.failure is None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
