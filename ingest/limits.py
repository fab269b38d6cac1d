"""The bounds of the gateway: bytes, seconds, sockets and requests, each with its reason.

Everything that a client can make grow has a limit here. A limit that is reached is an answer (408, 411, 413, 429,
431, 503), never a slower or larger process. ``InFlight`` counts the bytes that are held for requests;
``RequestQuota`` limits the requests of a token in a minute.
"""

import math

import msgspec

MEBIBYTE = 1024 * 1024

BODY_BYTES_MAX = 10 * MEBIBYTE
"""Bytes of a body (Polar's limit), as sent and also unpacked: compression saves bandwidth, it does not lift limits."""

HEAD_BYTES_MAX = 32 * 1024
"""Bytes of a request line with its headers. Real ones stay under 2 KiB; proxies in front commonly allow 8 to 32 KiB."""

HEAD_DEADLINE_S = 10.0
"""Seconds from the first byte (or from connecting) to the end of the headers: one slow mobile round trip, ten times."""

BODY_DEADLINE_S = 30.0
"""Seconds for a body to arrive whole: 10 MiB at 3 Mbit/s."""

IDLE_DEADLINE_S = 75
"""Seconds that a silent connection is kept: longer than the 60 s of common load balancers, which must close first."""

WRITE_DEADLINE_S = 30.0
"""Seconds that a client may leave its answer unread before the connection is cut."""

SHUTDOWN_DEADLINE_S = 10
"""Seconds that requests get to finish at a stop; a group commit takes milliseconds, orchestrators kill after 30."""

CONNECTIONS_MAX = 4096
"""Open sockets: at some 20 KiB each below 100 MiB, and far more than any pool of producers holds."""

PIPELINED_MAX = 128
"""Requests that wait on one connection for the answer to an earlier one: clients that do not wait are rare, and send a
few ahead. Each holds some 3 KiB."""

IN_FLIGHT_BYTES_MAX = 256 * MEBIBYTE
"""Bytes of bodies held at once, from the first byte until the answer: 25 of the largest, a million small events."""

INLINE_BODY_BYTES_MAX = 256 * 1024
"""A larger body is checked, spread and answered in a thread, so that nobody else waits: this much takes about 2 ms to
check."""

PARTITIONS_TOGETHER_MAX = 64
"""Partitions of a log whose requests are written together: which of them a request waits for is a word of 64 bits."""

DETAILS_MAX = 100
"""Entries of a 422's detail list. The whole request is refused in any case, and nobody reads more."""

CAREFUL_EVENTS_MAX = 50_000
"""Unusual events of one request, each read on its own in some 30 us: a second and a half of one core. A request
of plain events has no limit but its bytes."""

CAREFUL_VALUES_MAX = 1_000_000
"""Commas in the unusual events of one request: some 3 us for each value, so three seconds more at the most. A limit to
events alone would not do, because one event may have as many values as fit into the body."""

HURRIED_EVENTS_MAX = 200
"""Unusual events of a small body: more are read in a thread like a large body, since these take some 4 ms."""

HURRIED_VALUES_MAX = 2_000
"""Commas in these events, likewise: another 6 ms. More are read in the thread."""

HURRIED_BODY_VALUES_MAX = 10_000
"""Commas of a small body that is not plain throughout and is sorted, event by event, while everybody waits."""

BODY_VALUES_MAX = 1_000_000
"""Commas in a body that is not plain throughout, before it is cut up: 10 MiB of ``0,0,0`` would take 400 MiB."""

REFUSALS_OF_EVENT_MAX = 10
"""Refusals of one event that a lenient request hears of: enough to mend it, and there may be a hundred thousand."""

REFUSALS_MAX = 10_000
"""Refusals in one lenient request; beyond, it is refused as a whole. Its answer has them all, some 200 bytes each: two
megabytes, and a tenth of a second to write. Without a limit 8 MB got 186 MB back."""

ANSWER_BYTES_MAX = 256 * 1024
"""A longer detail list is sent without the inputs that it echoes: whoever sent them has them."""

PASSTHROUGH_CONNECTIONS_MAX = 64
"""Requests at the query API at once; it is one process, more would only queue there."""

PASSTHROUGH_CONNECTIONS_OF_ONE_MAX = 32
"""The same of one organization, half as many: whoever asks slow questions, or reads answers slowly, leaves the rest to
others. What shows neither a token of an organization nor a customer's session is one more."""

RELAYED_MAX = 16
"""Reads that are out at the query API by the short way, which knows no shares; further ones take the usual way."""

PASSTHROUGH_ANSWER_DEADLINE_S = 60.0
"""Seconds until the query API begins to answer: the longest wait for a position, and a slow query."""

PASSTHROUGH_IDLE_DEADLINE_S = 30.0
"""Seconds without a byte of an answer that has begun, or without room for more of a request. The query API has the
whole answer before it sends any of it, so only what a network loses lies between two bytes; a host that died never
says so."""


class InFlight:
    """The bytes of bodies that the process holds, under a ceiling."""

    def __init__(self, bytes_max: int = IN_FLIGHT_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0

    def take(self, count: int) -> bool:
        """Count the bytes in; False (and nothing counted) when they do not fit."""
        if self.bytes + count > self.bytes_max:
            return False
        self.bytes += count
        return True

    def give_back(self, count: int) -> None:
        """Count the bytes out again."""
        self.bytes -= count


class _Allowance(msgspec.Struct):
    tokens: float
    refilled_at_s: float


class RequestQuota:
    """Requests a minute for each key, as a token bucket: a minute's worth may come at once, then at the rate.

    ``per_minute`` of 0 allows everything. Keys are ids of good tokens and of customers, so there are as few as
    of those.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._allowances: dict[str, _Allowance] = {}

    def wait_s(self, key: str, now_s: float) -> int:
        """0 and one request taken, or the whole seconds until the next one is allowed."""
        if not self._per_minute:
            return 0
        rate = self._per_minute / 60
        allowance = self._allowances.setdefault(key, _Allowance(float(self._per_minute), now_s))
        grown = allowance.tokens + (now_s - allowance.refilled_at_s) * rate
        allowance.tokens = min(float(self._per_minute), grown)
        allowance.refilled_at_s = now_s
        if allowance.tokens < 1:
            return math.ceil((1 - allowance.tokens) / rate)
        allowance.tokens -= 1
        return 0
