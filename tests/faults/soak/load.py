"""The sender: a process that keeps to a rate, sends again whatever it got no yes for, and books what it was told.

A tenth of the requests in flight may be cut at any moment; all that counts is in the tally's mapped files, which
outlive the process. Bodies have one to a thousand events, travel over several connections at once, so they arrive in
another order than they were made in, and some are repetitions of what was sent before.
"""

import asyncio
import contextlib
import gzip
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meters.log import parse_position
from tests.faults.soak.tally import ACKNOWLEDGED, SENT, Count, Numbers, Tally, body

EVENTS_A_BODY = (1, 10, 100, 100, 100, 100, 100, 1000)
PACKED_SHARE = 0.03  # of the bodies
BEHIND_S_MAX = 2.0  # after an outage, that much is made up for; the rest of the time is gone
ANSWER_S_MAX = 60.0
AGAIN_S = 0.05  # after a connection that was cut
PAUSE_S_MAX = 2.0  # whatever Retry-After says: this sender is in a hurry


class Order(NamedTuple):
    """Where to send, as whom (a connection each), and where to book it."""

    host: str
    port: int
    tokens: tuple[str, ...]
    tally: Path
    numbers_max: int
    seed: int


def run(order: Order) -> None:
    """Send until the rate is 0 and everything that was sent is acknowledged."""
    asyncio.run(_Sender(order).run())


class _Sender:
    def __init__(self, order: Order) -> None:
        self._order = order
        self._tally = Tally(order.tally, order.numbers_max)
        self._random = random.Random(order.seed)
        self._shuffle = np.random.default_rng(order.seed)
        self._again: list[Numbers] = []
        self._due_s = time.monotonic()
        self._parent = os.getppid()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for token in self._order.tokens:
                group.create_task(self._connection(token))

    async def _connection(self, token: str) -> None:
        while not self._over():
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                reader, writer = await asyncio.open_connection(self._order.host, self._order.port)
                try:
                    while not self._over():
                        await self._one(reader, writer, token)
                finally:
                    writer.close()
            await asyncio.sleep(AGAIN_S)

    def _over(self) -> bool:
        is_orphan = os.getppid() != self._parent
        return is_orphan or (not self._tally.counts[Count.RATE] and not self._again)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
        if not (numbers := self._next()).size:
            await asyncio.sleep(AGAIN_S)
            return
        counts = self._tally.counts
        states = self._tally.states
        states[numbers] = np.maximum(states[numbers], SENT)
        counts[Count.SENT_LINES] += len(numbers)
        acknowledged = False
        try:
            await self._pace(len(numbers))
            async with asyncio.timeout(ANSWER_S_MAX):
                status, headers = await _post(reader, writer, token, body(numbers), self._packed())
            acknowledged = await self._book(numbers, status, headers)
        except (OSError, EOFError, TimeoutError):
            counts[Count.CUT] += 1
            raise
        finally:
            if not acknowledged:
                self._again.append(numbers)

    def _packed(self) -> bool:
        return self._random.random() < PACKED_SHARE

    def _next(self) -> Numbers:
        """The numbers of the next body; none while there is nothing to send."""
        if self._again:
            return self._again.pop()
        counts, size = self._tally.counts, self._random.choice(EVENTS_A_BODY)
        first = int(counts[Count.NEXT])
        if not counts[Count.RATE]:
            return np.zeros(0, np.int64)
        new = self._random.randrange(1000) < counts[Count.NEW_PER_MILLE] or not first
        if new and first + size <= len(self._tally.states):
            counts[Count.NEXT] = first + size
            return np.arange(first, first + size)
        start = self._random.randrange(max(1, first - size))
        return self._shuffle.permutation(np.arange(start, min(start + size, first)))

    async def _pace(self, lines: int) -> None:
        rate = int(self._tally.counts[Count.RATE])
        self._due_s = max(self._due_s + lines / rate if rate else 0.0, time.monotonic() - BEHIND_S_MAX)
        if (wait_s := self._due_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    async def _book(self, numbers: Numbers, status: int, headers: dict[str, str]) -> bool:
        """Whether it was a yes. Waits as long as a no asks for."""
        counts = self._tally.counts
        counts[Count.REQUESTS] += 1
        if status == 200:
            self._tally.states[numbers] = ACKNOWLEDGED
            counts[Count.ACKNOWLEDGED_LINES] += len(numbers)
            for partition, end in (parse_position(headers["log-position"]) or {}).items():
                self._tally.positions[partition] = max(self._tally.positions[partition], end)
            return True
        counts[{503: Count.REFUSED, 429: Count.LIMITED}.get(status, Count.WRONG)] += 1
        await asyncio.sleep(min(float(headers.get("retry-after", PAUSE_S_MAX)), PAUSE_S_MAX))
        return False


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, content: bytes, packed: bool
) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer. Raises OSError, EOFError."""
    encoding = ""
    if packed:
        content, encoding = gzip.compress(content, 1), "content-encoding: gzip\r\n"
    head = (
        "POST /v1/events/ingest HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
        f"{encoding}authorization: Bearer {token}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    await reader.readexactly(int(headers.get("content-length", "0")))
    if headers.get("connection") == "close":
        writer.close()
    return int(first.split(" ")[1]), headers
