"""This side: the feed of our own server, read over its socket or its address.

Every failure is ``Away``, because all of them pass: the server is being started, restarted or updated. A token that is
not taken is said so, for the owner to make another.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from aggregator.forward.answer import pages
from aggregator.forward.polar_event import Entry, Group
from aggregator.place import FeedPlace, format_places, parse_places
from meters.log import parse_position

ANSWER_TIMEOUT_S = 60.0  # twice what a question to the store may take


class Away(Exception):
    """The feed cannot be read now. ``is_denied``: because the token is not good."""

    def __init__(self, message: str, is_denied: bool = False) -> None:
        super().__init__(message)
        self.is_denied = is_denied


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


class _Rollup(msgspec.Struct):
    items: list[Group]
    position: str


class Page(NamedTuple):
    """Entries, the position behind them, and whether the feed has no more just now."""

    entries: list[Entry]
    position: dict[int, FeedPlace]
    is_last: bool


class Source:
    """A connection to the server whose events are forwarded. One thread at a time."""

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
        """Raises Away."""
        try:
            response = self._http.get(path, params=params)
        except httpx.HTTPError as error:
            raise Away(f"the server's feed does not answer ({type(error).__name__})") from error
        if not response.is_success:
            denied = response.status_code in (401, 403)
            raise Away(f"the server's feed answers {response.status_code}: {response.text[:200]}", denied)
        return response

    def page(self, position: Mapping[int, FeedPlace], selection: Selection, limit: int) -> Page:
        """The next entries. Raises Away."""
        asked = {"position": format_places(position), "limit": limit, **selection.params()}
        response = self._get("/v1/feed/", asked)
        found = msgspec.json.decode(response.content, type=FeedPage)
        reached = parse_places(found.position) or {}
        ends = parse_position(response.headers.get("as-of", "")) or {}
        is_last = all(reached.get(partition, (0, 0)) >= (end, 0) for partition, end in ends.items())
        return Page(found.items, reached, is_last)

    def end(self) -> dict[int, FeedPlace]:
        """Behind everything that is counted now. Raises Away."""
        ends = parse_position(self._get("/v1/feed/", {"limit": 1}).headers.get("as-of", "")) or {}
        return {partition: (end, 0) for partition, end in ends.items()}

    def backlog(self, position: Mapping[int, FeedPlace], selection: Selection) -> tuple[int, int | None]:
        """How many entries there are from the position on, and when the oldest came in (UTC, microseconds)."""
        found = self._get("/v1/feed/backlog", {"position": format_places(position), **selection.params()}).json()
        oldest = found["oldest_ingested_at"]
        return found["events"], oldest and int(datetime.fromisoformat(oldest).timestamp() * 1e6)

    def rollup(
        self, position: Mapping[int, FeedPlace], meter_ids: Sequence[str], before: datetime, window_s: int
    ) -> tuple[list[Group], dict[int, FeedPlace]]:
        """What the meters add up to from the position on, and the position behind it. Raises Away."""
        asked = {
            "position": format_places(position), "meter_id": list(meter_ids), "before": before.isoformat(),
            "window_seconds": window_s,
        }  # fmt: skip
        found = msgspec.json.decode(self._get("/v1/feed/rollup", asked).content, type=_Rollup)
        return found.items, parse_places(found.position) or {}

    def traffic(self, since: datetime, selection: Selection, meter_ids: Sequence[str], window_s: int) -> dict[str, Any]:
        """What came in since the instant, and what a rollup of each meter would make of it. Raises Away."""
        asked = {"since": since.isoformat(), "rollup_meter_id": list(meter_ids), "window_seconds": window_s}
        found: dict[str, Any] = self._get("/v1/feed/traffic", {**asked, **selection.params()}).json()
        return found

    def meters(self) -> list[dict[str, Any]]:
        """The organization's meters. Raises Away."""
        return list(pages(lambda path, **asked: self._get(path, asked).json(), "/v1/meters/"))
