"""The forwarder's file belongs to one log and store: over another one nothing is skipped in silence."""

import contextlib
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aggregator.forward.forwarder import NOTE_LATE_US
from aggregator.forward.planner import Reached
from aggregator.forward.state import State
from deploy.errors import GiveUp
from deploy.forwarding import ask_to_adopt
from deploy.server.data import DataDirectory
from tests.aggregator.forward.test_command import Site
from tests.aggregator.forward.test_forwarder import Room, events, ids, room
from tests.support.polar.forwarder import Clocks
from tests.support.polar.proxy import Polar, send, stored
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

__all__ = ["room"]

ALERTS = Path(__file__).parents[3] / "deploy" / "observability" / "alerts.yaml"


@pytest.fixture
def site(
    tmp_path: Path, upstream: Installation, polar: Polar, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """A server that forwards by itself, told by its environment."""
    monkeypatch.setenv("METERSTREAM_POLAR_TOKEN", "polar_oat_upstream")
    monkeypatch.setenv("METERSTREAM_POLAR_SERVER", polar.url)
    monkeypatch.setenv("METERSTREAM_POLAR_REQUESTS_PER_MINUTE", "6000")
    with contextlib.closing(Installation(tmp_path / "data")) as place:
        place.start()
        yield Site(place, polar)


def log_restored(site: Site, name: str) -> None:
    """Ten events are forwarded, of which the backup of the log has four; the log is restored and the store rebuilt."""
    every, copy = events(name, 10), site.place.data.with_name("copy.sqlite")
    send(site.place, every[:4])
    eventually(lambda: site.status()["sent"] == 4)
    assert site.place.stop() == 0
    with contextlib.closing(sqlite3.connect(DataDirectory(site.place.data).log)) as log:
        log.execute("VACUUM INTO ?", [str(copy)])
    site.place.start()
    for event in every[4:]:  # each a record of its own
        send(site.place, [event])
    eventually(lambda: site.status()["sent"] == 10)
    assert site.place.stop() == 0
    for part in site.place.data.glob("log.sqlite*"):
        part.unlink()
    shutil.move(copy, site.place.data / "log.sqlite")
    assert site.place.run("rebuild").returncode == 0


def test_a_restored_log_stops_forwarding_until_it_is_adopted(site: Site, upstream: Installation, name: str) -> None:
    """Six new events take the places of six lost ones. Nobody hears of that by accident, and all six arrive."""
    log_restored(site, name)
    site.place.start()
    new = [event | {"external_id": f"new-{event['external_id']}"} for event in events(name, 6)]
    for event in new:
        send(site.place, [event])

    eventually(lambda: site.status()["state"] == "stopped")
    shown = site.status()
    assert "meterstream forward adopt" in shown["reason"]
    eventually(lambda: site.metrics().get("stopped") == 1)
    assert re.search(r'"reason": "[^"]*meterstream forward adopt.*"event": "forwarding_stopped"', site.place.log)
    alerts = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in alerts if rule.get("expr") == "meterstream_forward_stopped == 1"]

    assert "beginning" in site.forward("adopt", "--from", "beginning")
    eventually(lambda: site.status()["state"] == "forwarding")
    eventually(lambda: len(stored(upstream, name)) == 16)
    assert sorted(ids(stored(upstream, name))) == sorted(ids(events(name, 10) + new))
    assert site.metrics().get("stopped") == 0


def test_a_store_rebuilt_from_the_same_log_goes_on(site: Site, upstream: Installation, name: str) -> None:
    """The places are those of the same events: nobody has to do anything, and nothing is sent twice."""
    send(site.place, events(name, 5))
    eventually(lambda: site.status()["sent"] == 5)
    assert site.place.stop() == 0
    assert site.place.run("rebuild").returncode == 0
    site.place.start()
    send(site.place, events(name, 8)[5:])
    eventually(lambda: site.status()["sent"] == 8)
    assert site.polar.committed == ids(events(name, 8))


def test_a_restored_backup_goes_on_where_its_own_file_was(site: Site, upstream: Installation, name: str) -> None:
    """Log and forwarder's file are of one backup, made while both were at work: new events are sent by themselves."""
    every, copy = events(name, 12), site.place.data.with_name("copy")
    send(site.place, every[:4])
    eventually(lambda: site.status()["sent"] == 4)
    assert site.place.run("backup", str(copy)).returncode == 0
    send(site.place, every[4:6])
    eventually(lambda: site.status()["sent"] == 6)
    assert site.place.stop() == 0
    assert site.place.run("restore", str(copy)).returncode == 0
    site.place.start()
    send(site.place, every[6:])

    eventually(lambda: len(stored(upstream, name)) == 12)
    assert site.status()["state"] == "forwarding"
    assert sorted(ids(stored(upstream, name))) == sorted(ids(every))


