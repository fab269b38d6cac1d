"""A careful client under faults: ids of its own, a memory of what was acknowledged, repetition of what was not.

Every body that was not acknowledged is sent again, and some of the acknowledged events too. What such a client was
told is all that a fault test believes; the rest it reads out of the log and the store.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import httpx

from meters.log import parse_position
from tests.support.faults.store_checks import SEED

EVENTS_A_BODY = 10
CONNECTIONS = 8
REPEATED_SHARE = 0.05  # of the bodies: one event that was acknowledged before
AGAIN_S = 0.1  # between two tries of one connection that were refused
INGEST_PATH = "/v1/events/ingest"


class Outcome(NamedTuple):
    """What became of the events of one sender. ``print`` it: each fault test does."""

    sent: int
    acked: int
    stored: int
    dead: int
    lost: int
    doubled: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items())


class Sender:
    """Sends bodies of events called "call", over several connections at once."""

    def __init__(self, seed: int, token: str, customers: int = 1, pause_s: float = 0.0) -> None:
        """``pause_s`` is what each connection waits after an acknowledgment, where volume is not the question."""
        self._random = random.Random(seed)
        self._headers = {"authorization": f"Bearer {token}"}
        self._customers, self._pause_s = customers, pause_s
        self._next = 0
        self.sent: set[str] = set()
        self.acknowledged: list[str] = []
        self.unanswered: list[list[str]] = []
        self.under_way: set[int] = set()
        """Numbers of the requests that wait for an answer."""
        self.requests = self.repeated = self.refused = 0

    def _body(self) -> list[str]:
        if self.unanswered:
            return self.unanswered.pop()
        if self.acknowledged and self._random.random() < REPEATED_SHARE:
            self.repeated += 1
            return [self._random.choice(self.acknowledged)]
        first, self._next = self._next, self._next + EVENTS_A_BODY
        return [f"id-{number}" for number in range(first, self._next)]

    def event(self, id: str) -> dict[str, object]:
        """The event of an id: the same bytes every time, and always the same customer."""
        customer = f"customer-{int(id.removeprefix('id-')) % self._customers}"
        return {"name": "call", "external_customer_id": customer, "external_id": id, "metadata": {"n": 1}}

    async def load(self, url: str, strike: Callable[[], Awaitable[object]], *, refused: bool = False) -> None:
        """Send until ``strike`` returns; it begins after the first acknowledgment of this load.

        With ``refused`` a 503 is an answer like none: the body is sent again, now or with the next load. A connection
        whose request was cut ends; without ``refused`` every other answer than 200 fails.
        """
        acknowledged, over = asyncio.Event(), asyncio.Event()
        async with (
            httpx.AsyncClient(base_url=url, headers=self._headers, timeout=60) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(CONNECTIONS):
                group.create_task(self._connection(http, acknowledged, over, refused))
            await acknowledged.wait()
            await strike()
            over.set()

    async def settle(self, url: str) -> None:
        """Send again what was never acknowledged, until all of it is."""
        async with httpx.AsyncClient(base_url=url, headers=self._headers, timeout=60) as http:
            while self.unanswered:
                if not await self._send(http, self.unanswered.pop(), refused=True):
                    await asyncio.sleep(AGAIN_S)

    async def _connection(
        self, http: httpx.AsyncClient, acknowledged: asyncio.Event, over: asyncio.Event, refused: bool
    ) -> None:
        while not over.is_set():
            if await self._send(http, self._body(), refused=refused):
                acknowledged.set()
                await asyncio.sleep(self._pause_s)
            elif refused:
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _send(self, http: httpx.AsyncClient, ids: list[str], *, refused: bool) -> bool:
        """Whether the body was acknowledged."""
        self.sent.update(ids)
        number, self.requests = self.requests, self.requests + 1
        self.under_way.add(number)
        try:
            answer = await http.post(INGEST_PATH, json={"events": [self.event(id) for id in ids]})
        except httpx.TransportError:
            self.unanswered.append(ids)
            return False
        finally:
            self.under_way.remove(number)
        if refused and answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            self.unanswered.append(ids)
            self.refused += 1
            return False
        assert answer.status_code == 200, answer.text
        assert parse_position(answer.headers["log-position"])
        self.acknowledged += ids
        return True

    def outcome(self, stored: list[str], dead: int = 0) -> Outcome:
        """Compare with the ids that are in the store, one for each row."""
        once = set(stored)
        lost = len(set(self.acknowledged) - once)
        return Outcome(len(self.sent), len(set(self.acknowledged)), len(once), dead, lost, len(stored) - len(once))


def told(fault: str, outcome: Outcome, recovery: float | str, more: str = "", *, seed: int | str = SEED) -> str:
    """Return the figures of a fault over Kafka: sent, acked, stored, dead, lost, doubled, recovery, seed. Omit none.

    ``recovery`` is in seconds, or says of whom, or why there is none; so does ``seed`` where nothing is drawn.
    """
    away = f"{recovery:.2f} s" if isinstance(recovery, float) else recovery
    return f"kafka, {fault}: {outcome}, recovery {away}, seed {seed}{more and '; '}{more}"
