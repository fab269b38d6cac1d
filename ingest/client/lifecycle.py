"""Clients and the life of their process: forks, SIGTERM, the end of the interpreter.

A fork happens while no client is in the middle of something: its lock is held across. The child starts every client
anew, with threads, connections and a spool of its own, and without the parent's events, which the parent sends.
No thread of a client imports anything: a module that is being imported when the process forks stays locked in the
child, for ever.
At the end of the interpreter every client closes within its bound; what is told after that, by streams that nobody had
ended, is for the spool. SIGTERM, which by default ends Python on the spot,
is made to end it in order, but only where the application has not decided otherwise.
"""

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Protocol
from weakref import WeakSet

logger = logging.getLogger(__name__)


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
