"""What the gateway remembers of the events it has just acknowledged.

A courtesy to clients that repeat a request: the answer can say "duplicate" and, where the bytes differ, "conflict".
It is a memory of this process alone, limited in size, keyed by 64 bits, and two requests under way at the same time do
not see each other. Nothing is decided here: every event goes to the log whatever this says, and the store, which
knows every identity there ever was, counts each once.
"""

from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum

from xxhash import xxh3_64_intdigest

GENERATION_MAX = 100_000
"""Identities in one of the two generations, some 20 MB each. A client repeats within seconds, and the younger
generation alone holds five seconds of 20,000 events a second."""


class Verdict(StrEnum):
    """What became of one event of a request. All but ``rejected`` are in the log."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # its external id came before, with the same bytes
    CONFLICT = "conflict"  # its external id came before, with other bytes
    REJECTED = "rejected"


class Fingerprints:
    """Events of an organization as two numbers each: who it is, and what it says."""

    def __init__(self, organization_id: str, external_ids: Iterable[str], lines: Iterable[bytes]) -> None:
        self.organization_id = organization_id
        self.keys = list(map(hash, external_ids))
        self.different = set(self.keys)
        self.contents = list(map(xxh3_64_intdigest, lines))


Contents = dict[int, int]  # by identity


class RecentIdentities:
    """Identity to content, for the last 100,000 to 200,000 identities that were acknowledged."""

    def __init__(self, generation_max: int = GENERATION_MAX) -> None:
        self._generation_max = generation_max
        self._young: defaultdict[str, Contents] = defaultdict(dict)  # by organization
        self._old: dict[str, Contents] = {}
        self._young_count = 0

    def judge(self, events: Fingerprints) -> list[Verdict] | None:
        """A verdict for each event in order; None where every one of them is new, as nearly always."""
        old, young = self._old.get(events.organization_id, {}), self._young.get(events.organization_id, {})
        if _all_new(events, young) and old.keys().isdisjoint(events.different):
            return None
        verdicts = []
        first: Contents = {}
        for key, content in zip(events.keys, events.contents, strict=True):
            before = old.get(key, young.get(key, first.get(key)))
            first.setdefault(key, content)
            if before is None:
                verdicts.append(Verdict.ACCEPTED)
            else:
                verdicts.append(Verdict.DUPLICATE if before == content else Verdict.CONFLICT)
        return verdicts

    def remember(self, events: Fingerprints) -> None:
        """Take in events whose append is durable. The first content of an identity stays."""
        if self._young_count + len(events.keys) > self._generation_max:
            self._old, self._young, self._young_count = self._young, defaultdict(dict), 0
        young = self._young[events.organization_id]
        self._young_count -= len(young)
        pairs = zip(events.keys, events.contents, strict=True)
        if _all_new(events, young):
            young.update(pairs)
        else:
            for key, content in pairs:
                young.setdefault(key, content)
        self._young_count += len(young)


def _all_new(events: Fingerprints, known: Contents) -> bool:
    return len(events.different) == len(events.keys) and known.keys().isdisjoint(events.different)
