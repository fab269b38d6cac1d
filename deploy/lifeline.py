"""How a process of ours ends: when it is asked to, or when its supervisor is gone, however that went.

The pipe works everywhere: its other end closes with the process that holds it. On Linux the kernel's own signal is
quicker and reaches a child that is stuck. Leaving at once is safe, because every part is built to be killed.
"""

import ctypes
import os
import signal
import sys
import threading

from deploy.giving_up import DONE, FAILED

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def live_no_longer_than_supervisor(lifeline: int) -> None:
    """End this process when the other end of the pipe is closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_await_end, args=(lifeline,), name="lifeline", daemon=True).start()


def leave_when_asked() -> None:
    """Let SIGTERM, SIGINT and SIGHUP end the process through its ``finally`` clauses, with exit code 0.

    A server takes the first two over while it runs and raises them again when it has stopped. A terminal that goes away
    is as good as SIGTERM, but not under nohup.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _leave(*_: object) -> None:
    raise SystemExit(DONE)


def _await_end(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns only when nobody can write any more
    os._exit(FAILED)
