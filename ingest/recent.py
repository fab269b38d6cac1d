"""What the gateway remembers of the events it has just acknowledged.

A courtesy to clients that repeat a request: the answer can say "duplicate" and, where the bytes differ, "conflict".
It is a memory of this process alone, limited in size and keyed by 64 bits. Nothing is decided here: every event goes to
the log whatever this says, and the store, which knows every identity there ever was, counts each once.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

GENERATION_MAX = 100_000
"""Identities in one of the two generations, some 20 MB each. A client repeats within seconds, and the younger
generation alone holds five seconds of 20,000 events a second."""


SEED = int.from_bytes(os.urandom(8))
"""Of the hashes of external ids, another one in each process: nobody can choose ids that fall on each other."""


class Verdict(StrEnum):
    """What became of one event of a request. All but ``rejected`` are in the log."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # its external id came before, with the same bytes
    CONFLICT = "conflict"  # its external id came before, with other bytes
    REJECTED = "rejected"


class Fingerprints(NamedTuple):
    """Events of an organization as two numbers each: who it is, and what it says."""

    organization_id: str
    keys: list[int]
    contents: list[int]

    @classmethod
    def of(cls, organization_id: str, external_ids: Iterable[str], lines: Iterable[bytes]) -> "Fingerprints":
        """Those that ``ingest.kernels`` makes, too."""
        keys = [xxh3_64_intdigest(external_id.encode(), SEED) for external_id in external_ids]
        return cls(organization_id, keys, list(map(xxh3_64_intdigest, lines)))


Contents = dict[int, int]  # by identity


class RecentIdentities:
    """Identity to content, for the last 100,000 to 200,000 identities that were acknowledged."""

    def __init__(self, generation_max: int = GENERATION_MAX) -> None:
        self._generation_max = generation_max
        self._young: defaultdict[str, Contents] = defaultdict(dict)  # by organization
        self._old: dict[str, Contents] = {}
        self._young_count = 0

    def take(self, events: Fingerprints) -> list[Verdict] | None:
        """Remember events whose append is durable, and judge them; None where every one is new, as nearly always.

        Of two requests with the same event, the one whose append ended first has the new one.
        """
        old, young = self._old.get(events.organization_id, {}), self._young[events.organization_id]
        known = len(young)
        verdicts = None if _are_new(events, old, young) else _verdicts(events, old, young)
        self._young_count += len(young) - known
        if self._young_count >= self._generation_max:
            self._old, self._young, self._young_count = self._young, defaultdict(dict), 0
        return verdicts


def _are_new(events: Fingerprints, old: Contents, young: Contents) -> bool:
    """Put all of them into ``young`` where each is new, by looking each up once there; else none."""
    if not (young.keys().isdisjoint(events.keys) and old.keys().isdisjoint(events.keys)):
        return False
    known = len(young)
    young.update(zip(events.keys, events.contents, strict=True))
    if len(young) == known + len(events.keys):
        return True
    for key in set(events.keys):  # one of them is there twice
        del young[key]
    return False


def _verdicts(events: Fingerprints, old: Contents, young: Contents) -> list[Verdict]:
    """What became of each. The first content of an identity stays."""
    verdicts = []
    for key, content in zip(events.keys, events.contents, strict=True):
        before = old.get(key, young.get(key))
        young.setdefault(key, content if before is None else before)
        if before is None:
            verdicts.append(Verdict.ACCEPTED)
        else:
            verdicts.append(Verdict.DUPLICATE if before == content else Verdict.CONFLICT)
    return verdicts
