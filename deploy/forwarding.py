"""The forwarder to Polar: its process, its status, its replays and its plan.

``run`` is the process ``meterstream forward``: it opens the state in the data directory, finds the organization and
the feed of the aggregator, and starts ``aggregator.forward``. ``status``, ``ask_replay`` and ``dead_letters`` read
and write the state beside a running forwarder. ``plan`` computes whether the traffic fits Polar's limits, and what a
rollup would change.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog

from aggregator.forward.feed_client import Away, Selection, Source
from aggregator.forward.forwarder import Forwarder, RolledMeter, Wishes
from aggregator.forward.polar_client import BODY_BYTES_MAX, RequestWindow, Upstream, base_url
from aggregator.forward.sqlite_errors import Unusable, explaining
from aggregator.forward.state import SILENT_US, State
from deploy.console import ids, meters_called, parse_instant
from deploy.errors import USAGE, GiveUp
from deploy.server.control import new_secret, new_token, open_control, revoked
from deploy.server.data import DataDirectory, data_directory
from deploy.server.runtime import configure_logs, leave_when_asked, live_no_longer_than_supervisor
from deploy.settings import Settings
from meters.aggregation import SUMMABLE
from meters.catalogue.access import digest
from meters.catalogue.catalogue import TokenCreated
from meters.timestamps import instant_of, utc_text

# Opening the state: an error becomes one line.

@contextlib.contextmanager
def explained(data: DataDirectory) -> Iterator[None]:
    """Around whatever uses the file. Raises GiveUp where it cannot be used, whenever that shows."""
    try:
        with explaining(data.forwarding):
            yield
    except Unusable as reason:
        raise GiveUp(str(reason)) from reason


@contextlib.contextmanager
def open_state(data: DataDirectory) -> Iterator[State]:
    """The forwarder's state, made if there is none. Raises GiveUp as above."""
    with explained(data), contextlib.closing(State(data.forwarding)) as state:
        yield state


# Status and replays.

LANES = ("raw", "rollup")


def now_us() -> int:
    """The time, UTC, microseconds since 1970."""
    return time.time_ns() // 1000


def nothing_forwarded(data: DataDirectory) -> GiveUp:
    """What to say where no forwarder ever ran."""
    return GiveUp(f"nothing was forwarded from {data.path} yet; set METERSTREAM_POLAR_TOKEN and `meterstream serve`")


@contextlib.contextmanager
def opened(data: DataDirectory) -> Iterator[State]:
    """The forwarder's state. Raises GiveUp when nothing was ever forwarded from here, or its file cannot be used."""
    if not data.forwarding.exists():
        raise nothing_forwarded(data)
    with open_state(data) as state:
        yield state


def status(data: DataDirectory) -> dict[str, Any]:
    """What a person wants to know, in one look. Raises GiveUp."""
    with opened(data) as state:
        flags, tallies = state.flags(), state.tallies()
        waiting, oldest_waiting_us = state.waiting()
        replays = [f"{replay.number}: {replay.since} to {replay.until}" for replay in state.replays()]
    oldest = [us for us in (flags.get("oldest_us"), oldest_waiting_us) if us is not None]
    sums = {name: sum(tallies.get(lane, {}).get(name, 0) for lane in LANES) for name in ("accepted", "dead")}
    requests = tallies.get("", {})
    return {
        "state": _word(flags),
        "reason": flags.get("stopped") or flags.get("waits_for"),
        "server": flags.get("server"),
        "circuit": flags.get("circuit"),
        "pending": flags.get("pending"),
        "waiting": waiting,
        "polar_clock_behind_seconds": flags.get("skew_us", 0) / 1e6,
        "oldest_unsent": _instant(min(oldest)) if oldest else None,
        "events_per_second": flags.get("rate"),
        "sent": sums["accepted"],
        "duplicates": requests.get("duplicates", 0),
        "refused": sums["dead"],
        "requests": requests.get("requests", 0),
        "postponed": requests.get("postponed", 0),
        "requests_in_last_minute": _requests(data),
        "last_failure": flags.get("last_failure"),
        "replays": "; ".join(replays) or None,
        "as_of": _instant(flags.get("seen_us")),
    }


def _word(flags: dict[str, Any]) -> str:
    if flags.get("paused"):
        return "paused"
    if flags.get("stopped"):
        return "stopped"
    if now_us() - flags.get("seen_us", 0) > SILENT_US and not flags.get("waits_for"):
        return "not running"
    if flags.get("waits_for"):
        return "waits"
    return "forwarding"


