"""What the sender was told, kept apart from everything that is tested: two mapped files, for several processes.

An event is its number: customer, tokens and cost are functions of it, so the numbers that were stored say what every
meter must show, to the last decimal, and a repetition is the same bytes again.
"""

from decimal import Decimal
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
CUSTOMERS = 10_000
SENT, ACKNOWLEDGED = 1, 2  # states of a number; 0 was never sent
PARTITIONS_MAX = 64
AT_ONCE = 1_000_000  # numbers looked at
FORWARDED_TOKENS = 50  # of ten thousand: no Polar takes as many events as a soak sends
FORWARDED = (
    '{"conjunction":"and","clauses":'
    f'[{{"property":"tokens","operator":"lt","value":{10_000 + FORWARDED_TOKENS}}}]}}'
)
_MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads neighbors over everything
_LINE = (
    b'{"name":"call","external_customer_id":"customer-CCCC","external_id":"soak-IIIIIIIIIIII",'
    b'"timestamp":"2026-03-01THH:00:00Z","metadata":{"tokens":1TTTT,"_cost":{"amount":1.KKKK,"currency":"usd"}}}'
)
_DIGITS = np.array([list(b"%04d" % number) for number in range(10_000)], np.uint8)


class Content(NamedTuple):
    """What some events say. Tokens are 10,000 more than this; a cost is 1 and so many ten-thousandths."""

    customer: Numbers
    tokens: Numbers
    cost: Numbers
    hour: Numbers


def content(numbers: Numbers) -> Content:
    """The content of events, by their numbers."""
    mixed = numbers.astype(np.uint64) * _MIXER
    sizes = ((50, 10_000), (36, 10_000), (22, 10_000), (8, 24))
    parts = [(mixed >> np.uint64(shift)) % np.uint64(size) for shift, size in sizes]
    return Content(*(part.astype(np.int64) for part in parts))


class Says(NamedTuple):
    """What an event says, as another one reads it."""

    customer: str
    tokens: int
    cost: Decimal


def forwarded(count: int) -> Numbers:
    """Those of the first numbers that FORWARDED lets through."""
    few = []
    for first in range(0, count, AT_ONCE):
        numbers = np.arange(first, min(first + AT_ONCE, count))
        few.append(numbers[content(numbers).tokens < FORWARDED_TOKENS])
    return np.concatenate(few)


def says(numbers: Numbers) -> dict[str, Says]:
    """Events by their ids."""
    rows = zip(numbers.tolist(), *(column.tolist() for column in content(numbers)), strict=True)
    return {
        f"soak-{number:012d}": Says(f"customer-{customer:04d}", 10_000 + tokens, Decimal(10_000 + cost).scaleb(-4))
        for number, customer, tokens, cost, _ in rows
    }


def body(numbers: Numbers) -> bytes:
    """A request with these events."""
    lines = np.tile(np.frombuffer(_LINE + b",", np.uint8), (len(numbers), 1))
    *fours, hour = content(numbers)
    for slot, values in zip((b"CCCC", b"TTTT", b"KKKK"), fours, strict=True):
        _write(lines, slot, values)
    place = _LINE.index(b"HH")
    lines[:, place : place + 2] = _DIGITS[hour, 2:]
    _write(lines, b"IIIIIIIIIIII", numbers)
    return b'{"events":[' + lines.tobytes()[:-1] + b"]}"


def _write(lines: npt.NDArray[np.uint8], slot: bytes, values: Numbers) -> None:
    place = _LINE.index(slot)
    for end in range(place + len(slot), place, -4):
        lines[:, end - 4 : end] = _DIGITS[values % 10_000]
        values = values // 10_000


class Expected(NamedTuple):
    """What the meters must show."""

    calls: Decimal
    tokens: Decimal
    cost: Decimal


def expected(numbers: Numbers) -> Expected:
    """The exact totals over events, each counted once."""
    found = content(numbers)
    count = len(numbers)
    cost = Decimal(int(found.cost.sum()) + 10_000 * count).scaleb(-4)
    return Expected(Decimal(count), Decimal(int(found.tokens.sum()) + 10_000 * count), cost)


class Count(IntEnum):
    """Places in ``Tally.counts``. The last two are the sender's orders."""

    SENT_LINES = 0
    ACKNOWLEDGED_LINES = 1
    REQUESTS = 2
    REFUSED = 3  # answers 503
    LIMITED = 4  # answers 429
    CUT = 5  # requests without an answer
    NEXT = 6  # the next number that was never sent
    WRONG = 7  # answers that nobody may get
    RATE = 8  # lines a second; 0 ends the sender, once everything is acknowledged
    NEW_PER_MILLE = 9  # of the bodies: numbers that were never sent, as long as there are any


class Tally:
    """The state of every number, counts, and the log position of the acknowledged, by partition."""

    def __init__(self, directory: Path, numbers_max: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.states = _mapped(directory / "states", np.uint8, numbers_max)
        self.counts = _mapped(directory / "counts", np.int64, len(Count))
        self.positions = _mapped(directory / "positions", np.int64, PARTITIONS_MAX)

    @property
    def acknowledged(self) -> int:
        """How many numbers were acknowledged."""
        return int(np.count_nonzero(self.states[: self.counts[Count.NEXT]] == ACKNOWLEDGED))

    @property
    def sent(self) -> int:
        """How many numbers were sent, acknowledged or not."""
        return int(np.count_nonzero(self.states[: self.counts[Count.NEXT]]))

    @property
    def log_position(self) -> dict[int, int]:
        """Behind everything acknowledged so far."""
        return {partition: int(end) for partition, end in enumerate(self.positions) if end}


def _mapped(path: Path, kind: type, length: int) -> "np.memmap[tuple[int], np.dtype[np.generic]]":
    return np.memmap(path, dtype=kind, mode="r+" if path.exists() else "w+", shape=(length,))
