"""The client and everything around it under faults: acknowledged + spooled + rejected = captured, and nothing twice.

What was captured is what an application wrote down itself; what was acknowledged is what the server's log holds; what
counts is what its store says. Every test prints its figures.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingest.client import Ingestion, Limits, Rejection
from ingest.client.spool import Spool, fingerprint, spools
from ingest.log import open_log
from meters.log import USAGE_EVENTS
from tests.support.faults.small_disk import SmallDisk
from tests.support.faults.store_checks import SEED
from tests.support.servers.faulty_gateway import Bad, Events, FaultServer, refusal
from tests.support.servers.killable_server import TOKEN, Server
from tests.support.waiting import eventually

pytestmark = pytest.mark.vendors

QUICK = Limits(linger_s=0.01, backoff_s=0.01, backoff_s_max=0.1, close_s_max=30)
KILLS, KILLS_LONG = 4, 40
ABSENCE_S, ABSENCE_LONG_S = 1.5, 30.0
STORM_EVENTS, STORM_EVENTS_LONG = 6_000, 100_000
PATIENCE_S = 60
TAKEN_AND_CUT = Bad(-1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A whole Meterstream."""
    running = Server(tmp_path / "data", tmp_path / "server.log")
    try:
        running.start()
        yield running
    finally:
        running.close()


def url(server: Server | FaultServer) -> str:
    """Where it listens."""
    return f"http://127.0.0.1:{server.port}"


class Application:
    """One of ``tests.support.client_applications`` that writes down what it captures."""

    def __init__(self, name: str, server: Server | FaultServer, spool: Path, notes: Path, *more: str) -> None:
        where = (url(server), str(spool), TOKEN, *more)
        command = [sys.executable, "-m", "tests.support.client_applications", name, *where]
        self.notes = notes
        with notes.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)

    def captured(self) -> list[str]:
        """Ids, as far as they were written down; the last line may be half a one."""
        text = self.notes.read_text()
        return text[: text.rfind("\n") + 1].split()

    def capture_more(self, events: int) -> None:
        """Wait until it has captured so many more."""
        goal = len(self.captured()) + events
        eventually(lambda: len(self.captured()) >= goal)

    def end(self, number: int) -> None:
        """Send a signal and wait."""
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)


def logged(server: Server) -> list[str]:
    """The id of every event called "call" in the server's log; an id occurs as often as it was sent."""
    log = open_log(str(server.data))
    try:
        position, found = 0, []
        while records := log.read(USAGE_EVENTS, {0: position}, bytes_max=8 << 20):
            lines = (line for record in records for line in record.value.split(b"\n"))
            found += [event["external_id"] for event in map(msgspec.json.decode, lines) if event["name"] == "call"]
            position = records[-1].offset + 1
        return found
    finally:
        log.close()


def spooled(directory: Path, server: Server | FaultServer) -> set[str]:
    """The ids in the files of processes that are gone."""
    found: set[str] = set()
    for spool in filter(Spool.claim, spools(directory, [fingerprint(url(server), TOKEN)])):
        found |= {msgspec.json.decode(line)["external_id"] for _, line in spool.read(-1, 1 << 30)}
        spool.close()
    return found


def say(record_property: Callable[[str, object], None], text: str) -> None:
    """Print figures, whether the test is quiet or not."""
    record_property("figures", f"{text}")