def _requests(data: DataDirectory) -> int:
    with contextlib.closing(RequestWindow(data.forwarding, is_reader=True)) as window:
        return window.used()


def _instant(at_us: int | None) -> str | None:
    return None if at_us is None else utc_text(instant_of(at_us))


def ask_replay(data: DataDirectory, since: str, until: str) -> int:
    """Put a range of time in line; its number. Raises GiveUp."""
    start, end = parse_instant(since, "--since"), parse_instant(until, "--until")
    if start >= end:
        raise GiveUp("--until must be later than --since", USAGE)
    with opened(data) as state:
        flags = state.flags()
        if not flags.get("is_raw", True):
            raise GiveUp("only sums are forwarded from here; Polar would count the events themselves beside them")
        if "seen_us" not in flags:
            raise nothing_forwarded(data)
        return state.ask_replay(start.isoformat(), end.isoformat(), now_us())


def ask_to_adopt(data: DataDirectory, begin: str) -> None:
    """Have the forwarder read the log that is here from ``begin`` on: beginning, now, or a time of ingestion.

    Raises GiveUp unless forwarding stopped because the log is another one.
    """
    if begin not in ("beginning", "now"):
        begin = parse_instant(begin, "--from (unless it is beginning or now)").isoformat()
    with opened(data) as state:
        if not state.flags().get("is_elsewhere"):
            raise GiveUp("forwarding did not stop because of another log, so there is nothing to adopt")
        if begin == "beginning" and state.knows("rollup"):
            raise GiveUp(
                "sums are forwarded from here, and from the beginning they would count twice at Polar; give the time "
                "of the backup that was restored, or now",
                USAGE,
            )
        state.set(adopt=begin)


def dead_letters(data: DataDirectory, limit: int) -> list[dict[str, Any]]:
    """What Polar refuses. Raises GiveUp."""
    with opened(data) as state:
        return [
            {"refused_at": _instant(letter.refused_us), "external_id": letter.external_id, "words": letter.words,
             "event": letter.body.decode()}
            for letter in state.dead(limit)
        ]  # fmt: skip


# The process. If it cannot forward (no organization yet, several organizations, an unknown meter, a refused token),
# it writes the reason into the state, where ``meterstream forward status`` and the metrics show it, and tries again.
# It must never end the server beside it.

TRY_AGAIN_S = 2.0  # after what a person or a starting server will mend
TOKEN_PATIENCE_S = 60.0  # a new token is known to a running aggregator within a second, unless it is far behind
SCOPES = ("events:read", "meters:read")  # all that the feed needs

logger = structlog.get_logger("deploy.forward")


def run(settings: Settings, lifeline: int | None) -> None:
    """Forward until SIGTERM. Raises GiveUp when there is nothing to forward with."""
    leave_when_asked()
    if lifeline is not None:
        live_no_longer_than_supervisor(lifeline)
    configure_logs("forwarder", settings.log_level)
    if not settings.polar_token:
        raise GiveUp("forwarding needs a token of the Polar organization: set METERSTREAM_POLAR_TOKEN", USAGE)
    data = data_directory(settings)
    data.require()
    data.require_directory()
    with alone(data, patient=lifeline is not None), open_state(data) as state:
        state.set(stopped=None, is_elsewhere=None, last_failure=None, last_failure_us=None)
        know_destination(state, settings)
        window = RequestWindow(data.forwarding, settings.polar_requests_per_minute)
        timeout_s = settings.polar_timeout_seconds
        with Upstream(settings.polar_server, settings.polar_token, window, timeout_s=timeout_s) as upstream:
            while True:
                _try(settings, data, state, upstream, is_child=lifeline is not None)
                time.sleep(TRY_AGAIN_S)


def know_destination(state: State, settings: Settings) -> None:
    """Open the server's own books. What one organization took says nothing of another one, and is never sent there."""
    server = base_url(settings.polar_server)
    left = state.turn_to(server)
    if left is not None:
        logger.warning("forwarding_elsewhere", server=server, left=left)
    destination = digest(f"{settings.polar_server} {settings.polar_token}")
    if state.flags().get("destination") != destination:
        state.set(destination=destination, taken_last=None)


