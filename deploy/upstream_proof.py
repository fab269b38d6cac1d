"""Our running server and a Polar organization, compared and, where something is missing over there, sent again.

Both are read over their APIs. Requests to Polar share the forwarder's limit, and what it answered is kept until the run
is complete, so that an interrupted run goes on where it was.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from aggregator.forward.polar_event import item_of
from aggregator.forward.request_window import RequestWindow
from aggregator.forward.source import FeedPage
from aggregator.forward.state import State
from aggregator.forward.upstream import Denied, NoAnswer, Upstream
from aggregator.place import parse_places
from aggregator.reconcile.correction import instead
from aggregator.reconcile.remembering import Remembering, interrupted
from aggregator.reconcile.report import Check, Difference, Done, Repair
from aggregator.reconcile.upstream_check import UpstreamCheck
from aggregator.reconcile.upstream_scope import DAY, Scope, midnight, text
from aggregator.reconcile.worth import Worth
from deploy.client import Api
from deploy.control import Control
from deploy.data import DataDirectory
from deploy.forward import selection_of
from deploy.giving_up import GiveUp
from deploy.settings import Settings
from meters.log import Log
from meters.window import START_MIN

DAYS_BACK = 35  # when nobody says: the month that is billed, and a few days
BATCH = 500  # events of one request of a repair
SEND_ATTEMPTS_MAX = 5


class Range(msgspec.Struct, frozen=True):
    """Whole days in UTC, and how long an event may be on its way."""

    since: datetime | None
    until: datetime | None
    settle: timedelta

    def days(self, now: datetime) -> tuple[datetime, datetime]:
        """The first day's beginning and the last one's end."""
        until = midnight((self.until or now) - timedelta(microseconds=1)) + DAY
        since = midnight(self.since) if self.since else until - DAYS_BACK * DAY
        return max(since, START_MIN), until


@contextlib.contextmanager
def connected(settings: Settings, data: DataDirectory) -> Iterator[Upstream]:
    """The Polar organization of the settings, within the limit that the forwarder keeps. Raises GiveUp."""
    if not settings.polar_token:
        raise GiveUp("there is nothing to compare with: set METERSTREAM_POLAR_TOKEN (and METERSTREAM_POLAR_SERVER)")
    window = RequestWindow(data.forwarding, settings.polar_requests_per_minute)
    try:
        with Upstream(settings.polar_server, settings.polar_token, window) as upstream:
            yield upstream
    except Denied as error:
        raise GiveUp(f"Polar refuses to be read: {error}") from error
    except NoAnswer as error:
        raise GiveUp(f"Polar does not answer: {error}; the next run goes on from here") from error
    finally:
        window.close()


def compare(settings: Settings, data: DataDirectory, log: Log, here: Api, range_: Range, now: datetime) -> Check:
    """The upstream check. Raises GiveUp."""
    control = Control(log)
    organization = control.organization(settings.polar_organization)
    meters = [meter for meter in control.catalogue.meters_of(organization.id) if meter.archived_at is None]
    since, until = range_.days(now)
    path = _progress(data)
    key = f"{settings.polar_server} {organization.id} {text(since)} {text(until)}"
    before = interrupted(path, key, now)
    began = before or now
    forwarded = selection_of(settings, list(here.pages("/v1/meters/")) if settings.polar_meter else [])
    with connected(settings, data) as upstream, contextlib.closing(State(data.forwarding)) as state:
        there = Remembering(upstream, path, key, began, go_on=before is not None)
        scope = Scope(
            organization_id=organization.id, since=since, until=until, arrived_before=began - range_.settle,
            settles=range_.settle > timedelta(0),
            selection=forwarded.params(),
            refused={letter.external_id: letter.words for letter in state.dead(limit=-1)}, is_pending=_pending(state),
        )  # fmt: skip
        check = UpstreamCheck(here, there, scope, meters, Worth(control.catalogue)).run()
        there.complete()
    check.notes.append(f"{there.asked} requests; {since:%Y-%m-%d} to {until - DAY:%Y-%m-%d}, {_known(scope)}")
    return check


def send_again(settings: Settings, data: DataDirectory, here: Api, differences: Sequence[Difference]) -> Done | None:
    """Send what is missing over there, with the ids it has; sending it twice changes nothing. Raises GiveUp."""
    missing = [difference for difference in differences if difference.repair is Repair.SEND]
    if not missing:
        return None
    inserted, duplicates = _send_all(settings, data, (list(_bodies(here, difference)) for difference in missing))
    what = f"Sent to Polar again: {inserted} events were new there, {duplicates} it had already."
    return Done(Repair.SEND, what, inserted + duplicates)


def correct(settings: Settings, data: DataDirectory, here: Api, differences: Sequence[Difference]) -> Done | None:
    """Take back what Polar counts wrongly, and send what is right; doing it twice changes nothing. Raises GiveUp."""
    wrong = [difference for difference in differences if difference.repair is Repair.CORRECT]
    if not wrong:
        return None
    inserted, duplicates = _send_all(settings, data, (_corrections(here, difference) for difference in wrong))
    what = f"Corrected at Polar: {inserted} events take others back or stand for them, {duplicates} it had already."
    return Done(Repair.CORRECT, what, inserted + duplicates)


def _corrections(here: Api, difference: Difference) -> list[bytes]:
    taking_back = [body.encode() for body in difference.payload["corrections"]]
    return taking_back + [instead(body) for body in _bodies(here, difference)]


def _send_all(settings: Settings, data: DataDirectory, batches: Iterable[Sequence[bytes]]) -> tuple[int, int]:
    """How many were new over there, and how many were not. Raises GiveUp."""
    inserted = duplicates = 0
    with connected(settings, data) as upstream:
        for bodies in batches:
            for start in range(0, len(bodies), BATCH):
                answer = _send(upstream, bodies[start : start + BATCH])
                inserted += answer["inserted"]
                duplicates += answer.get("duplicates", 0)
    return inserted, duplicates


def _bodies(here: Api, difference: Difference) -> Iterator[bytes]:
    """The events of a difference as the forwarder would send them."""
    wanted = dict(difference.payload["events"])
    assert difference.window is not None
    position, (since, until) = "", difference.window
    while wanted:
        given = {"start_timestamp": text(since), "end_timestamp": text(until), "position": position, "limit": 10_000}
        response = here.send("GET", "/v1/feed/", params=given)
        if not response.is_success:
            raise GiveUp(f"our own events cannot be read: {response.status_code}")
        page = msgspec.json.decode(response.content, type=FeedPage)
        for entry in page.items:
            item = item_of(entry, "repair")
            if wanted.pop(item.external_id, None) is not None:
                yield item.body
        if page.position == position:
            return
        position = page.position


def _send(upstream: Upstream, bodies: Sequence[bytes]) -> dict[str, Any]:
    body = b'{"events":[' + b",".join(bodies) + b"]}"
    for attempt in range(SEND_ATTEMPTS_MAX):
        try:
            answer = upstream.ingest(body)
        except NoAnswer:
            if attempt + 1 == SEND_ATTEMPTS_MAX:
                raise
            continue
        if answer.is_success:
            found: dict[str, Any] = answer.json()
            return found
        if answer.status < 500 and answer.status != 429:
            raise GiveUp(f"Polar refuses the events: {answer.words()}; `meterstream forward` isolates such an event")
        upstream.window.clock.pause(1.0 + attempt)
    raise GiveUp("Polar does not take the events now; run the repair again, it changes nothing twice")


def _pending(state: State) -> Any:
    """Whether the forwarder has yet to reach a place; nothing is pending where nobody forwards."""
    reached = state.position("raw") if state.knows("raw") else None

    def is_pending(place: str) -> bool:
        if reached is None:
            return False
        ((partition, at),) = (parse_places(place) or {}).items()
        return at >= reached.get(partition, (0, 0))

    return is_pending


def _known(scope: Scope) -> str:
    return f"what arrived before {scope.arrived_before:%Y-%m-%d %H:%M} UTC"


def _progress(data: DataDirectory) -> Path:
    folder = data.path / "reconcile"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise GiveUp(f"{folder} cannot be made: {error.strerror}; give a --data that can be written") from None
    return folder / "progress.jsonl"
