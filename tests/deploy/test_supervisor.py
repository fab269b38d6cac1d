"""The supervisor: what the first start gives, and what happens to its children and to what they took in."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from deploy.server.data import PUT_BACK
from tests.support.servers.installation import Installation, alive, meterstream
from tests.support.waiting import eventually

pytestmark = pytest.mark.crash

EVENT = '{"name":"call","external_customer_id":"ada","metadata":{"n":1}}\n'


class Counted:
    """An installation with a meter that counts every event."""

    def __init__(self, installation: Installation) -> None:
        installation.start()
        self._installation = installation
        self._meter = installation.answer("meters", "create", "--name", "calls", "--count")["id"]

    def total(self) -> int:
        """What the meter says now, or -1 while nobody answers."""
        answer = self._installation.get(f"/v1/meters/{self._meter}/usage", external_customer_id="ada")
        return int(answer.json()["value"]) if answer.status_code == 200 else -1


def test_the_first_start_prints_a_request_that_works(installation: Installation) -> None:
    """The printed command, run as it is, is answered with 200; the next start prints no token."""
    installation.start()
    words = shlex.split(installation.greeting[installation.greeting.index("curl ") :])
    headers = dict(word.split(": ", 1) for option, word in pairwise(words) if option == "-H")

    answer = httpx.post(words[2], headers=headers, content=words[words.index("-d") + 1], timeout=60)

    assert answer.status_code == 200, answer.text
    assert answer.json() == {"inserted": 1, "duplicates": 0}
    assert installation.token not in installation.log
    assert installation.stop() == 0
    assert installation.log == ""
    installation.start()
    assert "polar_oat_" not in installation.greeting


def test_a_given_token_is_taken_and_not_shown(installation: Installation) -> None:
    """The first start makes the token that it was given, and the greeting does not repeat it."""
    installation.token = "polar_oat_given-by-hand"

    installation.start("--token", installation.token)

    assert installation.answer("meters", "list") == []
    assert "given-by-hand" not in installation.greeting + installation.log


def test_what_is_stored_is_for_its_owner_alone(running: Installation) -> None:
    """Whoever may list the data directory, as a volume's often may be, reads neither log nor store."""
    kept = [path for path in running.data.iterdir() if not path.is_dir()]

    assert {"api.sock", "log.sqlite", "store.duckdb"} <= {path.name for path in kept}
    assert [path.name for path in kept if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize("process", ["serve", "gateway", "aggregate"])
@pytest.mark.parametrize("left", ["store.duckdb", "forward.sqlite", "log.sqlite-wal"])
def test_a_lost_log_is_not_made_again(process: str, left: str, tmp_path: Path) -> None:
    """What stands beside it says that there was one; events would be acknowledged into one that nobody counts."""
    (tmp_path / left).write_bytes(b"of another log")

    done = meterstream(process, "--data", str(tmp_path), "--port", "0", METERSTREAM_TOKEN="polar_oat_given-by-hand")

    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no log.sqlite in {tmp_path}, but {left}" in done.stderr
    assert f"restore log.sqlite from a backup ({PUT_BACK})" in done.stderr
    assert f"move {left} away, and the next start begins anew" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {left, "serve.lock"}


def test_whoever_moves_the_rest_away_begins_anew(installation: Installation) -> None:
    """A log that nobody has any more is given up by hand, and by nothing else."""
    installation.data.mkdir()
    left = installation.data / "store.duckdb"
    left.write_bytes(b"of another log")
    assert installation.run("tokens", "list").returncode == 1
    left.rename(installation.data / "store.duckdb.old")

    installation.start()

    assert "This is the first start" in installation.greeting
    assert installation.answer("events", "send", "-", text=EVENT)["inserted"] == 1


@pytest.mark.parametrize(("process", "address"), [("gateway", "http://127.0.0.1:"), ("aggregate", "unix:")])
def test_a_process_by_itself_says_where_it_listens(process: str, address: str, tmp_path: Path) -> None:
    """In a line of its log, which for port 0 is the only place to learn it."""
    command = [sys.executable, "-m", "deploy.cli", process, "--data", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            said = json.loads(running.stderr.readline())
            if process == "gateway":
                assert httpx.get(f"{said['url']}/livez", timeout=60).status_code == 200
        finally:
            running.terminate()

    assert said["event"] == "listening"
    assert said["url"].startswith(address)


def test_a_second_server_on_the_same_data_is_refused(running: Installation) -> None:
    """It ends at once with one line that names the first one; the first one goes on."""
    assert running.server

    second = meterstream("serve", "--data", str(running.data), "--port", "0")

    assert second.returncode == 1
    assert f"another server (process {running.server.pid}) uses" in second.stderr
    assert second.stderr.count("\n") == 1
    assert running.run("meters", "list").returncode == 0


def test_a_port_in_use_is_one_line(installation: Installation) -> None:
    """A taken port is said before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = meterstream("serve", "--data", str(installation.data), "--port", str(port))

    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("victim", ["gateway", "aggregate"])
def test_a_killed_child_comes_back_and_nothing_is_lost(installation: Installation, victim: str) -> None:
    """Events sent before and while a child is away are counted once when it is back."""
    counted = Counted(installation)
    installation.answer("events", "send", "-", text=EVENT * 10)
    before = installation.children()[victim]

    os.kill(before, signal.SIGKILL)
    sent = installation.answer("events", "send", "-", text=EVENT * 10)

    assert sent["inserted"] == 10
    eventually(lambda: installation.children().get(victim, before) != before)
    eventually(lambda: counted.total() == 20)


def test_the_gateway_yields_to_the_aggregator(running: Installation) -> None:
    """Where both want all of a machine, what was taken is counted first."""
    niceness = {name: os.getpriority(os.PRIO_PROCESS, pid) for name, pid in running.children().items()}

    assert niceness["gateway"] > niceness["aggregate"]


def test_children_do_not_outlive_a_killed_supervisor(installation: Installation) -> None:
    """SIGKILL of the supervisor ends both children; the next start finds everything that was acknowledged."""
    counted = Counted(installation)
    installation.answer("events", "send", "-", text=EVENT * 10)
    children = installation.children()
    assert set(children) == {"gateway", "aggregate"}

    assert installation.stop(signal.SIGKILL) == -signal.SIGKILL

    eventually(lambda: not any(alive(pid) for pid in children.values()))
    installation.start()
    eventually(lambda: counted.total() == 10)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_server_stops_cleanly(installation: Installation, ending: signal.Signals) -> None:
    """Ctrl-C, or a terminal that goes away, ends all three with exit code 0 and without a word, as SIGTERM does."""
    installation.start()
    children = installation.children()

    assert installation.stop(ending) == 0
    assert not any(alive(pid) for pid in children.values())
    assert installation.log == ""


def test_what_a_restart_cannot_heal_ends_everything(installation: Installation) -> None:
    """A store that is none stops the server with a line that names the command to run; that command heals it."""
    counted = Counted(installation)
    installation.answer("events", "send", "-", text=EVENT * 10)
    installation.stop()
    (installation.data / "store.duckdb").write_bytes(b"this is no store" * 1000)

    done = meterstream("serve", "--data", str(installation.data), "--port", "0")

    assert done.returncode == 1
    assert f"meterstream rebuild --data {installation.data}" in done.stderr
    assert "the aggregator cannot run" in done.stderr
    assert installation.run("doctor").returncode == 1
    assert installation.run("rebuild").returncode == 0
    assert (installation.data / "store.duckdb").stat().st_mode & 0o077 == 0
    assert installation.run("doctor").returncode == 0
    installation.start()
    eventually(lambda: counted.total() == 10)


def test_a_rebuild_beside_a_server_is_refused(running: Installation) -> None:
    """While a server runs a rebuild is refused and says what to do; the doctor says that one runs."""
    refused = running.run("rebuild")

    assert refused.returncode == 1
    assert "cannot rebuild the store: another server" in refused.stderr
    assert "stop it first" in refused.stderr
    seen = running.run("doctor")
    assert "a server runs here" in seen.stdout
    assert "the store was not looked at" in seen.stderr
    assert "Nothing is wrong." not in seen.stderr


@pytest.mark.parametrize(("by_option", "shown"), [(True, "<the token you gave>"), (False, "$METERSTREAM_TOKEN")])
def test_a_token_that_was_given_is_not_shown(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, by_option: bool, shown: str
) -> None:
    """The first request names the variable only where there is one; nothing shows the secret."""
    installation.token = "polar_oat_given-by-hand"
    if not by_option:
        monkeypatch.setenv("METERSTREAM_TOKEN", installation.token)
    installation.start(*(("--token", installation.token) if by_option else ()))
    assert installation.server is not None
    assert installation.server.stdout is not None
    lines = iter(installation.server.stdout.readline, "")
    greeting = "".join(next(lines) for _ in range(7))

    assert f'-H "Authorization: Bearer {shown}"' in greeting
    assert installation.token not in greeting


def test_a_token_that_nobody_knows_is_doubted(installation: Installation) -> None:
    """A later start with another token serves all the same, and says what is wrong with the token."""
    installation.start()
    known = installation.token
    installation.stop()

    installation.start("--token", "polar_oat_of-another-place")

    assert eventually(lambda: "not known here" in installation.log)
    assert installation.token == known
    assert installation.answer("meters", "list") == []
