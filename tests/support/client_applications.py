"""Small applications that end in every way there is.

    python -m tests.support.client_applications NAME URL SPOOL [TOKEN [CLOSE_S_MAX]]

Each writes the id of every event that it captured to standard output, a line each, before the next thing can happen to
it; SPOOL is a directory or ``-`` for none. CLOSE_S_MAX is how long ``close`` may take: two seconds where a spool keeps
what that cuts off, and PATIENCE_S without one, because a server that shares its cores may let anybody wait.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import msgspec

from ingest.client import Ingestion, Limits, outbox
from ingest.client import spool as spool_module
from ingest.client.instrument import WatchedStream, Watcher
from tests.support.waiting import eventually

LIMITS = Limits(
    linger_s=0.02, backoff_s=0.02, backoff_s_max=0.2, close_s_max=2.0, batch_events_max=200, adopt_every_s=0.2
)
EVENTS = 300
PATIENCE_S = 30
CHILDREN = 3


def capture(ingestion: Ingestion, events: int = EVENTS) -> None:
    """Capture, and say so."""
    for number in range(events):
        id = ingestion.ingest({"name": "call", "external_customer_id": "u", "metadata": {"n": number}})
        os.write(1, f"{id}\n".encode())


def ends(ingestion: Ingestion) -> None:
    """Captures and comes to its end without closing anything."""
    capture(ingestion)


def fails(ingestion: Ingestion) -> None:
    """Captures and dies of an error."""
    capture(ingestion)
    raise RuntimeError("a bug")


def waits(ingestion: Ingestion) -> None:
    """Captures and waits for a signal."""
    capture(ingestion)
    os.write(2, b"ready\n")
    while True:
        signal.pause()


def has_handler(ingestion: Ingestion) -> None:
    """Has its own idea of SIGTERM: it goes on for a while."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    with ingestion:
        capture(ingestion)
        os.write(2, b"ready\n")
        while not ended.is_set():
            time.sleep(0.01)
        capture(ingestion, 10)


def runs(ingestion: Ingestion) -> None:
    """Captures until it is killed."""
    os.write(2, b"ready\n")
    while True:
        capture(ingestion)


def runs_short_of_memory(ingestion: Ingestion) -> None:
    """Captures until it is killed; memory and the spool's journal hold so few events that every part is at work."""
    with patch.object(spool_module, "_EVENTS_MAX", 50), patch.object(outbox, "MEMORY_EVENTS_MAX", 120):
        runs(ingestion)


def forks(ingestion: Ingestion) -> None:
    """Captures before a fork, in the children, and after; the children end as interpreters do."""
    capture(ingestion, 20)
    children = []
    for _ in range(CHILDREN):
        child = os.fork()
        if child == 0:
            capture(ingestion)
            return
        children.append(child)
    capture(ingestion, 20)
    for child in children:
        os.waitpid(child, 0)


def forks_and_vanishes(ingestion: Ingestion) -> None:
    """The children end without a word, as those of process pools do."""
    capture(ingestion, 20)
    for _ in range(CHILDREN):
        if (child := os.fork()) == 0:
            capture(ingestion)
            os._exit(0)
        os.waitpid(child, 0)


def forks_while_busy(ingestion: Ingestion) -> None:
    """Forks in the middle of everything, many times; each child captures one event."""
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            capture(ingestion, 10)
            time.sleep(0.01)  # more would be sent for minutes

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        if (child := os.fork()) == 0:
            capture(ingestion, 1)
            ingestion.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    ended.set()
    for thread in threads:
        thread.join()


_pooled: Ingestion


def work(events: int) -> None:
    """A task in a pool."""
    capture(_pooled, events)


def pools(ingestion: Ingestion) -> None:
    """Captures in the workers of a pool, which fork the client."""
    global _pooled
    _pooled = ingestion
    capture(ingestion, 20)
    with multiprocessing.get_context("fork").Pool(CHILDREN) as pool:
        pool.map(work, [50] * 6)
        pool.close()
        pool.join()


_left: list[Path] = []
"""What lay in the spool before this process had a client."""


def collects(ingestion: Ingestion) -> None:
    """Captures nothing itself; what others have left is sent."""
    eventually(lambda: not any(spool.exists() for spool in _left))
    assert ingestion.flush(PATIENCE_S)


class Told(Watcher):
    """Captures an event when its stream ends, and says so."""

    def __init__(self, ingestion: Ingestion) -> None:
        self._ingestion, self._write = ingestion, os.write

    def item(self, item: object) -> bool:
        """Nothing to see."""
        return True

    def end(self, is_complete: bool) -> None:
        """The end of the interpreter, most likely."""
        self._write(1, f"{self._ingestion.ingest({'name': 'call', 'external_customer_id': 'u'})}\n".encode())


_open: list[object] = []


def leaves_streams_open(ingestion: Ingestion) -> None:
    """Comes to its end in the middle of streams, whose usage is told after every client was closed."""
    for _ in range(3):
        stream = WatchedStream(iter(range(10)), Told(ingestion))
        next(stream)
        _open.append(stream)


APPLICATIONS: dict[str, Callable[[Ingestion], None]] = {
    each.__name__: each
    for each in (ends, fails, waits, has_handler, runs, runs_short_of_memory, forks, forks_and_vanishes,
                 forks_while_busy, pools, leaves_streams_open, collects)
}

if __name__ == "__main__":
    _, name, url, directory, *rest = sys.argv
    token, close_s_max = [*rest, *["token", ""][len(rest) :]]
    spool = None if directory == "-" else directory
    _left += Path(directory).glob("*.spool")
    bound_s = float(close_s_max or (LIMITS.close_s_max if spool else PATIENCE_S))
    limits = msgspec.structs.replace(LIMITS, close_s_max=bound_s)
    APPLICATIONS[name](Ingestion(token, base_url=url, spool=spool, limits=limits))
