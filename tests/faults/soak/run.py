"""One soak: measure what the machine can do, keep a server at a part of it under faults, and prove what is left."""

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import duckdb
import msgspec

from ingest.log import open_log
from ingest.log.kafka_admin import Wanted, make_topics, parse_address
from meters.log import TryAgain
from tests.faults.soak.forwarding import Forwarding
from tests.faults.soak.ground import MEBIBYTE, Ground
from tests.faults.soak.load import Order, run
from tests.faults.soak.polar import Polar
from tests.faults.soak.proof import compare, fingerprint, totals_differ, usage_of
from tests.faults.soak.schedule import CALM_SHARE, Fault, faults
from tests.faults.soak.strikes import Site, Wrong
from tests.faults.soak.tally import FORWARDED, Count, Tally
from tests.faults.soak.vitals import Slope, Vitals
from tests.faults.soak.watch import CREDITED, UNITS, Watch
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.installation import own_brokers
from tests.support.servers.killable_server import TOKEN, Server

CONNECTIONS = 8
PARTITIONS = 3  # of a log on Kafka
PROOF_S_MAX = 1800.0  # for one command of the proof
CALIBRATION_S = 6.0
LOAD_SHARE = 0.7  # of what the machine does at full speed
NUMBERS_MAX = 20_000_000  # different events of one soak; beyond, repetitions: every id is remembered for ever
NEW_PER_MILLE_MAX = 950  # the others are repetitions
FULL_SPEED = 10_000_000  # lines a second that no machine reaches
STORM_NUMBERS_SHARE = 0.995  # of the different events, sent while processes die: each takes memory, rightly
REBUILT_LINES_MAX = 30_000_000  # of a log that is read once more, for some minutes
LINE_BYTES, EVENT_BYTES = 40, 300  # what a line takes in the log and an event in both stores, amply
QUOTA_SHARE = 3.0  # requests a minute that a token may have, of what the sender needs
QUOTA_MIN = 3000
LEAK_BYTES_PER_HOUR_MAX = 64 * MEBIBYTE
IDENTITY_BYTES = 9  # what the aggregator remembers of an event (aggregator/decode/identities.py)
JUDGED_S_MIN = 600.0  # a slope over less says more about the allocator than about leaks


class Options(NamedTuple):
    """What a soak was asked for. ``rate`` is lines a second; None measures the machine."""

    minutes: float
    seed: int
    rate: int | None
    work: Path
    kafka: bool


class Outcome(NamedTuple):
    """What became of it. The run failed where there are problems."""

    problems: list[str]
    figures: dict[str, Any]
    memory: dict[str, Slope]
    charts: dict[str, list[float]]


