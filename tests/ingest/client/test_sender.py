"""Bad servers and bad events: nothing is lost, nothing counts twice, and the good do not wait for the bad."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingest.client import EventRefused, Ingestion, Limits, Rejection, Stats
from ingest.client.event import MEMORY_EVENTS_MAX
from tests.support.servers.faulty_gateway import Bad, Events, FaultServer, Script, refusal
from tests.support.waiting import PATIENCE_S, eventually

QUICK = Limits(linger_s=0.005, backoff_s=0.005, backoff_s_max=0.05, batch_events_max=50, close_s_max=10)
TOGETHER = msgspec.structs.replace(QUICK, linger_s=60)  # what is captured in a row leaves in one request


def event(number: int, **metadata: Any) -> dict[str, Any]:
    """An event with an id of its own."""
    named = {"name": "call", "external_customer_id": "u", "external_id": f"e{number}"}
    return {**named, "metadata": {"n": number, **metadata}}


@contextmanager
def client(
    server: FaultServer, spool: Path | None = None, limits: Limits = QUICK, **options: Any
) -> Iterator[Ingestion]:
    """A client of the server; it has settled everything when the block ends, and its sums are right."""
    with Ingestion("token", base_url=server.url, spool=spool, limits=limits, **options) as ingestion:
        yield ingestion
        assert ingestion.flush(PATIENCE_S)
    assert_adds_up(ingestion.stats())


def assert_adds_up(stats: Stats) -> None:
    """Every event captured or taken over is in exactly one place."""
    places = stats.acknowledged + stats.pending + stats.rejected + stats.dropped
    assert stats.captured + stats.adopted == places


def join(ingestion: Ingestion) -> None:
    """Wait for the threads of a client that was closed without patience."""
    ingestion._sender.join(time.monotonic() + PATIENCE_S)


@pytest.fixture(params=["memory", "disk"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Without and with a spool."""
    return tmp_path / "spool" if request.param == "disk" else None


def bad_for(times: int, answer: Callable[[], Bad]) -> Script:
    """The first requests are answered so, the rest well."""
    return lambda events, number: answer() if number <= times else None


@pytest.mark.parametrize("answer", [
    Bad(0), Bad(-1), Bad(429, {"retry-after": "0"}), Bad(429), Bad(503, {"retry-after": "0"}), Bad(500), Bad(502),
    Bad(401), Bad(404), Bad(307, {"location": "/elsewhere"}), Bad(400), Bad(418),
])  # fmt: skip
def test_an_answer_that_is_no_yes_costs_nothing(answer: Bad, spool: Path | None) -> None:
    """Whatever a server says for a while, every event is taken in the end, and counts once."""
    with FaultServer(bad_for(3, lambda: answer)) as server, client(server, spool, gzip=False) as ingestion:
        for number in range(120):
            ingestion.ingest(event(number))
        assert ingestion.flush(PATIENCE_S)

    assert set(server.taken) == {f"e{number}" for number in range(120)}
    assert ingestion.stats().acknowledged == 120
    assert ingestion.stats().retries >= 1


def test_an_answer_that_got_lost_counts_once() -> None:
    """The server took the events and the answer was lost: they are sent again under the same ids."""
    with FaultServer(bad_for(1, lambda: Bad(-1))) as server, client(server, limits=TOGETHER) as ingestion:
        made = [ingestion.ingest({"name": "call", "external_customer_id": "u"}) for _ in range(5)]
        assert ingestion.flush(PATIENCE_S)

    assert dict(server.taken) == dict.fromkeys(made, 2)
    assert ingestion.stats().duplicates == 5


def test_a_refused_event_is_found_by_its_index() -> None:
    """The events that a 422 names are handed over; the others go on in one more request."""
    def script(events: Events, number: int) -> Bad | None:
        bad = [index for index, each in enumerate(events) if each["metadata"].get("poison")]
        return refusal(*((index, "EventCreateCustomer.metadata.poison") for index in bad)) if bad else None

    rejected: list[Rejection] = []
    with FaultServer(script) as server, client(server, limits=TOGETHER, on_rejected=rejected.append) as ingestion:
        for number in range(40):
            ingestion.ingest(event(number, poison=number in (3, 17)))

    assert [rejection.external_id for rejection in rejected] == ["e3", "e17"]
    assert {(rejection.by, rejection.type) for rejection in rejected} == {("server", "value_error")}
    assert rejected[0].event["metadata"] == {"n": 3, "poison": True}
    assert len(server.taken) == 38
    assert sum(count > 1 for count in server.taken.values()) == 0


