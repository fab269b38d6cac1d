"""Measure one checkout on command, as one side of a comparison (``compare``).

The process prepares what a group of goals needs, a running server for example, and prints the names of its turns. Each
line on standard input then asks for one turn by its name, and the turn's figures are printed. Every answer is a line of
JSON. At the end of the input every number is checked. The exit code is 3 when a number is wrong.

A commit from before this file is measured with this file and its own benchmarks. Therefore the file imports nothing of
the product, and takes the other benchmarks by their names: their types are those of the measured checkout.

    python -m benchmarks.turns GROUP --seconds SECONDS --size SIZE
"""

import argparse
import asyncio
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

SHAPES = ((1, 64), (10, 32), (100, 32), (1000, 8))  # events in a body, connections
HALF_LOAD, FULL_LOAD = 50_000, 100_000  # events a second, the same for both checkouts
LOADS = {"idle": 0, "at 5,000 events/s": 5_000, "at half load": HALF_LOAD}
READS = {"a balance": "one balance", "a balance without a gateway": "one balance, no gateway between"}
RECORD_EVENTS = 100  # the smallest backlog
SHARES = ("p50", "p99")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # the least CPU time that can be seen
WARM_UP_S = 3.0  # processes load then what they load only once
LEAD_S = 0.3  # a sender has begun by then

Figures = dict[str, float]
"""Goals and their values. More is better of a goal that ends in ``/s``, and less of every other one."""
Turns = dict[str, Callable[[], Figures]]


@dataclass(frozen=True)
class Asked:
    """Seconds of one stretch of load; events of a backlog, or customers."""

    seconds: float
    size: int


class WrongError(Exception):
    """A number is not what was written or acknowledged."""


@contextlib.contextmanager
def ingest(asked: Asked) -> Iterator[Turns]:
    """A gateway alone, with bodies of one to a thousand events."""
    accept = _own("accept")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as data:
        accept.prepare(data)
        with _gateway("--data", data) as gateway:
            yield {
                str(events): partial(gateway.take, events, connections, asked.seconds, "taken")
                for events, connections in SHAPES
            }
        _hold(accept.logged(data), gateway.acknowledged)


@contextlib.contextmanager
def drain(asked: Asked) -> Iterator[Turns]:
    """An engine that works off a backlog in the embedded log."""
    own = _own("drain")
    sys.setswitchinterval(own.SWITCH_INTERVAL_S)

    def backlog() -> Figures:
        with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as folder:
            return _drained(own.open_log(folder), Path(folder), asked.size, "a backlog")

    backlog()  # warms up
    yield {"backlog": backlog}


@contextlib.contextmanager
def end_to_end(asked: Asked) -> Iterator[Turns]:
    """A whole server at full speed, then at half load with reads beside it."""
    with _load(asked) as load:
        yield {"full speed": partial(load.full, "end to end, embedded"), "half load": load.half}


@contextlib.contextmanager
def freshness(asked: Asked) -> Iterator[Turns]:
    """A whole server at 100,000 events a second."""
    with _load(asked) as load:
        yield {"full load": load.fresh}


@contextlib.contextmanager
def balances(asked: Asked) -> Iterator[Turns]:
    """Reads of one balance among ten for each customer: idle, and beside two loads."""
    own = _own("balances")
    with _own("server").Server() as server:
        meter_ids = server.create_meters(own.definitions())
        server.stop()
        log = own.DataDirectory(server.data).open_log()
        asyncio.run(own.fill(log, asked.size, meter_ids[0]))
        position = ",".join(f"{partition}:{end}" for partition, end in log.ends(own.USAGE_EVENTS).items())
        log.close()
        server.start()
        server.wait_for(position)
        reads = Balances(server, asked, meter_ids)
        reads.warm_up()
        yield {load: partial(reads.beside, load, rate) for load, rate in LOADS.items()}
        written = own.FIRST_TOKENS * asked.size
        _hold_all(own.check(server, asked.size, meter_ids, written + reads.tokens))


