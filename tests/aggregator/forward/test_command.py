"""``meterstream serve`` with a Polar token forwards by itself, and ``meterstream forward`` is its cockpit."""

import contextlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aggregator.forward.feed_client import Selection, item_of
from aggregator.forward.planner import Reached
from aggregator.forward.state import State
from deploy.client import Session
from deploy.console import Output
from deploy.doctor import examine
from deploy.errors import GiveUp
from deploy.forwarding import ask_replay, open_source, selection_of, status
from deploy.reconcile.local import Task
from deploy.reconcile.run import prove
from deploy.server.data import DataDirectory
from deploy.settings import Secret, Settings
from tests.aggregator.forward.test_forwarder import events, ids
from tests.support.polar.proxy import POISON, Polar, send, stored
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually


class Site:
    """A server that forwards to the proxy, and the command line beside it."""

    def __init__(self, place: Installation, polar: Polar) -> None:
        self.place, self.polar = place, polar

    def forward(self, *arguments: str) -> Any:
        """What ``meterstream forward ...`` answers, as JSON if it is one."""
        done = self.place.run("forward", *arguments, "--output", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout else done.stderr

    def status(self) -> Any:
        """What ``meterstream forward status`` shows, without starting a process for each look."""
        return status(DataDirectory(self.place.data))

    def metrics(self) -> dict[str, float]:
        """The metrics of forwarding."""
        text = self.place.get("/metrics").text
        found = re.findall(r"^meterstream_forward_(\w+)(?:{[^}]*})? (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def quick(upstream: Installation) -> Iterator[Polar]:
    """The proxy, on the world's clock."""
    proxy = Polar(upstream, lambda: int(datetime.now(UTC).timestamp() * 1e6))
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, quick: Polar) -> Iterator[Site]:
    """See the class; told by its environment, as an operator would."""
    place = Installation(tmp_path_factory.mktemp("site") / "data")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("METERSTREAM_POLAR_TOKEN", "polar_oat_upstream")
        environment.setenv("METERSTREAM_POLAR_SERVER", quick.url)
        place.start()
    yield Site(place, quick)
    place.close()


def test_serve_forwards(site: Site, upstream: Installation, name: str) -> None:
    """What is ingested arrives at Polar; status and metrics say so; a pause is a pause; poison is listed."""
    send(site.place, events(name, 40))
    eventually(lambda: site.metrics().get("accepted") == 40)
    site.forward("pause")
    poison, *more = events(name, 50)[40:]
    send(site.place, [poison | {"external_id": POISON + name}, *more])
    eventually(lambda: site.status()["pending"] == 10)
    assert site.status()["state"] == "paused"
    eventually(lambda: site.metrics().get("paused") == 1)
    assert site.forward("resume") == "Forwarding goes on.\n"
    eventually(lambda: site.status()["sent"] == 49)
    eventually(lambda: site.status()["pending"] == 0)
    shown = site.forward("status")
    assert (shown["state"], shown["circuit"], shown["refused"]) == ("forwarding", "closed", 1)
    (letter,) = site.forward("dead")
    assert (letter["external_id"], letter["words"]) == (POISON + name, "customer_id: Customer not found.")
    eventually(lambda: len(stored(upstream, name)) == 49)
    assert sorted(ids(stored(upstream, name))) == sorted(event["external_id"] for event in [*events(name, 40), *more])


def test_a_stop_is_visible_and_counting_goes_on(site: Site, name: str) -> None:
    """A refused token stops forwarding alone: events are still taken and counted, and the reason is in sight."""
    site.polar.is_denied = True
    send(site.place, events(name, 5))
    eventually(lambda: site.status()["state"] == "stopped")
    assert "give a token of its organization" in site.status()["reason"]
    eventually(lambda: site.metrics().get("stopped") == 1)
    assert len(stored(site.place, name)) == 5
    site.polar.is_denied = False
    site.forward("resume")
    eventually(lambda: site.status()["state"] == "forwarding")
    eventually(lambda: site.metrics().get("stopped") == 0)


def test_a_damaged_file_stops_forwarding_alone(
    tmp_path: Path, quick: Polar, upstream: Installation, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever needs the file says so in a line, whoever does not goes on, and with the file away all is forwarded."""
    monkeypatch.setenv("METERSTREAM_POLAR_TOKEN", "polar_oat_upstream")
    monkeypatch.setenv("METERSTREAM_POLAR_SERVER", quick.url)
    with contextlib.closing(Installation(tmp_path / "data")) as place:
        place.start()
        assert place.stop() == 0
        data, begun = DataDirectory(place.data), place.log.count('"child": "forwarder"')
        data.forwarding.write_bytes(b"this is no database " * 500)
        place.start()
        send(place, events(name, 5))
        eventually(lambda: place.log.count('"child": "forwarder"') >= begun + 2)
        eventually(lambda: Site(place, quick).metrics() == {"stopped": 1.0})

        with pytest.raises(GiveUp, match=r"forward.sqlite is damaged \(file is not a database\): stop everything"):
            status(data)
        assert [finding.part for finding in examine(data) if finding.heal] == ["forwarding"]
        settings = Settings(data=place.data, polar_token=Secret("polar_oat_upstream"), polar_server=quick.url)
        report = prove(Session(settings, Output.json), Task(checks=("log", "ledger", "upstream")))
        assert [(check.name, "is damaged" in check.skipped) for check in report.checks if check.has_failed] == [
            ("ledger", True), ("upstream", True)
        ]  # fmt: skip

        data.forwarding.unlink()
        eventually(lambda: ids(stored(upstream, name)) == ids(events(name, 5)))
        assert place.stop() == 0


def test_a_replay_is_asked_for_by_its_times(site: Site) -> None:
    """It runs in the background; times that make no sense are refused."""
    now = datetime.now(UTC)
    before = site.status()["duplicates"]
    asked = site.forward("replay", "--since", (now - timedelta(hours=1)).isoformat(), "--until", now.isoformat())
    assert asked["replay"] >= 1
    eventually(lambda: site.status()["replays"] is None)
    assert site.status()["duplicates"] > before
    wrong = site.place.run("forward", "replay", "--since", "yesterday", "--until", "today")
    assert (wrong.returncode, wrong.stderr.startswith("meterstream: --since takes a time")) == (2, True)


def test_sums_are_not_replayed(tmp_path: Path) -> None:
    """Where Polar has nothing but sums, the events of a range would count beside them."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(State(data.forwarding)) as state:
        state.set(is_raw=False)
        with pytest.raises(GiveUp, match="only sums are forwarded"):
            ask_replay(data, "2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z")
        assert state.replays() == []


def test_a_meter_that_is_forwarded_is_one_meter() -> None:
    """By its id or its name; who forwards and who compares give up alike where that is none, or more than one."""
    meters = [{"id": "1", "name": "calls"}, {"id": "2", "name": "tokens"}, {"id": "3", "name": "tokens"}]
    for wanted in ("1", "calls"):
        assert selection_of(Settings(polar_meter=wanted, polar_events="a, b"), meters) == Selection(("a", "b"), "1")
    for wanted, words in (("token", "there is no meter"), ("tokens", "more than one meter")):
        with pytest.raises(GiveUp, match=words):
            selection_of(Settings(polar_meter=wanted), meters)


def test_a_plan_weighs_raw_events_against_rollups(site: Site, name: str) -> None:
    """From what came in during the last day: requests, the busiest minute, and what each summable meter would send."""
    assert site.place.run("meters", "create", "--name", "the sum", "--sum", "n").returncode == 0
    assert site.place.run("meters", "create", "--name", "the mean", "--avg", "n").returncode == 0
    send(site.place, events(name, 30, customers=3, timestamp="2026-03-01T10:00:00Z"))
    raw, *rollups = site.forward("plan")
    assert (raw["way"], raw["fits"], raw["events"] >= 30) == ("raw", True, True)
    assert [row["way"] for row in rollups] == ["rollup of the sum"]
    assert 3 <= rollups[0]["events"] < raw["events"]


def test_without_a_token_there_is_nothing_to_forward_with(tmp_path: Path) -> None:
    """The command says which setting it lacks, or which option is wrong, and looks have nothing to show."""
    place = _nowhere(tmp_path)
    for arguments, code, words in (
        ((), 2, "set METERSTREAM_POLAR_TOKEN"),
        (("--server", "polar"), 2, "--server: 'polar' is neither production, sandbox nor a URL"),
        (("status",), 1, "nothing was forwarded from"),
    ):
        done = place.run("forward", *arguments)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_beside_an_aggregator_alone_the_feed_has_an_address(ours: Installation, tmp_path: Path, name: str) -> None:
    """Where there is no socket, the address and the token of the settings are what the feed is read with."""
    send(ours, events(name, 3))
    settings = Settings(data=tmp_path, url=ours.url, token=Secret(ours.token))
    with (
        contextlib.closing(State(tmp_path / "forward.sqlite")) as state,
        contextlib.closing(open_source(settings, DataDirectory(tmp_path), state)) as source,
    ):
        found = source.page(Reached({}, None), Selection(names=(name,)), 10)

    assert [item_of(entry, "raw").external_id for entry in found.entries] == ids(events(name, 3))


def _nowhere(path: Path) -> Installation:
    place = Installation(path / "data")
    place.close()
    return place
