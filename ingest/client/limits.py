"""How much the client holds, how long it waits, and why that much."""

from pathlib import Path
from tempfile import gettempdir

import msgspec

MEBIBYTE = 1 << 20


def _state_directory() -> Path:
    try:
        return Path.home() / ".local" / "state"
    except RuntimeError:  # a user without a home, as in containers
        return Path(gettempdir())


DEFAULT_SPOOL = _state_directory() / "meterstream"
"""Where what is not yet acknowledged is kept unless a directory is named: the place for the state of programs."""

MEMORY_EVENTS_MAX = 20_000
"""Events held in memory when a spool holds them, too: some ten megabytes; what is beyond is read back from it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Every bound of a client. The defaults suit a web application; each can be changed alone."""

    batch_events_max: int = 1000
    """Events of a request: its cost is spread over enough of them, and a refused one is soon isolated."""

    batch_bytes_max: int = MEBIBYTE
    """Bytes of a request before compression: a tenth of what servers take, sent in a second on a slow line."""

    linger_s: float = 0.5
    """Seconds that an event waits for others to share its request."""

    in_flight_max: int = 4
    """Requests at once: enough that a round trip of 20 ms still lets 200,000 events a second through."""

    held_bytes_max: int = 256 * MEBIBYTE
    """Bytes of events not yet acknowledged, on disk (or in memory where there is no spool): half a million to a
    million events, hours of a busy application without its server. The journal adds at most 16 MiB to it."""

    block_s_max: float = 1.0
    """The longest that capturing an event may wait for room, when that is what a full spool shall do. Who comes after
    one that waited in vain is refused at once, until room appears."""

    close_s_max: float = 5.0
    """Seconds to send the rest at the end; orchestrators kill after ten or thirty."""

    request_s_max: float = 30.0
    """Seconds until an unanswered request counts as failed."""

    backoff_s: float = 0.25
    """The first pause after a failure; it doubles with each."""

    backoff_s_max: float = 30.0
    """The longest pause, unless the server asks for a longer one."""

    retry_after_s_max: float = 600.0
    """The longest pause that a server may ask for: whoever says next year is mistaken."""

    adopt_every_s: float = 30.0
    """Seconds between two looks for what processes that are gone have left in the spool."""