@contextlib.contextmanager
def kafka(asked: Asked) -> Iterator[Turns]:
    """Over a real broker of its own: a gateway alone, a backlog, and a whole server."""
    own, accept = _own("kafka"), _own("accept")
    sys.setswitchinterval(own.SWITCH_INTERVAL_S)
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        cluster = running.enter_context(own.running(folder / "cluster", settings=own.BROKER))
        taken, whole, numbers = own.topics(cluster, "taken"), own.topics(cluster, "whole"), itertools.count()
        accept.prepare(taken)
        gateway = running.enter_context(
            _gateway("--log", f"{taken}?linger_ms={own.LINGER_MS}", "--data", str(folder / "gateway"))
        )
        load = running.enter_context(_load(asked, "--log", whole))

        def backlog(events: int) -> Figures:
            store = folder / f"store-{next(numbers)}"
            store.mkdir()
            return _drained(own.open_log(own.topics(cluster, store.name)), store, events, "a backlog over Kafka")

        backlog(RECORD_EVENTS)  # warms up
        yield {
            "100": partial(gateway.take, 100, 32, asked.seconds, "taken over Kafka"),
            "backlog": partial(backlog, asked.size),
            "full speed": partial(load.full, "end to end over Kafka"),
        }
        _hold(accept.logged(taken), gateway.acknowledged)
        load.server.wait_for(own.format_position(own.ends(whole)))  # every partition, before the totals are compared


GROUPS: dict[str, Callable[[Asked], AbstractContextManager[Turns]]] = {
    "ingest": ingest, "drain": drain, "end_to_end": end_to_end, "freshness": freshness, "balances": balances,
    "kafka": kafka,
}  # fmt: skip


class Gateway:
    """One gateway, and how many events it acknowledged."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid, self._port, self.acknowledged = pid, port, 0

    def take(self, events: int, connections: int, seconds: float, what: str) -> Figures:
        """One stretch of bodies with so many events, by CPU time and by the clock."""
        contenders, server = _own("contenders"), _own("server")
        before_s: float = server.usage(self._pid)["cpu_s"]
        work = contenders.sent([self._port], events, connections, seconds)
        taken: int = sum(ledger.events for ledger in contenders.uvloop.run(work))
        self.acknowledged += taken
        cpu_s = max(server.usage(self._pid)["cpu_s"] - before_s, TICK_S)
        shape = "single events, requests/s" if events == 1 else f"{events:,} events a body, events/s"
        return {f"{what} by a core, {shape}": taken / cpu_s, f"{what}, {shape}": taken / seconds}


class Load:
    """A whole server under load, and what it acknowledged."""

    def __init__(self, server: Any, seconds: float) -> None:
        self._own, self.server, self._seconds, self._runs = _own("end_to_end"), server, seconds, itertools.count(1)
        self.ids = server.create_meters(self._own.meters())
        self.ledgers = [self._own.warmed(server)]

    def full(self, what: str) -> Figures:
        """One stretch at full speed."""
        row = self._row(None)
        longest = {"longest time without an acknowledgement, ms": row["longest stall ms"]}
        return {f"{what}, events/s": row["events/s"], **longest, **_cpu(row, "full speed")}

    def half(self) -> Figures:
        """One stretch at half load: freshness, and totals that are read meanwhile."""
        row = self._row(HALF_LOAD)
        reads = {"one customer's total": "read", "one customer's total without a gateway": "without gateway"}
        return {
            **_fresh(row, "half load"),
            **{f"{read} at half load, {share}, ms": row[f"{column} {share} ms"] or 0.0  # nothing was read
               for read, column in reads.items() for share in SHARES},
            **_cpu(row, "half load"),
        }  # fmt: skip

    def fresh(self) -> Figures:
        """One stretch at full load: freshness, and how much of the load was carried."""
        row, load = self._row(FULL_LOAD), f"{FULL_LOAD:,} events/s"
        return {**_fresh(row, load), f"carried of {load}, events/s": row["events/s"], **_cpu(row, load)}

    def _row(self, rate: float | None) -> dict[str, Any]:
        phase = self._own.Phase(self.server, next(self._runs), self._seconds, rate)
        self.ledgers.append(phase.ledger)
        row: dict[str, Any] = self._own.row("", phase)
        return row


class Balances:
    """Reads of balances from a server that was filled, and the tokens of what was acknowledged meanwhile."""

    def __init__(self, server: Any, asked: Asked, meter_ids: list[str]) -> None:
        self._own, self._server, self._asked = _own("balances"), server, asked
        self._questions = self._own.questions(server, asked.size, meter_ids)
        self._runs, self.tokens = itertools.count(1), 0

    def warm_up(self) -> None:
        """Stream for a while without reading."""
        with self._sending(HALF_LOAD, WARM_UP_S):
            pass

    def beside(self, load: str, rate: int) -> Figures:
        """Each question for a while, beside a load."""
        figures: Figures = {}
        with self._sending(rate, self._asked.seconds * len(READS)):
            for name, question in READS.items():
                found = self._own.measure(*self._questions[question], self._asked.seconds)
                figures |= {f"{name} {load}, {share}, ms": found[f"{share}_ms"] for share in SHARES}
        return figures

    @contextlib.contextmanager
    def _sending(self, rate: int, seconds: float) -> Iterator[None]:
        if not rate:
            yield
            return
        bodies = _own("load").Bodies(next(self._runs), customers=self._asked.size)
        ledgers: multiprocessing.Queue[Any] = multiprocessing.Queue()
        work = self._server.port, bodies, rate, LEAD_S + seconds, ledgers
        sender = multiprocessing.Process(target=self._own.stream, args=work)
        sender.start()
        time.sleep(LEAD_S)
        yield
        self.tokens += _own("end_to_end").taken(ledgers, sender).tokens
        sender.join()


def main() -> None:
    """Prepare, take the turns that the input asks for, and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--seconds", type=float, required=True, help="of one stretch of load")
    parser.add_argument("--size", type=int, required=True, help="events of a backlog, or customers")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers stop, and scratch directories are removed
    answers = _answers()
    try:
        with GROUPS[arguments.group](Asked(arguments.seconds, arguments.size)) as turns:
            _say(answers, list(turns))
            for name in iter(sys.stdin.readline, ""):
                _say(answers, turns[name.strip()]())
    except WrongError as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        sys.exit(_own("report").WRONG)


