"""Records that left the log before they were read: nothing skips them but a person who says so."""

import asyncio
import contextlib
import os
import pwd
from pathlib import Path

import pytest

from aggregator.store.maintenance import Lost
from deploy.client import Session
from deploy.console import Output
from deploy.doctor import examine
from deploy.errors import GiveUp
from deploy.rebuild import rebuild, skip_lost
from deploy.reconcile.local import Task, reconcile
from deploy.server.data import DataDirectory
from deploy.settings import Settings
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log
from tests.support.records import ORGANIZATION, decisions, line, organization

FAR = 1 << 62  # microseconds: later than any record


def written(log: Log, *names: str) -> None:
    """A record for each name."""
    asyncio.run(log.append(USAGE_EVENTS, [Entry(line(name), 0, ORGANIZATION, admitted=True) for name in names]))


def test_what_is_lost_is_skipped_when_a_person_is_sure(tmp_path: Path) -> None:
    """It is listed first; then the store goes on at the beginning of the log, and counts what is there."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        written(log, "a", "b")
    assert rebuild(data)["stored"] == 2
    with contextlib.closing(data.open_log()) as log:
        written(log, "c", "d", "e")
        assert log.trim(USAGE_EVENTS, FAR) == 4

    lost = [Lost(USAGE_EVENTS, 0, 2, 4)]
    assert skip_lost(data, sure=False) == lost
    assert skip_lost(data, sure=True) == lost
    assert skip_lost(data, sure=True) == []


def test_decisions_are_not_skipped(tmp_path: Path) -> None:
    """Without every decision nobody knows whose the usage is."""
    data = DataDirectory(tmp_path)
    data.open_log().close()
    rebuild(data)
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, [*decisions([organization()]), *decisions([organization()])]))
        assert log.trim(USAGE_CONTROL, FAR) == 1

    with pytest.raises(GiveUp, match="decisions left the log"):
        skip_lost(data, sure=True)


def test_where_no_store_is_nothing_is_skipped(tmp_path: Path) -> None:
    """A --data that was mistyped is said, whatever the log is, and nothing is made there."""
    data = DataDirectory(tmp_path / "mistyped", "kafka://127.0.0.1:1")

    with pytest.raises(GiveUp, match=r"there is no store in .*mistyped; name the right place with --data"):
        skip_lost(data, sure=True)
    with pytest.raises(GiveUp, match=r"there is no directory .*mistyped; name the right place with --data"):
        rebuild(data)
    assert not data.path.exists()


def test_what_was_given_up_stays_in_sight(tmp_path: Path) -> None:
    """The log keeps the decision: reconcile and the doctor say how many records, when and by whom, for good."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        written(log, "a", "b")
    rebuild(data)
    with contextlib.closing(data.open_log()) as log:
        written(log, "c", "d", "e")
        log.trim(USAGE_EVENTS, FAR)
    skip_lost(data, sure=False)
    assert not [finding for finding in examine(data) if finding.part == "given up"]
    skip_lost(data, sure=True)

    (finding,) = (finding for finding in examine(data) if finding.part == "given up")
    words = "2 records of usage.events, 0:2 up to 4, were given up on "
    assert finding.found.startswith(words)
    assert f" UTC by {pwd.getpwuid(os.getuid()).pw_name} on " in finding.found
    (check,) = reconcile(Session(Settings(data=tmp_path), Output.json), Task(checks=("log",))).checks
    assert finding.found in check.notes


def test_a_log_without_its_beginning_is_not_rebuilt_from(tmp_path: Path) -> None:
    """It is said plainly, with the way on, and the old store is as it was."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
        written(log, "a", "b")
    rebuild(data)
    before = data.store.read_bytes()
    with contextlib.closing(data.open_log()) as log:
        log.trim(USAGE_EVENTS, FAR)

    with pytest.raises(GiveUp, match=r"cannot be rebuilt: the first 1 records left the log.*keep it, or restore"):
        rebuild(data)
    assert data.store.read_bytes() == before