@pytest.mark.parametrize("witness", ["another event", "behind the end"])
def test_a_position_of_another_log_is_refused(room: Room, clocks: Clocks, witness: str) -> None:
    """Also where a filter passed over what stands before it; the position does not move, and nothing is sent."""
    room.send(events(room.name, 5))
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(5))
        position, witnesses = running.state.reached("raw")
        if witness == "another event":
            running.state.recognize("raw", dict.fromkeys(witnesses or {}, "0" * 16))
        else:
            ahead = {partition: (offset + 9, 0) for partition, (offset, _) in position.items()}
            running.state.mark("raw", [], Reached(ahead, witnesses), clocks.now_us())
        stood = running.state.reached("raw")
        room.send(events(room.name, 10)[5:])
        running.until(lambda: running.state.flags().get("stopped"))
        for _ in range(3):
            running.clocks.pause(running.forwarder.turn())

        assert running.state.reached("raw") == stood
        assert running.books()["taken"] == 5
        assert running.state.flags()["is_elsewhere"] is True

        running.state.set(adopt="now")
        running.until(lambda: not running.state.flags().get("adopt"))
        room.send([events(room.name, 11)[10]])
        running.until(lambda: running.done(6))
        assert "stopped" not in running.state.flags()


def test_a_position_of_a_time_is_where_its_events_begin(room: Room, clocks: Clocks) -> None:
    """What came in since the time of a restored backup is sent, and nothing older."""
    room.send(events(room.name, 3))
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(3))
        before = room.ours.get("/v1/feed/", name=room.name).json()["items"]
        room.send(events(room.name, 4)[3:])
        running.until(lambda: running.done(4))
        (last,) = room.ours.get("/v1/feed/", name=room.name).json()["items"][len(before) :]
        running.state.set(adopt=last["ingested_at"])
        running.until(lambda: running.done(5))
        assert running.state.tallies()[""]["duplicates"] == 1


@pytest.mark.parametrize("is_another", [False, True])
def test_a_file_of_an_earlier_version_is_adopted_safely(room: Room, clocks: Clocks, is_another: bool) -> None:
    """It has no witness. Of this log is a position before which nothing came in since forwarding was last at work."""
    room.send(events(room.name, 5))
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(5))
        position, _ = running.state.reached("raw")
        seen_us = clocks.now_us() - (2 * NOTE_LATE_US + int(clocks.speed * 60e6) if is_another else 0)
        running.state.mark("raw", [], Reached(position, None), clocks.now_us())
        running.state.set(seen_us=seen_us)
        assert running.state.reached("raw").witnesses is None
    room.send(events(room.name, 8)[5:])
    with room.forwarder(clocks) as running:
        if is_another:
            running.until(lambda: running.state.flags().get("stopped"))
            assert "after forwarding was last at work" in running.state.flags()["stopped"]
            assert running.books()["taken"] == 5
        else:
            running.until(lambda: running.done(8))
            assert running.state.reached("raw").witnesses


def test_a_feed_reader_is_told_of_another_log(room: Room) -> None:
    """The position of an answer is good with its witness, and 409 with another one; a wrong text is 422."""
    room.send(events(room.name, 3))
    page = room.ours.get("/v1/feed/", name=room.name).json()
    known = {"position": page["position"], "witness": page["witness"]}
    assert room.ours.get("/v1/feed/", **known).status_code == 200
    assert room.ours.get("/v1/feed/position", **known).json()["witness"] == page["witness"]
    other = room.ours.get("/v1/feed/", **known | {"witness": "0:0000000000000000"})
    assert (other.status_code, other.json()["error"]) == (409, "Conflict")
    assert room.ours.get("/v1/feed/", position="0:999999:0").status_code == 409
    assert room.ours.get("/v1/feed/", **known | {"witness": "x"}).status_code == 422


def test_only_another_log_is_adopted(tmp_path: Path) -> None:
    """Forwarding that goes on stays where it is; sums are not sent from the beginning, where they would count twice."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(State(data.forwarding)) as state:
        state.begin("rollup", Reached({}, {}), 1)
        with pytest.raises(GiveUp, match="nothing to adopt"):
            ask_to_adopt(data, "now")
        state.set(is_elsewhere=True)
        with pytest.raises(GiveUp, match="would count twice at Polar"):
            ask_to_adopt(data, "beginning")
        with pytest.raises(GiveUp, match="--from"):
            ask_to_adopt(data, "yesterday")
        ask_to_adopt(data, "2026-03-01T00:00:00Z")
        assert state.flags()["adopt"] == "2026-03-01T00:00:00+00:00"
