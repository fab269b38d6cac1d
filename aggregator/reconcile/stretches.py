"""The log in stretches of a few megabytes, as lines, the next ones made while one is compared.

Half of the work of making lines is DuckDB's, outside of the interpreter's lock, so two threads keep two cores busy.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from aggregator.reconcile.lines import LineReader, Lines
from meters.log import USAGE_EVENTS, Log, Record, TryAgain

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
