"""When the write-ahead log is folded into the file.

A checkpoint costs about a microsecond per row written since the last one, and rounds go on beside it. Often enough
means: the file opens quickly after a crash (replay is slower than a checkpoint) and no single checkpoint is long.

What a checkpoint finds becomes row groups of its own, of 122,880 rows at most. DuckDB would like to merge small ones
with their neighbors there and then; that keeps a round waiting for up to half a second, because a table takes no rows
while it is rewritten. So under load a checkpoint comes when there is nearly a full row group and merges nothing, and
the small ones that a quiet time leaves behind are merged in the next quiet time.
"""

import threading

from aggregator.store.store import Store

ROWS_BETWEEN = 100_000  # and what comes while it is noticed: nearly a row group, about 0.1 s of work beside the rounds
AGAIN_S = 0.05  # DuckDB does not checkpoint while a transaction writes; a round takes about this long
MERGES_MAX = 100  # in a quiet time; DuckDB's own limit
IDLE_S = 5.0  # what is left over is folded in when nothing else happens


class Checkpointer:
    """Checkpoints when enough rows came, or some came and then none. ``run`` is for a thread of the caller's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows = 1  # as if: what a crash left in the write-ahead log is folded in when nothing else happens
        self._wake = threading.Condition()
        self._stopping = False

    def wrote(self, rows: int) -> None:
        """Tell of rows committed."""
        with self._wake:
            self._rows += rows
            if self._rows >= ROWS_BETWEEN:
                self._wake.notify()

    def stop(self) -> None:
        """Have ``run`` return, after a checkpoint under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        """Until ``stop``. Raises Doubt when a checkpoint failed: the instance is not to be used any more."""
        before = 0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._rows >= ROWS_BETWEEN, timeout=IDLE_S)
                if self._stopping:
                    return
                due = self._rows >= ROWS_BETWEEN or 0 < self._rows == before
                before = rows = self._rows
                merges_max = 0 if rows >= ROWS_BETWEEN else MERGES_MAX
            if not due:
                continue
            done = self._store.checkpoint(merges_max)
            with self._wake:
                if done:
                    self._rows -= rows
                else:  # a round is being committed
                    self._wake.wait_for(lambda: self._stopping, timeout=AGAIN_S)
