"""Servers that do the same, measured in turns.

On a shared host the same code takes half as much CPU again a minute later. So whoever is compared runs at the same
time, takes its turn for a second or two, again and again, and a ratio is one of sums over all turns.
"""

import asyncio
import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

from benchmarks.load import Bodies, Ledger, Numbers, send
from benchmarks.server import TOKEN, usage

Shape = tuple[int, int]
"""Events a body, connections."""

SHAPES: Sequence[Shape] = ((1, 64), (10, 32), (100, 32), (1000, 8))
WARM_UP: Shape = (100, 32)  # a stretch that is not shown: what a server loads once it loads there
WARM_UP_S = 3.0
TURNS = 3  # of each contender, with each shape
PREPARED = {1: 30_000, 10: 150_000, 100: 350_000, 1000: 400_000}  # events a second that bodies are made for

_RUNS = itertools.count()  # no two senders have the same, or their ids would be


class Prepared(Bodies):
    """Bodies of which so many are made before anybody sends."""

    def __init__(self, events: int, count: int) -> None:
        super().__init__(next(_RUNS), events)
        made = super().make
        self._ready = [made() for _ in range(count)]

    def make(self) -> tuple[bytes, Numbers]:
        """One of them, or another when they are used up."""
        return self._ready.pop() if self._ready else super().make()


@dataclass
class Taken:
    """What the servers of a contender took of one shape."""

    events: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)


class Contender:
    """Servers that share a load, on free ports."""

    def __init__(self, command: Sequence[str], servers: int = 1) -> None:
        """Start them; ``PORT`` in the command, which is run by this Python, stands for the port of each."""
        self.servers, self.acknowledged = servers, 0
        self._taken: dict[Shape, Taken] = defaultdict(Taken)
        self._peak_mb: dict[Shape, float] = {}
        self._running = [started(list(command)) for _ in range(servers)]
        self.take(WARM_UP, WARM_UP_S)
        self._taken.clear()

    def take(self, shape: Shape, seconds: float) -> int:
        """One turn; how many events were acknowledged."""
        events, connections = shape
        pids = [process.pid for process, _ in self._running]
        before_s = sum(usage(pid)["cpu_s"] for pid in pids)
        ledgers = uvloop.run(sent([port for _, port in self._running], events, connections, seconds))
        found, count = self._taken[shape], sum(ledger.events for ledger in ledgers)
        found.cpu_s += sum(usage(pid)["cpu_s"] for pid in pids) - before_s
        found.events, found.seconds = found.events + count, found.seconds + seconds
        found.latencies_s += [second for ledger in ledgers for second in ledger.latencies_s]
        self._peak_mb[shape] = sum(usage(pid)["peak_mb"] for pid in pids)
        self.acknowledged += count
        return count

    def row(self, shape: Shape) -> dict[str, Any]:
        """The figures of one shape."""
        found, (events, _) = self._taken[shape], shape
        latencies_ms = np.array(found.latencies_s) * 1000
        return {
            "gateways": self.servers, "events a body": events, "events/s": found.events / found.seconds,
            "requests/s": found.events / found.seconds / events, "events/CPU s": found.events / found.cpu_s,
            "CPU us/event": 1e6 * found.cpu_s / found.events, "ack p50 ms": float(np.percentile(latencies_ms, 50)),
            "ack p99 ms": float(np.percentile(latencies_ms, 99)), "peak MB": self._peak_mb[shape],
        }  # fmt: skip

    def end(self) -> None:
        """Stop them, and wait until they have."""
        for process, _ in self._running:
            process.send_signal(signal.SIGTERM)
        for process, _ in self._running:
            process.wait(30)


@contextlib.contextmanager
def contender(command: Sequence[str], servers: int = 1) -> Iterator[Contender]:
    """One that is stopped at the end."""
    one = Contender(command, servers)
    try:
        yield one
    finally:
        one.end()


def in_turns(contenders: Sequence[Contender]) -> Iterator[tuple[Shape, int, Contender]]:
    """Whose turn it is, and with which shape: the order is another one each time."""
    for shape in SHAPES:
        for turn in range(TURNS):
            for place in range(len(contenders)):
                number = (place + turn) % len(contenders)
                yield shape, number, contenders[number]


async def sent(ports: Sequence[int], events: int, connections: int, seconds: float) -> list[Ledger]:
    """What each server acknowledged; the connections and the bodies are shared out among them."""
    share = len(ports)
    count = int(seconds * PREPARED[events] / events / share)
    prepared = [Prepared(events, count) for _ in range(share)]
    sending = (
        send("127.0.0.1", port, TOKEN, bodies, seconds=seconds, rate=None, connections=connections // share)
        for port, bodies in zip(ports, prepared, strict=True)
    )
    return await asyncio.gather(*sending)


def started(command: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A server on a free port, once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, *(str(port) if part == "PORT" else part for part in command)])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(0.5)  # the catalogue is read
                return process, port
        time.sleep(0.02)
    raise RuntimeError(f"{command} does not listen")
