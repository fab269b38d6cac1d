"""When the write-ahead log is folded into the file.

A checkpoint costs about a microsecond per row written since the last one, and rounds go on beside it. Often enough
means: the file opens quickly after a crash (replay is slower than a checkpoint) and no single checkpoint is long.
"""

import threading

from aggregator.store.store import Store

ROWS_BETWEEN = 400_000  # about half a second of work beside the rounds, and a second of replay after a crash
IDLE_S = 5.0  # what is left over is folded in when nothing else happens


class Checkpointer:
    """A thread that checkpoints when enough rows came, or some came and then none."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wrote(self, rows: int) -> None:
        """Tell of rows committed."""
        with self._wake:
            self._rows += rows
            if self._rows >= ROWS_BETWEEN:
                self._wake.notify()

    def stop(self) -> None:
        """Let a checkpoint under way finish, then end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        before = 0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._rows >= ROWS_BETWEEN, timeout=IDLE_S)
                if self._stopping:
                    return
                due = self._rows >= ROWS_BETWEEN or 0 < self._rows == before
                before = rows = self._rows
            if due and self._store.checkpoint():
                with self._wake:
                    self._rows -= rows
