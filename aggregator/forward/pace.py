"""How fast: a sliding window of requests, pauses that grow, and what ``Retry-After`` says.

Time and chance are arguments; only ``jitter`` draws.

The window is kept for the receiver, not for us. A request arrives somewhere between its start and the end of its
answer, so it occupies its place from its start until a whole period after its end; then no window of that length, laid
anywhere over the receiver's own times, holds more requests than allowed.
"""

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

REQUESTS_MAX = 300  # a setting: Polar's production allows 500, or 300 by another of its pages, its sandbox 100
PERIOD_S = 60.0  # Polar counts by the minute
PAUSE_MIN_S = 0.5  # after a first failure: most are over by then
PAUSE_MAX_S = 60.0  # an upstream that is away for hours is asked once a minute
RETRY_AFTER_MAX_S = 600.0  # a longer wait is a mistake at the other end; asking again costs one request
FAILURES_UNTIL_OPEN = 5  # in a row; then one small request probes before the batches go on
IN_FLIGHT_POLL_US = 20_000  # how soon to look again when every place is taken by a request still under way


def free_in_us(ended_us: Sequence[int | None], now_us: int, requests_max: int, period_us: int) -> int:
    """Microseconds until another request may begin; 0 for now.

    ``ended_us`` are when earlier requests ended, None for those under way.
    """
    ended = sorted(at for at in ended_us if at is not None and at > now_us - period_us)
    under_way = sum(at is None for at in ended_us)
    surplus = len(ended) + under_way - requests_max + 1
    if surplus <= 0:
        return 0
    if surplus > len(ended):
        return IN_FLIGHT_POLL_US
    return ended[surplus - 1] + period_us - now_us


def retry_after_s(header: str | None, now_us: int) -> float | None:
    """The seconds of a ``Retry-After`` header, in either of its forms (RFC 9110, 10.2.3); None where there is none."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(int(text[:9])), RETRY_AFTER_MAX_S)
    try:
        instant = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    aware = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    seconds = (aware - datetime.fromtimestamp(now_us / 1e6, UTC)).total_seconds()
    return min(max(math.ceil(seconds), 0.0), RETRY_AFTER_MAX_S)


class Circuit(msgspec.Struct):
    """What the last answers say of the upstream: failures in a row, and from when on it may be asked again."""

    failures: int = 0
    open_until_us: int = 0

    def state(self, now_us: int) -> str:
        """closed: batches flow; open: nothing is sent; half-open: the next request is a probe."""
        if self.failures < FAILURES_UNTIL_OPEN:
            return "closed"
        return "open" if now_us < self.open_until_us else "half-open"

    def succeeded(self) -> None:
        """There was an answer that is no failure of the upstream."""
        self.failures, self.open_until_us = 0, 0

    def failed(self, now_us: int, asked_s: float | None, draw: float) -> float:
        """Count a failure; the seconds to wait. ``asked_s`` is the upstream's own wish, ``draw`` of [0, 1) the jitter.

        The pause doubles up to PAUSE_MAX_S and is drawn from its upper half, so that those who failed together do not
        come back together. A wish is kept as it is, plus a little, for the same reason.
        """
        self.failures += 1
        pause_s = pause_after(self.failures, draw) if asked_s is None else asked_s + draw * PAUSE_MIN_S
        self.open_until_us = now_us + int(pause_s * 1e6)
        return pause_s


def pause_after(failures: int, draw: float) -> float:
    """The pause after this many failures in a row (at least 1)."""
    longest = min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0 ** min(failures - 1, 16))
    return longest * (0.5 + draw / 2)


def jitter() -> float:
    """A draw of [0, 1) for whoever has no reason to repeat a run."""
    return random.random()  # noqa: S311 (no secret hangs on it)
