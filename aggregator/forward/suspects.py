"""Tells an event that Polar cannot take from a Polar that is away. Pure: no clock, no files, no network.

Both give a server's error (5xx). What tells them apart is the request after it: an event is at fault if it fails alone
and Polar takes the next request, again and again. While Polar is away the next request fails, too, so however long that
lasts, it says nothing against anybody.
"""

from collections.abc import Collection, Set

STRIKES_MAX = 5  # each needs a minute and another request that passes: what passes by itself is over by then
PAUSE_US = 60_000_000  # between two tries of an event that failed alone, while the others go on
FAULTS_UNTIL_CUT = 3  # failures in a row, three seconds: hiccups are over, and the circuit is not open yet


class Suspects:
    """Strikes against events, by external id. Kept in memory: a restart begins to count again."""

    def __init__(self) -> None:
        self._strikes: dict[str, int] = {}
        self._latest: str | None = None

    @property
    def struck(self) -> Set[str]:
        """The events with a strike or more: they are sent alone."""
        return self._strikes.keys()

    @property
    def is_open(self) -> bool:
        """Whether the next request decides if the last failure is a strike."""
        return self._latest is not None

    def failed(self, external_id: str) -> bool:
        """It failed alone. Whether it did so once too often."""
        self._latest = None
        if self._strikes.get(external_id, 0) >= STRIKES_MAX:
            del self._strikes[external_id]
            return True
        self._latest = external_id
        return False

    def others_failed(self) -> None:
        """A request failed: what failed before it may be Polar's fault."""
        self._latest = None

    def accepted(self, external_ids: Collection[str]) -> None:
        """These were taken: nothing is held against them any more, and the one that failed before them has a strike."""
        if self._latest is not None and self._latest not in external_ids:
            self._strikes[self._latest] = self._strikes.get(self._latest, 0) + 1
        self._latest = None
        for external_id in self._strikes.keys() & set(external_ids):
            del self._strikes[external_id]
