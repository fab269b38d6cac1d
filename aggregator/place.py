"""How far a reader of the feed has come: in each partition of the log, before which line of which record.

Written as ``partition:offset:line``, comma separated, like ``Log-Position`` with a line more. Half-open: everything
before the place has been read. It speaks of the log and not of the store, so it stays true when the store is made anew.
"""

from collections.abc import Mapping

from meters.log import is_count

FeedPlace = tuple[int, int]
"""Offset of a record in its partition, and a line of it; in the order in which the log has them."""


def parse_places(text: str) -> dict[int, FeedPlace] | None:
    """{partition: place}; the empty text is the beginning, None no text of this kind."""
    found: dict[int, FeedPlace] = {}
    for part in filter(None, text.split(",")):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(map(is_count, numbers)):
            return None
        partition, offset, line = map(int, numbers)
        if partition in found:
            return None
        found[partition] = offset, line
    return found


def format_places(places: Mapping[int, FeedPlace]) -> str:
    """The inverse of ``parse_places``."""
    return ",".join(f"{partition}:{offset}:{line}" for partition, (offset, line) in sorted(places.items()))
