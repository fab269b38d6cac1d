"""The client in its process: forks, exit, SIGTERM, and a lock that signal handlers may re-enter.

``Turns`` is the lock of an outbox. ``look_after`` registers a client (``Living``) for the life of the process: its
lock is held across a fork, the child starts the client anew, and at interpreter exit the client closes within its
time limit.
"""

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, RLock, get_ident
from types import FrameType
from typing import Protocol
from weakref import WeakSet

# The re-entrant lock. A lock keeps other threads out, but not its owner: a signal handler, or a finalizer run by
# garbage collection, can interrupt its own thread anywhere and capture an event. Half-finished work would then be
# done a second time in the middle of the first. So the owner of the lock has a turn, and what its thread captures
# meanwhile is deferred to the end of the turn.
#
# Nothing is logged within a turn, only after it: a log handler may be slow, or capture events itself, and then wait
# for the turn while the turn waits for the handler's lock.
#
# Signal handlers may raise, too: a turn is marked and unmarked by plain assignments, and Python runs no handler
# between these and their ``try``.

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


# Life of the process. The child of a fork starts every client with threads, connections and a spool of its own, and
# without the parent's events, which the parent sends. No thread of a client imports anything: a module that is being
# imported during a fork stays locked in the child for ever. Usage of streams that are still open at interpreter exit
# comes after the clients closed, and is written to the spool. SIGTERM, which ends Python at once by default, is made
# to end it in order, unless the application has set its own handler.

class Living(Protocol):
    """A client, as its process sees it."""

    def hold_still(self) -> None:
        """Let nothing happen until ``go_on``."""

    def go_on(self) -> None:
        """Let things happen again."""

    def start_anew(self) -> None:
        """In a forked child: leave everything to the parent."""

    def close(self) -> None:
        """Send the rest, within a bound."""


_FIRST = 100  # before pools and managers end, which have 15 and less

is_ending = threading.Event()
"""The interpreter ends, and clients were closed for it."""

_clients: "WeakSet[Living]" = WeakSet()
_held: list[Living] = []
_forking = threading.RLock()


def look_after(client: Living, *, handle_sigterm: bool) -> None:
    """From now on the client hears of forks and of the end."""
    _clients.add(client)
    in_main_thread = threading.current_thread() is threading.main_thread()  # signals are set nowhere else
    if handle_sigterm and in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_in_order)


def started() -> None:
    """A client has something to close now. Children of multiprocessing end without the interpreter's own farewell, but
    keep a list of their own."""
    if (library := sys.modules.get("multiprocessing.util")) is not None:
        library.Finalize(None, _at_exit, exitpriority=_FIRST)


def leave(client: Living) -> None:
    """The client is closed and needs to hear of nothing."""
    _clients.discard(client)


def abandon(inherited: object) -> None:
    """In a forked child: keep something of the parent's as it is, for ever. Closing it here would do harm there, and
    an ordinary reference would be taken away, and so close it, at the end of the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _end_in_order(number: int, frame: FrameType | None) -> None:
    """Unwind the main thread, so that ``with`` and ``finally`` do their work and the interpreter ends as it should.

    Once: another SIGTERM would only interrupt that.
    """
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _before_fork() -> None:
    _forking.acquire()
    _held.extend(sorted(_clients, key=id))  # one order for every thread that forks
    for client in _held:
        client.hold_still()


def _after_in_parent() -> None:
    while _held:
        _held.pop().go_on()
    _forking.release()


def _after_in_child() -> None:
    while _held:
        _held.pop().start_anew()
    _forking.release()


def _at_exit() -> None:
    is_ending.set()
    for client in list(_clients):
        try:
            client.close()
        except Exception:  # the others want to be closed as well
            logger.exception("a client could not be closed in order")


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
