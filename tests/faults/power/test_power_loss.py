"""The power goes at any moment: what was acknowledged is in the log, and the store is exact or says how to heal it.

A real log and a real aggregator are recorded system call by system call (``power/recording.py``); from the recording
come disks as they may be found afterwards (``power/losing.py``). Each is opened by the code that opens it in life.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import duckdb
import pytest

from aggregator.engine.supervisor import Aggregator
from aggregator.store.database import Unopenable
from aggregator.store.store import Store
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log, Record
from tests.faults.power.losing import Crash, Disk, crashes
from tests.faults.power.recording import Operation, record
from tests.faults.power.workload import STORE
from tests.support.faults.store_checks import SEED, assert_store_tells, caught_up, count, ends, export, positions
from tests.support.programs import program
from tests.support.records import SMALL
from tests.support.waiting import eventually

STATES = 80
CONTINUED_SHARE = 0.1  # of the states: an aggregator goes on from there
STREAMS = (USAGE_EVENTS, USAGE_CONTROL)


class Recorded:
    """A recording, and what its log says up to each of its records."""

    def __init__(self, folder: Path) -> None:
        self.final, self.folder = folder / "recorded", folder
        self.final.mkdir()
        self.operations: list[Operation] = record(self.final, folder / "trace")
        log = open_log(str(self.final))
        self.records = {stream: everything(log, stream) for stream in STREAMS}
        self.counted = [count(log, {0: offset}) for offset in range(len(self.records[USAGE_EVENTS]) + 1)]
        log.close()

    def laid_out(self, crash: Crash) -> Path:
        """A data directory as the crash left it."""
        place = self.folder / "crashed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name, content in crash.files.items():
            (place / name).write_bytes(content)
        return place


def everything(log: Log, stream: str) -> list[Record]:
    """Every record of a stream of one partition."""
    return log.read(stream, {0: 0}, bytes_max=1 << 30)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Made once."""
    program("strace", "strace")
    return Recorded(tmp_path_factory.mktemp("power"))


def test_the_recording_is_complete(recorded: Recorded) -> None:
    """Whoever repeats the recorded operations gets the files that are really there, to the byte."""
    disk = Disk()
    for at, operation in enumerate(recorded.operations):
        disk.do(at, operation)
    real = {path.name: path.read_bytes() for path in recorded.final.iterdir() if path.name != "acknowledged"}

    assert {"log.sqlite", STORE} <= set(real)
    assert {name: content for name, content in disk.seen().items() if name in real} == {
        name: content for name, content in real.items() if not name.endswith("-shm")
    }
    assert disk.acknowledged == {stream: len(records) for stream, records in recorded.records.items()}


@pytest.mark.timeout(3600)  # with --long many times the states
def test_no_loss_of_power_loses_anything_silently(
    recorded: Recorded, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Whatever arrived of the last writes: the log has what it promised, and the store never shows another number."""
    states = STATES * (25 if long else 1)
    choose = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for crash in crashes(recorded.operations, states, SEED):
        outcomes[f"{crash.kind}: {look(recorded, crash, choose)}"] += 1
    shown = ", ".join(f"{outcome} {times}" for outcome, times in sorted(outcomes.items()))
    record_property("figures", f"power loss: seed {SEED}, {states} states of {len(recorded.operations)} calls: {shown}")

    assert sum(outcomes.values()) == states
    assert any("exact" in outcome for outcome in outcomes)


def look(recorded: Recorded, crash: Crash, choose: random.Random) -> str:
    """Open what is left as a server would. Fails where something acknowledged is missing or a number is wrong."""
    data = recorded.laid_out(crash)
    if not (data / "log.sqlite").exists():
        assert not crash.acknowledged, crash
        return "before there was a log"
    log = open_log(str(data))
    try:
        assert_log_is_a_prefix(log, recorded.records, crash)
        outcome = store_outcome(recorded, log, data)
        if outcome.startswith("refused"):
            log.close()
            rebuild(DataDirectory(data))
            log = open_log(str(data))
        elif choose.random() < CONTINUED_SHARE:
            go_on(log, data)
        else:
            return outcome
        tables = export(data / STORE)
        assert positions(tables) == log.ends(USAGE_EVENTS)
        assert_store_tells(tables, recorded.counted[log.ends(USAGE_EVENTS)[0]])
        return outcome
    finally:
        log.close()


def assert_log_is_a_prefix(log: Log, records: Mapping[str, list[Record]], crash: Crash) -> None:
    """Every record that was acknowledged, perhaps more, nothing else."""
    for stream, all_of_them in records.items():
        found = everything(log, stream)
        assert len(found) >= crash.acknowledged.get(stream, 0), (crash.kind, crash.at, stream)
        assert found == all_of_them[: len(found)]


def store_outcome(recorded: Recorded, log: Log, data: Path) -> str:
    """What the store says, which must be what the log says up to its position, or that a rebuild heals it."""
    path = data / STORE
    if not path.exists():
        return "no store yet"
    try:
        store = Store.open(path, {stream: log.identity(stream) for stream in STREAMS}, SMALL)
    except Unopenable as error:
        if "meterstream rebuild" not in str(error):
            raise
        return "refused, healed by meterstream rebuild"
    try:
        with store.read() as snapshot:
            tables = export(snapshot.connection)
    except duckdb.Error:
        return "refused when read, healed by meterstream rebuild"
    finally:
        store.close()
    if not (until := positions(tables)):
        return "empty store"
    assert until[0] <= log.ends(USAGE_EVENTS)[0], "the store counted what the log has not"
    assert_store_tells(tables, recorded.counted[until[0]])
    return "exact"


def go_on(log: Log, data: Path) -> None:
    """An aggregator starts on what was left and reads to the end of the log."""
    aggregator = Aggregator(log, data / STORE, SMALL)
    aggregator.start()
    eventually(lambda: caught_up(aggregator, ends(log)) or aggregator.failure)
    aggregator.stop()
    assert aggregator.failure is None
