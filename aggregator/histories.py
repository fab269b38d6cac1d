"""Work in the background, by organization: at most HISTORIES_AT_ONCE threads, and what waits for one organization is
done in one pass.

A meter that is made, and every one at a start, has its history counted, which reads all events of its organization. A
thread for each would be as many threads as there are organizations, and a pass over the events for each meter.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

Item = TypeVar("Item")
HISTORIES_AT_ONCE = 2  # organizations whose history is read at a time: each reads all events

logger = structlog.get_logger("aggregator")


class Histories(Generic[Item]):
    """Calls ``work(organization_id, added)`` in a thread, with all that was added for an organization since its last.

    ``work`` must not raise.
    """

    def __init__(self, work: Callable[[str, list[Item]], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Item]] = {}
        self._working = 0
        self._threads: list[threading.Thread] = []

    def add(self, organization_id: str, added: list[Item]) -> None:
        """Have this done, together with what waits for the same organization."""
        with self._lock:
            self._waiting.setdefault(organization_id, []).extend(added)
        self.go_on()

    def go_on(self) -> None:
        """Begin what waits, if there is room. Where no thread can be had it goes on waiting for the next call."""
        with self._lock:
            if not self._waiting or self._working == HISTORIES_AT_ONCE:
                return
            self._working += 1
        thread = threading.Thread(target=self._run, name="history", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads just now
            logger.error("history_waits", reason=str(error))
            with self._lock:
                self._working -= 1
            return
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]

    def wait(self) -> None:
        """Return when all that was begun is done, and all that waits for those who do it."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working -= 1
                    return
                organization_id = next(iter(self._waiting))
                added = self._waiting.pop(organization_id)
            self._work(organization_id, added)