def _try(settings: Settings, data: DataDirectory, state: State, upstream: Upstream, *, is_child: bool) -> None:
    """Forward until something has to be set up again."""
    try:
        with (
            explaining(data.forwarding),
            contextlib.closing(open_source(settings, data, state, is_child=is_child)) as source,
        ):
            wishes = wishes_of(settings, source)
            state.set(waits_for=None)
            Forwarder(source, upstream, state, wishes).run()
    except Away as away:
        state.complain(str(away))
        if away.is_denied:
            _forget_old_token(state)
        logger.warning("forwarding_waits", reason=str(away))
    except (GiveUp, Unusable) as reason:
        state.complain(str(reason))
        logger.error("forwarding_waits", reason=str(reason))
    except Exception as error:  # a bug: it is seen to here, and the server beside it goes on
        logger.exception("forwarding_failed")
        state.complain(f"{type(error).__name__}: {error}")


def _forget_old_token(state: State) -> None:
    """Have another token made, unless this one is so young that the aggregator may not have heard of it."""
    known = state.flags().get("feed_token")
    if known is not None and known["made_s"] < time.time() - TOKEN_PATIENCE_S:
        state.set(feed_token=None)


@contextlib.contextmanager
def alone(data: DataDirectory, patient: bool) -> Iterator[None]:
    """One forwarder for a data directory. Raises GiveUp if there is another, unless it is waited for."""
    lock = os.open(data.path / "forward.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            raise GiveUp(f"another process forwards the events of {data.path} already") from None
        yield
    finally:
        os.close(lock)


def open_source(settings: Settings, data: DataDirectory, state: State, *, is_child: bool = False) -> Source:
    """The feed of this directory's aggregator, with a token made for it, or of the server at --url. Raises GiveUp.

    A child of ``serve`` has the aggregator beside it, though its socket may not be there yet.
    """
    if not is_child and not data.socket.exists() and settings.token:
        return Source(settings.url, settings.token)
    organization = settings.polar_organization
    known = state.flags().get("feed_token")
    if known is None or known["organization"] != organization:
        known = {"organization": organization, "secret": new_secret(), "made_s": time.time()}
        with open_control(data) as control:
            owner = control.organization(organization, "METERSTREAM_POLAR_ORGANIZATION")
            token = new_token(owner, "forwarder", known["secret"], SCOPES)
            control.decide([TokenCreated(token)])
        state.set(feed_token=known)
    return Source("", known["secret"], data.socket)


def wishes_of(settings: Settings, source: Source) -> Wishes:
    """What the settings ask for. Raises GiveUp for a meter that there is not or that cannot be rolled up, Away."""
    wanted = [name.strip() for name in settings.polar_rollup.split(",") if name.strip()]
    meters = source.meters() if wanted or settings.polar_meter else []
    rolled = [_meter(meters, name) for name in wanted]
    for meter in rolled:
        if meter["aggregation"]["func"] not in SUMMABLE:
            raise GiveUp(
                f"the meter {meter['name']!r} cannot be rolled up: parts of {meter['aggregation']['func']} do not add "
                f"up to the whole ({' and '.join(SUMMABLE)} do); forward its events instead"
            )
    selection = selection_of(settings, meters)
    return Wishes(
        selection=selection, is_raw=not rolled or selection != Selection(), begin=settings.polar_from,
        meters=tuple(RolledMeter(meter["id"], meter["aggregation"]["func"]) for meter in rolled),
        window_s=settings.polar_rollup_seconds, batch_events=settings.polar_batch_events,
    )  # fmt: skip


def selection_of(settings: Settings, meters: Sequence[dict[str, Any]]) -> Selection:
    """What is forwarded at all; ``meters`` are the organization's, if the settings name one. Raises GiveUp."""
    return Selection(
        names=tuple(name.strip() for name in settings.polar_events.split(",") if name.strip()),
        meter_id=_meter(meters, settings.polar_meter)["id"] if settings.polar_meter else None,
        filter=settings.polar_filter,
    )


def _meter(meters: Sequence[dict[str, Any]], wanted: str) -> dict[str, Any]:
    found = meters_called(meters, wanted)
    if len(found) > 1:
        raise GiveUp(f"there is more than one meter {wanted!r}; give the id of one: {ids(found)}")
    if not found:
        names = ", ".join(sorted(str(meter["name"]) for meter in meters)) or "none"
        raise GiveUp(f"there is no meter {wanted!r}; there are: {names}")
    return found[0]


# The plan. It is based on the last day: its events, their size and its busiest minute. Polar's limit counts requests,
# so what matters is how many events fit into one request: the number in the settings, or fewer if the events are
# large.

DAY = timedelta(days=1)
MINUTES = 24 * 60
ENVELOPE_BYTES = 160  # names of fields, a timestamp and a customer beside the metadata
TOKEN_S_MAX = 10.0  # until the aggregator knows a new token, nearly always within a second
AGAIN_S = 0.05
SAFETY = 0.8  # of the limit: the rest is for repetitions, replays and the nightly comparison


def plan(settings: Settings) -> list[dict[str, Any]]:
    """A row for raw events, and one for a rollup of each meter that allows it. Raises GiveUp."""
    data = data_directory(settings)
    data.require()
    data.require_directory()
    try:
        with ExitStack() as stack:
            state = stack.enter_context(_state(data))
            source = stack.enter_context(closing(open_source(settings, data, state)))
            every = _meters(source)
            wishes = wishes_of(settings, source)
            meters = [m for m in every if m["aggregation"]["func"] in SUMMABLE and not m["archived_at"]]
            since, ids = datetime.now(UTC) - DAY, [meter["id"] for meter in meters]
            traffic = source.traffic(since, wishes.selection, ids, wishes.window_s)
    except Away as away:
        raise GiveUp(f"{away}; a plan needs a running server on {data.path}") from None
    rolled = {rollup["meter_id"]: rollup["events"] for rollup in traffic["rollups"]}
    raw = _row("raw", traffic["events"], traffic["metadata_bytes"], traffic["busiest_minute"], settings)
    rows = [_rollup_row(meter, rolled[meter["id"]], settings) for meter in meters]
    return [raw | {"about": _about(raw, traffic["events"])}, *rows]


def _meters(source: Source) -> list[dict[str, Any]]:
    """The organization's meters, as soon as a token that was made just now is known. Raises Away."""
    until_s = time.monotonic() + TOKEN_S_MAX
    while True:
        try:
            return source.meters()
        except Away as away:
            if not away.is_denied or time.monotonic() > until_s:
                raise
            time.sleep(AGAIN_S)


@contextmanager
def _state(data: DataDirectory) -> Iterator[State]:
    """The forwarder's state; where nothing is forwarded one for this look alone, whose token is taken back."""
    if data.forwarding.exists():
        with open_state(data) as state:
            yield state
        return
    with TemporaryDirectory(prefix="meterstream-plan-") as place, closing(State(Path(place) / "state")) as state:
        try:
            yield state
        finally:
            _take_back(data, state.flags().get("feed_token"))


def _take_back(data: DataDirectory, made: dict[str, Any] | None) -> None:
    if made is None:
        return
    with open_control(data) as control:
        control.decide([revoked(control.catalogue.tokens[digest(made["secret"])])])


def _row(way: str, events: int, size: int, busiest_minute: int, settings: Settings) -> dict[str, Any]:
    event_bytes = size / max(events, 1) + ENVELOPE_BYTES
    per_request = max(1, min(settings.polar_batch_events, int(BODY_BYTES_MAX / event_bytes)))
    limit = settings.polar_requests_per_minute
    busiest = ceil(busiest_minute / per_request)
    return {
        "way": way, "events": events, "requests": ceil(events / per_request), "busiest_minute_requests": busiest,
        "events_per_request": per_request, "fits": busiest <= limit * SAFETY,
        "events_per_minute_max": limit * per_request,
    }  # fmt: skip


def _about(raw: dict[str, Any], events: int) -> str:
    if not events:
        return "nothing came in during the last day"
    if raw["fits"]:
        return "the busiest minute fits with room to spare"
    if ceil(raw["requests"] / MINUTES) <= raw["events_per_minute_max"] / raw["events_per_request"] * SAFETY:
        return "fits over the day, but busy minutes are worked off later"
    return "does not fit; raise the limit or roll up"


def _rollup_row(meter: dict[str, Any], events: int, settings: Settings) -> dict[str, Any]:
    window_s = settings.polar_rollup_seconds
    per_minute = ceil(events / MINUTES * max(1, window_s / 60))
    row = _row(f"rollup of {meter['name']}", events, events * ENVELOPE_BYTES, per_minute, settings)
    return row | {"about": f"an event per customer and {window_s} s; Polar's meter sums `value` where meter is its id"}
