"""``make kafka``: the broker that the README has people try, started and stopped as they do it."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.log import open_log
from meters.log import USAGE_EVENTS, Entry
from tests.support.kafka.jars import Missing, jars
from tests.support.kafka.shared import need_kafka
from tests.support.ports import take_port
from tests.support.programs import program
from tests.support.servers.installation import meterstream
from tests.support.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.kafka

REPOSITORY = Path(__file__).resolve().parents[3]
MAKE_FAILED = 2
CLOSED_IN_ORDER = ".kafka_cleanshutdown"  # a broker writes it last of all


class Made:
    """A run of the target, with the environment that is there already and a session of its own, as a terminal's."""

    def __init__(self, folder: Path, options: str) -> None:
        self._said = folder / "said.txt"
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        tools = [f"BIN={Path(sys.executable).parent}", "--assume-old=setup"]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [program("make", "make"), *tools, "kafka", f"ARGS={options}"],
                cwd=REPOSITORY, env=os.environ | {"TMPDIR": str(self.temporary)}, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """Its output so far."""
        return self._said.read_text()

    def is_ready(self) -> bool:
        """Whether it said all of what to try. Fails when it ended instead."""
        assert self.process.poll() is None, self.said
        return "meterstream serve" in self.said

    def signal(self, number: signal.Signals) -> None:
        """To all that the terminal started: make, and what it runs; the broker is apart."""
        os.killpg(self.process.pid, number)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose name is in the command line of whatever works in it; it is gone at the end, like they are."""
    try:
        jars("4")
    except Missing as reason:
        need_kafka(reason)
    yield tmp_path
    eventually(lambda: not processes_in(tmp_path))


@contextlib.contextmanager
def made(folder: Path, options: str) -> Iterator[Made]:
    """A run that is killed where the test did not stop it; the broker's watchdog ends the broker then."""
    run = Made(folder, options)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.signal(signal.SIGKILL)
            run.process.wait()


def processes_in(folder: Path) -> list[str]:
    """The command lines that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if str(folder) in line]


def test_a_broker_for_trying_takes_events_until_ctrl_c(folder: Path) -> None:
    """On the port that was asked for; what it says to try works; afterwards no process and no file is left of it."""
    port = take_port()
    with made(folder, f"--port {port}") as run:
        eventually(run.is_ready)
        assert processes_in(run.temporary)
        [init, serve] = re.findall("^  meterstream (.+)$", run.said, re.MULTILINE)
        assert serve == f"serve --log kafka://127.0.0.1:{port}"
        done = meterstream(*init.split())
        assert done.returncode == 0, done.stderr
        with contextlib.closing(open_log(serve.split()[-1])) as log:
            [offset] = asyncio.run(log.append(USAGE_EVENTS, [Entry(b"{}", 3)]))
            assert [record.value for record in log.read(USAGE_EVENTS, {3: offset}, bytes_max=100)] == [b"{}"]
        run.signal(signal.SIGINT)
        run.process.wait(PATIENCE_S)

    assert "Traceback" not in run.said
    assert not processes_in(folder)
    assert not list(run.temporary.iterdir())


def test_a_broker_for_trying_closes_in_order_however_often_it_is_told(folder: Path) -> None:
    """Told once more while it stops, it goes on closing its files; what was to be kept is kept."""
    data = folder / "data"
    with made(folder, f"--port {take_port()} --data {data}") as run:
        eventually(run.is_ready)
        run.signal(signal.SIGTERM)
        eventually(lambda: "Kafka stops." in run.said)
        run.signal(signal.SIGINT)
        run.process.wait(PATIENCE_S)
        eventually(lambda: not processes_in(folder))  # make may be gone at the second signal

    assert "Traceback" not in run.said
    assert (data / "node-1" / "data" / CLOSED_IN_ORDER).exists()


def test_a_broker_for_trying_has_a_port_and_a_folder_of_its_own(folder: Path) -> None:
    """Where another one listens, or has its data, it says so and what to give instead; nothing is started."""
    (folder / "data" / "node-1").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for options, complaint in (
            (f"--port {taken}", f"port {taken} is taken"),
            (f"--port {take_port()} --data {folder / 'data'}", "has an earlier broker's data"),
        ):
            with made(folder, options) as run:
                assert run.process.wait(PATIENCE_S) == MAKE_FAILED
            assert complaint in run.said
            assert "Traceback" not in run.said
