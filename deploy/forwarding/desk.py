"""What an operator sees of forwarding and asks of it: reads and writes the forwarder's state, beside the forwarder."""

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from aggregator.forward.metrics import SILENT_US
from aggregator.forward.request_window import RequestWindow
from aggregator.forward.state import State
from deploy.data import DataDirectory
from deploy.forwarding.file import open_state
from deploy.giving_up import USAGE, GiveUp
from deploy.typed import parse_instant

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
    if at_us is None:
        return None
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us)).isoformat().replace("+00:00", "Z")


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


def dead_letters(data: DataDirectory, limit: int) -> list[dict[str, Any]]:
    """What Polar refuses. Raises GiveUp."""
    with opened(data) as state:
        return [
            {"refused_at": _instant(letter.refused_us), "external_id": letter.external_id, "words": letter.words,
             "event": letter.body.decode()}
            for letter in state.dead(limit)
        ]  # fmt: skip
