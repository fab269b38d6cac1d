"""I6: what Polar was given is what it was to get, and the forwarder's books say the same.

One event in two hundred is forwarded, which a filter decides; the sender's own books say which those are.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aggregator.forward.state import State
from tests.faults.soak.polar import Polar
from tests.faults.soak.tally import ACKNOWLEDGED, Says, Tally, forwarded, says
from tests.support.waiting import eventually

SHOWN_MAX = 5  # ids in a complaint
LOOK_AGAIN_S = 0.2
PATIENCE_S = 180.0

Books = Mapping[str, Mapping[str, int]]


class Forwarding:
    """The stand-in for Polar beside the sender's books, and the file of the forwarder's."""

    def __init__(self, polar: Polar, tally: Tally, state: Path) -> None:
        self._polar, self._tally, self._state = polar, tally, state
        self._numbers = forwarded(len(tally.states))

    def expected(self) -> dict[str, Says]:
        """What is to come of everything that is acknowledged by now."""
        return says(self._numbers[self._tally.states[self._numbers] == ACKNOWLEDGED])

    def recover(self) -> float:
        """Seconds until Polar has all of that. Fails after a while."""
        began_s, expected = time.monotonic(), self.expected().keys()
        eventually(lambda: not self._polar.lacks(expected), PATIENCE_S, LOOK_AGAIN_S)
        return time.monotonic() - began_s

    def settle(self) -> tuple[dict[str, Any], list[str]]:
        """Figures and what is wrong, once everything was acknowledged and should have come."""
        expected, began_s = self.expected(), time.monotonic()
        try:
            self.recover()
            eventually(lambda: self._books()["raw"].get("accepted", 0) >= len(expected), PATIENCE_S, LOOK_AGAIN_S)
        except AssertionError:
            pass  # what is missing is told with the rest
        figures = {"forwarded": self._polar.inserted, "forwarded again": self._polar.sent - self._polar.inserted}
        figures["behind s"] = round(time.monotonic() - began_s, 1)
        told = books_differ(self._books(), len(expected), self._polar.inserted)
        return figures, differences(expected, *self._polar.taken()) + told

    def _books(self) -> dict[str, dict[str, int]]:
        state = State(self._state)
        try:
            waiting, _ = state.waiting()
            return {"raw": {}, "": {}} | state.tallies() | {"waiting": {"": waiting}}
        finally:
            state.close()


def differences(expected: Mapping[str, Says], taken: Mapping[str, Says], changed: set[str]) -> list[str]:
    """In words: events that are lost, made up, or say something else than what was sent to be forwarded."""
    other = {id for id in expected.keys() & taken.keys() if expected[id] != taken[id]}
    found = {"are lost": expected.keys() - taken.keys(), "were made up": taken.keys() - expected.keys(),
             "say something else": changed | other}  # fmt: skip
    return [f"I6: {len(ids)} events {what}: {sorted(ids)[:SHOWN_MAX]}" for what, ids in found.items() if ids]


def books_differ(books: Books, expected: int, inserted: int) -> list[str]:
    """In words: what the forwarder booked otherwise. Answers that were lost never said how much was new."""
    raw, answered = books["raw"], books[""]
    claims = {
        "inserted there, and to be forwarded": (inserted, expected),
        "accepted, and to be forwarded": (raw.get("accepted", 0), expected),
        "taken from the feed, and to be forwarded": (raw.get("taken", 0), expected),
        "new and repeated by the answers, and accepted": (
            answered.get("inserted", 0) + answered.get("duplicates", 0), raw.get("accepted", 0)
        ),
        "refused, and none": (raw.get("dead", 0), 0),
        "waiting, and none": (books["waiting"][""], 0),
    }  # fmt: skip
    return [f"I6: {claim}: {one} and {other}" for claim, (one, other) in claims.items() if one != other]
