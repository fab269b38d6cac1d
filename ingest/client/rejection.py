"""What becomes of an event that is not sent, or not taken: a rejection that says which, why and by whom.

The reasons carry the server's own words (``type``, ``loc``, ``msg``), whether it was the client that found them at
capture or the server that answered 422, so that one handler reads both.
"""

from typing import Any, Literal

import msgspec

By = Literal["capture", "server", "spool"]


class Rejection(msgspec.Struct, frozen=True):
    """One event that does not count, and why.

    ``event`` is what the caller gave, or, when the server refused it, what was sent. ``by`` is who refused: the
    checks at ``capture``, the ``server``, or the ``spool``, which had no room.
    """

    event: Any
    external_id: str | None
    type: str
    loc: tuple[str | int, ...]
    msg: str
    by: By


class EventRefused(ValueError):
    """Raised in strict mode: change the event. ``rejection`` says what is wrong with it."""

    def __init__(self, rejection: Rejection) -> None:
        place = ".".join(str(part) for part in rejection.loc)
        super().__init__(f"{place}: {rejection.msg}" if place else rejection.msg)
        self.rejection = rejection


class SpoolFull(Exception):
    """Raised when the caller chose it: send fewer events, or wait until the server has taken some."""
