"""The client: ``Ingestion``, ``AsyncIngestion`` for event loops, and their statistics.

``Ingestion.ingest`` seals an event, writes it to the spool through the outbox, and returns within microseconds. A
sender thread sends the event until the server has acknowledged it, over restarts of either side. Every captured event
is acknowledged, rejected (and handed to ``on_rejected``), dropped (if configured) or pending; ``Stats`` counts the
four, and they add up to what was captured and adopted.
"""

import asyncio
import contextlib
import contextvars
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import msgspec

from ingest.client import lifecycle
from ingest.client.event import DEFAULT_SPOOL, Event, EventRefused, Limits, Rejection, SpoolFull, Unacceptable, seal
from ingest.client.lifecycle import abandon
from ingest.client.outbox import Outbox, WhenFull
from ingest.client.sender import Sender
from ingest.client.spool import Spool, SpoolBroken, fingerprint, spools, strangers
from ingest.client.strategy import S
from ingest.client.transport import HttpTransport, Transport

logger = logging.getLogger(__name__)

_FULL = ("full", "There was no room for the event in time")
_CLOSED = ("closed", "The ingestion is closed")
_START_AGAIN_S = 1.0  # after the system had no thread left
_ADOPTED_AT_ONCE = 1000  # events that move from an abandoned spool in one transaction


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of events since the client was made (or forked). ``captured`` and ``adopted`` together are
    ``acknowledged + pending + rejected + dropped``."""

    captured: int
    """Calls of ``ingest``, whatever came of them."""
    adopted: int
    """Events taken over from processes that are gone."""
    acknowledged: int
    rejected: int
    dropped: int
    """Given up to make room, because that was chosen."""
    pending: int
    pending_bytes: int
    unspooled: int
    """Events that only memory held for a time, because the disk failed."""
    duplicates: int
    """Events that the server knew already, as it says."""
    requests: int
    retries: int
    last_problem: str | None
    """The cause of the last request that was not answered with a yes."""


class Ingestion:
    """Captures events and sends them in the background. A context manager; or call ``close`` at the end.

    ``token``, ``base_url``: as the server gave them; ``https://api.polar.sh`` is Polar's.
    ``spool``: a directory for what is not yet acknowledged, shared by as many processes as you like; None keeps events
    in memory alone, and a killed process loses them. ``previous_tokens`` and ``previous_base_urls`` are those whose
    events may still lie there: they are sent to this server, as this token's.
    ``when_full``: what happens once ``limits.held_bytes_max`` wait: ``block`` for at most ``limits.block_s_max`` and
    then reject, at once until some of them are settled; ``drop_oldest``, or ``raise`` SpoolFull.
    ``on_rejected`` gets every event that will not count, from any thread. ``strict`` raises at capture instead.
    ``handle_sigterm``: end in order at SIGTERM if nobody else handles it.
    """

    def __init__(
        self, token: str, *, base_url: str, spool: str | Path | None = DEFAULT_SPOOL, when_full: WhenFull = "block",
        on_rejected: Callable[[Rejection], object] | None = None, strict: bool = False, gzip: bool = True,
        previous_tokens: Sequence[str] = (), handle_sigterm: bool = True, transport: Transport | None = None,
        limits: Limits | None = None, previous_base_urls: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._limits = limits or Limits()
        self._directory = _usable(spool)
        self._when_full, self._on_rejected, self._strict = when_full, on_rejected, strict
        self._transport = transport or HttpTransport(
            token, base_url, gzip=gzip, timeout_s=self._limits.request_s_max, connections=self._limits.in_flight_max
        )
        destination = getattr(self._transport, "destination", "")
        self._owners = [
            fingerprint(url, one, destination)
            for url in (base_url, *previous_base_urls)
            for one in (token, *previous_tokens)
        ]
        self._is_closed = False
        self._begin()
        lifecycle.look_after(self, handle_sigterm=handle_sigterm)
        if self._directory and _has_files(self._directory, self._owners):
            self._start()

    def _begin(self) -> None:
        """The state of one process."""
        self._spool = Spool(self._directory, self._owners[0]) if self._directory else None
        self._outbox = Outbox(self._limits, self._when_full, self._spool)
        self._sender = Sender(self._outbox, self._transport, self._tell)
        self._refused = 0
        self._is_started = False
        self._start_again_s = 0.0  # when threads are asked for again; 0 until the system refused one
        self._stop = threading.Event()
        self._adopting = threading.Lock()
        self._keeper: threading.Thread | None = None

    def ingest(self, event: Event | Mapping[str, Any]) -> str | None:
        """Capture one event; its id, or None when it was rejected.

        Takes microseconds, and at most ``limits.block_s_max`` when the spool has become full and it shall block. Raises
        nothing, but EventRefused in strict mode and SpoolFull if that was chosen. The event is not changed.
        """
        try:
            return self._capture(event)
        except (EventRefused, SpoolFull):
            raise
        except Exception as error:  # a mapping that cannot be read, say
            logger.exception("an event could not be captured")
            self._refuse(Rejection(event, None, "error", (), type(error).__name__, "capture"))
            return None

    def _capture(self, event: Event | Mapping[str, Any]) -> str | None:
        try:
            sealed = seal(event)
        except Unacceptable as problem:
            self._refuse(Rejection(event, None, problem.type, problem.loc, problem.msg, "capture"))
            return None
        if not self._is_started:
            self._start()
        try:
            if self._outbox.put(sealed.line):
                return sealed.external_id
        except SpoolFull:
            self._count_refused()
            raise
        if self._is_closed and lifecycle.is_ending.is_set() and self._leave(sealed.line):
            return sealed.external_id
        type, msg = _CLOSED if self._is_closed else _FULL
        self._refuse(Rejection(event, sealed.external_id, type, (), msg, "spool"))
        return None

    capture = ingest

    def _leave(self, line: bytes) -> bool:
        """To the next process: this one was closed because it ends."""
        return self._directory is not None and self._outbox.leave(line, Spool(self._directory, self._owners[0]))

    def strategy(self, strategy_class: type[S], event_name: str, **metadata: Any) -> S:
        """A strategy that reports events of this name, with this metadata on each."""
        return strategy_class(event_name, self, metadata)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Send what was captured until now without lingering; whether all of it was settled in time."""
        return bool(self.wait_flushed(self.begin_flush(), timeout_s))

    def begin_flush(self) -> int:
        """Send what was captured until now without lingering; the number to ``wait_flushed`` for."""
        if self._outbox.pending:
            self._start()
        return self._outbox.hurry()

    def wait_flushed(self, number: int, timeout_s: float | None) -> bool | None:
        """Whether all of it is settled; None when the time is up and it still may be."""
        return self._outbox.wait_settled(number, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Send the rest within ``timeout_s`` (``limits.close_s_max``), stop. The spool keeps what could not be sent."""
        if self._is_closed:
            return
        if self._outbox.pending:
            self._start()
        self._is_closed = True
        deadline_s = time.monotonic() + (self._limits.close_s_max if timeout_s is None else timeout_s)
        try:
            if self._is_started or self._sender.is_running:
                self.flush(max(0.0, deadline_s - time.monotonic()))
        finally:  # also when a signal ends the waiting
            self._end(deadline_s)

    def _end(self, deadline_s: float) -> None:
        self._stop.set()
        self._outbox.stop()
        self._sender.join(deadline_s)
        if self._keeper is not None:
            self._keeper.join(max(0.0, deadline_s - time.monotonic()))
        lost = self._outbox.close()
        self._transport.close()
        lifecycle.leave(self)
        if lost:
            logger.error("events were lost: the server took them not in time and no spool holds them",
                         extra={"events": lost})  # fmt: skip

    def may_wait(self) -> bool:
        """Whether the next event may have to wait for room."""
        return self._outbox.is_nearly_full()

    def stats(self) -> Stats:
        """The counters, and what is on its way."""
        outbox, sender = self._outbox, self._sender
        with outbox.turn():
            return Stats(
                captured=outbox.taken + self._refused, adopted=outbox.adopted, acknowledged=outbox.acknowledged,
                rejected=outbox.rejected + self._refused, dropped=outbox.dropped, pending=outbox.pending,
                pending_bytes=outbox.held_bytes, unspooled=outbox.unspooled, duplicates=sender.duplicates,
                requests=sender.requests, retries=sender.retries, last_problem=sender.last_problem,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hold_still(self) -> None:
        """A fork is about to happen."""
        self._adopting.acquire()
        self._outbox.turns.lock.acquire()

    def go_on(self) -> None:
        """The fork has happened, and this is the parent."""
        self._outbox.turns.lock.release()
        self._adopting.release()

    def start_anew(self) -> None:
        """This is a forked child: events, threads, connections and the spool's file are the parent's."""
        self._outbox.forget()
        self._transport.after_fork()
        self._begin()

    def _start(self) -> None:
        """Start the threads, unless they run. Those that cannot be started now are tried again with a later event."""
        with self._outbox.turn():
            if self._is_started or self._is_closed or time.monotonic() < self._start_again_s:
                return
            self._is_started = True
        is_first = not self._start_again_s
        if is_first:
            lifecycle.started()
        try:
            self._start_threads()
        except RuntimeError:  # the interpreter ends, or the system has no threads left: events wait where they are
            self._start_again_s = time.monotonic() + _START_AGAIN_S
            self._is_started = False
            if is_first:
                logger.exception("events cannot be sent from this process for now")

    def _start_threads(self) -> None:
        self._sender.start()
        if self._spool and self._keeper is None:
            name = "meterstream-client-spool"
            keeper = threading.Thread(target=self._keep, args=(self._spool,), name=name, daemon=True)
            keeper.start()
            self._keeper = keeper

    def _keep(self, spool: Spool) -> None:
        """Take over what processes that are gone have left, now and then."""
        wait_s = 0.0
        self._look_for_strangers(spool)
        while not self._stop.wait(wait_s):
            try:
                for other in spools(spool.directory, self._owners):
                    self._adopt(other)
            except Exception:  # another user's file, say: the next look is as good
                logger.exception("abandoned spools could not be looked through")
            wait_s = self._limits.adopt_every_s

    def _adopt(self, other: Spool) -> None:
        """Move every event of an abandoned file into our own. Between two steps the process may fork: a child could
        never use SQLite again if another thread was in the middle of it."""
        with self._adopting:
            is_abandoned = other.claim()
        try:
            try:
                while is_abandoned and not self._stop.is_set():
                    with self._adopting:
                        if not _move(other, self._outbox):
                            break
            finally:
                with self._adopting:
                    other.close()
        except SpoolBroken as error:
            logger.warning("an abandoned spool could not be taken over", extra={"cause": str(error)})

    def _look_for_strangers(self, spool: Spool) -> None:
        """Say once that events lie here that nobody sends: those of another server or token, whose process is gone."""
        found = 0
        for other in strangers(spool.directory, self._owners):
            with self._adopting, contextlib.suppress(SpoolBroken):
                if other.claim():
                    found += not other.is_empty()
                    other.close()
        if found:
            logger.warning(
                "spool files of another server or token are not sent; previous_base_urls and previous_tokens send them",
                extra={"files": found, "directory": str(spool.directory)},
            )

    def _count_refused(self) -> None:
        with self._outbox.turn():
            self._refused += 1

    def _refuse(self, rejection: Rejection) -> None:
        self._count_refused()
        if self._strict:
            raise EventRefused(rejection)
        self._tell(rejection)

    def _tell(self, rejection: Rejection) -> None:
        """Hand a rejection over; the handler's own errors are logged and go no further."""
        told = {"by": rejection.by, "type": rejection.type, "loc": rejection.loc}
        logger.warning("an event was rejected", extra=told)
        if self._on_rejected is not None:
            try:
                self._on_rejected(rejection)
            except Exception:
                logger.exception("on_rejected failed")


def _usable(spool: str | Path | None) -> Path | None:
    """The spool's directory. Raises OSError when it was named and cannot be made; the default is then done without."""
    if spool is None:
        return None
    directory = Path(spool)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if spool is not DEFAULT_SPOOL:
            raise
        logger.warning("no spool: events are held in memory only", extra={"cause": str(error)})
        return None
    return directory


def _has_files(directory: Path, owners: Sequence[str]) -> bool:
    return any(any(directory.glob(f"{owner}-*")) for owner in owners)


def _move(spool: Spool, outbox: Outbox) -> bool:
    """Some events of an abandoned spool into our own, then out of it; False when it is empty. Between the two they are
    in both: an event that is sent twice has one id and counts once."""
    rows = spool.read(-1, _ADOPTED_AT_ONCE)
    if rows:
        outbox.adopt([line for _, line in rows])
        spool.delete([number for number, _ in rows])
    return bool(rows)


# The client for event loops. Capturing takes microseconds and runs on the loop. What may wait (room in a full spool,
# ``flush``, ``close``) runs in threads of its own, not in the pool in which asyncio resolves hosts. No thread waits
# long for a coroutine that may have been cancelled: it would hold up other callers, and the end of the process.
# Events are sent by the client's own threads, so a busy loop does not delay usage and an ended loop does not lose it.

_WAITING_MAX = 8  # threads: more events that wait for room would only wait behind each other
_GLANCE_S = 0.25  # how long a flush waits in a thread at a time, and so the longest that a cancelled one keeps it

T = TypeVar("T")


class AsyncIngestion:
    """Takes the arguments of ``Ingestion``. An asynchronous context manager; or await ``close`` at the end."""

    def __init__(self, token: str, **arguments: Any) -> None:
        self._ingestion = Ingestion(token, **arguments)
        self._make_threads()

    async def ingest(self, event: Event | Mapping[str, Any]) -> str | None:
        """As ``Ingestion.ingest``; waiting for room leaves the loop free."""
        if self._ingestion.may_wait():
            return await self._wait("ingest", lambda: self._ingestion.ingest(event))
        return self._ingestion.ingest(event)

    def capture(self, event: Event | Mapping[str, Any]) -> str | None:
        """As ``Ingestion.ingest``, for strategies and for code that cannot await: where the spool is full and shall
        block, this holds the loop up for at most ``limits.block_s_max``, and not again until room has appeared."""
        return self._ingestion.ingest(event)

    def strategy(self, strategy_class: type[S], event_name: str, **metadata: Any) -> S:
        """As ``Ingestion.strategy``."""
        return strategy_class(event_name, self, metadata)

    async def flush(self, timeout_s: float | None = None) -> bool:
        """As ``Ingestion.flush``."""
        number = self._ingestion.begin_flush()
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            glance_s = min(_GLANCE_S, until_s - time.monotonic())
            is_settled = await self._wait("flush", partial(self._ingestion.wait_flushed, number, glance_s))
            if is_settled is not None or time.monotonic() >= until_s:
                return bool(is_settled)

    async def close(self, timeout_s: float | None = None) -> None:
        """As ``Ingestion.close``."""
        await asyncio.to_thread(self._ingestion.close, timeout_s)  # not behind flushes that only it ends

    def stats(self) -> Stats:
        """As ``Ingestion.stats``."""
        return self._ingestion.stats()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _wait(self, what: Literal["ingest", "flush"], action: Callable[[], T]) -> T:
        if self._process_id != os.getpid():  # a fork: the threads did not come along
            abandon(self._threads)
            self._make_threads()
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads[what], lambda: context.run(action))

    def _make_threads(self) -> None:
        self._process_id = os.getpid()
        self._threads = {
            what: ThreadPoolExecutor(_WAITING_MAX, f"meterstream-client-{what}") for what in ("ingest", "flush")
        }
