"""The supervisor: what the first start gives, and what happens to its children and to what they took in."""

import os
import shlex
import signal
import socket
from itertools import pairwise

import httpx
import pytest

from tests.deploy.installation import Installation, alive, eventually, meterstream

EVENT = '{"name":"call","external_customer_id":"ada","metadata":{"n":1}}\n'


def total(installation: Installation) -> int:
    """What the meter says now, or -1 while nobody answers."""
    done = installation.run("usage", "calls", "--output", "csv")
    return sum(int(line.split(",")[1]) for line in done.stdout.split()[1:]) if done.returncode == 0 else -1


def count_events(installation: Installation) -> None:
    """Start, and make the meter that ``total`` asks."""
    installation.start()
    installation.answer("meters", "create", "--name", "calls", "--count")


def test_the_first_start_prints_a_request_that_works(installation: Installation) -> None:
    """The printed command, run as it is, is answered with 200; the next start prints no token."""
    installation.start()
    words = shlex.split(installation.greeting[installation.greeting.index("curl ") :])
    headers = dict(word.split(": ", 1) for option, word in pairwise(words) if option == "-H")

    answer = httpx.post(words[2], headers=headers, content=words[words.index("-d") + 1])

    assert answer.status_code == 200, answer.text
    assert answer.json() == {"inserted": 1, "duplicates": 0}
    assert installation.token not in installation.log
    assert installation.stop() == 0
    installation.start()
    assert "polar_oat_" not in installation.greeting


def test_a_given_token_is_taken_and_not_shown(installation: Installation) -> None:
    """The first start makes the token that it was given, and the greeting does not repeat it."""
    installation.token = "polar_oat_given-by-hand"

    installation.start("--token", installation.token)

    assert installation.answer("meters", "list") == []
    assert "given-by-hand" not in installation.greeting + installation.log


def test_a_second_server_on_the_same_data_is_refused(installation: Installation) -> None:
    """It ends at once with one line that names the first one; the first one goes on."""
    installation.start()
    assert installation.server

    second = meterstream("serve", "--data", str(installation.data), "--port", "0")

    assert second.returncode == 1
    assert f"another server (process {installation.server.pid}) uses" in second.stderr
    assert second.stderr.count("\n") == 1
    assert installation.answer("meters", "list") == []


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
    count_events(installation)
    installation.answer("events", "send", "-", text=EVENT * 10)
    before = installation.children()[victim]

    os.kill(before, signal.SIGKILL)
    sent = installation.answer("events", "send", "-", text=EVENT * 10)

    assert sent["inserted"] == 10
    eventually(lambda: installation.children().get(victim, before) != before)
    eventually(lambda: total(installation) == 20)


def test_children_do_not_outlive_a_killed_supervisor(installation: Installation) -> None:
    """SIGKILL of the supervisor ends both children; the next start finds everything that was acknowledged."""
    count_events(installation)
    installation.answer("events", "send", "-", text=EVENT * 10)
    children = installation.children()
    assert set(children) == {"gateway", "aggregate"}

    assert installation.stop(signal.SIGKILL) == -signal.SIGKILL

    eventually(lambda: not any(alive(pid) for pid in children.values()))
    installation.start()
    eventually(lambda: total(installation) == 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_clean(installation: Installation, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end all three with exit code 0 and without a complaint."""
    installation.start()
    children = installation.children()

    assert installation.stop(number) == 0
    assert not any(alive(pid) for pid in children.values())
    assert installation.log == ""


def test_what_a_restart_cannot_heal_ends_everything(installation: Installation) -> None:
    """A store that is none stops the server with a line that names the command to run; that command heals it."""
    count_events(installation)
    installation.answer("events", "send", "-", text=EVENT * 10)
    installation.stop()
    (installation.data / "store.duckdb").write_bytes(b"this is no store" * 1000)

    done = meterstream("serve", "--data", str(installation.data), "--port", "0")

    assert done.returncode == 1
    assert "meterstream rebuild" in done.stderr
    assert "the aggregate cannot run" in done.stderr
    assert installation.run("doctor").returncode == 1
    assert installation.run("rebuild").returncode == 0
    assert installation.run("doctor").returncode == 0
    installation.start()
    eventually(lambda: total(installation) == 10)


def test_a_rebuild_waits_for_nobody(installation: Installation) -> None:
    """While a server runs a rebuild is refused and says what to do; the doctor says that one runs."""
    installation.start()

    refused = installation.run("rebuild")

    assert refused.returncode == 1
    assert "cannot rebuild the store: another server" in refused.stderr
    assert "stop it first" in refused.stderr
    assert "a server runs here" in installation.run("doctor").stdout
