"""The client's threads beside the application's: where the system starts none events wait, later ones ask again, and
nothing is raised; and what they log keeps nobody waiting for them."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ingest.client import Ingestion
from ingest.client import ingestion as ingestion_module
from tests.ingest.client.test_sender import QUICK, assert_adds_up, bad_for, client, event
from tests.support.servers.faulty_gateway import Bad, FaultServer
from tests.support.waiting import PATIENCE_S, eventually


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


class Slow(logging.Handler):
    """Takes until another thread has captured an event, as long as it may."""

    def __init__(self, ingestion: Ingestion) -> None:
        super().__init__()
        self.ingestion, self.waited_in_vain = ingestion, dict[str, bool]()

    def emit(self, record: logging.LogRecord) -> None:
        """Under the handler's own lock."""
        capturing = threading.Thread(target=self.ingestion.ingest, args=(event(2),))
        if record.msg not in self.waited_in_vain:
            self.waited_in_vain[record.msg] = False  # where the capture has something to log itself
            capturing.start()
            capturing.join(PATIENCE_S / 4)
            self.waited_in_vain[record.msg] = capturing.is_alive()


@pytest.fixture
def slow() -> Iterator[Callable[[Ingestion], Slow]]:
    """Makes a handler of what a client logs."""
    logger, handlers = logging.getLogger("ingest.client"), list[Slow]()

    def add(ingestion: Ingestion) -> Slow:
        handlers.append(Slow(ingestion))
        logger.addHandler(handlers[-1])
        return handlers[-1]

    yield add
    for handler in handlers:
        logger.removeHandler(handler)


def test_a_capture_waits_for_no_log_handler(spool: Path | None, slow: Callable[[Ingestion], Slow]) -> None:
    """Least of all for one that captures, too, and that would wait for it: the sender holds nothing while it logs."""
    with FaultServer(bad_for(1, lambda: Bad(503))) as server, client(server, spool) as ingestion:
        handler = slow(ingestion)
        ingestion.ingest(event(1))
        eventually(lambda: "e2" in server.taken)

    assert handler.waited_in_vain == {"the server cannot be reached or asks to wait": False}


def test_a_capture_that_has_something_to_log_keeps_no_other_waiting(
    tmp_path: Path, slow: Callable[[Ingestion], Slow]
) -> None:
    """What the disk refuses is told when the event has been taken."""
    with FaultServer() as server, client(server, tmp_path / "spool") as ingestion:
        handler = slow(ingestion)
        (tmp_path / "spool").rmdir()
        (tmp_path / "spool").touch()
        assert ingestion.ingest(event(1)) == "e1"

    assert handler.waited_in_vain == {"the spool cannot be written; events are held in memory": False}
