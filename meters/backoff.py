"""Exponential backoff with jitter, and the ``Retry-After`` header. The clock and the random number are arguments.

The client library has these rules of its own (``ingest/client/outbox.py``, ``ingest/client/transport.py``), because it
depends on no package of the server; ``tests/contracts/test_senders.py`` compares the two.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

RETRY_AFTER_S_MAX = 600.0  # a longer wait is a mistake at the other end; asking again costs one request
_DOUBLINGS_MAX = 16  # beyond any longest pause; keeps the power small


class Backoff(NamedTuple):
    """Pauses between attempts: ``first_s`` after the first failure, twice as long after each further one.

    ``jitter`` are the shares of that pause between which a pause is drawn, so that senders that failed together do not
    come back together.
    """

    first_s: float
    longest_s: float
    jitter: tuple[float, float] = (0.5, 1.0)

    def pause_s(self, failures: int, draw: float) -> float:
        """Return the pause after this many failures in a row (at least 1); ``draw`` is a random number of [0, 1)."""
        longest_s = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, _DOUBLINGS_MAX))
        least, most = self.jitter
        return longest_s * (least + draw * (most - least))


def retry_after_s(header: str | None, now_us: int) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, at most RETRY_AFTER_S_MAX.

    The header is a number of seconds or a date (RFC 9110, 10.2.3); the answer is None where it is neither.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return min(int(text[:9]), RETRY_AFTER_S_MAX)
    try:
        instant = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    aware = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    seconds = (aware - datetime.fromtimestamp(now_us / 1e6, UTC)).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_S_MAX)