class Place(NamedTuple):
    """A server, its log (a URL, or a directory), and what a command is told to work on them."""

    server: Server
    log: str
    arguments: tuple[str, ...]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of ``meterstream``, which may take its time."""
        line = [sys.executable, "-m", "deploy.cli", *command, *self.arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("METERSTREAM_")}
        return subprocess.run(line, capture_output=True, text=True, env=clean, timeout=PROOF_S_MAX, check=False)


class Soak:
    """Made once, run once."""

    def __init__(self, options: Options) -> None:
        self._options = options
        seconds = 60 * options.minutes
        lines = (options.rate or 150_000) * seconds
        self._numbers_max = int(min(NUMBERS_MAX, lines))
        disk_bytes = int(lines * LINE_BYTES + self._numbers_max * EVENT_BYTES) + 512 * MEBIBYTE
        self._ground = Ground(options.work, disk_bytes)
        self._struck: Counter[str] = Counter()
        self._recovery_s: dict[str, list[float]] = {}
        self._problems: list[str] = []

    def run(self) -> Outcome:
        """Everything, from the first start to the last comparison."""
        with (
            contextlib.closing(self._ground), self._brokers() as self._cluster,
            contextlib.closing(Polar(self._options.seed)) as self._polar,
        ):  # fmt: skip
            rate = self._options.rate or int(LOAD_SHARE * self._calibrate())
            return self._endure(rate)

    def _calibrate(self) -> float:
        """Lines a second from a request to a number, at full speed."""
        with self._served("calibration", quota=0) as place, self._sending(place, "full", FULL_SPEED) as tally:
            watch = Watch(place.server, tally)
            watch.make_meters()
            began_s, before = time.monotonic(), int(tally.counts[Count.ACKNOWLEDGED_LINES])
            time.sleep(CALIBRATION_S)
            acknowledged = int(tally.counts[Count.ACKNOWLEDGED_LINES]) - before
            watch.recover()
            rate = acknowledged / (time.monotonic() - began_s)
            tally.counts[Count.RATE] = 0
        shutil.rmtree(self._ground.path / "calibration")
        say(f"full speed: {rate:,.0f} lines/s")
        return rate

    def _endure(self, rate: int) -> Outcome:
        quota = max(QUOTA_MIN, int(QUOTA_SHARE * 60 * rate / 230 / CONNECTIONS))
        forwarding = self._polar.environment | {"METERSTREAM_POLAR_FILTER": FORWARDED}
        with (
            self._served("data", quota=quota, **forwarding) as place, self._sending(place, "sent", rate) as tally,
        ):  # fmt: skip
            server = place.server
            self._tally, self._watch = tally, Watch(server, tally)
            self._watch.make_meters()
            self._forwarding = Forwarding(self._polar, tally, server.data / "forward.sqlite")
            vitals = Vitals(
                lambda: {"supervisor": server.process.pid} | server.children() if server.process else {},
                lambda: int(tally.counts[Count.ACKNOWLEDGED_LINES]), lambda: int(tally.counts[Count.NEXT]),
            )
            vitals.start()
            flooder = _token(place, "flooder")
            site = Site(server, self._ground, flooder, place.log, self._options.seed, self._cluster)
            self._strike_on(site, rate)
            vitals.stop()
            tally.counts[Count.RATE] = 0
            self._settle(place)
        return self._outcome(place, rate, vitals)

    def _strike_on(self, site: Site, rate: int) -> None:
        began_s, seconds = time.monotonic(), 60 * self._options.minutes
        calm_s = began_s + seconds * (1 - CALM_SHARE)
        for number, fault in enumerate(faults(self._options.seed, site.kinds()), 1):
            calm = time.monotonic() > calm_s
            if calm and fault.kind not in site.kinds(calm=True):
                continue
            self._spread_new(rate, (began_s + seconds if calm else calm_s) - time.monotonic(), calm=calm)
            time.sleep(fault.pause_s)
            if time.monotonic() > began_s + seconds:
                return
            self._one(site, number, fault)
            if self._problems:
                return

    def _spread_new(self, rate: int, left_s: float, *, calm: bool) -> None:
        """Have the new numbers of this stretch last until its end."""
        left = self._numbers_max * (1.0 if calm else STORM_NUMBERS_SHARE) - int(self._tally.counts[Count.NEXT])
        per_mille = 1000 * left / (rate * max(left_s, 1.0))
        self._tally.counts[Count.NEW_PER_MILLE] = int(max(1, min(NEW_PER_MILLE_MAX, per_mille)))

    def _one(self, site: Site, number: int, fault: Fault) -> None:
        """A fault, the recovery from it, and a look at what is shown then."""
        began_s = time.monotonic()
        try:
            site.strike(fault)
            struck_s = time.monotonic() - began_s
            recovery_s = self._watch.recover()
            if fault.kind.endswith("forwarder"):
                recovery_s += self._forwarding.recover()
            self._watch.give_credits()
            if found := self._watch.misses():
                self._problems.append(f"after {fault.kind}: {found}")
        except (Wrong, AssertionError, OSError) as error:
            self._problems.append(f"fault {number}, {fault.kind}: {error}")
            return
        self._struck[fault.kind] += 1
        self._recovery_s.setdefault(fault.kind, []).append(recovery_s)
        counts = self._tally.counts
        say(
            f"{number:4} {fault.kind:16} {struck_s:5.1f} s, recovered after {recovery_s:5.2f} s; "
            f"{counts[Count.ACKNOWLEDGED_LINES]:,} lines acknowledged"
        )

    def _settle(self, place: Place) -> None:
        """Everything is acknowledged and counted; compare what is shown, and whether it agrees with itself."""
        self._sender.join(timeout=300)
        if self._sender.is_alive():
            self._problems.append("the sender was not done after five minutes")
            return
        if self._problems:
            return
        self._watch.recover()
        self._totals, self._balances = self._watch.totals(), self._watch.balances()
        checks = ("--check", "store", "--check", "ledger")
        url = str(place.server.client.base_url)
        done = place.run("reconcile", *checks, "--url", url, "--token", TOKEN)
        if done.returncode:
            self._problems.append(f"I4, I5: meterstream reconcile says {done.stdout[-2000:]} {done.stderr[-500:]}")
        self._forwarded, problems = self._forwarding.settle()
        self._problems += problems

    def _outcome(self, place: Place, rate: int, vitals: Vitals) -> Outcome:
        counts = self._tally.counts
        figures: dict[str, Any] = {
            "seed": self._options.seed, "minutes": self._options.minutes,
            "log": "Kafka" if self._cluster else "embedded", "lines/s": rate,
            "lines": int(counts[Count.ACKNOWLEDGED_LINES]), "faults": dict(sorted(self._struck.items())),
            "answers 503": int(counts[Count.REFUSED]), "429": int(counts[Count.LIMITED]),
            "cut": int(counts[Count.CUT]),
            "recovery_s": {kind: (median(all_s), max(all_s)) for kind, all_s in self._recovery_s.items()},
        }  # fmt: skip
        if counts[Count.WRONG]:
            self._problems.append(f"{counts[Count.WRONG]} answers to the sender were neither yes nor later")
        if not self._problems:
            try:
                figures |= self._prove(place)
            except (AssertionError, OSError, subprocess.SubprocessError, duckdb.Error, TryAgain) as error:
                self._problems.append(f"the proof ended early: {error!r}")  # the other figures are told all the same
        memory = vitals.slopes()
        self._problems += _leaks(memory)
        charts = {name: [sample.resident_bytes / 1e6 for sample in samples] for name, samples in vitals.memory.items()}
        return Outcome(self._problems, figures, memory, {"lines/s": vitals.rates, **charts})

    def _prove(self, place: Place) -> dict[str, Any]:
        store = place.server.data / "store.duckdb"
        with contextlib.closing(open_log(place.log)) as log, duckdb.connect(str(store), read_only=True) as connection:
            books, stored, problems = compare(connection, self._tally, log)
        problems += totals_differ(self._totals, stored)
        for customer, (credited, consumed, balance) in zip(CREDITED, self._balances, strict=True):
            right = (Decimal(self._watch.credits * UNITS), usage_of(stored, customer))
            if (credited, consumed) != right or balance != credited - consumed:
                problems.append(f"I5: customer {customer} has {credited} - {consumed} = {balance}, not {right}")
        rebuilt = self._tally.counts[Count.SENT_LINES] < REBUILT_LINES_MAX
        if rebuilt:
            problems += _rebuild(place, one_partition=self._cluster is None)
        self._problems += problems
        figures = books._asdict() | self._forwarded
        return figures | {"credits": self._watch.credits * len(CREDITED), "rebuilt": "yes" if rebuilt else "no"}

    def _brokers(self) -> contextlib.AbstractContextManager[Cluster | None]:
        return own_brokers(self._options.work) if self._options.kafka else contextlib.nullcontext()

    @contextlib.contextmanager
    def _served(self, name: str, quota: int, **settings: str) -> Iterator[Place]:
        data = self._ground.path / name
        log: tuple[str, ...] = ()
        if self._cluster is not None:
            url = f"kafka://{self._cluster.bootstrap}/soak-{name}"
            make_topics(parse_address(url, {}), Wanted(partitions=PARTITIONS))
            log = ("--log", url)
        environment = self._ground.environment | {"METERSTREAM_REQUESTS_PER_MINUTE": str(quota)} | settings
        output = self._options.work / f"{name}.log"
        server = Server(data, output, options=log, environment=environment)
        try:
            server.start()
            server.start("aggregate")
            yield Place(server, log[-1] if log else str(data), ("--data", str(data), *log))
        finally:
            server.close()

    @contextlib.contextmanager
    def _sending(self, place: Place, name: str, rate: int) -> Iterator[Tally]:
        """A sender that has nothing to send yet."""
        where = self._options.work / name
        tally = Tally(where, self._numbers_max)
        tally.counts[Count.RATE] = rate
        tally.counts[Count.NEW_PER_MILLE] = NEW_PER_MILLE_MAX
        tokens = tuple(_token(place, f"sender {number}") for number in range(CONNECTIONS))
        order = Order("127.0.0.1", place.server.port, tokens, where, self._numbers_max, self._options.seed)
        self._sender = multiprocessing.get_context("spawn").Process(target=run, args=(order,), daemon=True)
        self._sender.start()
        try:
            yield tally
        finally:
            tally.counts[Count.RATE] = 0
            self._sender.join(timeout=60)
            if self._sender.is_alive():
                self._sender.kill()


def _token(place: Place, name: str) -> str:
    done = place.run("tokens", "create", "--name", name, "--output", "json")
    if done.returncode:
        raise RuntimeError(done.stderr)
    token: str = msgspec.json.decode(done.stdout)["token"]
    return token


def _rebuild(place: Place, *, one_partition: bool) -> list[str]:
    """I7: the store made again from the log is the same."""
    store = place.server.data / "store.duckdb"
    before = fingerprint(store, one_partition=one_partition)
    healed = place.run("rebuild")
    if healed.returncode:
        return [f"I7: meterstream rebuild says {healed.stderr}"]
    after = fingerprint(store, one_partition=one_partition)
    return [f"I7: the table {name} is another after a rebuild" for name in before if before[name] != after.get(name)]


def _leaks(memory: dict[str, Slope]) -> list[str]:
    """What grows without a reason, where it was watched long enough to say so."""
    return [
        f"{name} grows by {slope.bytes_per_hour / MEBIBYTE:.0f} MiB an hour"
        for name, slope in memory.items()
        if slope.seconds >= JUDGED_S_MIN and unexplained(name, slope) > LEAK_BYTES_PER_HOUR_MAX
    ]


def unexplained(name: str, slope: Slope) -> float:
    """Bytes an hour beside what the aggregator has to remember of each new event."""
    return slope.bytes_per_hour - (IDENTITY_BYTES * slope.events_per_hour if name == "aggregate" else 0)


def say(text: str) -> None:
    """A line, with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)
