"""How much the log takes at once. Every figure has its reason beside it; a caller may set others."""

import msgspec

MEBIBYTE = 1 << 20


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one open log. Beyond ``value_bytes_max`` an entry is Refused, beyond a queue's bound it is TryAgain."""

    # A request body is at most 10 MiB, and an event of 39 bytes, the shortest, gets an id of 50 more.
    value_bytes_max: int = 24 * MEBIBYTE
    # Under half a second of writing at the slowest rate measured, so a full queue empties within one retry.
    queue_bytes_max: int = 64 * MEBIBYTE
    # Under a second of writing, one small entry a request; each costs about 1 KiB of objects besides its value.
    queue_entries_max: int = 32_768
    # A commit of this size takes tens of milliseconds; larger groups would only make the first in them wait.
    group_bytes_max: int = 8 * MEBIBYTE
    # What a client of a full or failing log is asked to wait: about what a full queue needs to empty.
    retry_after_s: float = 1.0
    # Another process's commit or checkpoint takes milliseconds; one that holds the lock for so long is stuck.
    lock_wait_s_max: float = 5.0
