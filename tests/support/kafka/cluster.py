"""One to three real Kafka brokers on loopback, to be started, killed, paused and started again on the same data.

A node is broker and KRaft controller in one Java process. The settings make it small and quick to notice a death;
they change nothing about what it promises to a client. A node's ports are held for it (``tests/support/ports.py``), so
one that is started again finds them free.
"""

import base64
import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.support.kafka.jars import jars
from tests.support.ports import take_port

READY_S_MAX = 90.0  # a start takes about 3 s alone on a machine, several times as long on a busy one
STOP_S_MAX = 30.0
JAVA = (
    "java", "-Xms96m", "-Xmx320m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)  # fmt: skip

# Ends a broker whose starter is gone, however that went: the pipe closes, and if the process is still that broker
# ($1 is in its command line) it is killed.
_WATCHDOG = 'cat; tr "\\0" " " < "/proc/$0/cmdline" | grep -qF "$1" && kill -9 "$0"'

_SETTINGS = """
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
num.network.threads=1
num.io.threads=2
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
log.cleaner.dedupe.buffer.size=4194304
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
replica.lag.time.max.ms=3000
log.retention.check.interval.ms=500
log.initial.task.delay.ms=500
log.segment.delete.delay.ms=500
"""


class Node:
    """One broker process and its folder."""

    def __init__(self, number: int, folder: Path, libraries: Path, java: Sequence[str]) -> None:
        self.number, self.folder = number, folder
        self.port, self.controller_port = take_port(), take_port()
        self._java = [*java, "-cp", f"{libraries}/*"]
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where clients find it, ``127.0.0.1:PORT``."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        """What the broker complained of in all of its lives."""
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def filled(self, value: str) -> str:
        """The value of a setting with this node's ports and folder in it."""
        own = {"port": self.port, "controller_port": self.controller_port, "folder": self.folder}
        for name, content in own.items():
            value = value.replace(f"{{{name}}}", str(content))
        return value

    def prepare(self, settings: str, cluster_id: str, format_options: Sequence[str]) -> None:
        """Write the settings and format the data folder."""
        self.folder.mkdir(parents=True)
        path = self.folder / "server.properties"
        path.write_text(settings)
        command = [*self._java, "kafka.tools.StorageTool", "format"]
        options = [f"--cluster-id={cluster_id}", "-c", str(path), *format_options]  # an id may begin with a dash
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, f"formatting the storage failed: {done.stdout} {done.stderr}"

    def start(self) -> None:
        """Start the process on its data; ``Cluster.wait_ready`` tells when it serves."""
        assert not self.running
        with (self.folder / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._java, "kafka.Kafka", str(self.folder / "server.properties")],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
            )  # fmt: skip
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, str(self.pid), str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Let it close its files; SIGKILL when it does not within STOP_S_MAX."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: the process is there and answers nothing, once the last of its threads has stopped."""
        pause(self.pid)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
            self._watchdog = None
        if self._process is None or not self.running:
            return
        self._process.send_signal(number)
        with contextlib.suppress(ProcessLookupError):
            self.resume()  # a paused process hears nothing else
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Cluster:
    """Brokers of one release that know each other. Make one with ``running``, or ``start`` and ``stop`` it yourself.

    ``settings`` are broker settings over those of this module; ``{port}``, ``{controller_port}`` and ``{folder}`` in a
    value are a node's own. ``format_options`` go to the storage tool. ``port`` is the first node's, the others' follow;
    without it each has a free one.
    """

    def __init__(
        self, folder: Path, version: str = "4", nodes: int = 1, settings: Mapping[str, str] | None = None,
        format_options: Sequence[str] = (), port: int | None = None, java: Sequence[str] = (),
    ) -> None:  # fmt: skip
        libraries = jars(version)
        java = java or _java(version, libraries)
        self.version = version
        self.nodes = [Node(number, folder / f"node-{number}", libraries, java) for number in range(1, nodes + 1)]
        if port is not None:
            for node in self.nodes:
                node.port = port + node.number - 1
        voters = ",".join(f"{node.number}@127.0.0.1:{node.controller_port}" for node in self.nodes)
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        for node in self.nodes:
            data = node.folder / "data"
            text = _SETTINGS.format(
                node=node.number, voters=voters, port=node.port, controller_port=node.controller_port, data=data
            )
            for name, value in (settings or {}).items():  # the last line of a name counts
                text += f"{name}={node.filled(value)}\n"
            node.prepare(text, cluster_id, format_options)

    @property
    def bootstrap(self) -> str:
        """Every node's address, comma separated: Kafka's ``bootstrap.servers``."""
        return ",".join(node.address for node in self.nodes)

    def admin(self) -> AdminClient:
        """A client for topics and their settings."""
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def start(self) -> None:
        """Start every node and wait until all of them serve."""
        for node in self.nodes:
            node.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until every running node is known to the cluster. Raises AssertionError with the broker's words."""
        expected = sum(node.running for node in self.nodes)
        deadline_s = time.monotonic() + READY_S_MAX
        while True:
            admin = self.admin()  # another one each time: a client whose broker was away waits longer and longer
            for node in self.nodes:
                assert node.running or expected < len(self.nodes), f"node {node.number} ended: {node.output[-2000:]}"
            with contextlib.suppress(KafkaException):
                if len(admin.list_topics(timeout=2.0).brokers) >= expected:
                    return
            assert time.monotonic() < deadline_s, f"not ready in time: {self.nodes[0].output[-2000:]}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop every node. A quorum needs its majority to close in order, so all are told before any is awaited."""
        for node in self.nodes:
            if node.running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(node.pid, signal.SIGTERM)
                    node.resume()
        for node in self.nodes:
            node.stop()


@contextlib.contextmanager
def running(
    folder: Path, version: str = "4", nodes: int = 1, settings: Mapping[str, str] | None = None,
    format_options: Sequence[str] = (), port: int | None = None,
) -> Iterator[Cluster]:  # fmt: skip
    """A cluster that serves, for as long as the block lasts. Raises ``jars.Missing``."""
    cluster = Cluster(folder, version, nodes, settings, format_options, port)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _java(version: str, libraries: Path) -> list[str]:
    """The command with a broker's classes loaded beforehand, which halves its start. A first broker is their model.

    An archive that does not fit, after another Java was installed, is passed over.
    """
    archive = libraries / "classes.jsa"
    with (libraries.parent / f"{libraries.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            unfinished = archive.with_suffix(".unfinished")
            with tempfile.TemporaryDirectory() as folder:
                model = Cluster(Path(folder) / "model", version, java=[*JAVA, f"-XX:ArchiveClassesAtExit={unfinished}"])
                try:
                    model.start()
                finally:
                    model.stop()
            unfinished.touch()  # where this Java writes none
            unfinished.rename(archive)
    return [*JAVA, f"-XX:SharedArchiveFile={archive}"]


def pause(pid: int) -> None:
    """SIGSTOP, and wait until the last of the process's threads has stopped."""
    os.kill(pid, signal.SIGSTOP)
    while any(_state(path) != "T" for path in Path(f"/proc/{pid}/task").glob("*/stat")):
        time.sleep(0.001)


def _state(stat: Path) -> str:
    """A thread's state as /proc tells it, one letter; "T" for a thread that has ended meanwhile, too."""
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "T"
