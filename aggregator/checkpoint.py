"""When the write-ahead log is folded into the file.

A checkpoint costs one to two microseconds per row written since the last one, and the round that comes meanwhile waits
for it. Often enough means: the file opens quickly after a crash (replay is slower than a checkpoint), and no single
checkpoint is long. While rounds follow what arrives, each of their events is waited for, so a checkpoint takes what
fits between two rounds. While a backlog is worked off, nobody waits for the single event, and larger ones leave a file
that is a fifth smaller.

What a checkpoint finds becomes row groups of its own, of 122,880 rows at most. DuckDB would like to merge small ones
with their neighbors there and then; that keeps a round waiting for up to half a second, because a table takes no rows
while it is rewritten. So under load a checkpoint merges nothing; the first one of a quiet time merges some of the small
row groups that were left behind. One without rows to write merges none.

Each checkpoint also looks at every row group there is, changed or not: 3 ms of CPU time for a million rows stored. So
the longer the history, the more rows lie between two.
"""

import threading
import time

from aggregator.store.store import Store

ROWS_BETWEEN = 25_000  # 55 ms on busy cores, which mostly fit between two rounds; 100,000 kept every 20th event 0.2 s
ROWS_BETWEEN_BACKLOG = 100_000  # and what comes while it is noticed: nearly a row group
STORED_ROWS_PER_ROW = 320  # in the store for one row more between two: a row's part in looking at them is 1 us at most,
ROWS_MORE_MAX = 200_000  # up to 64 million stored: what waits is in memory, and read again after a crash, in 0.2 s
BACKLOG_ROUND_ROWS = 15_000  # a round of more has been waited for already
AGAIN_S = 0.05  # DuckDB does not checkpoint while a transaction writes; a round takes about this long
MERGES_MAX = 4  # in a quiet time; making five row groups of fifteen took 0.6 s, which a next round may have to wait
IDLE_S = 5.0  # what is left over is folded in when nothing else happens
EVERY_S = 600.0  # at least this often: rows that webhooks write are not reported to ``wrote``


class Checkpointer:
    """Checkpoints when enough rows came, or some came and then none. ``run`` is for a thread of the caller's."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._enough = ROWS_BETWEEN
        self._rows = 1  # as if: what a crash left in the write-ahead log is folded in when nothing else happens
        self._wake = threading.Condition()
        self._stopping = False

    def wrote(self, rows: int) -> None:
        """Tell of rows committed."""
        with self._wake:
            self._rows += rows
            more = min(self._store.next_seq // STORED_ROWS_PER_ROW, ROWS_MORE_MAX)
            self._enough = more + (ROWS_BETWEEN_BACKLOG if rows >= BACKLOG_ROUND_ROWS else ROWS_BETWEEN)
            if self._rows >= self._enough:
                self._wake.notify()

    def stop(self) -> None:
        """Have ``run`` return, after a checkpoint under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        """Until ``stop``. Raises Doubt when a checkpoint failed: the instance is not to be used any more."""
        before, newest_s = 0, time.monotonic()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._rows >= self._enough, timeout=IDLE_S)
                if self._stopping:
                    return
                under_load = self._rows >= self._enough
                is_quiet = not under_load and 0 < self._rows == before
                due = under_load or is_quiet or time.monotonic() - newest_s >= EVERY_S
                before = rows = self._rows
                merges_max = MERGES_MAX if is_quiet else 0
            if not due:
                continue
            done = self._store.checkpoint(merges_max)
            with self._wake:
                if done:
                    self._rows, newest_s = self._rows - rows, time.monotonic()
                else:  # a round is being committed
                    self._wake.wait_for(lambda: self._stopping, timeout=AGAIN_S)
