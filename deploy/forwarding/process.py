"""The forwarder's process: a data directory's state, the feed of its aggregator, and Polar.

Whatever keeps it from forwarding (no organization yet, an ambiguous one, a meter that does not exist, a refused token)
is written into the state, where ``meterstream forward status`` and the metrics show it, and tried again: it must never
take down the server beside it.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import structlog

from aggregator.forward.forwarder import Forwarder, RolledMeter, Wishes
from aggregator.forward.opening import Unusable, explaining
from aggregator.forward.request_window import RequestWindow
from aggregator.forward.source import Away, Selection, Source
from aggregator.forward.state import State
from aggregator.forward.upstream import Upstream, base_url
from deploy.control import new_secret, new_token, open_control
from deploy.data import DataDirectory, data_directory
from deploy.forwarding.file import open_state
from deploy.giving_up import USAGE, GiveUp
from deploy.lifeline import leave_when_asked, live_no_longer_than_supervisor
from deploy.logs import configure_logs
from deploy.settings import Settings
from deploy.typed import ids, meters_called
from meters.access import digest
from meters.aggregation import SUMMABLE
from meters.catalogue import TokenCreated

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
    with _alone(data, patient=lifeline is not None), open_state(data) as state:
        state.set(stopped=None, last_failure=None, last_failure_us=None)
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
def _alone(data: DataDirectory, patient: bool) -> Iterator[None]:
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