def test_kill_9_of_a_client_under_load(
    server: Server, tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Killed at any moment, again and again: what it captured is in the server's log or in the spool, then in the log;
    it is counted once."""
    choose, spool, notes = random.Random(SEED), tmp_path / "spool", tmp_path / "notes"
    kills, resent = KILLS_LONG if long else KILLS, 0
    for _ in range(kills):
        application = Application("runs", server, spool, notes)
        application.capture_more(choose.randrange(500, 4000))
        application.end(signal.SIGKILL)
        left = spooled(spool, server)
        resent += len(left)
        assert set(application.captured()) <= set(logged(server)) | left
    captured, last = set(application.captured()), Application("collects", server, spool, tmp_path / "none")
    assert last.process.wait(PATIENCE_S) == 0
    sent = logged(server)
    counted = server.calls()
    say(
        record_property,
        f"kill -9 of a client: seed {SEED}, {kills} kills, {len(captured)} captured, {resent} found in spools, "
                f"{len(sent)} lines in the log, {counted} counted")  # fmt: skip

    assert captured <= set(sent)
    assert len(set(sent) - captured) <= kills  # captured, and killed before that was written down
    assert counted == len(set(sent))
    assert not list(spool.glob("*.spool"))


def test_kill_9_while_the_journal_moves(
    tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Killed while events are settled in the journal, moved into the SQLite file and read back from it, by a server
    that takes every other request, rejects some events and cuts connections: each event is acknowledged, rejected or
    in the spool at any time."""
    choose, spool, notes = random.Random(SEED), tmp_path / "spool", tmp_path / "notes"
    kills, moved, rejected = KILLS_LONG if long else KILLS, 0, set[str]()

    def script(batch: Events, number: int) -> Bad | None:
        refused = [each["external_id"] for each in batch if each["metadata"]["n"] == 77]
        if number % 2 or refused:
            rejected.update(refused)
            return refusal(*((index, "EventCreateCustomer.metadata") for index, each in enumerate(batch)
                             if each["external_id"] in refused)) if refused else TAKEN_AND_CUT  # fmt: skip
        return None

    with FaultServer(script) as server:
        for _ in range(kills):
            application = Application("runs_short_of_memory", server, spool, notes)
            application.capture_more(choose.randrange(200, 3000))
            application.end(signal.SIGKILL)
            left = spooled(spool, server)
            moved += len(left)
            assert set(application.captured()) <= set(server.taken) | rejected | left
        captured, last = set(application.captured()), Application("collects", server, spool, tmp_path / "none")
        assert last.process.wait(PATIENCE_S) == 0
    say(
        record_property,
        f"kill -9 while the journal moves: seed {SEED}, {kills} kills, {len(captured)} captured, {moved} found in "
                f"spools, {len(server.taken)} acknowledged, {len(rejected)} rejected")  # fmt: skip

    assert captured <= set(server.taken) | rejected
    assert rejected.isdisjoint(server.taken)
    assert len(set(server.taken) | rejected) - len(captured) <= kills  # captured, and killed before it was written down
    assert list(spool.iterdir()) == []


def test_a_process_takes_over_from_one_that_was_killed(
    server: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two processes share a directory. One is killed; the other sends what it left, while it goes on itself."""
    spool = tmp_path / "spool"
    first, second = (Application("runs", server, spool, tmp_path / name, "30") for name in ("first", "second"))
    eventually(lambda: len(first.captured()) > 2000 and len(second.captured()) > 500)
    first.end(signal.SIGKILL)
    captured = set(first.captured())
    eventually(lambda: captured <= set(logged(server)))
    eventually(lambda: len(list(spool.glob("*.spool"))) == 1)  # what was left is taken over, whether it was sent or not
    second.capture_more(500)
    second.end(signal.SIGTERM)
    captured |= set(second.captured())
    sent, counted = logged(server), server.calls()
    say(
        record_property,
        f"two processes, one spool, one killed: {len(captured)} captured, {len(sent)} lines, {counted} counted")

    assert second.process.returncode == 128 + signal.SIGTERM
    assert captured <= set(sent)
    assert len(set(sent) - captured) <= 2
    assert counted == len(set(sent))
    left = spooled(spool, server)
    assert len(left) <= 1  # SIGTERM may come in the middle of a capture, which then never returns
    assert left.isdisjoint(captured)


def event(number: int, **metadata: Any) -> dict[str, Any]:
    """An event called "call"."""
    return {"name": "call", "external_customer_id": f"u{number % 10}", "metadata": {"n": number, **metadata}}


def assert_adds_up(ingestion: Ingestion) -> None:
    """Every event is in one place."""
    stats = ingestion.stats()
    assert stats.captured + stats.adopted == stats.acknowledged + stats.pending + stats.rejected + stats.dropped


@pytest.mark.parametrize("has_spool", [False, True])
def test_a_server_that_is_away(
    server: Server, tmp_path: Path, long: bool, has_spool: bool, record_property: Callable[[str, object], None]
) -> None:
    """Killed for a while and started again: the application noticed nothing, and every event counts once."""
    absence_s, slowest_s = ABSENCE_LONG_S if long else ABSENCE_S, 0.0
    spool = tmp_path / "spool" if has_spool else None
    with Ingestion(TOKEN, base_url=url(server), spool=spool, limits=QUICK) as client:
        for number in range(500):
            client.ingest(event(number))
        server.kill("server")
        back_s = time.monotonic() + absence_s
        while time.monotonic() < back_s:
            began_s = time.monotonic()
            assert client.ingest(event(client.stats().captured))
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            time.sleep(0.0005)
        while_away = client.stats()
        server.start()
        assert client.flush(PATIENCE_S)
        stats = client.stats()
        assert_adds_up(client)
    counted = server.calls()
    say(
        record_property,
        f"server away for {absence_s} s, spool {has_spool}: {stats.captured} captured, {while_away.pending} "
                f"waited, slowest capture {slowest_s * 1000:.1f} ms, {counted} counted")  # fmt: skip

    assert counted == stats.acknowledged == stats.captured


def test_a_storm_of_everything(tmp_path: Path, long: bool, record_property: Callable[[str, object], None]) -> None:
    """Requests that meet 429, 503, 500, cut connections and lost answers at random, and events that are poison in two
    ways: the good ones are taken, the poison is handed over, each once."""
    choose, rejected = random.Random(SEED), list[Rejection]()
    events = STORM_EVENTS_LONG if long else STORM_EVENTS
    answers = [Bad(429, {"retry-after": "0"}), Bad(429), Bad(503), Bad(500), Bad(0), Bad(502)]

    def script(batch: Events, number: int) -> Bad | None:
        if choose.random() < 0.4:
            poisoned = any("poison" in each["metadata"] for each in batch)
            return choose.choice(answers if poisoned else [*answers, TAKEN_AND_CUT])
        named = [index for index, each in enumerate(batch) if each["metadata"].get("poison") == "named"]
        if named:
            return refusal(*((index, "EventCreateCustomer.metadata") for index in named))
        return Bad(422) if any("poison" in each["metadata"] for each in batch) else None

    with FaultServer(script) as server, Ingestion(
        "token", base_url=server.url, spool=tmp_path, limits=QUICK, on_rejected=rejected.append
    ) as client:
        for number in range(events):
            die = choose.random()
            poison = {"poison": "named"} if die < 0.003 else {"poison": "nameless"} if die < 0.004 else {}
            client.ingest(event(number, **poison))
        assert client.flush(PATIENCE_S)
        stats = client.stats()
        assert_adds_up(client)
    say(
        record_property,
        f"storm: seed {SEED}, {stats.captured} captured, {stats.acknowledged} acknowledged, {stats.rejected} "
                f"rejected, {stats.requests} requests of which {stats.retries} failed")  # fmt: skip

    assert stats.pending == 0
    assert len(server.taken) == stats.acknowledged == events - len(rejected)
    assert {rejection.event["metadata"]["n"] for rejection in rejected} == set(range(events)) - {
        each["metadata"]["n"] for each in server.events.values()
    }
    assert all("poison" in rejection.event["metadata"] for rejection in rejected)


def test_a_full_disk_under_the_spool(disk: SmallDisk, record_property: Callable[[str, object], None]) -> None:
    """Capturing goes on in memory, sending goes on; with room again the spool is used again, and nothing was lost."""
    is_away = True
    with FaultServer(lambda events, number: Bad(503) if is_away else None) as server:
        with Ingestion("token", base_url=server.url, spool=disk.path / "spool", limits=QUICK) as client:
            for number in range(200):
                assert client.ingest(event(number))
            disk.fill(leave_kib=0)
            while client.stats().unspooled < 300:
                assert client.ingest(event(client.stats().captured))
            is_away = False
            assert client.flush(PATIENCE_S)
            on_full_disk = client.stats()
            disk.empty()

            def is_spooled() -> bool:
                before = client.stats().unspooled
                client.ingest(event(client.stats().captured))
                return client.stats().unspooled == before

            eventually(is_spooled)
            assert client.flush(PATIENCE_S)
            stats = client.stats()
            assert_adds_up(client)
        left = list((disk.path / "spool").glob("*.spool"))
    say(
        record_property,
        f"full disk under the spool: {stats.captured} captured, {on_full_disk.unspooled} held in memory alone, "
                f"{stats.acknowledged} acknowledged")  # fmt: skip

    assert stats.acknowledged == stats.captured == len(server.taken)
    assert set(server.taken.values()) == {1}
    assert left == []
