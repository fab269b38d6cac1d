"""A request with events, from its head on: who asks, how its body is packed, what it asks for besides.

``Prefer`` (RFC 7240) may ask for more than Polar's API does: to keep the good events of a request in which others are
refused, and to hear of each.
"""

from collections.abc import Callable
from typing import NamedTuple

from ingest.answers import Answer
from meters.catalogue import Token

Tell = Callable[[Answer], None]


class Preferences(NamedTuple):
    """What a ``Prefer`` header (RFC 7240) may ask: to keep the good events, and to hear of each one."""

    lenient: bool
    representation: bool

    @property
    def applied(self) -> bytes:
        """The ``Preference-Applied`` header; empty for none."""
        names = [b"handling=lenient"] * self.lenient + [b"return=representation"] * self.representation
        return b", ".join(names)


NO_PREFERENCES = Preferences(lenient=False, representation=False)


def read_preferences(header: bytes) -> Preferences:
    """The preferences known here; others are ignored, as they may be."""
    if not header:
        return NO_PREFERENCES
    asked = {b"".join(part.partition(b";")[0].split()).lower() for part in header.split(b",")}
    return Preferences(b"handling=lenient" in asked, b"return=representation" in asked)


class Opened(NamedTuple):
    """A request that may send its body."""

    token: Token
    encoding: str
    preferences: Preferences


class Asked(NamedTuple):
    """A request whose body is whole. ``tell`` is called once, by the event loop."""

    opened: Opened
    tell: Tell