def _answers() -> TextIO:
    """Standard output; what servers and benchmarks print goes to standard error from here on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _say(answers: TextIO, what: list[str] | Figures) -> None:
    print(json.dumps(what), file=answers, flush=True)


def _own(name: str) -> ModuleType:
    """A benchmark of the measured checkout."""
    return importlib.import_module(f"benchmarks.{name}")


@contextlib.contextmanager
def _gateway(*arguments: str) -> Iterator[Gateway]:
    """A gateway that listens and is warmed up."""
    contenders = _own("contenders")
    process, port = contenders.started(["-m", "deploy.cli", "gateway", *arguments, "--port", "PORT"])
    try:
        gateway = Gateway(process.pid, port)
        gateway.take(100, 32, WARM_UP_S, "")
        yield gateway
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def _load(asked: Asked, *arguments: str) -> Iterator[Load]:
    """A server under load, whose totals are compared at the end."""
    with _own("server").Server(*arguments) as server:
        load = Load(server, asked.seconds)
        yield load
        _hold_all(_own("end_to_end").check(server, load.ids, load.ledgers))


def _drained(log: Any, folder: Path, events: int, what: str) -> Figures:
    """Fill a log and work it off into a store in the folder."""
    with contextlib.closing(log):
        row, differences = _own("drain").work_off(log, folder, events)
    _hold_all(differences)
    return {f"{what}, events/s": row["events/s"], f"{what}, CPU us an event": row["CPU us/event"]}


def _fresh(row: dict[str, Any], load: str) -> Figures:
    return {f"freshness {share} at {load}, ms": row[f"fresh {share} ms"] for share in SHARES}


def _cpu(row: dict[str, Any], load: str) -> Figures:
    columns = {"gateway": "gateway us/ev", "aggregator": "aggregate us/ev"}
    return {f"CPU of the {process} at {load}, us an event": row[column] for process, column in columns.items()}


def _hold(found: int, acknowledged: int) -> None:
    """Raise WrongError unless the log holds what was acknowledged."""
    if found != acknowledged:
        raise WrongError(f"{acknowledged:,} events were acknowledged, and {found:,} are in the log")


def _hold_all(differences: list[str]) -> None:
    """Raise WrongError for differences between totals and what was acknowledged."""
    if differences:
        raise WrongError("; ".join(differences))


if __name__ == "__main__":
    main()
