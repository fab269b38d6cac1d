"""Meterstream over a real Kafka, a process for each part, any of which can be killed, stopped, or started again."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import httpx

from ingest.log import open_log
from ingest.log.kafka_admin import Unreachable, Wanted, make_topics, parse_address
from meters.catalogue.access import digest
from meters.catalogue.catalogue import Token, TokenCreated
from meters.log import USAGE_CONTROL, Entry, Log, Record, TryAgain, format_position, parse_position
from tests.support.faults.sender import Outcome, Sender
from tests.support.faults.store_checks import Counted, Tables, assert_store_tells, count, ends_of, export, positions
from tests.support.kafka.cluster import Cluster, pause
from tests.support.kafka.jars import Missing
from tests.support.kafka.shared import need_kafka
from tests.support.ports import take_port
from tests.support.records import ORGANIZATION, decisions, organization
from tests.support.waiting import eventually

TOKEN = "polar_oat_kafka_fault_test_0123456789"
PARTITIONS = 3
STOP_S_MAX = 30.0
CATCH_UP_S_MAX = 100.0  # a slow machine may need half a minute after a death; a test is cut after 120
LOOK_AGAIN_S = 0.05  # a question costs its asker, and there are few cores
QUICK = {"broker.session.timeout.ms": "1000", "broker.heartbeat.interval.ms": "200"}
"""A broker that was killed is let in again when its last session is over: soon, where many rounds wait for it."""
_EXTERNAL_ID, _NAME = 13, 9  # columns of ``events``


@contextlib.contextmanager
def own_brokers(
    folder: Path, *, nodes: int = 1, settings: Mapping[str, str] | None = None, start: bool = True
) -> Iterator[Cluster]:
    """Brokers that a test may kill and stop. Skips or fails the test where there can be none."""
    try:
        cluster = Cluster(folder / "cluster", nodes=nodes, settings=QUICK | dict(settings or {}))
    except Missing as reason:
        need_kafka(reason)
        raise
    try:
        if start:
            cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Process:
    """One command of ours. ``output`` is what all of its lives wrote."""

    def __init__(self, name: str, arguments: list[str], folder: Path) -> None:
        self.name, self._arguments = name, arguments
        self._output = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        """What it wrote so far."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """A new life."""
        assert not self.running
        clean = {name: value for name, value in os.environ.items() if not name.startswith("METERSTREAM_")}
        clean["PYTHONFAULTHANDLER"] = "1"  # a signal that ends it, a test's too, has it write where its threads were
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", *self._arguments], stdout=output, stderr=output, env=clean
            )

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: signal.Signals) -> None:
        """Any signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def pause(self) -> None:
        """SIGSTOP, to its last thread."""
        assert self._process is not None
        pause(self._process.pid)

    def wait(self) -> int:
        """The exit code."""
        assert self._process is not None
        return self._process.wait(STOP_S_MAX)

    def stop(self) -> int | None:
        """SIGTERM, and the exit code; None when it did not run."""
        if self._process is None or self._process.poll() is not None:
            return None
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a stopped process hears nothing else
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class KafkaInstallation:
    """Topics of its own on a cluster, one organization with one token, a gateway and an aggregator."""

    def __init__(self, cluster: Cluster, folder: Path, *, servers: str | None = None, options: str = "") -> None:
        """``servers`` are the brokers' addresses for the processes; None takes the cluster's own."""
        self.cluster, self.folder = cluster, folder
        self.prefix = f"fault-{uuid.uuid4().hex[:12]}"
        self.url = f"kafka://{cluster.bootstrap}/{self.prefix}{options}"
        eventually(self._made_topics, look_again_s=LOOK_AGAIN_S)
        token = Token(
            id="t", organization_id=ORGANIZATION, name="fault", sha256=digest(TOKEN), created_at=datetime.now(UTC),
            scopes=["events:write", "events:read", "meters:read", "meters:write"],
        )
        eventually(lambda: self._decided(decisions([organization(), TokenCreated(token)])), look_again_s=LOOK_AGAIN_S)
        self._url_of_processes = f"kafka://{servers or cluster.bootstrap}/{self.prefix}{options}"
        self.port, self.api_port = take_port(), take_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.store = folder / "aggregator" / "store.duckdb"
        self.gateway = self.another_gateway(self.port, "gateway")
        self.aggregator = self.another_aggregator("aggregator", self.api_port, folder / "aggregator")
        self.client = httpx.Client(headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)

    def _made_topics(self) -> bool:
        with contextlib.suppress(Unreachable):  # brokers that have only begun, on a busy machine
            make_topics(parse_address(self.url, {}), Wanted(partitions=PARTITIONS))
            return True
        return False

    def _decided(self, entries: list[Entry]) -> bool:
        """Write decisions; the topics are new, and a broker may not have heard of them yet."""
        with contextlib.closing(self.open_log()) as log, contextlib.suppress(TryAgain):
            return bool(asyncio.run(log.append(USAGE_CONTROL, entries)))
        return False

    def another_gateway(self, port: int, name: str) -> Process:
        """One more gateway, not started."""
        where = ["--log", self._url_of_processes, "--data", str(self.folder / name), "--port", str(port)]
        return Process(name, ["gateway", *where, "--upstream", f"http://127.0.0.1:{self.api_port}"], self.folder)

    def another_aggregator(self, name: str, port: int, data: Path) -> Process:
        """One more aggregator, not started."""
        where = ["--log", self._url_of_processes, "--data", str(data), "--port", str(port)]
        return Process(name, ["aggregate", *where], self.folder)

    def open_log(self) -> Log:
        """The log, for a test to read."""
        return open_log(self.url)

    def start(self) -> None:
        """Start both, and wait until both answer."""
        self.aggregator.start()
        self.gateway.start()
        eventually(lambda: self._lives() and self.accepts() and self.is_ready(), look_again_s=LOOK_AGAIN_S)
        eventually(lambda: self._lives() and self.reads(), look_again_s=LOOK_AGAIN_S)

    def _lives(self) -> bool:
        for process in (self.gateway, self.aggregator):
            assert process.running, process.output[-2000:]
        return True

    def accepts(self, port: int | None = None) -> bool:
        """Whether a gateway takes events: by its own word, which it gives up when the log does not write."""
        with contextlib.suppress(httpx.TransportError):
            address = f"http://127.0.0.1:{port or self.port}"
            return self.client.post(f"{address}/v1/events/ingest", json={"events": []}).status_code == 200
        return False

    def is_ready(self) -> bool:
        """Whether the gateway knows what it needs for an event, by its own word."""
        with contextlib.suppress(httpx.TransportError):
            return self.client.get(f"{self.address}/readyz").status_code == 200
        return False

    def writes(self) -> bool:
        """Whether an event is made durable now."""
        event = {"name": "probe", "external_customer_id": "probe", "external_id": "probe"}
        with contextlib.suppress(httpx.TransportError):
            return self.client.post(f"{self.address}/v1/events/ingest", json={"events": [event]}).status_code == 200
        return False

    def ask(self, path: str, **params: str) -> httpx.Response:
        """A question to the aggregator itself."""
        return self.client.get(f"http://127.0.0.1:{self.api_port}{path}", params=params)

    def reads(self) -> bool:
        """Whether the aggregator answers."""
        with contextlib.suppress(httpx.TransportError):
            return self.ask("/v1/events/names").status_code == 200
        return False

    def catch_up(self) -> None:
        """Wait until the view has everything that is in the log."""
        with contextlib.closing(self.open_log()) as log:
            ends = ends_of(log)
        headers = {"prefer": "wait=5", "log-position": format_position(ends)}
        address = f"http://127.0.0.1:{self.api_port}/v1/events/names"

        def caught_up() -> bool:
            with contextlib.suppress(httpx.TransportError):
                answer = self.client.get(address, headers=headers)
                as_of = parse_position(answer.headers.get("as-of", "")) or {}
                return answer.status_code == 200 and all(as_of.get(place, 0) >= end for place, end in ends.items())
            return False

        try:
            eventually(caught_up, CATCH_UP_S_MAX, LOOK_AGAIN_S)
        except AssertionError as failure:
            raise AssertionError(f"not caught up; it wrote:\n{self.aggregator.output[-4000:]}") from failure

    def end(self, sender: Sender, gone: Sequence[Record] = ()) -> tuple[Outcome, Counted, Tables]:
        """Settle, catch up, stop everything and compare the store with the log, line by line.

        ``gone`` are records that were counted before they left the log.
        """
        asyncio.run(sender.settle(self.address))
        assert self.gateway.stop() == 0, self.gateway.output[-2000:]
        self.catch_up()
        assert self.aggregator.stop() == 0, self.aggregator.output[-2000:]
        tables = export(self.store)
        with contextlib.closing(self.open_log()) as log:
            counted = count(log, positions(tables), gone)  # a request that was given up may still reach the log later
        assert_store_tells(tables, counted)
        stored = stored_ids(tables)
        assert not sender.sent or set(stored) <= sender.sent
        return sender.outcome(stored, len(counted.dead)), counted, tables

    def close(self) -> None:
        """Stop what still runs."""
        self.client.close()
        for process in (self.gateway, self.aggregator):
            process.stop()


def stored_ids(tables: Tables) -> list[str]:
    """The ids of a sender's events in an exported store, one for each row."""
    return [row[_EXTERNAL_ID] for row in tables["events"] if row[_NAME] == "call"]


def recovery_s(begin: Callable[[], object], recovered: Callable[[], bool]) -> float:
    """Seconds from the fault until the condition holds again."""
    struck_s = time.monotonic()
    begin()
    eventually(recovered, CATCH_UP_S_MAX, LOOK_AGAIN_S)
    return time.monotonic() - struck_s
