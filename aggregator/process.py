"""The aggregator process: engine, API and webhook sender in one process, and the gauges of its lag.

``run`` starts an ``Aggregator`` (``engine/supervisor.py``), creates the API over it and serves both until SIGTERM,
SIGINT or a final failure of the aggregator. The webhook sender runs as a task on the API's event loop. ``LagWatch``
compares the store's positions with the ends of the log for ``/metrics``; ``UnmatchedWatch`` looks for new events that
add nothing to their meters.
"""

import asyncio
import contextlib
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import uvicorn
import uvloop
from prometheus_client import Gauge

from aggregator.api import create_app
from aggregator.api.fast_reads import front
from aggregator.engine.pipeline import Readable
from aggregator.engine.supervisor import FINAL, Aggregator
from aggregator.forward.state import ForwardingMetrics
from aggregator.store.database import MODEST, Settings
from aggregator.store.queries.unmatched import in_newest
from aggregator.store.store import StillRead
from aggregator.view import Unavailable
from aggregator.webhooks.sender import Sender
from meters.log import USAGE_EVENTS, Log, PositionLost, TryAgain

# LagWatch: how many records of ``usage.events`` the store has not applied yet, by partition.
#
# A lag is true for a moment in the past, because the end of the log and the store's position are read one after the
# other. While either of them cannot be read, the gauges keep the last values, and another gauge shows their age.

FIRST_LOOK_S = 0.2  # until the view is there
LOOK_S = 2.0  # well below what a scrape waits, and nothing to a broker


class LagWatch:
    """Gauges of ``usage.events`` by partition, kept by a thread until ``stop``."""

    def __init__(self, log: Log, aggregator: Aggregator) -> None:
        self._log, self._aggregator = log, aggregator
        self._readable = Readable()
        registry = aggregator.telemetry.registry
        self._end = Gauge("meterstream_log_end", "Next offset that the log will give", ["partition"], registry=registry)
        self._lag = Gauge(
            "meterstream_lag_records", "Records of the log that are not in the store", ["partition"], registry=registry
        )
        self._looked = Gauge("meterstream_lag_looked_seconds", "When the lag was known, since 1970", registry=registry)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lag", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        pause_s = FIRST_LOOK_S
        while not self._stopping.wait(pause_s):
            with contextlib.suppress(TryAgain, Unavailable, PositionLost):  # said by whoever stops, or waits, for it
                self._look()
                pause_s = LOOK_S

    def _look(self) -> None:
        as_of = self._aggregator.as_of
        with self._readable.asking(f"the end of {USAGE_EVENTS}"):
            ends = self._log.ends(USAGE_EVENTS)
        for partition, end in ends.items():
            position = as_of.get(partition, 0)
            self._aggregator.telemetry.position.labels(str(partition)).set(position)
            self._end.labels(str(partition)).set(end)
            self._lag.labels(str(partition)).set(max(0, end - position))
        self._looked.set(time.time())


# UnmatchedWatch: events that a meter's filter lets through and that add nothing, because their value is no number.
#
# The engine counts no such events: that would cost every event. Each minute a thread looks at the newest thousand, so a
# sender that writes numbers as text is seen while it sends. What it costs is bounded by events and meters.

UNMATCHED_LOOK_S = 60.0
UNMATCHED_METERS_MAX = 100  # of organizations with new events: half a second of one core in each look


class UnmatchedWatch:
    """A gauge by meter, kept by a thread until ``stop``."""

    def __init__(self, aggregator: Aggregator, look_s: float = UNMATCHED_LOOK_S) -> None:
        self._aggregator, self._look_s = aggregator, look_s
        self._gauge = Gauge(
            "meterstream_unmatched_events",
            "Matching events whose value is no number, among the newest thousand events; meters without any are absent",
            ["meter"], registry=aggregator.telemetry.registry,
        )  # fmt: skip
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="unmatched", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(self._look_s):
            with contextlib.suppress(Unavailable):  # between two engines: the next time will do
                self.look()

    def look(self) -> None:
        """Look at the newest events. Raises Unavailable."""
        with self._aggregator.read() as snapshot:
            found = in_newest(snapshot.connection, self._aggregator.catalogue, UNMATCHED_METERS_MAX)
        self._gauge.clear()
        for meter_id, events in found.items():
            self._gauge.labels(meter_id).set(events)


# The process itself.
#
# The API's event loop, the reader and the writer share the interpreter's lock. A short switch interval keeps answers
# from memory in the low milliseconds while the reader decodes at full speed.

