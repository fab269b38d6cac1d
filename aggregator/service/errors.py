"""Errors that queries and decisions raise, and the limits behind them.

The service raises these errors without knowing HTTP; ``aggregator.api.requests`` maps each error to a status. Errors
in ``PASSING`` are temporary, and the caller may retry. Each limit has its reason below it.
"""

from collections.abc import Sequence

from aggregator.view import Unavailable
from meters.errors import Detail, detail
from meters.log import TryAgain

QUERIES_AT_ONCE = 4
"""Store queries that run at the same time. Each uses every thread of DuckDB, so more would only share memory."""

QUERIES_OF_ONE_AT_ONCE = 3
"""Running queries of one organization, one less: an organization with slow queries leaves a thread to the others."""

QUERIES_WAITING_MAX = 30
"""Queries that wait for a thread. At half a second each the last one waits four seconds; more raise Busy. Together with
the requests that wait for a position (WAITS_MAX) they are fewer than a gateway forwards at the same time (64), so short
reads have room."""

QUERIES_OF_ONE_WAITING_MAX = 20
"""Waiting queries of one organization, so that the others find a place in the queue."""

TURN_S_MAX = 10.0
"""Longest wait for a thread; then Busy. Together with QUERY_S_MAX it is shorter than a gateway waits for an answer
(60 s), so no work is done for a request that has timed out."""

QUERY_S_MAX = 30.0
"""Longest run of a query; then TooLong. Polar's statement timeout, and half of the command line's timeout."""

INTERRUPT_AGAIN_S = 0.02
"""How often a query that took too long is interrupted until it ends. Between two statements an interrupt has no
effect."""

WAITS_MAX = 24
"""Requests of all organizations that wait for a log position."""

WAITS_OF_ONE_MAX = 12
"""Such requests of one organization: half, so that another organization may wait, too. What was just written is visible
within a tenth of a second."""

VERIFICATIONS_AT_ONCE = 1
"""Webhook signatures that are verified at the same time: a sender without a secret keeps one thread busy, not more."""

VERIFICATIONS_WAITING_MAX = 64
"""Webhooks that wait for that thread: 32 MiB. More raise Busy, and their sender retries."""

CHANGES_AT_ONCE = 500
"""Changes in one record, where decisions are independent of each other: a few hundred bytes each, far below the log's
limit."""

IN_DOUBT_S = 10.0
"""How long a decision waits to learn whether an uncertain one before it is durable. A restart of the engine takes
less."""

RETRY_AFTER_S = 1
"""When to retry after 503: the queue has moved, or the engine has restarted, in about a second."""

PRESENT_S_MAX = 5.0
"""How long a decision about a balance waits for usage that arrived before it; then Unavailable."""

SETTLED_S = 1.0
"""Seconds after which everything stamped before a moment is in the log, where no clock is far behind. A gateway makes
its events durable long before: a group commit takes milliseconds. Counting earlier would miss usage in flight."""


class NotFound(Exception):
    """The object does not exist, or belongs to another organization."""


class Malformed(Exception):
    """The request does not have the required form."""

    def __init__(self, details: Sequence[Detail]) -> None:
        super().__init__(f"{len(details)} complaints")  # without the rejected inputs, which may be megabytes
        self.details = details


class Refused(Exception):
    """The request is well formed, but breaks a rule."""

    def __init__(self, type: str, loc: tuple[str | int, ...], msg: str, input: object = None) -> None:
        super().__init__(msg)
        self.details: Sequence[Detail] = [detail(type, loc, msg, input)]


class Conflict(Exception):
    """The current state does not allow the request. ``is_passing``: a retry may succeed."""

    def __init__(self, message: str, *, is_passing: bool = True) -> None:
        super().__init__(message)
        self.is_passing = is_passing


class Busy(Exception):
    """Too many requests of the same kind are waiting already."""


class TooLong(Exception):
    """The query took longer than QUERY_S_MAX."""


class TooLarge(Exception):
    """The query needs more memory than the store may use."""


PASSING = (Unavailable, TryAgain, Busy, TooLong, TooLarge)
"""Errors after which a retry of the same query may succeed."""
