"""The spool's files: whose they are, and that nothing which was written to one is ever nowhere."""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ingest.client import spool as journal_module
from ingest.client.event import Limits
from ingest.client.outbox import Outbox
from ingest.client.spool import Row, Spool, SpoolBroken, fingerprint, spools

OWNER = "owner"


def lines(directory: Path) -> list[bytes]:
    """What lies in the files that belong to nobody."""
    found = []
    for spool in filter(Spool.claim, spools(directory, [OWNER])):
        found += [line for _, line in spool.read(-1, 1000)]
        spool.close()
    return found


def test_a_file_belongs_to_one(tmp_path: Path) -> None:
    """While it is open nobody else gets it; afterwards whoever comes first."""
    mine = Spool(tmp_path, OWNER)
    mine.append(1, b"a")
    [seen] = spools(tmp_path, [OWNER])
    assert not seen.claim()

    mine.close()
    assert seen.claim()
    assert seen.read(-1, 10) == [(1, b"a")]
    seen.close()


@pytest.mark.skipif(os.name != "posix", reason="this system knows no modes")
def test_nobody_else_reads_it(tmp_path: Path) -> None:
    """Though others may read the directory, and new files are usually theirs to read."""
    tmp_path.chmod(0o755)
    usual = os.umask(0o022)
    try:
        spool = Spool(tmp_path, OWNER)
        spool.append(1, b"a")
        spool.append_all([(2, b"b")])
        modes = {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        spool.close()
    finally:
        os.umask(usual)

    assert modes == {".spool": 0o600, ".journal": 0o600, ".spool-wal": 0o600}


def test_an_empty_file_is_removed(tmp_path: Path) -> None:
    """With its journal; one that holds something stays."""
    spool = Spool(tmp_path, OWNER)
    spool.append_all([(1, b"a"), (2, b"b"), (5, b"c")])
    spool.delete([1, 5])
    spool.close()
    assert lines(tmp_path) == [b"b"]

    [left] = spools(tmp_path, [OWNER])
    assert left.claim()
    left.delete([2])
    left.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    """It is nobody's, and no reason to stop."""
    (tmp_path / f"{OWNER}-broken.spool").write_bytes(b"this is no database" * 100)

    assert lines(tmp_path) == []
    assert (tmp_path / f"{OWNER}-broken.spool").exists()


def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """And leaves nothing behind."""
    (tmp_path / "file").touch()
    with pytest.raises(SpoolBroken):
        Spool(tmp_path / "file" / "below", OWNER).append(1, b"a")


def test_a_new_file_is_never_taken_for_an_abandoned_one(tmp_path: Path) -> None:
    """However often others look while files are made: every event written is found, once."""
    ended, found = threading.Event(), list[bytes]()

    def look() -> None:
        while not ended.is_set():
            for spool in filter(Spool.claim, spools(tmp_path, [OWNER])):
                rows = spool.read(-1, 10)
                found.extend(line for _, line in rows)
                if rows:
                    spool.delete([number for number, _ in rows])
                spool.close()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    written = [b"%d" % number for number in range(60)]
    for line in written:
        spool = Spool(tmp_path, OWNER)
        spool.append(1, line)
        spool.close()
    ended.set()
    for thread in threads:
        thread.join()

    assert sorted(found + lines(tmp_path)) == sorted(written)


def test_a_file_in_the_making_is_left_alone_and_one_never_made_is_removed(tmp_path: Path) -> None:
    """It is empty until it is locked. A minute later nobody makes it any more: its process was killed in between."""
    path = tmp_path / f"{OWNER}-new.spool"
    path.touch()
    assert [spool.claim() for spool in spools(tmp_path, [OWNER])] == [False]

    an_hour_ago_s = path.stat().st_mtime - 3600
    os.utime(path, (an_hour_ago_s, an_hour_ago_s))
    (abandoned,) = spools(tmp_path, [OWNER])
    assert abandoned.claim()
    abandoned.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    """When its journal moves into the file, the same thread captures an event, once."""
    late = [b"in the middle"]

    class Interrupted(Spool):
        def _fold(self, more: Sequence[Row] = ()) -> None:
            assert not late or outbox.put(late.pop())
            super()._fold(more)

    outbox = Outbox(Limits(linger_s=0), "block", Interrupted(tmp_path, OWNER))
    yield outbox
    outbox.close()


def test_an_event_in_the_middle_of_taking_over_hides_none(outbox: Outbox) -> None:
    """A finalizer captures while abandoned events move into the file: each of them is sent."""
    assert outbox.put(b"before")
    outbox.adopt([b"left", b"behind"])
    assert outbox.put(b"after")
    sent = [line for batch in (outbox.take(), outbox.take()) if batch for _, line in batch.rows]

    assert sent == [b"before", b"left", b"behind", b"in the middle", b"after"]


def test_an_event_in_the_middle_of_a_move_hides_none_after_a_kill(
    outbox: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler captures while another event waits for the journal: who takes the files over finds both."""
    monkeypatch.setattr(journal_module, "_EVENTS_MAX", 2)
    for line in (b"a", b"b", b"c"):
        assert outbox.put(line)
    shutil.copytree(tmp_path, tmp_path / "killed")

    assert lines(tmp_path / "killed") == [b"a", b"b", b"c", b"in the middle"]


def test_a_fingerprint_tells_server_and_token_apart() -> None:
    """And tells nobody the token."""
    names = {fingerprint(url, token) for url in ("http://a", "http://b") for token in ("s", "t")}

    assert len(names) == 4
    assert all("t" not in name and "s" not in name for name in names)


def test_a_slash_at_the_end_makes_no_other_server() -> None:
    """However an address is spelled, what is left for its server has one name."""
    assert len({fingerprint(url, "t") for url in ("http://a", "http://a/", "http://a//")}) == 1
