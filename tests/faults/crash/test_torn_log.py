"""A damaged log is never believed in silence: it is refused, or its reader sees that it is not what was counted.

The write-ahead log of SQLite ends at its first damaged frame, so damage there looks like a log that never had its last
records; the store remembers that it had. The file itself has no checksums for pages: packed values have their own, and
short ones are found by comparing them with what the store counted (``meterstream reconcile``).
"""

import asyncio
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from aggregator.engine.supervisor import Aggregator
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, PositionLost, Record, Refused, TryAgain
from tests.support.faults.store_checks import SEED, caught_up, ends, export, usage, write_sample, write_usage
from tests.support.records import ORGANIZATION, SMALL
from tests.support.servers.installation import meterstream
from tests.support.waiting import eventually

DAMAGES = 12
LOG, WAL, STORE = "log.sqlite", "log.sqlite-wal", "store.duckdb"
DIFFERENT = 3  # the exit code of reconcile


class Counted:
    """A log that was counted, as a crash leaves it and as a stop does, each with the store that has all of it."""

    def __init__(self, folder: Path) -> None:
        self.crashed, self.stopped, self.trial = folder / "crashed", folder / "stopped", folder / "trial"
        log = open_log(str(self.stopped))
        write_sample(log)
        write_usage(log, 6, SEED, decide=False)
        aggregator = Aggregator(log, self.stopped / STORE, SMALL)
        aggregator.start()
        eventually(lambda: caught_up(aggregator, ends(log)))
        aggregator.stop()
        self.crashed.mkdir()
        for name in (LOG, WAL, STORE):
            shutil.copy(self.stopped / name, self.crashed)
        self.records = records(self.stopped)
        log.close()

    def damaged(self, state: Path, name: str, content: bytes) -> Path:
        """A copy of a state with another content of one file."""
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(state, self.trial)
        (self.trial / name).write_bytes(content)
        return self.trial


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """Made once; a test works on copies."""
    return Counted(tmp_path_factory.mktemp("counted"))


def records(data: Path) -> list[Record]:
    """Everything in a log. Raises TryAgain, PositionLost, Refused."""
    log = open_log(str(data))
    try:
        return [
            record for stream in (USAGE_EVENTS, USAGE_CONTROL) for record in log.read(stream, {0: 0}, bytes_max=1 << 30)
        ]
    finally:
        log.close()


def outcome(counted: Counted, data: Path) -> str:
    """What becomes of a damaged log."""
    try:
        if records(data) == counted.records:
            return "whole"
    except (TryAgain, PositionLost, Refused):
        return "refused when read"
    log = open_log(str(data))
    aggregator = Aggregator(log, data / STORE, SMALL)
    try:
        aggregator.start()
    except PositionLost:
        return "refused by its reader"
    finally:
        aggregator.stop()
        log.close()
    found = meterstream("reconcile", "--check", "log", "--data", str(data))
    if found.returncode == DIFFERENT:
        return "found by meterstream reconcile"
    return f"silent: {found.returncode} {found.stdout} {found.stderr}"


def cut(content: bytes, choose: random.Random) -> bytes:
    """The end is missing."""
    return content[: choose.randrange(len(content))]


def zero(content: bytes, choose: random.Random) -> bytes:
    """The end never arrived."""
    place = choose.randrange(len(content))
    return content[:place] + bytes(len(content) - place)


def flip(content: bytes, choose: random.Random) -> bytes:
    """One bit is another."""
    place = choose.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("state", "name", "damage"), [
    ("crashed", WAL, cut), ("crashed", WAL, zero), ("crashed", WAL, flip),
    ("stopped", LOG, cut), ("stopped", LOG, flip),
])
def test_damage_to_a_counted_log_is_never_silent(
    counted: Counted, state: str, name: str, damage: Callable[[bytes, random.Random], bytes], long: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Either nothing is missing and nothing is different, or somebody says so before anything is counted wrong."""
    choose = random.Random(SEED)
    origin: Path = getattr(counted, state)
    content = (origin / name).read_bytes()
    outcomes: Counter[str] = Counter()
    for _ in range(DAMAGES * (10 if long else 1)):
        outcomes[outcome(counted, counted.damaged(origin, name, damage(content, choose)))] += 1
    record_property("figures", f"torn log: seed {SEED}, {damage.__name__} in {name}: {dict(outcomes)}")

    assert [] == [found for found in outcomes if found.startswith("silent")]


def test_the_doctor_says_that_records_are_missing(counted: Counted) -> None:
    """A log that lost its end is named, with the only thing that helps: its newest copy."""
    content = (counted.crashed / WAL).read_bytes()
    data = counted.damaged(counted.crashed, WAL, content[: len(content) // 2])
    ill = meterstream("doctor", "--data", str(data), "--output", "json")

    assert ill.returncode == 1
    (heal,) = (finding["heal"] for finding in json.loads(ill.stdout) if finding["heal"])
    assert "restore the newest log.sqlite" in heal


def test_a_record_that_names_no_organization_is_the_same_on_both_sides(tmp_path: Path) -> None:
    """The store buries its lines, and the nightly proof agrees that they cannot be counted."""
    log = open_log(str(tmp_path))
    write_sample(log)
    nobody = Entry(usage("nobody's"), 0, ORGANIZATION[:-1] + '"', admitted=True)
    asyncio.run(log.append(USAGE_EVENTS, [nobody]))
    aggregator = Aggregator(log, tmp_path / STORE, SMALL)
    aggregator.start()
    eventually(lambda: caught_up(aggregator, ends(log)))
    aggregator.stop()
    log.close()
    letters = export(tmp_path / STORE)["dead_letters"]
    proof = meterstream("reconcile", "--check", "log", "--data", str(tmp_path))

    assert nobody.value in [letter[7] for letter in letters]
    assert proof.returncode == 0, proof.stdout + proof.stderr