@pytest.mark.parametrize("answer", [Bad(422, {}, b"{}"), Bad(422, {}, b'{"detail":"no"}'), Bad(413)])
def test_a_refused_event_is_found_by_halves(answer: Bad) -> None:
    """A refusal that names nobody is narrowed down to the event at fault."""
    def script(events: Events, number: int) -> Bad | None:
        return answer if any(each["metadata"].get("poison") for each in events) else None

    rejected: list[Rejection] = []
    with FaultServer(script) as server, client(server, on_rejected=rejected.append) as ingestion:
        for number in range(40):
            ingestion.ingest(event(number, poison=number in (0, 39)))

    assert sorted(str(rejection.external_id) for rejection in rejected) == ["e0", "e39"]
    assert len(server.taken) == 38


@pytest.mark.parametrize("status", [400, 403, 408, 500, 502, 503, 504, 0])
def test_an_event_that_breaks_the_server_holds_nobody_up(status: int, spool: Path | None) -> None:
    """A batch that fails for no stated reason steps aside; the others pass, and its good events, too.

    The event at fault is handed over in the end, unless the server says that the fault is its own.
    """
    def script(events: Events, number: int) -> Bad | None:
        return Bad(status) if any(each["metadata"].get("poison") for each in events) else None

    rejected: list[Rejection] = []
    with FaultServer(script) as server, Ingestion(
        "token", base_url=server.url, spool=spool, limits=QUICK, on_rejected=rejected.append
    ) as ingestion:
        ingestion.ingest(event(0, poison=True))
        for number in range(1, 100):
            ingestion.ingest(event(number))

        def keep_going() -> bool:
            ingestion.ingest(event(1000 + ingestion.stats().captured))
            passed = {f"e{number}" for number in range(1, 100)} <= set(server.taken)
            return passed and (status == 500 or bool(rejected))

        eventually(keep_going)
        ingestion.close(0)
        join(ingestion)
        stats = ingestion.stats()

    assert_adds_up(stats)
    assert [rejection.external_id for rejection in rejected] == ([] if status == 500 else ["e0"])
    assert "e0" not in server.taken


@pytest.mark.parametrize("poisoned", [{0}, {59}, set(range(0, 60, 20)), set(range(30))])
def test_good_events_get_through_though_nothing_else_is_sent(poisoned: set[int], spool: Path | None) -> None:
    """Wherever in their batches those are that a firewall keeps out, and though no batch is without one."""
    def script(events: Events, number: int) -> Bad | None:
        return Bad(403) if any(each["metadata"]["poison"] for each in events) else None

    good = {f"e{number}" for number in set(range(60)) - poisoned}
    limits = msgspec.structs.replace(TOGETHER, batch_events_max=20)
    with FaultServer(script) as server, Ingestion(
        "token", base_url=server.url, spool=spool, limits=limits
    ) as ingestion:
        for number in range(60):
            ingestion.ingest(event(number, poison=number in poisoned))
        ingestion.flush(0)
        eventually(lambda: ingestion.stats().acknowledged == len(good))
        ingestion.close(0)

    assert set(server.taken) == good
    assert_adds_up(ingestion.stats())


def test_a_server_that_sends_most_requests_away_loses_nothing() -> None:
    """Three of four are told to wait, whoever asks: no event is at fault, and none is given up."""
    chance = random.Random(1)
    limits = msgspec.structs.replace(QUICK, batch_events_max=5, backoff_s=0.0005, backoff_s_max=0.001)
    script: Script = lambda events, number: Bad(503) if chance.random() < 0.75 else None  # noqa: E731
    with FaultServer(script) as server, client(server, limits=limits) as ingestion:
        for number in range(300):
            ingestion.ingest(event(number))

    assert ingestion.stats().acknowledged == len(server.taken) == 300
    assert ingestion.stats().rejected == 0


