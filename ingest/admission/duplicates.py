"""Recent identities: recognize events that this process has just acknowledged.

``RecentIdentities`` returns a ``Verdict`` for each event, so that the answer to a repeated request can say
"duplicate" or, if the bytes differ, "known". Other bytes may say the same (keys in another order, another spelling of a
time), and only a hash of the first bytes is kept here: the store decides whether it is a conflict. The memory belongs
to one process, is bounded, and is keyed by 64-bit hashes (``Fingerprints``). The verdict is information only: every
event goes to the log, and the store, which knows every identity, counts each event once.
"""

import os
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple, Protocol

from xxhash import xxh3_64_intdigest

GENERATION_MAX = 100_000
"""Identities in one of the two generations, some 20 MB each, or 4 MB in a table of compiled loops. A client repeats
within seconds, and the younger generation alone holds five seconds of 20,000 events a second."""


class Verdict(StrEnum):
    """What became of one event of a request. All but ``rejected`` are in the log."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # its external id came before, with the same bytes
    KNOWN = "known"  # its external id came before, with other bytes; the store compares what they say
    REJECTED = "rejected"


AT_ONCE_MAX = 10_000
"""Events that are remembered before a generation is looked at again: a table has room for so many more."""

_SEED = int.from_bytes(os.urandom(8))  # another one in each process: nobody can choose ids that fall on each other


class Numbers(Protocol):
    """A list of integers, or an array of compiled loops."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, rows: slice, /) -> "Numbers":
        """Some of them."""

    def __iter__(self) -> Iterator[int]:
        """Each."""


class Fingerprints(NamedTuple):
    """Events as two 64-bit numbers each:

    who it is, of whom, and what it says. ``ingest.admission.kernels`` makes them, too.
    """

    keys: Numbers
    contents: Numbers

    @classmethod
    def of(cls, organization_id: str, external_ids: Iterable[str], lines: Iterable[bytes]) -> "Fingerprints":
        """Of an organization's events, by their external ids and lines."""
        seed = seed_of(organization_id)
        keys = [xxh3_64_intdigest(external_id.encode(), seed) for external_id in external_ids]
        return cls(keys, list(map(xxh3_64_intdigest, lines)))

    def some(self, rows: slice) -> "Fingerprints":
        """Those of some of the events."""
        return Fingerprints(self.keys[rows], self.contents[rows])


def seed_of(organization_id: str) -> int:
    """Of the hashes of an organization's external ids."""
    return xxh3_64_intdigest(organization_id.encode(), _SEED)


class Generations:
    """The content that each identity came with first, in two generations, as dictionaries.

    A table of compiled loops (``ingest.kernels.Table``) takes a fifth of the memory and a tenth of the time. A server
    needs this class before it has loaded the loops, and where it cannot.
    """

    def __init__(self) -> None:
        self.young: dict[int, int] = {}
        self.old: dict[int, int] = {}

    @property
    def count(self) -> int:
        """Identities in the younger generation."""
        return len(self.young)

    def remember(self, keys: Numbers, contents: Numbers) -> list[int | None] | None:
        """Put events into the younger generation. For each the content it was known with; None if all are new."""
        known = [self._remember(key, content) for key, content in zip(keys, contents, strict=True)]
        return known if known.count(None) < len(known) else None

    def _remember(self, key: int, content: int) -> int | None:
        known = self.old.get(key, self.young.get(key))
        self.young.setdefault(key, content if known is None else known)
        return known

    def age(self) -> None:
        """Forget the older generation; the younger one becomes it."""
        self.old, self.young = self.young, {}


class Loops(Protocol):
    """What may have compiled loops: ``ingest.quick.Quick``."""

    def table(self, generation_max: int) -> Generations | None:
        """Generations in a table, once loops are loaded."""


class RecentIdentities:
    """Identity to content, for the last 100,000 to 200,000 identities that were acknowledged."""

    def __init__(self, generation_max: int = GENERATION_MAX, loops: Loops | None = None) -> None:
        """``loops`` are asked for a table until they have one."""
        self._generation_max, self._loops = generation_max, loops
        self._generations = Generations()

    def take(self, events: Fingerprints) -> list[Verdict] | None:
        """Remember events whose append is durable, and judge them; None where every one is new, as nearly always.

        Of two requests with the same event, the one whose append ended first has the new one.
        """
        if self._loops is not None and (table := self._loops.table(self._generation_max)) is not None:
            self._move_to(table)
        known = self._remember(events)
        return None if known is None else list(map(_verdict, known, events.contents))

    def _remember(self, events: Fingerprints) -> list[int | None] | None:
        """For each event the content it was known with; None if all are new."""
        count = len(events.keys)
        if count > AT_ONCE_MAX:
            parts = [events.some(slice(begin, begin + AT_ONCE_MAX)) for begin in range(0, count, AT_ONCE_MAX)]
            known = [first for part in parts for first in self._remember(part) or [None] * len(part.keys)]
            return known if known.count(None) < count else None
        found = self._generations.remember(events.keys, events.contents)
        if self._generations.count >= self._generation_max:
            self._generations.age()
        return found

    def _move_to(self, table: Generations) -> None:
        before, self._generations, self._loops = self._generations, table, None
        for known in (before.old, before.young):
            self.take(Fingerprints(list(known), list(known.values())))


def _verdict(known: int | None, content: int) -> Verdict:
    """What became of an event that was known with a content, or not known."""
    if known is None:
        return Verdict.ACCEPTED
    return Verdict.DUPLICATE if known == content else Verdict.KNOWN
