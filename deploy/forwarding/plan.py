"""``meterstream forward plan``: does the traffic fit through the limit, and what would a rollup cost?

Judged by the last day: its events, their size, its busiest minute. A limit counts requests, so what matters is how many
events a request carries: the setting's number of them, or fewer where they are large.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aggregator.forward.source import Away, Source
from aggregator.forward.state import State
from aggregator.forward.upstream import BODY_BYTES_MAX
from deploy.control import open_control, revoked
from deploy.data import DataDirectory, data_directory
from deploy.forwarding.file import open_state
from deploy.forwarding.process import open_source, wishes_of
from deploy.giving_up import GiveUp
from deploy.settings import Settings
from meters.access import digest
from meters.aggregation import SUMMABLE

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
