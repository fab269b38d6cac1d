"""What each kind of fault does to an installation. A strike ends when the fault is over; recovery begins then."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ingest.log import open_log
from meters.log import USAGE_EVENTS, Entry, TryAgain
from tests.faults.soak.ground import Ground
from tests.faults.soak.hostile import Hostile
from tests.faults.soak.schedule import BROKER, DISK, ENDING, OTHERS, Fault
from tests.support.kafka.cluster import Cluster
from tests.support.servers.killable_server import Server
from tests.support.waiting import eventually

PAUSE_S = (0.3, 5.0)  # a process stands still that long
FULL_S = (0.5, 4.0)
FROZEN_S = (0.2, 2.5)
CLOCK_S = 3000.0  # at most that far off, either way; Kafka refuses what is an hour ahead of its own clock
POISON = (b"{broken", b"\xff\xfe\x00", b"[]", b'{"name":"nobody\'s"}', b"NaN", b"null", b'"' + b"x" * 500_000 + b'"')
FLOOD_S_MAX = 30.0
AHEAD = 50  # requests of a flood that are sent before the first is answered
_NAMES = {"gateway": "gateway", "aggregator": "aggregate", "forwarder": "forward"}  # as the command says it
TURNED_AWAY = frozenset({400, 401, 408, 411, 413, 415, 422, 429, 431, 503})


class Wrong(Exception):
    """Something answered as it must not."""


class Site:
    """An installation under faults. ``flooder`` is a token of its own, for whoever asks too often."""

    def __init__(
        self, server: Server, ground: Ground, flooder: str, log: str, seed: int, cluster: Cluster | None = None
    ) -> None:
        self.server, self.ground, self.cluster = server, ground, cluster
        self._log, self._flooder, self._choose = log, flooder, random.Random(seed)
        hostile = Hostile(server.port, flooder, self._choose)
        self._attacks: dict[str, Callable[[float], list[int]]] = {
            "slow clients": hostile.slow_clients, "long heads": hostile.long_heads, "garbage": hostile.garbage,
            "bombs": hostile.bombs, "bad bodies": hostile.bad_bodies,
        }

    def kinds(self, *, calm: bool = False) -> set[str]:
        """What can be done here; without ending a process where it has to be calm."""
        found = {*OTHERS, *(DISK if self.ground.own_disk else ()), *(BROKER if self.cluster else ())}
        return found if calm else found | set(ENDING)

    def strike(self, fault: Fault) -> None:
        """Do it, and undo it. Raises Wrong."""
        verb, _, victim = fault.kind.partition(" ")
        if fault.kind in self._attacks:
            self._attack(fault)
        elif victim == "broker":
            self._broker(verb, fault.strength)
        elif verb == "kill":
            self._kill(victim)
        elif verb == "pause":
            with stopped(self._running(_NAMES[victim])):
                time.sleep(_between(PAUSE_S, fault.strength))
        else:
            {"end server": self._end, "fill disk": self._fill, "freeze disk": self._freeze, "step clock": self._step,
             "write poison": self._poison, "flood": self._flood}[fault.kind](fault.strength)  # fmt: skip

    def _attack(self, fault: Fault) -> None:
        statuses = self._attacks[fault.kind](fault.strength)
        if unexpected := set(statuses) - TURNED_AWAY:
            raise Wrong(f"{fault.kind} were answered with {sorted(unexpected)}")

    def _running(self, name: str) -> int:
        """The process, which may just be started again: nobody waited for a forwarder."""
        pid: int = eventually(lambda: self.server.children().get(name))
        return pid

    def _kill(self, victim: str) -> None:
        if victim in _NAMES:
            self._running(_NAMES[victim])
        self.server.kill(_NAMES.get(victim, victim))
        if victim == "server":
            self.server.start()

    def _end(self, _: float) -> None:
        if code := self.server.stop():
            raise Wrong(f"SIGTERM ended the server with exit code {code}")
        self.server.start()

    def _broker(self, verb: str, strength: float) -> None:
        assert self.cluster is not None
        node = self._choose.choice(self.cluster.nodes)
        if verb == "kill":
            node.kill()
            node.start()
            return
        node.pause()
        try:
            time.sleep(_between(PAUSE_S, strength))
        finally:
            node.resume()

    def _fill(self, strength: float) -> None:
        self.ground.fill()
        try:
            time.sleep(_between(FULL_S, strength))
        finally:
            self.ground.empty()

    def _freeze(self, strength: float) -> None:
        self.ground.freeze()
        try:
            time.sleep(_between(FROZEN_S, strength))
        finally:
            self.ground.thaw()

    def _step(self, strength: float) -> None:
        self.ground.set_clock_s(CLOCK_S * (2 * strength - 1))

    def _poison(self, strength: float) -> None:
        """Lines that no gateway would have taken, written into the log beside it."""
        lines = [self._choose.choice(POISON) for _ in range(int(20 * strength) + 1)]

        def written() -> bool:
            with contextlib.closing(open_log(self._log)) as log, contextlib.suppress(TryAgain):
                record = log.read(USAGE_EVENTS, log.starts(USAGE_EVENTS), bytes_max=1, wait_s=5.0)[0]
                entry = Entry(b"\n".join(lines), 0, record.organization_id, admitted=False)
                return bool(asyncio.run(log.append(USAGE_EVENTS, [entry])))
            return False

        eventually(written, look_again_s=0.1)

    def _flood(self, _: float) -> None:
        """Ask until the answer is to come back later."""
        body = b'{"events":[]}'
        head = f"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._flooder}\r\n"
        request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
        deadline_s = time.monotonic() + FLOOD_S_MAX
        answers = b""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=FLOOD_S_MAX) as connection:
            while b" 429 " not in answers:
                if time.monotonic() > deadline_s:
                    raise Wrong(f"nobody stopped a flood: {answers[:200]!r}")
                connection.sendall(request * AHEAD)
                answers = b""
                while answers.count(b"HTTP/1.1 ") < AHEAD:
                    answers += _received(connection)


def _received(connection: socket.socket) -> bytes:
    received = connection.recv(1 << 20)
    if not received:
        raise Wrong("a flood was cut off instead of answered")
    return received


def _between(bounds: tuple[float, float], strength: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * strength


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
