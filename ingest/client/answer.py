"""What the server's answer means for the events that were sent. Pure.

Only a 2xx acknowledges. A 422 speaks of single events: its ``detail`` names them by index, and they will never be
taken; when it names none, halves tell. What concerns the sender or the server as a whole (no connection, 401, 429,
503) waits and loses nothing; of some of it the events may be the reason after all, which others tell that get through.
Everything else may be the fault of this one batch, or of the server: see ``Failed``.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import msgspec


class Detail(NamedTuple):
    """Why one event was refused, in the server's words."""

    type: str
    loc: tuple[str | int, ...]
    msg: str


class Taken(msgspec.Struct, frozen=True):
    """The events are durable at the server. ``duplicates`` of them it knew already."""

    duplicates: int = 0


class Unavailable(msgspec.Struct, frozen=True):
    """Nothing can be sent now, whatever it is. ``retry_after_s`` is the server's wish.

    ``may_be_events``: so it looks as well where something in these events is not let through, or breaks the server.
    """

    cause: str
    retry_after_s: float | None = None
    may_be_events: bool = False


class Failed(msgspec.Struct, frozen=True):
    """This request went wrong; another one might not. ``is_final`` when repeating it cannot help."""

    cause: str
    is_final: bool


class Refused(msgspec.Struct, frozen=True):
    """Some events will not be taken: those in ``details``, by index; nobody knows which when it is empty.

    ``ahead_s`` is how far this machine's clock is ahead of the server's, as far as can be told.
    """

    cause: str
    details: dict[int, Detail] = {}
    ahead_s: float = 0.0


Outcome = Taken | Unavailable | Failed | Refused

_WAITING = frozenset({401, 402, 403, 404, 405, 407, 408, 421, 423, 425, 429, 502, 503, 504})
"""Statuses that say nothing of the events: credentials, address, rate, an overloaded or absent server."""

_AMBIGUOUS = frozenset({403, 408, 502, 503, 504})
"""Those that a firewall gives to a text it does not like, and a proxy when a request breaks the server behind it."""


def read_answer(status: int, headers: Mapping[str, str], body: bytes, now: datetime) -> Outcome:
    """What an HTTP answer means. Header names are looked up in lower case."""
    cause = f"HTTP {status}"
    if 200 <= status < 300:
        return Taken(_duplicates(body))
    if status == 422:
        return Refused(cause, _details(body), _ahead_s(headers, now))
    if status == 413:
        return Refused(cause)
    if status in _WAITING or 300 <= status < 400:
        return Unavailable(cause, _retry_after_s(headers, now), status in _AMBIGUOUS)
    return Failed(cause, is_final=400 <= status < 500)


class _Counts(msgspec.Struct):
    duplicates: int = 0


class _Entry(msgspec.Struct):
    loc: list[str | int]
    type: str = ""
    msg: str = ""


class _Refusal(msgspec.Struct):
    detail: list[_Entry]


def _duplicates(body: bytes) -> int:
    try:
        return msgspec.json.decode(body, type=_Counts).duplicates
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return 0  # a proxy's 204, a newer server: the status is what counts


def _details(body: bytes) -> dict[int, Detail]:
    """The first complaint about each event that is named as ``["body", "events", index, ...]``."""
    try:
        entries = msgspec.json.decode(body, type=_Refusal).detail
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}
    found: dict[int, Detail] = {}
    for entry in entries:
        if len(entry.loc) < 3 or entry.loc[1] != "events" or not isinstance(entry.loc[2], int):
            return {}  # something else is wrong, too: trust no index
        found.setdefault(entry.loc[2], Detail(entry.type, tuple(entry.loc), entry.msg))
    return found


def _retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds, or a date (RFC 9110)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    until = _date(value)
    return None if until is None else max(0.0, (until - now).total_seconds())


def _ahead_s(headers: Mapping[str, str], now: datetime) -> float:
    at_server = _date(headers.get("date", ""))
    return 0.0 if at_server is None else (now - at_server).total_seconds()


def _date(value: str) -> datetime | None:
    try:
        instant = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
