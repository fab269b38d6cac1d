"""Read Meterstream's own feed, and convert its events and rollups to Polar's form.

``Source`` is the HTTP client of the aggregator's feed routes; ``Page`` is what it reads. ``item_of`` and
``rollup_item`` make the ``Item`` that the planner schedules, with the bytes for Polar.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from aggregator.forward.planner import Item, Reached
from aggregator.forward.polar_client import pages
from meters.event_values import RESERVED, number_token
from meters.exact import amount_text, parse_amount
from meters.log import (
    FeedPlace,
    format_places,
    format_witnesses,
    parse_places,
    parse_position,
    parse_witnesses,
)
from meters.timestamps import microseconds_of, utc_text

# Conversion, without I/O: bytes in, bytes out.
#
# Polar requires ``_cost.amount`` with at most 12 decimals and the counts of ``_llm`` as integers, and drops unknown
# keys of both. Meterstream rounds amounts when it counts and stores the digits as sent. So the values that were
# counted are sent. Everything else is passed on unchanged; Polar itself refuses what it does not accept.

ROLLUP_NAME = "meterstream.rollup"
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Entry(msgspec.Struct):
    """One item of the feed; the event is looked into for its customer alone."""

    place: str
    ingested_at: datetime
    event: msgspec.Raw


class _Seen(msgspec.Struct):
    timestamp: datetime
    external_id: str
    metadata: msgspec.Raw
    external_customer_id: str | None = None
    customer_id: str | None = None


class Group(msgspec.Struct):
    """One item of a rollup."""

    meter_id: str
    window: datetime
    count: int
    sum: msgspec.Raw
    external_customer_id: str | None = None
    customer_id: str | None = None


_see = msgspec.json.Decoder(_Seen).decode


def item_of(entry: Entry, lane: str) -> Item:
    """What the forwarder needs to know of an event, and its bytes for Polar."""
    seen = _see(entry.event)
    partition, offset, line = map(int, entry.place.split(":"))
    return Item(
        lane=lane, external_id=seen.external_id, who=_who(seen), timestamp_us=microseconds_of(seen.timestamp),
        ingested_us=microseconds_of(entry.ingested_at), body=_within_limits(bytes(entry.event), bytes(seen.metadata)),
        partition=partition, offset=offset, line=line,
    )  # fmt: skip


def piece_at(position: Mapping[int, FeedPlace]) -> str:
    """The name of the piece of the log that begins there. A line is named only where it is not a record's first."""
    places = [(partition, *(place if place[1] else place[:1])) for partition, place in sorted(position.items())]
    return ",".join(":".join(map(str, place)) for place in places) or "0"


def rollup_item(group: Group, aggregation: str, window_s: int, piece: str, now_us: int) -> Item:
    """The event that carries what a customer used of a meter in a window, as far as one piece of the log has it.

    Its id names window and piece, so that sending it again is a duplicate and a late event goes into another one.
    """
    by_id, by_name = {"customer_id": group.customer_id}, {"external_customer_id": group.external_customer_id}
    customer = by_name if group.customer_id is None else by_id
    stamp = utc_text(group.window)
    external_id = f"rollup/{group.meter_id}/{window_s}/{stamp}/{piece}/{_who(group)}"
    value = msgspec.Raw(str(group.count).encode()) if aggregation == "count" else group.sum
    metadata = {"meter": group.meter_id, "value": value, "events": group.count, "seconds": window_s}
    body = {"name": ROLLUP_NAME, "timestamp": stamp, "external_id": external_id, **customer, "metadata": metadata}
    return Item(
        lane="rollup", external_id=external_id, who=_who(group), timestamp_us=microseconds_of(group.window),
        ingested_us=now_us, body=_encode(body),
    )  # fmt: skip


def _who(seen: _Seen | Group) -> str:
    """A customer's name with its kind, so that an id is never taken for an external id."""
    return f"c:{seen.customer_id}" if seen.external_customer_id is None else f"e:{seen.external_customer_id}"


def _within_limits(event: bytes, metadata: bytes) -> bytes:
    if b'"_' not in metadata:
        return event
    fields: dict[str, Any] = dict(_fields(metadata))
    for key in RESERVED.keys() & fields.keys():
        fields[key] = _reserved(key, fields[key])
    return _encode({**_fields(event), "metadata": fields})


def _reserved(key: str, raw: msgspec.Raw) -> dict[str, Any]:
    known, numbers = RESERVED[key]
    values: dict[str, Any] = {name: value for name, value in _fields(raw).items() if name in known}
    for name in numbers & values.keys():
        amount = parse_amount(number_token(bytes(values[name])))
        if amount is None:
            continue  # cannot have been counted
        text = amount_text(amount)
        values[name] = text if key == "_cost" else msgspec.Raw(text.encode())  # as text no double comes between
    return values


# The client. It connects to the server's socket or address.
#
# Every failure raises ``Away``, because every failure is temporary: the server is starting, restarting or being
# updated. If the token is refused, the error says so, and the owner must create another one.

ANSWER_TIMEOUT_S = 60.0  # twice what a question to the store may take


class Away(Exception):
    """The feed cannot be read now. ``is_denied``: because the token is not good."""

    def __init__(self, message: str, is_denied: bool = False) -> None:
        super().__init__(message)
        self.is_denied = is_denied


class Elsewhere(Exception):
    """The log that is read now is another one than that of the position, so going on would skip events."""


