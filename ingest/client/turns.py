"""One thing at a time, also where a thread interrupts itself.

A lock keeps other threads out, and not its owner: a signal handler, or a finalizer that the collection of garbage runs,
comes between any two steps of its thread and may capture an event there. What is half done would then be done a second
time, in the middle of the first. So whoever holds the lock has a turn, and what the same thread captures meanwhile
waits for the end of it.

Nothing is logged in a turn, but after it: a handler may be slow, or capture events itself, and then wait for the turn
while the turn waits for the handler's own lock.

Signal handlers may raise, too: a turn is marked and unmarked by plain assignments, between which and their ``try``
Python runs nobody else.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, RLock, get_ident

logger = logging.getLogger(__name__)

NOBODY = 0


class Turns:
    """The lock, its condition, and the lines that wait for the end of a turn; ``add`` takes them then."""

    def __init__(self, add: Callable[[bytes], None]) -> None:
        self.lock = RLock()  # a fork may happen while its owner holds it
        self.changed = Condition(self.lock)
        self.owner = NOBODY  # the thread that is in the middle of something
        self.late: deque[bytes] = deque()
        self.late_bytes = 0
        self.complaints: list[tuple[str, str]] = []
        self._add = add

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Do something under the lock that nobody comes between; in the middle of a turn, as a part of it."""
        with self.lock:
            outer, me = self.owner, get_ident()
            try:
                self.owner = me
                yield
            finally:
                self.owner = outer
                if self.late and outer != me:
                    self.catch_up()
        if self.complaints and outer != me:
            self.tell()

    def complain(self, message: str, cause: object) -> None:
        """In a turn: have a warning logged after it."""
        self.complaints.append((message, str(cause)))

    def tell(self) -> None:
        """Log the complaints, after a turn."""
        with self.lock:
            complaints, self.complaints = self.complaints, []
        for message, cause in complaints:
            logger.warning(message, extra={"cause": cause})

    def defer(self, line: bytes) -> None:
        """In the middle of a turn of this very thread: have a line added at the end of it."""
        size = len(line)
        self.late.append(line)
        self.late_bytes += size

    def catch_up(self) -> None:
        """Add what was deferred, between two steps or after the last. The lock is held by the caller."""
        outer, me = self.owner, get_ident()
        try:
            self.owner = me
            while self.late:
                self._add(self.late[0])
                size = len(self.late.popleft())
                self.late_bytes -= size
        finally:
            self.owner = outer

    def wait(self, seconds: float | None) -> None:
        """In a turn, between two steps: let others have theirs until something changes, or at most so long."""
        if self.late:  # it may be what is waited for
            self.catch_up()
            return
        me = self.owner
        try:
            self.owner = NOBODY
            self.changed.wait(seconds)
        finally:
            self.owner = me

    def wait_for(self, is_met: Callable[[], bool], seconds: float | None) -> bool:
        """In a turn, between two steps: let others have theirs until this is so, or at most so long; whether it is."""
        until_s = None if seconds is None else time.monotonic() + seconds
        while not is_met():
            left_s = None if until_s is None else until_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            self.wait(left_s)
        return True
