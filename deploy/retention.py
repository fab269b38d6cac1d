"""How long the log keeps records, where an operator sets a bound.

By default it keeps all, so that the store can be made again from the first event on. With a bound, records older than
so many days go, but never one that the store has not read: what was acknowledged is counted first, however long that
takes. The numbers in the store stay. A store made again later only has what the log still holds, so ``meterstream
rebuild`` then refuses.
"""

from collections.abc import Callable, Mapping

import structlog

from meters.log import USAGE_EVENTS, Log, TryAgain

DAY_US = 24 * 60 * 60 * 1_000_000

logger = structlog.get_logger("deploy")


def trimming(log: Log, days: int, clock_us: Callable[[], int]) -> Callable[[Mapping[int, int]], None]:
    """What to do now and then, given the positions up to which everything is in the store."""

    def trim(as_of: Mapping[int, int]) -> None:
        oldest_kept_us = clock_us() - days * DAY_US
        try:
            for place in as_of.items():  # one by one: a read of all ends at the first record, whosever it is
                unread = log.read(USAGE_EVENTS, dict([place]), bytes_max=1)
                if any(record.timestamp_us < oldest_kept_us for record in unread):
                    return  # the store is that far behind: it reads first
            removed = log.trim(USAGE_EVENTS, oldest_kept_us)
        except TryAgain as error:
            logger.warning("log_not_trimmed", reason=str(error))
            return
        if removed:
            logger.info("log_trimmed", records=removed, days=days)

    return trim
