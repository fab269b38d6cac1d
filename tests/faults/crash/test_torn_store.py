"""A damaged store is never a wrong one: it opens as an exact earlier state or not at all, and the log makes it anew."""

import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest

from aggregator.engine import pipeline
from aggregator.engine.supervisor import Aggregator
from aggregator.store.database import Unopenable
from aggregator.store.store import Store
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.faults.store_checks import (
    SEED,
    Counted,
    Tables,
    assert_store_tells,
    caught_up,
    count,
    ends,
    export,
    positions,
    write_sample,
    write_usage,
)
from tests.support.records import SMALL
from tests.support.servers.installation import meterstream
from tests.support.waiting import eventually

CUTS, FLIPS, ZEROS = 40, 40, 20
STORE, WAL = "store.duckdb", "store.duckdb.wal"


class Installed:
    """A data directory with a log of every kind of line, and its store in two states: as a crash leaves it, and closed.

    After a crash everything since the file was made is in the write-ahead log; a close folds it into the file.
    """

    def __init__(self, directory: Path) -> None:
        self.data, self.crashed, self.closed = directory / "data", directory / "crashed", directory / "closed"
        log = open_log(str(self.data))
        write_sample(log)
        write_usage(log, 10, SEED, decide=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "ROUND_BYTES_MAX", 1)  # a record a round: many commits to be cut between
            patch.setattr(pipeline, "ROUND_PERIOD_S", 0)
            patch.setattr(pipeline, "QUIET_ROUND_PERIOD_S", 0)
            aggregator = Aggregator(log, self.data / STORE, SMALL)
            aggregator.start()
            eventually(lambda: caught_up(aggregator, ends(log)))
            self._copy(self.crashed)
            aggregator.stop()
            self._copy(self.closed)
        self.identities = {stream: log.identity(stream) for stream in (USAGE_EVENTS, USAGE_CONTROL)}
        self.counted = [count(log, {0: offset}) for offset in range(log.ends(USAGE_EVENTS)[0] + 1)]
        self.tables = export(self.closed / STORE)
        assert_store_tells(self.tables, self.counted[-1])
        log.close()

    def _copy(self, to: Path) -> None:
        to.mkdir()
        for file in self.data.glob(f"{STORE}*"):
            shutil.copy(file, to)

    def damaged(self, state: Path, file: str, content: bytes) -> Path:
        """A copy of a state with one file of other content."""
        trial = self.data.parent / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(state, trial)
        (trial / file).write_bytes(content)
        return trial / STORE

    def opened(self, path: Path) -> Tables:
        """What the store says. Raises Unopenable, duckdb.Error."""
        store = Store.open(path, self.identities, SMALL)
        try:
            with store.read() as snapshot:
                return export(snapshot.connection)
        finally:
            store.close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Made once; a test works on copies."""
    return Installed(tmp_path_factory.mktemp("installed"))


def test_a_cut_write_ahead_log_is_an_exact_earlier_state(
    installed: Installed, record_property: Callable[[str, object], None]
) -> None:
    """Wherever it is cut: all rounds up to one, each whole, and the more there is left the later the state."""
    content = (installed.crashed / WAL).read_bytes()
    choose = random.Random(SEED)
    cuts = {*range(0, len(content), len(content) // CUTS), *(choose.randrange(len(content)) for _ in range(CUTS))}
    reached = []
    for cut in [*sorted(cuts), len(content)]:
        tables = installed.opened(installed.damaged(installed.crashed, WAL, content[:cut]))
        reached.append(positions(tables).get(0, 0))
        assert_store_tells(tables, installed.counted[reached[-1]])
    record_property(
        "figures", f"torn store: seed {SEED}, {len(reached)} cuts of {len(content)} bytes, {len(set(reached))} states"
    )

    assert sorted(reached) == reached
    assert installed.tables == tables
    assert len(set(reached)) > len(installed.counted) // 2


@pytest.mark.parametrize("kind", ["flip", "zero"])
def test_a_damaged_write_ahead_log_is_an_exact_state_or_refused(
    installed: Installed, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """A flipped bit or a zeroed tail never makes a number up: the message says how to heal, or nothing was harmed."""
    content = (installed.crashed / WAL).read_bytes()
    choose = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for _ in range(FLIPS if kind == "flip" else ZEROS):
        place, torn = choose.randrange(len(content)), bytearray(content)
        if kind == "flip":
            torn[place] ^= 0x40
        else:
            torn[place:] = bytes(len(torn) - place)
        outcomes[outcome(installed, installed.damaged(installed.crashed, WAL, bytes(torn)))] += 1
    record_property("figures", f"torn store: seed {SEED}, {kind} in the write-ahead log: {dict(outcomes)}")

    assert set() == set(outcomes) - {"refused", "exact"}


def test_a_damaged_file_is_exact_or_refused(
    installed: Installed, record_property: Callable[[str, object], None]
) -> None:
    """A flipped bit in the file itself is found by the checksum of its block, or stands where nothing is stored."""
    content = (installed.closed / STORE).read_bytes()
    choose = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    for _ in range(FLIPS):
        torn = bytearray(content)
        torn[choose.randrange(len(torn))] ^= 0x40
        outcomes[outcome(installed, installed.damaged(installed.closed, STORE, bytes(torn)))] += 1
    record_property("figures", f"torn store: seed {SEED}, flip in the file: {dict(outcomes)}")

    assert set() == set(outcomes) - {"refused", "exact", "found when read"}


def doctor(data: Path) -> subprocess.CompletedProcess[str]:
    """What ``meterstream doctor`` says, and its exit code."""
    return meterstream("doctor", "--data", str(data), "--output", "json")


def half_flipped(content: bytes) -> bytes:
    """A bit in the middle."""
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 0x40]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize(("state", "file", "damage"), [
    ("crashed", WAL, half_flipped),
    ("closed", STORE, half_flipped),
    ("closed", STORE, lambda content: content[: len(content) // 2]),
    ("closed", STORE, lambda content: b""),
])
def test_the_doctor_names_the_damage_and_a_rebuild_heals_it(
    installed: Installed, tmp_path: Path, state: str, file: str, damage: Callable[[bytes], bytes]
) -> None:
    """After a rebuild the store is what it was: every event, tally, link, number and dead letter, to the last digit."""
    origin = getattr(installed, state)
    for path in [*origin.iterdir(), *installed.data.glob("log.sqlite*")]:
        shutil.copy(path, tmp_path)
    assert doctor(tmp_path).returncode == 0
    for path in origin.iterdir():  # the doctor may have closed the store properly
        shutil.copy(path, tmp_path)
    (tmp_path / file).write_bytes(damage((origin / file).read_bytes()))
    ill = doctor(tmp_path)
    healed = meterstream("rebuild", "--data", str(tmp_path))
    well = doctor(tmp_path)

    assert ill.returncode == 1
    heals = [finding["heal"] for finding in json.loads(ill.stdout) if finding["heal"]]
    assert heals == [f"meterstream rebuild --data {tmp_path}"]
    assert healed.returncode == 0, healed.stderr
    assert well.returncode == 0, well.stdout
    assert installed.tables == export(tmp_path / STORE)


def outcome(installed: Installed, path: Path) -> str:
    """What became of a damaged store."""
    try:
        tables = installed.opened(path)
    except Unopenable as error:
        return "refused" if "meterstream rebuild" in str(error) else f"refused without a way on: {error}"
    except duckdb.Error:
        return "found when read"
    counted: Counted = installed.counted[positions(tables).get(0, 0)]
    assert_store_tells(tables, counted)
    return "exact"