def test_while_nobody_passes_nothing_is_given_up(spool: Path | None) -> None:
    """However often one event alone was answered so, by a server that takes nothing else either."""
    is_away = True
    script: Script = lambda events, number: Bad(403) if is_away else None  # noqa: E731
    limits = msgspec.structs.replace(QUICK, backoff_s=0.0005, backoff_s_max=0.001)
    with FaultServer(script) as server, client(server, spool, limits) as ingestion:
        for number in range(3):
            ingestion.ingest(event(number))
        eventually(lambda: len(server.requests) > 100)
        assert ingestion.stats().pending == 3
        is_away = False

    assert dict(server.taken) == {"e0": 1, "e1": 1, "e2": 1}


def test_a_handler_that_fails_changes_nothing() -> None:
    """``on_rejected`` is the application's code; its errors end with it."""
    def handler(rejection: Rejection) -> None:
        raise RuntimeError("no")

    with FaultServer(lambda events, number: Bad(422)) as server, client(server, on_rejected=handler) as ingestion:
        ingestion.ingest(event(1))
        ingestion.ingest({"name": "call"})

    assert ingestion.stats().rejected == 2


def test_retry_after_is_obeyed() -> None:
    """Nothing is sent before the time the server asked for, by any of the threads."""
    arrivals: list[float] = []

    def script(events: Events, number: int) -> Bad | None:
        arrivals.append(time.monotonic())
        return Bad(429, {"retry-after": "1"}) if number == 1 else None

    with FaultServer(script) as server, client(server) as ingestion:
        ingestion.ingest(event(1))
        eventually(lambda: ingestion._outbox.pace.failures)  # the answer is read, not just the request sent
        for number in range(2, 200):
            ingestion.ingest(event(number))

    assert arrivals[1] - arrivals[0] >= 0.99


def test_while_the_server_is_away_one_request_at_a_time_asks() -> None:
    """A storm of 429 is not answered with a storm of requests: each is sent when the answer before it was read."""
    failures: list[int] = []

    def script(events: Events, number: int) -> Bad | None:
        failures.append(ingestion._outbox.pace.failures)
        return Bad(429) if number < 12 else None

    with FaultServer(script) as server, client(server) as ingestion:
        ingestion.ingest(event(0))
        eventually(lambda: ingestion._outbox.pace.failures)  # until then several may ask
        for number in range(1, 2000):
            ingestion.ingest(event(number))
        assert ingestion.flush(PATIENCE_S)
        stats = ingestion.stats()

    assert stats.acknowledged == 2000
    assert stats.retries == 11
    assert failures[:12] == list(range(12))


def test_a_clock_that_is_ahead_loses_nothing() -> None:
    """Events refused as lying in the future, by a server whose clock is behind ours, are sent again when it is time."""
    def script(events: Events, number: int) -> Bad | None:
        if number > 1:
            return None
        future = refusal(*((index, "EventCreateCustomer.timestamp") for index in range(0, len(events), 2)))
        return future._replace(headers={"date": formatdate(time.time() - 2, usegmt=True)})

    with FaultServer(script) as server, client(server) as ingestion:
        for number in range(10):
            ingestion.ingest(event(number))

    assert len(server.taken) == 10


def test_batches_are_bounded_by_events_and_bytes() -> None:
    """No request is larger than the limits, unless one event alone is; large bodies are compressed."""
    limits = Limits(linger_s=60, batch_events_max=30, batch_bytes_max=10_000)
    with FaultServer() as server, client(server, limits=limits) as ingestion:
        for number in range(300):
            ingestion.ingest(event(number, text="x" * (number + 1)))
        counts = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
        ingestion.ingest(event(300, _llm={"vendor": "v", "model": "m", "prompt": "y" * 50_000, **counts}))

    assert len(server.taken) == 301
    assert max(events for events, _ in server.requests) <= 30
    *bounded, alone = sorted(server.body_bytes)
    assert bounded[-1] <= limits.batch_bytes_max + len('{"events":[]}')
    assert alone > 50_000
    assert {headers.get("content-encoding") for events, headers in server.requests if events > 20} == {"gzip"}


@pytest.mark.parametrize("status", [400, 415, 422])
def test_a_server_that_knows_no_compression_gets_none(status: int) -> None:
    """One request finds out; from then on bodies are plain, and no event was rejected for it."""
    def script(events: Events, number: int) -> Bad | None:
        return Bad(status) if "content-encoding" in server.requests[-1][1] else None

    with FaultServer(script) as server, client(server) as ingestion:
        for number in range(500):
            ingestion.ingest(event(number))

    assert len(server.taken) == 500
    assert ingestion.stats().rejected == 0
    assert sum("content-encoding" in headers for _, headers in server.requests) <= QUICK.in_flight_max


