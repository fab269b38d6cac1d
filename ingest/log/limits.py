"""How much the log takes at once. Every figure has its reason beside it; a caller may set others."""

import msgspec

MEBIBYTE = 1 << 20


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one open log. Beyond ``value_bytes_max`` an entry is Refused, beyond a queue's bound it is TryAgain."""

    # A request body is at most 10 MiB; the rest is room for made-up ids and for other producers.
    value_bytes_max: int = 16 * MEBIBYTE
    # Under half a second of writing at the slowest rate measured, so a full queue empties within one retry.
    queue_bytes_max: int = 64 * MEBIBYTE
    # An entry costs about 1 KiB of objects besides its value: at most 64 MiB of them.
    queue_entries_max: int = 65_536
    # A commit of this size takes tens of milliseconds; larger groups would only make the first in them wait.
    group_bytes_max: int = 8 * MEBIBYTE
    # What a client of a full or failing log is asked to wait: longer than the queue needs to empty.
    retry_after_s: float = 1.0
    # How long to wait for another process's commit or checkpoint (milliseconds) before saying TryAgain.
    lock_wait_s_max: float = 5.0
