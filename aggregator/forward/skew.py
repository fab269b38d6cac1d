"""How far Polar's clock is taken to be behind ours. Pure: no clock, no files, no network.

Nothing tells the time over there but that it calls an event's time the future, so the assumption grows while it does,
and is halved whenever it has not for a while. Where Polar's clock stays behind, that costs a refused request now and
then; where it was mended, no event waits any longer for nothing.
"""

SKEW_FIRST_US = 2_000_000  # assumed when Polar first calls an event's time the future
SKEW_MAX_US = 600_000_000  # no honest clock is ten minutes behind; what it refuses then is the event's own fault
EASE_US = 300_000_000  # without a refusal, until less is assumed


class Skew:
    """See the module."""

    def __init__(self) -> None:
        self._us, self._changed_us = 0, 0

    def at(self, now_us: int) -> int:
        """What is assumed now, in microseconds."""
        self._changed_us = min(self._changed_us, now_us)  # a clock that was set back makes nobody wait for the old time
        while self._us and now_us - self._changed_us >= EASE_US:
            self._us = self._us // 2 if self._us > SKEW_FIRST_US else 0
            self._changed_us += EASE_US
        return self._us

    def grow(self, now_us: int) -> int:
        """Polar called an event's time the future: take its clock to be further behind; what is assumed from now on."""
        self._us = min(max(SKEW_FIRST_US, 2 * self.at(now_us)), SKEW_MAX_US)
        self._changed_us = now_us
        return self._us
