"""When to send again after the server could not take something: the whole client slows down together.

The pause doubles with every failed try, is drawn at random so that a thousand clients do not come back at once, and
is never shorter than what the server asked for. While it does not work, one request at a time asks whether it does.
"""

import random

from ingest.client.limits import Limits

_DOUBLINGS_MAX = 16  # beyond any longest pause; keeps the power small


class Pace:
    """Not for several threads at once: the outbox's lock guards it. Times are seconds of a monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.failures = 0
        self.until_s = 0.0

    def worked(self) -> None:
        """The server took something."""
        self.failures, self.until_s = 0, 0.0

    def failed(self, now_s: float, retry_after_s: float | None = None) -> None:
        """The server could not be reached, or asked to wait. Requests that failed together count once."""
        if now_s >= self.until_s:
            self.failures += 1
        wished_s = min(retry_after_s or 0.0, self._limits.retry_after_s_max)
        pause_s = max(self.backoff_s(self.failures), wished_s * random.uniform(1.0, 1.1))  # noqa: S311 (clients that failed together do not come back together)
        self.until_s = max(self.until_s, now_s + pause_s)

    def backoff_s(self, failures: int) -> float:
        """A pause after so many failures."""
        longest_s = min(self._limits.backoff_s_max, self._limits.backoff_s * 2 ** min(failures - 1, _DOUBLINGS_MAX))
        return random.uniform(longest_s / 2, longest_s)  # noqa: S311

    def allows(self, now_s: float, in_flight: int) -> bool:
        """Whether a request may start."""
        return now_s >= self.until_s and (self.failures == 0 or in_flight == 0)
