"""Threads that the system does not start: events wait, later ones ask again, and nothing is raised."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ingest.client import Ingestion
from ingest.client import ingestion as ingestion_module
from tests.ingest.client.fault_server import FaultServer
from tests.ingest.client.test_sending import PATIENCE_S, QUICK, assert_adds_up, client, event
from tests.waiting import eventually


@pytest.fixture(params=["memory", "disk"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Without and with a spool."""
    return tmp_path / "spool" if request.param == "disk" else None


@contextmanager
def no_threads() -> Iterator[None]:
    """The system starts no thread: it has no room for a stack of half the addresses there are."""
    usual = threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(usual)


def test_threads_that_cannot_be_started_are_tried_again(
    spool: Path | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A moment without threads costs nothing: the next event, or ``flush``, starts them; it is logged once."""
    monkeypatch.setattr(ingestion_module, "_START_AGAIN_S", 0.0)
    with FaultServer() as server, client(server, spool) as ingestion:
        with no_threads():
            assert [ingestion.ingest(event(number)) for number in range(3)] == ["e0", "e1", "e2"]
        assert ingestion.flush(PATIENCE_S)
        assert ingestion.ingest(event(3)) == "e3"

    assert set(server.taken) == {"e0", "e1", "e2", "e3"}
    assert caplog.text.count("events cannot be sent") == 1


def test_a_client_without_threads_closes(spool: Path | None) -> None:
    """It raises nothing and waits for nobody; what it has is in the spool, or counted as pending."""
    with FaultServer() as server:
        with no_threads():
            ingestion = Ingestion("token", base_url=server.url, spool=spool, limits=QUICK)
            assert ingestion.ingest(event(1)) == "e1"
            ingestion.close()
        assert ingestion.stats().pending == 1
        assert_adds_up(ingestion.stats())
        if spool is not None:
            with client(server, spool):
                eventually(lambda: server.taken)
            assert set(server.taken) == {"e1"}
