"""What the gateway remembers of the events it has just acknowledged.

A courtesy to clients that repeat a request: the answer can say "duplicate" and, where the bytes differ, "conflict".
It is a memory of this process alone, limited in size, keyed by 64 bits, and two requests under way at the same time do
not see each other. Nothing is decided here: every event goes to the log whatever this says, and the store, which
knows every identity there ever was, counts each once.
"""

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
    """Events as two numbers each: who it is, and what it says."""

    def __init__(self, organization_id: str, external_ids: Iterable[str], lines: Iterable[bytes]) -> None:
        tenant = hash(organization_id)
        self.keys = [tenant ^ known for known in map(hash, external_ids)]
        self.contents = list(map(xxh3_64_intdigest, lines))


class RecentIdentities:
    """Identity to content, for the last 100,000 to 200,000 identities that were acknowledged."""

    def __init__(self, generation_max: int = GENERATION_MAX) -> None:
        self._generation_max = generation_max
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def judge(self, events: Fingerprints) -> list[Verdict] | None:
        """A verdict for each event in order; None where every one of them is new, as nearly always."""
        keys = set(events.keys)
        if len(keys) == len(events.keys) and self._young.keys().isdisjoint(keys) and self._old.keys().isdisjoint(keys):
            return None
        verdicts = []
        first: dict[int, int] = {}
        for key, content in zip(events.keys, events.contents, strict=True):
            known = self._content(key)
            before = first.get(key) if known is None else known
            first.setdefault(key, content)
            if before is None:
                verdicts.append(Verdict.ACCEPTED)
            else:
                verdicts.append(Verdict.DUPLICATE if before == content else Verdict.CONFLICT)
        return verdicts

    def remember(self, events: Fingerprints) -> None:
        """Take in events whose append is durable. The first content of an identity stays."""
        if len(self._young) + len(events.keys) > self._generation_max:
            self._old, self._young = self._young, {}
        for key, content in zip(events.keys, events.contents, strict=True):
            self._young.setdefault(key, content)

    def _content(self, key: int) -> int | None:
        found = self._old.get(key)
        return self._young.get(key) if found is None else found
