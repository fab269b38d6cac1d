"""Follow the operator's decisions in the control stream, for a gateway without a database.

``CatalogueTail`` reads the control stream in a thread from its beginning into a ``Catalogue``, then waits for more,
so that a revoked token is refused within a second. Until the stream was read once, and when it could not be read for
ten seconds, the gateway does not know who may send, and answers "try again".

``Unfollowable`` ends the gateway: a control stream that was deleted and created again cannot be followed further, and
a restarted gateway reads it from the beginning.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping

from meters.catalogue.catalogue import Catalogue, decode_changes
from meters.log import USAGE_CONTROL, Log, OpenAgain, PositionLost, TryAgain, format_position

READ_BYTES_MAX = 4 * 1024 * 1024
"""Bytes of control records taken at once: some ten thousand customers."""

WAIT_S = 0.25
"""Seconds one read waits for more: how late a decision acts at the worst, where the log has no wake-up of its own."""

STALE_S = 10.0
"""Seconds without a successful read after which what is known is no longer trusted."""

CATCH_UP_S = 1.0
"""Seconds that a request waits for what was decided before it came; it takes milliseconds."""

logger = logging.getLogger("ingest.tail")


class Unfollowable(Exception):
    """The decisions cannot be followed any more; the message says why."""


class CatalogueTail:
    """The catalogue as of the last record read, and whether it may be trusted. One thread writes; all may read."""

    def __init__(self, log: Log) -> None:
        self.catalogue = Catalogue()
        self.position: Mapping[int, int] = {}  # replaced, never changed: a reader keeps the one that it has seen
        self.newest_us = 0  # the newest time that one of our own processes put on a decision
        self.trouble = ""  # why the last read failed, if it did
        self._log = log
        self._has_places = False  # whether the position names every partition
        self._loaded = threading.Event()
        self._moved = threading.Condition()
        self._read_at_s = 0.0
        self._stopping = threading.Event()

    @property
    def current(self) -> bool:
        """Whether the whole stream was read, and the last read is not long ago."""
        return self._loaded.is_set() and time.monotonic() - self._read_at_s < STALE_S

    async def wait_until_loaded(self, seconds: float) -> bool:
        """Whether the whole stream was read within so many seconds."""
        return await asyncio.to_thread(self._loaded.wait, seconds)

    async def catch_up(self) -> bool:
        """Whether everything that was decided before this call is known, after waiting a moment for it."""
        return await asyncio.to_thread(self._catch_up)

    def _catch_up(self) -> bool:
        try:
            ends = self._log.ends(USAGE_CONTROL)
        except TryAgain:
            return False
        with self._moved:
            return self._moved.wait_for(lambda: self._at(ends), CATCH_UP_S)

    async def run(self) -> None:
        """Follow the stream until ``stop``. Owns its thread. Raises Unfollowable."""
        try:
            await asyncio.to_thread(self._follow)
        finally:
            self.stop()

    def stop(self) -> None:
        """Let the thread end, at the latest after one read's wait."""
        self._stopping.set()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                self._read_once()
            except TryAgain as error:
                self.trouble = str(error)
                self._stopping.wait(min(error.retry_after_s, 1.0))
            except OpenAgain as news:
                logger.warning("%s", news)
                self._has_places = False
            except (PositionLost, ValueError) as error:
                self._loaded.clear()  # the gateway refuses to guess
                where = format_position(self.position) or "their beginning"
                raise Unfollowable(f"the decisions cannot be followed from {where}: {error}") from error

    def _read_once(self) -> None:
        if not self._has_places:
            self.position = {**self._log.starts(USAGE_CONTROL), **self.position}
            self._has_places = True
        if not self._loaded.is_set() and self._at(self._log.ends(USAGE_CONTROL)):
            self._read_at_s = time.monotonic()
            self._loaded.set()
        wait_s = WAIT_S if self._loaded.is_set() else 0.0
        for record in self._log.read(USAGE_CONTROL, self.position, bytes_max=READ_BYTES_MAX, wait_s=wait_s):
            self._apply(record.value)
            self.newest_us = max(self.newest_us, record.timestamp_us if record.is_ours else 0)
            self.position = {**self.position, record.partition: record.offset + 1}
        self._read_at_s = time.monotonic()
        self.trouble = ""
        with self._moved:
            self._moved.notify_all()

    def _at(self, ends: dict[int, int]) -> bool:
        return all(self.position.get(partition, 0) >= end for partition, end in ends.items())

    def _apply(self, value: bytes) -> None:
        for change in decode_changes(value):
            self.catalogue.apply(change)