class Selection(msgspec.Struct, frozen=True):
    """What of the feed is wanted; all that is given must hold. ``filter`` is JSON; the times are ISO 8601."""

    names: tuple[str, ...] = ()
    meter_id: str | None = None
    filter: str | None = None
    since: str | None = None
    until: str | None = None

    def params(self) -> dict[str, Any]:
        """The same as query parameters."""
        named = {
            "name": list(self.names) or None, "meter_id": self.meter_id, "filter": self.filter,
            "start_timestamp": self.since, "end_timestamp": self.until,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}


class FeedPage(msgspec.Struct):
    """A page of the feed as it is answered."""

    items: list[Entry]
    position: str
    witness: str


class _Rollup(msgspec.Struct):
    items: list[Group]
    position: str
    witness: str


class _Position(msgspec.Struct):
    position: str
    witness: str
    ingested_at: datetime | None


class Page(NamedTuple):
    """Entries, where the reader stands behind them, and whether the feed has no more just now."""

    entries: list[Entry]
    reached: Reached
    is_last: bool


def _reached(found: FeedPage | _Rollup | _Position) -> Reached:
    return Reached(parse_places(found.position) or {}, parse_witnesses(found.witness) or {})


def _asked(reached: Reached) -> dict[str, str]:
    witness = {} if reached.witnesses is None else {"witness": format_witnesses(reached.witnesses)}
    return {"position": format_places(reached.position), **witness}


class Source:
    """A connection to the server whose events are forwarded. One thread at a time.

    It stays apart from the command line's client (``deploy/client.py``): what a failure means differs (each one here is
    ``Away``, since all of them pass, and the forwarder has a pause of its own), and the forwarder's process need not
    load the command line. What both do alike, reading a list page by page, is ``polar_client.pages``.
    """

    def __init__(self, url: str, token: str, socket: Path | None = None) -> None:
        transport = httpx.HTTPTransport(uds=str(socket)) if socket else None
        self._http = httpx.Client(
            base_url="http://meterstream" if socket else url, transport=transport, timeout=ANSWER_TIMEOUT_S,
            headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def _get(self, path: str, params: Mapping[str, Any]) -> httpx.Response:
        """Raises Away, Elsewhere."""
        try:
            response = self._http.get(path, params=params)
        except httpx.HTTPError as error:
            raise Away(f"the server's feed does not answer ({type(error).__name__})") from error
        if response.status_code == 409:
            raise Elsewhere(str(response.json()["detail"]))
        if not response.is_success:
            denied = response.status_code in (401, 403)
            raise Away(f"the server's feed answers {response.status_code}: {response.text[:200]}", denied)
        return response

    def page(self, reached: Reached, selection: Selection, limit: int) -> Page:
        """The next entries. Raises Away, and Elsewhere where the log is not the one of the position any more."""
        asked = {**_asked(reached), "limit": limit, **selection.params()}
        response = self._get("/v1/feed/", asked)
        found = msgspec.json.decode(response.content, type=FeedPage)
        behind = _reached(found)
        ends = parse_position(response.headers.get("as-of", "")) or {}
        is_last = all(behind.position.get(partition, (0, 0)) >= (end, 0) for partition, end in ends.items())
        return Page(found.items, behind, is_last)

    def end(self) -> Reached:
        """Behind everything that is counted now. Raises Away."""
        ends = parse_position(self._get("/v1/feed/", {"limit": 1}).headers.get("as-of", "")) or {}
        return self.at({partition: (end, 0) for partition, end in ends.items()})[0]

    def at(self, position: Mapping[int, FeedPlace]) -> tuple[Reached, int | None]:
        """The position with its witnesses, and when the newest event before it came in (UTC, microseconds).

        Raises Away, and Elsewhere where the log ends before the position.
        """
        found = self._position({"position": format_places(position)})
        return _reached(found), None if found.ingested_at is None else microseconds_of(found.ingested_at)

    def since(self, instant: str) -> Reached:
        """Where the events begin that came in since the instant (ISO 8601). Raises Away."""
        return _reached(self._position({"since": instant}))

    def _position(self, asked: Mapping[str, str]) -> _Position:
        return msgspec.json.decode(self._get("/v1/feed/position", asked).content, type=_Position)

    def backlog(self, position: Mapping[int, FeedPlace], selection: Selection) -> tuple[int, int | None]:
        """How many entries there are from the position on, and when the oldest came in (UTC, microseconds)."""
        found = self._get("/v1/feed/backlog", {"position": format_places(position), **selection.params()}).json()
        oldest = found["oldest_ingested_at"]
        return found["events"], oldest and int(datetime.fromisoformat(oldest).timestamp() * 1e6)

    def rollup(
        self, reached: Reached, meter_ids: Sequence[str], before: datetime, window_s: int
    ) -> tuple[list[Group], Reached]:
        """What the meters add up to from the position on, and the place behind it. Raises Away, Elsewhere."""
        asked = {
            **_asked(reached), "meter_id": list(meter_ids), "before": before.isoformat(),
            "window_seconds": window_s,
        }  # fmt: skip
        found = msgspec.json.decode(self._get("/v1/feed/rollup", asked).content, type=_Rollup)
        return found.items, _reached(found)

    def traffic(self, since: datetime, selection: Selection, meter_ids: Sequence[str], window_s: int) -> dict[str, Any]:
        """What came in since the instant, and what a rollup of each meter would make of it. Raises Away."""
        asked = {"since": since.isoformat(), "rollup_meter_id": list(meter_ids), "window_seconds": window_s}
        found: dict[str, Any] = self._get("/v1/feed/traffic", {**asked, **selection.params()}).json()
        return found

    def meters(self) -> list[dict[str, Any]]:
        """The organization's meters. Raises Away."""
        return list(pages(lambda path, **asked: self._get(path, asked).json(), "/v1/meters/"))
