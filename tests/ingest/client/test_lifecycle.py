"""Forks, signals and ends of processes: what was captured arrives, by this process or the next."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.client import Ingestion
from ingest.client.spool import Spool, fingerprint
from tests.support.client_applications import CHILDREN, EVENTS, LIMITS, PATIENCE_S
from tests.support.servers.faulty_gateway import Bad, FaultServer
from tests.support.waiting import eventually

_asked: set[str] = set()
"""The servers of the applications of one test."""


@pytest.fixture(autouse=True)
def _no_application_outlives_its_test() -> Iterator[None]:
    """Nor does a fork of one, whose parent is gone: it has the same command line, with the server of this test."""
    _asked.clear()
    yield
    eventually(lambda: still_running() == [])


def still_running() -> list[Path]:
    """The applications of this test that have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            found += [process] if _asked & set(arguments) else []
    return found


def start(name: str, url: str, spool: Path | None, *more: str) -> subprocess.Popen[bytes]:
    """An application in a process of its own."""
    _asked.add(url)
    command = [sys.executable, "-m", "tests.support.client_applications", name, url, str(spool or "-"), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> tuple[list[str], int, str]:
    """The ids it captured, its exit code, and what it complained of."""
    try:
        captured, complaints = process.communicate(timeout=2 * PATIENCE_S)
    finally:
        process.kill()
    return captured.decode().split(), process.returncode, complaints.decode()


def run(name: str, url: str, spool: Path | None, *more: str) -> tuple[list[str], int, str]:
    """An application, to its end."""
    return finish(start(name, url, spool, *more))


def collect(url: str, spool: Path) -> None:
    """What others have left is sent by an application that captures nothing."""
    ids, code, complaints = run("collects", url, spool)
    assert (ids, code) == ([], 0), complaints


def ready(process: subprocess.Popen[bytes]) -> None:
    """Wait for its word."""
    assert process.stderr is not None
    while (said := process.stderr.readline()) != b"ready\n":
        assert said, "it ended before it was ready"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A good server."""
    with FaultServer() as running:
        yield running


@pytest.mark.parametrize(("name", "captured"), [
    ("ends", EVENTS), ("fails", EVENTS), ("forks", 40 + CHILDREN * EVENTS), ("pools", 20 + 6 * 50),
])  # fmt: skip
def test_what_memory_holds_is_sent_at_the_end(server: FaultServer, name: str, captured: int) -> None:
    """Without a spool and without ``close``: the end of an interpreter, of a fork and of a pool's worker send it."""
    ids, code, complaints = run(name, server.url, None)

    assert len(ids) == captured
    assert sorted(server.taken.elements()) == sorted(ids)
    assert (code != 0, "a bug" in complaints) == (name == "fails", name == "fails")


def test_sigterm_ends_in_order(server: FaultServer) -> None:
    """An application that decided nothing about SIGTERM sends the rest and says that it was ended."""
    process = start("waits", server.url, None)
    ready(process)
    process.send_signal(signal.SIGTERM)
    ids, code, _ = finish(process)

    assert code == 128 + signal.SIGTERM
    assert sorted(server.taken.elements()) == sorted(ids)


def test_an_application_keeps_its_own_sigterm(server: FaultServer) -> None:
    """What it does after the signal is captured, too."""
    process = start("has_handler", server.url, None)
    ready(process)
    process.send_signal(signal.SIGTERM)
    ids, code, _ = finish(process)

    assert (code, len(ids)) == (0, EVENTS + 10)
    assert sorted(server.taken.elements()) == sorted(ids)


def test_an_absent_server_does_not_hold_the_end_up(tmp_path: Path) -> None:
    """The end comes within the stated bound, and the next process finds everything in the spool."""
    with FaultServer(lambda events, number: Bad(503, {"retry-after": "100"})) as server:
        process = start("waits", server.url, tmp_path)
        ready(process)
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        ids, _, _ = finish(process)
        took_s = time.monotonic() - began_s
        assert not server.taken
        server.script = lambda events, number: None
        collect(server.url, tmp_path)

    assert LIMITS.close_s_max <= took_s < LIMITS.close_s_max + 10
    assert sorted(server.taken.elements()) == sorted(ids)
    assert list(tmp_path.glob("*.spool")) == []


def test_children_that_vanish_leave_their_events_to_others(server: FaultServer, tmp_path: Path) -> None:
    """A process that ends without a word has lost nothing: what it had is sent by whoever looks next."""
    ids, _, _ = run("forks_and_vanishes", server.url, tmp_path)
    collect(server.url, tmp_path)

    assert len(ids) == 20 + CHILDREN * EVENTS
    assert set(server.taken) == set(ids)
    assert list(tmp_path.glob("*.spool")) == []


@pytest.mark.parametrize("has_spool", [False, True])
def test_a_fork_may_happen_at_any_moment(server: FaultServer, tmp_path: Path, has_spool: bool) -> None:
    """Threads capture and send while the process forks: no child hangs, nothing is lost or made up."""
    ids, code, complaints = run(
        "forks_while_busy", server.url, tmp_path if has_spool else None, "token", str(PATIENCE_S)
    )

    assert code == 0, complaints
    assert set(server.taken) == set(ids)
    assert len(ids) == len(set(ids))
    assert list(tmp_path.glob("*.spool")) == []


def test_what_a_token_left_is_sent_under_the_next_without_a_capture(tmp_path: Path) -> None:
    """A service that starts anew with another token, and has nothing to say, sends what the old one was killed with."""
    with FaultServer(lambda events, number: Bad(503)) as server:
        with Ingestion("old", base_url=server.url, spool=tmp_path, limits=LIMITS) as ingestion:
            ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": "e1"})
            ingestion.close(0)
        server.script = lambda events, number: None
        with Ingestion("new", base_url=server.url, spool=tmp_path, previous_tokens=["old"], limits=LIMITS) as ingestion:
            eventually(lambda: server.taken)

    assert set(server.taken) == {"e1"}
    assert server.requests[-1][1]["authorization"] == "Bearer new"


def left_behind(directory: Path, base_url: str) -> None:
    """A process captured an event for a server that was away, and is gone."""
    spool = Spool(directory, fingerprint(base_url, "token"))
    spool.append(1, b'{"name":"call","external_customer_id":"u","external_id":"e1"}')
    spool.close()


def test_what_another_address_left_is_said_and_sent_where_it_is_asked_for(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """A server that moved has another address: until that is said, its events stay and are spoken of."""
    left_behind(tmp_path, "http://before.example")
    with Ingestion("token", base_url=server.url, spool=tmp_path, limits=LIMITS) as ingestion:
        ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": "e2"})
        eventually(lambda: "e2" in server.taken and "previous_base_urls" in caplog.text)
    assert set(server.taken) == {"e2"}
    previous = ["http://before.example/"]
    with Ingestion("token", base_url=server.url, spool=tmp_path, previous_base_urls=previous, limits=LIMITS):
        eventually(lambda: "e1" in server.taken)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_without_its_file_is_taken_over(server: FaultServer, tmp_path: Path) -> None:
    """Somebody removed the SQLite file; the newest events are in the journal."""
    journal = tmp_path / f"{fingerprint(server.url, 'token')}-0123456789abcdef.spool.journal"
    journal.write_bytes(b'+1 {"name":"call","external_customer_id":"u","external_id":"e1"}\n')
    with Ingestion("token", base_url=server.url, spool=tmp_path, limits=LIMITS):
        eventually(lambda: "e1" in server.taken)
    assert list(tmp_path.iterdir()) == []


def test_one_client_that_cannot_close_does_not_keep_others_from_it() -> None:
    """At the end of the interpreter each of them is asked."""
    code = """
from ingest.client import Ingestion
class Broken(Ingestion):
    def close(self, timeout_s=None):
        print("asked", flush=True)
        raise OSError("no")
clients = [Broken("token", base_url="http://127.0.0.1:1", spool=None) for _ in range(3)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["asked"] * 3


def test_streams_that_are_open_at_the_end_are_left_to_the_next_process(server: FaultServer, tmp_path: Path) -> None:
    """Their usage is told after the client was closed, and is then on the disk; without a spool it is rejected."""
    ids, code, complaints = run("leaves_streams_open", server.url, tmp_path)
    assert (len(ids), code, complaints) == (3, 0, "")
    collect(server.url, tmp_path)
    assert sorted(server.taken.elements()) == sorted(ids)

    ids, code, _ = run("leaves_streams_open", server.url, None)
    assert (ids, code) == (["None"] * 3, 0)


@pytest.mark.parametrize("imported", ["before", "after"])
def test_usage_after_the_end_of_multiprocessing_is_left_to_the_next_process(
    server: FaultServer, tmp_path: Path, imported: str
) -> None:
    """Wherever ``multiprocessing`` was imported, which says its own farewell to clients."""
    code = """
import atexit, sys
if sys.argv[3] == "before":
    import multiprocessing.util
from ingest.client import Ingestion

def tell(number):
    print(ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": f"e{number}"}))

atexit.register(tell, 2)
import multiprocessing.util
ingestion = Ingestion("token", base_url=sys.argv[1], spool=sys.argv[2])
tell(1)
"""
    command = [sys.executable, "-c", code, server.url, str(tmp_path), imported]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["e1", "e2"]
    collect(server.url, tmp_path)

    assert set(server.taken) == {"e1", "e2"}


def test_threads_import_nothing(server: FaultServer) -> None:
    """A module that a thread is importing when the process forks would be locked in the child for ever."""
    code = """
import sys
from ingest.client import Ingestion
with Ingestion("token", base_url=sys.argv[1], spool=None) as ingestion:
    before = set(sys.modules)
    ingestion.ingest({"name": "call", "external_customer_id": "u"})
    assert ingestion.flush(30)
    print(*set(sys.modules) - before)
"""
    command = [sys.executable, "-c", code, server.url]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


def test_importing_the_client_loads_no_server() -> None:
    """Nothing of the server's libraries, or of its modules, is loaded."""
    code = "import sys, ingest.client, ingest.client.testing; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    strangers = {"duckdb", "pyarrow", "numpy", "fastapi", "starlette", "pydantic", "uvicorn", "xxhash",
                 "structlog", "prometheus_client", "ingest.gateway", "ingest.log", "openai",
                 "confluent_kafka"}  # fmt: skip

    assert strangers & set(loaded) == set()
    pure = {"meters.exact", "meters.log", "meters.errors"}
    assert {name for name in loaded if name.startswith("meters.")} <= pure


def test_two_owners_never_share(tmp_path: Path) -> None:
    """What lies in a spool goes to the server and under the token it was captured for, and to no other."""
    with FaultServer(lambda events, number: Bad(503)) as other, FaultServer() as server:
        ids, _, _ = run("ends", other.url, tmp_path)
        assert len(ids) == EVENTS
        strangers, _, _ = run("ends", server.url, tmp_path, "token", str(PATIENCE_S))
        assert sorted(server.taken.elements()) == sorted(strangers)
        other.script = lambda events, number: None
        collect(other.url, tmp_path)

    assert sorted(other.taken.elements()) == sorted(ids)