def test_what_the_disk_holds_beyond_memory_is_read_back(tmp_path: Path) -> None:
    """A long absence fills the disk, not the memory; afterwards everything is sent, once, and in order but for the
    event that finds out."""
    captured = MEMORY_EVENTS_MAX + 3000
    is_away = True
    limits = Limits(linger_s=0.005, backoff_s=0.01, backoff_s_max=0.02, in_flight_max=1)
    script: Script = lambda events, number: Bad(503) if is_away else None  # noqa: E731
    with FaultServer(script) as server, client(server, tmp_path, limits) as ingestion:
        for number in range(captured):
            ingestion.ingest(event(number))
        assert len(ingestion._outbox._memory) <= MEMORY_EVENTS_MAX
        is_away = False
        assert ingestion.flush(PATIENCE_S)

    asked, *others = (int(name[1:]) for name in server.events)
    assert others == [number for number in range(captured) if number != asked]
    assert set(server.taken.values()) == {1}
    assert list(tmp_path.iterdir()) == []


def test_strict_raises_what_would_be_handed_over() -> None:
    """In strict mode the caller learns at once that its event is bad."""
    with FaultServer() as server, client(server, strict=True) as ingestion:
        with pytest.raises(EventRefused, match=r"metadata\.k"):
            ingestion.ingest(event(1) | {"metadata": {"k": []}})
        assert ingestion.ingest(event(2)) == "e2"


class Unreadable(dict[str, Any]):
    """A mapping that fails."""

    def items(self) -> Any:
        """Fails."""
        raise RuntimeError("no")


def test_nothing_is_raised_into_the_application() -> None:
    """Whatever it hands over, and whatever that does when it is read."""
    rejected: list[Rejection] = []
    events: list[Any] = [Unreadable(), {"name": "call", "external_customer_id": "u", "metadata": Unreadable()}, 5, None]
    with FaultServer() as server, client(server, on_rejected=rejected.append) as ingestion:
        assert [ingestion.ingest(event) for event in [*events, event(1)]] == [None, None, None, None, "e1"]

    assert [rejection.type for rejection in rejected] == ["error", "error", *["model_attributes_type"] * 2]


def test_after_close_events_are_rejected_not_lost_in_silence() -> None:
    """A closed client says so, to the handler."""
    rejected: list[Rejection] = []
    with FaultServer() as server:
        ingestion = Ingestion("token", base_url=server.url, spool=None, on_rejected=rejected.append)
        ingestion.close()
        assert ingestion.ingest(event(1)) is None

    assert [rejection.type for rejection in rejected] == ["closed"]
    assert_adds_up(ingestion.stats())


def test_close_leaves_no_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that was being made when it came."""
    connecting, is_closed, made = threading.Event(), threading.Event(), list[socket.socket]()
    connect = socket.create_connection

    def slow(*arguments: Any, **options: Any) -> socket.socket:
        connecting.set()
        assert is_closed.wait(PATIENCE_S)
        made.append(connect(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(socket, "create_connection", slow)
    with FaultServer() as server:
        ingestion = Ingestion("token", base_url=server.url, spool=None, limits=QUICK)
        ingestion.ingest(event(1))
        assert connecting.wait(PATIENCE_S)
        ingestion.close(0)
        is_closed.set()
        join(ingestion)

    assert [connection.fileno() for connection in made] == [-1]


def test_the_log_has_no_payload(caplog: pytest.LogCaptureFixture) -> None:
    """Neither values nor the token appear in any record, whatever goes wrong."""
    def script(events: Events, number: int) -> Bad | None:
        return (Bad(503), Bad(500), Bad(422))[number - 1] if number < 4 else None

    with FaultServer(script) as server, client(server) as ingestion:
        ingestion.ingest(event(1, secret="hunter2"))
        ingestion.ingest({"name": "call", "metadata": {"secret": "hunter2"}})
        ingestion.ingest(event(2) | {"metadata": {"secret": ["hunter2"]}})

    text = json.dumps([record.__dict__ for record in caplog.records], default=str)
    assert len(caplog.records) >= 3
    assert "hunter2" not in text
    assert "Bearer" not in text
