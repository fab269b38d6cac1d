"""A log that cannot be read is told, so that whoever an alert sends to the log lines finds it there."""

import contextlib
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from structlog.testing import capture_logs

from aggregator import process
from aggregator.engine.supervisor import Aggregator
from aggregator.process import LagWatch
from aggregator.view import Unavailable
from ingest.log.memory import Disk, MemoryLog
from ingest.log.partitions import Limits
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Record, TryAgain
from tests.support.records import SMALL
from tests.support.waiting import eventually


class Away(MemoryLog):
    """A log that answers nothing while it is away, and counts who asked."""

    def __init__(self) -> None:
        super().__init__(Disk(), lambda: 0, Limits(retry_after_s=0.01))
        self.away, self.asked = threading.Event(), Counter[str]()

    def read(
        self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0
    ) -> list[Record]:
        """See the port."""
        self._ask(stream)
        return super().read(stream, positions, bytes_max=bytes_max, wait_s=wait_s)

    def ends(self, stream: str) -> dict[int, int]:
        """See the port."""
        self._ask("the end of " + stream)
        return super().ends(stream)

    def _ask(self, what: str) -> None:
        if self.away.is_set():
            self.asked[what] += 1
            raise TryAgain("nobody answers", self._limits.retry_after_s)


def is_followed(aggregator: Aggregator) -> bool:
    """Whether its first engine is there."""
    with contextlib.suppress(Unavailable):
        return aggregator.control_position == 0
    return False


def test_a_log_that_cannot_be_read_is_told_once(tmp_path: Path) -> None:
    """However often it is asked meanwhile; once more when it is back. The lag is looked at by a thread of its own."""
    log, asked = Away(), {USAGE_EVENTS, USAGE_CONTROL, f"the end of {USAGE_EVENTS}"}
    aggregator = Aggregator(log, tmp_path / "store.duckdb", SMALL)
    aggregator.start()
    eventually(lambda: is_followed(aggregator))
    with capture_logs() as told, patch.object(process, "LOOK_S", 0.01):
        watch = LagWatch(log, aggregator)
        for _ in range(2):
            log.asked.clear()
            log.away.set()
            eventually(lambda: {what for what in asked if log.asked[what] > 2} == asked)
            log.away.clear()
            begun = [line for line in told if line["event"] == "log_cannot_be_read"]
            eventually(lambda begun=begun: len(told) == 2 * len(begun))
        watch.stop()
        aggregator.stop()

    for what in asked:
        lines = [line["event"] for line in told if line["what"] == what]
        assert lines == 2 * ["log_cannot_be_read", "log_can_be_read_again"]
    assert {line.get("reason") for line in told} == {"nobody answers", None}
    assert aggregator.failure is None
