"""Which fault comes when: a function of the seed and of nothing else, so that a failure can be had again.

Faults are dealt from shuffled decks that hold each kind once, so every kind comes soon and often. Between two faults
is a pause, counted from the recovery of the first. In the last stretch of a run nobody is killed, because memory can
only be judged in processes that live for a while.
"""

import itertools
import random
from collections.abc import Collection, Iterator
from typing import NamedTuple

ENDING = ("kill gateway", "kill aggregator", "kill forwarder", "kill server", "end server")
"""What ends a process. One of each in a deck stays below the crashes after which a supervisor rightly gives up."""

DISK = ("fill disk", "freeze disk")
"""What needs a disk of its own."""

BROKER = ("kill broker", "pause broker")
"""What needs a broker."""

OTHERS = (
    "pause gateway", "pause aggregator", "pause forwarder", "step clock", "write poison", "slow clients", "long heads",
    "garbage", "bombs", "bad bodies", "flood",
)
PAUSE_S = (0.3, 3.0)
CALM_SHARE = 0.4  # of a run, at its end: without kinds that end a process


class Fault(NamedTuple):
    """What happens, after which pause, and a number from 0 to 1 that says how hard."""

    kind: str
    pause_s: float
    strength: float


def faults(seed: int, kinds: Collection[str]) -> Iterator[Fault]:
    """The faults of a seed, without an end."""
    choose = random.Random(seed)
    for round_ in itertools.count():
        deck = sorted(kinds)
        choose.shuffle(deck)
        if round_ == 0:  # a short run has a short storm, in which what ends a process has to come
            deck.sort(key=lambda kind: kind not in ENDING)
        for kind in deck:
            yield Fault(kind, choose.uniform(*PAUSE_S), choose.random())
