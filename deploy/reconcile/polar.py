"""Reconcile with Polar: compare the running server and a Polar organization over their APIs.

``compare`` connects to both (``connected``) and runs ``aggregator.reconcile`` over a ``Range``. Requests to Polar
share the forwarder's rate limit. Polar's answers are kept until the run is complete, so an interrupted run resumes
where it stopped.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from aggregator.forward.forwarder import RAW, ROLLUP
from aggregator.forward.polar_client import Denied, NoAnswer, RequestWindow, Upstream, base_url
from aggregator.forward.state import State
from aggregator.reconcile.polar_check import UpstreamCheck
from aggregator.reconcile.polar_pairing import Seen
from aggregator.reconcile.polar_reader import DAY, Forwarded, Remembering, Scope, interrupted, midnight
from aggregator.reconcile.report import Check, Worth
from deploy.client import Api
from deploy.console import harmless, note
from deploy.errors import USAGE, GiveUp
from deploy.forwarding import explained, open_state, selection_of
from deploy.server.control import Control
from deploy.server.data import DataDirectory
from deploy.settings import Settings
from meters.catalogue.access import digest
from meters.log import Log, format_places, parse_places
from meters.timestamps import START_MIN, utc_text

DAYS_BACK = 35  # when nobody says: the month that is billed, and a few days
NO_BEGIN = (
    "where forwarding began is not known (METERSTREAM_POLAR_FROM is `now`, and it has not begun yet), so what "
    "seems to be missing there may have been sent another way before: nothing is repaired. If everything was sent from "
    "here, set METERSTREAM_POLAR_FROM=beginning for this command"
)

ELSEWHERE = (
    "forwarding stopped because the log is another one than the one whose events were sent, so numbers that agree may "
    "hide lost events, and nothing is repaired: `meterstream forward status` says what to do"
)
OTHER_SERVER = (
    "the forwarder's books are those of {books} and say nothing of {asked}, so what seems to be missing there may "
    "never have been meant for it: nothing is repaired. Set METERSTREAM_POLAR_SERVER as the forwarder has it, or start "
    "forwarding to this one first"
)


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
        raise GiveUp(
            "a token of the Polar organization is needed: set METERSTREAM_POLAR_TOKEN (and METERSTREAM_POLAR_SERVER)",
            USAGE,
        )
    requests_max = settings.polar_requests_per_minute
    try:
        with (
            explained(data),
            contextlib.closing(RequestWindow(data.forwarding, requests_max)) as window,
            Upstream(settings.polar_server, settings.polar_token, window, on_trouble=_trying_again) as upstream,
        ):
            yield upstream
    except Denied as error:
        raise GiveUp(f"Polar refuses to be read: {error}") from error
    except NoAnswer as error:
        raise GiveUp(f"Polar does not answer: {error}; the next run goes on from here") from error


def _trying_again(trouble: str) -> None:
    note(f"Polar: {harmless(trouble)}; trying again for some minutes")


def compare(settings: Settings, data: DataDirectory, log: Log, here: Api, range_: Range, now: datetime) -> Check:
    """The upstream check. Raises GiveUp."""
    control = Control(log)
    organization = control.organization(settings.polar_organization, "METERSTREAM_POLAR_ORGANIZATION")
    meters = [meter for meter in control.catalogue.meters_of(organization.id) if meter.archived_at is None]
    since, until = range_.days(now)
    path = _progress(data)
    destination = digest(f"{settings.polar_server} {settings.polar_token}")  # the token says whose answers they are
    key = f"{destination} {organization.id} {utc_text(since)} {utc_text(until)}"
    forwarded = selection_of(settings, list(here.pages("/v1/meters/")) if settings.polar_meter else [])
    with _alone(path.parent), open_state(data) as state, connected(settings, data) as upstream:
        before = interrupted(path, key, now)
        began = before or now
        there = Remembering(upstream, path, key, began, go_on=before is not None)
        with state.at_once():
            scope = Scope(
                organization_id=organization.id, since=since, until=until, arrived_before=began - range_.settle,
                settles=range_.settle > timedelta(0), window=timedelta(seconds=settings.polar_rollup_seconds),
                raw=_forwarded(state, RAW, forwarded.params()), rolled=_forwarded(state, ROLLUP, {}),
                doubt=_doubt(state, settings),
                refused={letter.external_id: letter.words for letter in state.dead(limit=-1)},
                is_pending=_pending(state),
            )  # fmt: skip
        check = _checked(UpstreamCheck(here, there, scope, meters, Worth(control.catalogue)), there)
    check.notes += [scope.doubt] if scope.doubt else []
    check.notes += _began(scope)
    check.notes.append(f"{there.asked} requests; {since:%Y-%m-%d} to {until - DAY:%Y-%m-%d}, {_known(scope)}")
    return check


def _checked(check: UpstreamCheck, there: Remembering) -> Check:
    """What the check finds; the next run asks anew, unless there was no answer to go on with. Raises GiveUp."""
    try:
        found = check.run()
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:  # answers of the right shape, and odd within
        there.complete()
        raise GiveUp(f"what Polar answers cannot be compared ({type(error).__name__}: {error})") from error
    there.complete()
    return found


def _forwarded(state: State, lane: str, selection: Mapping[str, Any]) -> Forwarded:
    """What a lane forwards. Where it began at the log's beginning, nothing was before."""
    begin = state.begin_of(lane)
    if begin is None or not begin.position:
        return Forwarded(selection)
    return Forwarded(selection, format_places(begin.position), datetime.fromtimestamp(begin.began_us / 1e6, UTC))


def _doubt(state: State, settings: Settings) -> str:
    """Why what is found may not be repaired; empty where it may."""
    books, asked = state.flags().get("server"), base_url(settings.polar_server)
    if books not in (None, asked):
        return OTHER_SERVER.format(books=books, asked=asked)
    if state.flags().get("is_elsewhere"):
        return ELSEWHERE
    lane = ROLLUP if settings.polar_rollup else RAW
    return NO_BEGIN if settings.polar_from == "now" and state.begin_of(lane) is None else ""


def _began(scope: Scope) -> Iterator[str]:
    for what, forwarded in (("events", scope.raw), ("sums", scope.rolled)):
        if forwarded.began is not None and forwarded.began > scope.since:
            yield f"{what} are forwarded since {forwarded.began:%Y-%m-%d %H:%M} UTC; what came before is not compared"


def _pending(state: State) -> Callable[[Seen], bool]:
    """Whether the forwarder has yet to reach an event, or holds it back; nothing is pending where nobody forwards."""
    reached = state.position(RAW) if state.knows(RAW) else None
    waiting = state.waiting_ids()

    def is_pending(event: Seen) -> bool:
        if reached is None:
            return False
        if event.external_id in waiting:
            return True
        ((partition, at),) = (parse_places(event.place) or {}).items()
        return at >= reached.get(partition, (0, 0))

    return is_pending


def _known(scope: Scope) -> str:
    return f"what arrived before {scope.arrived_before:%Y-%m-%d %H:%M} UTC"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One comparison for a data directory: two would write and take away each other's answers. Raises GiveUp."""
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GiveUp("another comparison with Polar runs on this directory; try again when it is over") from None
        yield
    finally:
        os.close(lock)


def _progress(data: DataDirectory) -> Path:
    folder = data.path / "reconcile"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise GiveUp(f"{folder} cannot be made: {error.strerror}; give a --data that can be written") from None
    return folder / "progress.jsonl"
