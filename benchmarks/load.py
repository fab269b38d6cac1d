"""A load of usage events that costs the sender almost nothing and can be summed exactly afterwards.

A body is a block of fixed-width lines, so a whole request is made by writing digits into a byte matrix. Every event
has an id of its own, one of ``customers`` customers, a token count, a cost in cents with four decimals and one of
four models. What was acknowledged is summed in integers beside it: the only truth a benchmark is checked against.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np

MODELS = (b"gpt-4.1-nano", b"gpt-4.1-mini", b"claude-haiku", b"gemini-flash")  # of one width
LATENCY_MIN_MS = 1000
_LINE = (
    b'{"name":"chat.completion","external_customer_id":"customer-CCCCCCCC","external_id":"req-RRRR-IIIIIIIIIIII",'
    b'"timestamp":"2026-03-01T10:00:00.123456Z","metadata":{"model":"MMMMMMMMMMMM","tokens":1TTTT,'
    b'"region":"eu-west-1","cached":false,"latency_ms":LLLL,"_cost":{"amount":1.KKKK,"currency":"usd"}}}'
)
_FOUR_DIGITS = np.array([list(b"%04d" % number) for number in range(10_000)], np.uint8)
assert len({len(model) for model in MODELS}) == 1


@dataclass
class Ledger:
    """What was acknowledged: integers, exact. ``cost_units`` are ten-thousandths of a cent."""

    requests: int = 0
    events: int = 0
    tokens: int = 0
    cost_units: int = 0
    model_tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(MODELS), np.int64))
    latency_counts: np.ndarray = field(default_factory=lambda: np.zeros(1000, np.int64))  # from LATENCY_MIN_MS on
    refused: int = 0
    latencies_s: list[float] = field(default_factory=list)
    began_s: float = 0.0  # on the machine's monotonic clock, when the first request was due
    stall_s: float = 0.0  # the longest time without an acknowledgement
    cpu_s: float = 0.0  # what sending cost

    def include(self, others: Iterable["Ledger"]) -> "Ledger":
        """Itself, with what others acknowledged; not with their times."""
        for other in others:
            self.events, self.tokens = self.events + other.events, self.tokens + other.tokens
            self.cost_units += other.cost_units
            self.model_tokens += other.model_tokens
            self.latency_counts += other.latency_counts
        return self


class Bodies:
    """Makes request bodies; ``run`` keeps the ids of two senders apart."""

    def __init__(self, run: int, events: int = 100, customers: int = 100_000, seed: int = 7) -> None:
        self._events, self._customers = events, customers
        self._random = np.random.default_rng(seed)
        self._next_id = 0
        line = _LINE.replace(b"RRRR", b"%04d" % run)
        self._lines = np.tile(np.frombuffer(line + b",", np.uint8), (events, 1))
        self._models = np.stack([np.frombuffer(model, np.uint8) for model in MODELS])

    def make(self) -> tuple[bytes, "Numbers"]:
        """One body and the numbers in it."""
        random, rows = self._random, self._events
        numbers = Numbers(
            random.integers(0, self._customers, rows),
            random.integers(0, 10_000, rows),
            random.integers(0, 10_000, rows),
            random.integers(0, len(MODELS), rows),
        )
        ids = np.arange(self._next_id, self._next_id + rows)
        self._next_id += rows
        self._write(b"CCCCCCCC", numbers.customer)
        self._write(b"IIIIIIIIIIII", ids)
        self._write(b"TTTT", numbers.tokens)
        self._write(b"LLLL", LATENCY_MIN_MS + numbers.tokens % 1000)
        self._write(b"KKKK", numbers.cost)
        place = _LINE.index(b"MMMMMMMMMMMM")
        self._lines[:, place : place + 12] = self._models[numbers.model]
        return b'{"events":[' + self._lines.tobytes()[:-1] + b"]}", numbers

    def _write(self, slot: bytes, values: np.ndarray) -> None:
        """Four digits at a time, from a table of all of them."""
        place = _LINE.index(slot)
        for end in range(place + len(slot), place, -4):
            self._lines[:, end - 4 : end] = _FOUR_DIGITS[values % 10_000]
            values = values // 10_000


@dataclass
class Numbers:
    """The numbers of one body, a row an event."""

    customer: np.ndarray
    tokens: np.ndarray
    cost: np.ndarray
    model: np.ndarray

    def add_to(self, ledger: Ledger) -> None:
        """Book the body as acknowledged."""
        ledger.requests += 1
        ledger.events += len(self.tokens)
        ledger.tokens += int(self.tokens.sum()) + 10_000 * len(self.tokens)
        ledger.cost_units += int(self.cost.sum()) + 10_000 * len(self.cost)
        by_model = np.bincount(self.model, self.tokens + 10_000, len(MODELS))
        ledger.model_tokens += by_model.astype(np.int64)
        ledger.latency_counts += np.bincount(self.tokens % 1000, minlength=1000)


async def send(
    host: str,
    port: int,
    token: str,
    bodies: Bodies,
    *,
    seconds: float,
    rate: float | None,
    connections: int = 16,
    prepared: int = 0,
) -> Ledger:
    """Send for so many seconds, at ``rate`` events a second (None: as fast as answers come). Bounded by itself.

    With a rate, a request's latency counts from when it was due, though it may have had to wait for its turn.
    So many bodies are ``prepared`` before the clock starts, because in life the senders are other machines.
    """
    ledger = Ledger()
    ready = [bodies.make() for _ in range(prepared)]
    ready.reverse()
    acknowledged: list[Numbers] = []
    ledger.began_s, cpu_s = time.monotonic(), time.process_time()
    began = last = time.perf_counter()
    sent = 0

    async def connection() -> None:
        nonlocal sent, last
        transport, protocol = await asyncio.get_running_loop().create_connection(lambda: _Answers(token), host, port)
        try:
            while time.perf_counter() - began < seconds:
                body, numbers = ready.pop() if ready else bodies.make()
                due = began + sent * len(numbers.tokens) / rate if rate else 0.0
                sent += 1
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                posted = time.perf_counter()
                if await protocol.post(body) == b"200":
                    acknowledged.append(numbers)
                    now = time.perf_counter()
                    ledger.latencies_s.append(now - (due if rate else posted))
                    ledger.stall_s, last = max(ledger.stall_s, now - last), now
                else:
                    ledger.refused += 1
                    await asyncio.sleep(0.05)  # a full server says when to come back; the load must not spin on it
        finally:
            transport.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(connection())
    ledger.cpu_s = time.process_time() - cpu_s
    for numbers in acknowledged:
        numbers.add_to(ledger)
    return ledger


class _Answers(asyncio.Protocol):
    """The least that a client can be, because it shares the machine with what is measured."""

    def __init__(self, token: str) -> None:
        self._head = (
            b"POST /v1/events/ingest HTTP/1.1\r\nhost: load\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %s\r\ncontent-length: " % token.encode()
        )
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what to write to."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's transports have another family

    def data_received(self, data: bytes) -> None:
        """Wait for the whole answer; its status is all that counts."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            self._received = b""
            if self._answer is not None and not self._answer.done():
                self._answer.set_result(head.split(b" ", 2)[1])

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody will answer."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server closed the connection"))

    async def post(self, body: bytes) -> bytes:
        """Send a body; the status of the answer. Raises OSError."""
        self._answer = self._loop.create_future()
        self._transport.writelines((self._head, b"%d\r\n\r\n" % len(body), body))
        return await self._answer
