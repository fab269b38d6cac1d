"""Compiled loops are loaded in the background, once there is enough work for them.

They take a second of CPU and 110 MB, and most processes never need them, so a process starts without. Until the loops
are loaded, and where they cannot be, everything is done without them: slower, never wrong.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Loops = TypeVar("Loops")


class Thread(Protocol):
    """``threading.Thread``, which this package does not import: it starts nothing by itself."""

    def start(self) -> None:
        """Begin."""

    def join(self) -> None:
        """Wait for the end."""


class Loader(Generic[Loops]):
    """Loads loops once. ``loops`` is None until they are there, ``thread`` until they are asked for."""

    def __init__(
        self, load: Callable[[], Loops], failed: Callable[[Exception], None], work_min: int,
        make_thread: Callable[..., Thread], loops: Loops | None = None,
    ) -> None:
        """``load`` is called in a thread, and ``failed`` if it raises. With ``loops`` there is nothing to load."""
        self.loops = loops
        self.thread: Thread | None = None
        self._load, self._failed, self._make_thread = load, failed, make_thread
        self._work, self._work_min = 0, work_min

    def add_work(self, work: int) -> None:
        """Count work that loops would do; begin to load them when it is more than ``work_min`` altogether."""
        self._work += work
        if self.loops is None and self.thread is None and self._work > self._work_min:
            # No daemon: a compiler that is in the way of the interpreter's end would end it with a signal.
            self.thread = self._make_thread(target=self._run, name="load-kernels", daemon=False)
            self.thread.start()

    def _run(self) -> None:
        try:
            self.loops = self._load()
        except Exception as error:
            self._failed(error)
