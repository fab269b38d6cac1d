"""Recent identities: recognize events that this process has just acknowledged.

``RecentIdentities`` returns a ``Verdict`` for each event, so that the answer to a repeated request can say
"duplicate" or, if the bytes differ, "conflict". The memory belongs to one process, is bounded, and is keyed by 64-bit
hashes (``Fingerprints``). The verdict is information only: every event goes to the log, and the store, which knows
every identity, counts each event once.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

GENERATION_MAX = 100_000
"""Identities in one of the two generations, some 20 MB each, or 4 MB in a table of compiled loops. A client repeats
within seconds, and the younger generation alone holds five seconds of 20,000 events a second."""


class Verdict(StrEnum):
    """What became of one event of a request. All but ``rejected`` are in the log."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # its external id came before, with the same bytes
    CONFLICT = "conflict"  # its external id came before, with other bytes
    REJECTED = "rejected"


_BY_CODE = (Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.CONFLICT)  # as compiled loops say it
_SEED = int.from_bytes(os.urandom(8))  # another one in each process: nobody can choose ids that fall on each other


class Fingerprints(NamedTuple):
    """Events as two 64-bit numbers each:

    who it is, of whom, and what it says. ``ingest.admission.kernels`` makes them, too.
    """

    keys: Sequence[int]
    contents: Sequence[int]

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


Contents = dict[int, int]  # by identity


class RecentIdentities:
    """Identity to content, for the last 100,000 to 200,000 identities that were acknowledged."""

    def __init__(self, generation_max: int = GENERATION_MAX, table: Callable[[int], Any] = lambda _: None) -> None:
        """``table`` makes ``ingest.admission.kernels.Table`` for so many identities, when it can;

        it is asked until then.
        """
        self._generation_max, self._make_table = generation_max, table
        self._young: Contents = {}
        self._old: Contents = {}
        self._table: Any = None

    def take(self, events: Fingerprints) -> list[Verdict] | None:
        """Remember events whose append is durable, and judge them; None where every one is new, as nearly always.

        Of two requests with the same event, the one whose append ended first has the new one.
        """
        if self._table is None and (table := self._make_table(self._generation_max)) is not None:
            for known in (self._old, self._young):
                table.take(list(known), list(known.values()))
            self._table, self._old, self._young = table, {}, {}
        if self._table is not None:
            codes = self._table.take(events.keys, events.contents)
            return None if codes is None else [_BY_CODE[code] for code in codes]
        verdicts = [self._verdict(key, content) for key, content in zip(events.keys, events.contents, strict=True)]
        if len(self._young) >= self._generation_max:
            self._old, self._young = self._young, {}
        return verdicts if any(verdict is not Verdict.ACCEPTED for verdict in verdicts) else None

    def _verdict(self, key: int, content: int) -> Verdict:
        """What became of one. The first content of an identity stays."""
        before = self._old.get(key, self._young.get(key))
        self._young.setdefault(key, content if before is None else before)
        if before is None:
            return Verdict.ACCEPTED
        return Verdict.DUPLICATE if before == content else Verdict.CONFLICT