SWITCH_INTERVAL_S = 0.0005  # between 0.5 and 2 ms no difference showed above the noise of a loaded machine
GARBAGE_THRESHOLD = 100_000  # about five rounds of events, which reference counts free long before
HOUSEKEEPING_S = 60.0  # retention is a matter of days
START_AGAIN = 75  # the exit code where another process can go on at once, as sysexits.h counts it
SHUTDOWN_DEADLINE_S = 10  # requests get this to finish at a stop, as at the gateway; whoever supervises kills after 20
_WATCH_S = 0.2  # how often the server looks whether the aggregator ended for good


Listener = socket.socket  # which is the name of a field below


class Process(NamedTuple):
    """Where the process works. ``socket`` is a unix socket's path; ``listener``, which is bound, is used without one.

    ``housekeeping`` is called in a thread every HOUSEKEEPING_S, with the positions of the last commit; ``forwarding``
    is the file in which a forwarder says how far it got, for ``/metrics``; with ``private_targets`` webhooks may go to
    addresses that are not public. ``on_listening`` hears the address, a path or a host and a port, once it is open.
    """

    store: Path
    socket: Path | None = None
    listener: Listener | None = None
    settings: Settings = MODEST
    housekeeping: Callable[[Mapping[int, int]], None] | None = None
    forwarding: Path | None = None
    private_targets: bool = False
    on_listening: Callable[[Any], None] | None = None


def run(log: Log, process: Process) -> None:
    """Serve until SIGTERM or SIGINT. Raises what ended the aggregator for good, for the command line to explain.

    Leaves with START_AGAIN where only another process can go on; whoever supervises this one starts it.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    aggregator = Aggregator(log, process.store, process.settings)
    if process.forwarding is not None:
        aggregator.telemetry.registry.register(ForwardingMetrics(process.forwarding))
    aggregator.start()  # what it raises ends the process, before anything is frozen that has to be let go
    gc.freeze()  # what is loaded by now stays; looking through it again and again only stalls everybody
    gc.set_threshold(GARBAGE_THRESHOLD, 50, 100)
    if process.housekeeping is not None:
        keeper = threading.Thread(target=_keep_house, args=(aggregator, process.housekeeping), daemon=True)
        keeper.start()
    lag, unmatched = LagWatch(log, aggregator), UnmatchedWatch(aggregator)
    try:
        uvloop.run(_serve(aggregator, process))
    finally:
        lag.stop()
        unmatched.stop()
        aggregator.stop()
        gc.unfreeze()  # or the bindings of DuckDB complain of what is left at the end
    if isinstance(aggregator.failure, FINAL):
        raise aggregator.failure


def _keep_house(aggregator: Aggregator, housekeeping: Callable[[Mapping[int, int]], None]) -> None:
    while not aggregator.ended.wait(HOUSEKEEPING_S):
        with contextlib.suppress(Unavailable):  # between two engines: the next time will do
            housekeeping(aggregator.as_of)


class _Server(uvicorn.Server):
    """Tells where it listens, since port 0 is any."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[Any], None] | None) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_listening is not None:
            self._on_listening(self.servers[0].sockets[0].getsockname())


async def _serve(aggregator: Aggregator, process: Process) -> None:
    app = create_app(
        aggregator, lambda: datetime.now(UTC), lambda: str(uuid4()), aggregator.telemetry.text,
        private_targets=process.private_targets,
    )  # fmt: skip
    sender = Sender(app.state.desk, private_allowed=process.private_targets)
    if process.socket:
        _close_to_others(process.socket)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, loop="uvloop", http=front(app.state.desk), ws="none", lifespan="off",
        proxy_headers=False, server_header=False, timeout_graceful_shutdown=SHUTDOWN_DEADLINE_S,
        uds=str(process.socket) if process.socket else None,
    )  # fmt: skip
    server = _Server(config, process.on_listening)
    try:
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(work) for work in (_watch(aggregator, server), sender.run())]
            await server.serve([process.listener] if process.listener else None)
            for task in beside:
                task.cancel()
    finally:
        await asyncio.to_thread(app.state.desk.close)


def _close_to_others(path: Path) -> None:
    """Lay a socket there for uvicorn to replace, which keeps its mode; a new one would be open to everybody."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as placed:
        placed.bind(str(path))
    path.chmod(0o600)


async def _watch(aggregator: Aggregator, server: _Server) -> None:
    while not aggregator.ended.is_set():  # noqa: ASYNC110 (set by a thread, which knows no loop)
        await asyncio.sleep(_WATCH_S)
    if isinstance(aggregator.failure, StillRead):
        os._exit(START_AGAIN)  # a server that ends waits for its readers; nothing needs it, as after a kill
    server.should_exit = True
