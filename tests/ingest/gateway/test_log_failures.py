"""What the gateway answers when it cannot, and that what it answered with yes is in the log."""

import asyncio
import concurrent.futures
import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingest.admission import intake
from ingest.catalogue_follower import CatalogueTail
from ingest.limits import INLINE_BODY_BYTES_MAX
from ingest.log import clock_us, open_log
from ingest.log.memory import Disk, MemoryLog, Partition
from ingest.log.partitions import Limits, Places
from meters.catalogue.access import TOKEN_PREFIX
from meters.catalogue.catalogue import Customer, CustomerCreated, Token, TokenCreated, TokenRevoked, encode_change
from meters.event import identity
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, PositionLost, Record, TryAgain, parse_position
from tests.support.servers.gateway import CREATED, RunningGateway, event
from tests.support.waiting import eventually

BODY = json.dumps({"events": [event()]}).encode()


def test_a_token_has_its_quota() -> None:
    """Beyond the requests of a minute: 429, an empty body, and the seconds to wait. Others are not concerned."""
    with RunningGateway(requests_per_minute=2) as gateway:
        assert [gateway.ingest({"events": []}).status_code for _ in range(3)] == [200, 200, 429]
        answer = gateway.ingest({"events": []})
        assert answer.content == b""
        assert 0 < int(answer.headers["retry-after"]) <= 30
        secret = TOKEN_PREFIX + uuid.uuid4().hex
        gateway.decide(TokenCreated(gateway.make_token(secret, ["events:write"])))
        eventually(lambda: gateway.ingest({"events": []}, authorization=f"Bearer {secret}").status_code == 200)


def memory_log(disk: Disk) -> MemoryLog:
    """A log on a disk that the test holds."""
    log = open_log("memory:")
    assert isinstance(log, MemoryLog)
    return MemoryLog(disk, log._clock_us, Limits())


def test_a_log_that_cannot_write_is_no_yes() -> None:
    """503 with Retry-After, /readyz says so, and all is well again when the log is."""
    disk = Disk()
    with RunningGateway(memory_log(disk)) as gateway:
        disk.full = True
        answer = gateway.ingest({"events": [event(external_id="later")]})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"] == "LogUnavailable"
        ready = gateway.client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"] == {"catalogue": True, "log": False}
        assert ready.json()["waiting_for"]
        disk.full = False
        assert gateway.ingest({"events": [event(external_id="later")]}).json() == {"inserted": 1, "duplicates": 0}
        assert gateway.client.get("/readyz").status_code == 200


def make_again(disk: Disk, partitions: int) -> None:
    """The events' stream, deleted and made with so many partitions."""
    disk.places = Places({USAGE_EVENTS: partitions, USAGE_CONTROL: 1})
    disk.streams[USAGE_EVENTS] = [Partition() for _ in range(partitions)]


def test_partitions_that_are_gone_are_forgotten() -> None:
    """Clients try again until the gateway has looked at the log, and none is told to give its events up."""
    disk = Disk({USAGE_EVENTS: 4, USAGE_CONTROL: 1})
    body = {"events": [event(external_customer_id=f"user-{number}") for number in range(40)]}
    with RunningGateway(memory_log(disk)) as gateway:
        assert parse_position(gateway.ingest(body).headers["log-position"]).keys() == {0, 1, 2, 3}
        make_again(disk, 2)
        answer = gateway.ingest(body)
        assert (answer.status_code, answer.json()["error"]) == (503, "LogUnavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert gateway.client.get("/readyz").json()["checks"]["log"] is False
        gateway.gateway.endpoint.intake.learn(gateway.log.ends(USAGE_EVENTS))
        written = parse_position(gateway.ingest(body).headers["log-position"])
        assert written.keys() == {0, 1}
        assert parse_position(gateway.ingest({"events": []}).headers["log-position"]) == written
        assert gateway.client.get("/readyz").status_code == 200


def test_more_bytes_than_may_be_held_are_turned_away() -> None:
    """503 before memory is spent; what was held is given back."""
    with RunningGateway(in_flight_bytes_max=500) as gateway:
        for _ in range(3):
            answer = gateway.ingest(content=b" " * 501)
            assert answer.status_code == 503
            assert answer.json()["error"] == "Busy"
        assert gateway.ingest(content=BODY).status_code == 200
        assert gateway.gateway.endpoint.in_flight.bytes == 0


class SlowControlLog(MemoryLog):
    """A log whose control stream cannot be read at first."""

    open = False

    def read(self, stream: str, *arguments: Any, **options: Any) -> Any:
        """Nothing, until it is open."""
        if stream == USAGE_CONTROL and not self.open:
            return []
        return super().read(stream, *arguments, **options)


def test_nobody_is_turned_away_before_the_tokens_are_known() -> None:
    """Until the control stream was read, a good token is answered "try again" and not "unknown"."""
    log = SlowControlLog(Disk(), lambda: 0, Limits())
    with RunningGateway(log, is_ready=False) as gateway:
        answer = gateway.ingest({"events": [event()]})
        assert answer.status_code == 503
        assert answer.json()["error"] == "CatalogueUnavailable"
        assert gateway.client.get("/readyz").json()["checks"]["catalogue"] is False
        assert gateway.client.get("/livez").status_code == 200
        log.open = True
        eventually(lambda: gateway.client.get("/readyz").status_code == 200)
        assert gateway.ingest({"events": [event()]}).status_code == 200


def test_a_damaged_control_stream_stops_the_gateway_from_guessing() -> None:
    """What is no decision cannot be passed over: tokens are not trusted from there on."""
    with RunningGateway() as gateway:
        asyncio.run(gateway.log.append(USAGE_CONTROL, [Entry(b"no decision")]))
        eventually(lambda: gateway.ingest({"events": []}).status_code == 503)


# ---- the lost answer


class HeldLog(MemoryLog):
    """A log that writes at once and says so only when it is let go."""

    let_go = threading.Event()

    def submit(self, stream: str, entries: Sequence[Entry]) -> asyncio.Future[list[int]]:
        """Durable now, acknowledged later."""
        return asyncio.ensure_future(self._append(stream, entries))

    async def _append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        offsets = await super().submit(stream, entries)
        if stream == USAGE_EVENTS:
            await asyncio.to_thread(self.let_go.wait)
        return offsets


class FailingLog(HeldLog):
    """Such a log, of which one question about a stream fails in a way that nobody expects."""

    def __init__(self) -> None:
        super().__init__(Disk(), lambda: 0, Limits())
        self.let_go = threading.Event()
        self.failures: dict[str, Exception] = {}

    def read(self, stream: str, *arguments: Any, **options: Any) -> Any:
        """Records, or the failure."""
        self._fail_once(stream)
        return super().read(stream, *arguments, **options)

    def ends(self, stream: str) -> dict[int, int]:
        """Where the stream ends, or the failure."""
        self._fail_once(stream)
        return super().ends(stream)

    def _fail_once(self, stream: str) -> None:
        if stream in self.failures:
            raise self.failures.pop(stream)


@pytest.mark.parametrize(
    ("stream", "failure"), [(USAGE_EVENTS, PositionLost("damaged once")), (USAGE_CONTROL, KeyError(1))]
)
def test_a_gateway_that_lost_a_background_task_ends(
    stream: str, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer 503 for ever. It stops as if it were asked to: what it took before is answered with yes."""
    monkeypatch.setattr("ingest.gateway.app.LOG_LOOK_S", 0.01)
    log = FailingLog()
    with RunningGateway(log) as gateway, concurrent.futures.ThreadPoolExecutor(1) as clients:
        eventually(lambda: gateway.client.get("/readyz").status_code == 200)
        held = clients.submit(gateway.ingest, content=BODY)
        eventually(lambda: sum(MemoryLog.ends(log, USAGE_EVENTS).values()))
        log.failures[stream] = failure
        eventually(lambda: not is_listening(gateway))
        assert not held.done()
        log.let_go.set()
        assert held.result().status_code == 200
        eventually(lambda: not gateway.is_running)
        assert gateway.gateway.failure is failure


def is_listening(gateway: RunningGateway) -> bool:
    """Whether it takes another connection."""
    try:
        with gateway.connect():
            return True
    except ConnectionRefusedError:
        return False


def test_a_repeated_request_after_a_lost_answer_has_the_same_identities() -> None:
    """A client that lost the answer sends again: the log has both copies, with the same identity and content."""
    log = HeldLog(Disk(), lambda: 0, Limits())
    with RunningGateway(log) as gateway:
        body = json.dumps({"events": [event(external_id=f"lost-{number}") for number in range(3)]}).encode()
        head = (
            f"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            f"authorization: Bearer {gateway.secret}\r\n\r\n"
        )
        with gateway.connect() as connection:
            connection.sendall(head.encode() + body)
            eventually(lambda: gateway.records())
        log.let_go.set()
        assert gateway.ingest(content=body).status_code == 200
        first, second = gateway.records()
        assert first.value == second.value
        ids = [json.loads(line)["external_id"] for line in gateway.lines()]
        identities = [identity(gateway.organization_id, external_id) for external_id in ids]
        assert identities[:3] == identities[3:]


def test_what_was_acknowledged_survives_the_process(tmp_path: Path) -> None:
    """On the embedded log: many clients at once, and every event with a 200 is in the file afterwards."""
    def send(number: int) -> str:
        name = f"kept-{number}"
        assert gateway.ingest({"events": [event(external_id=name)]}).status_code == 200
        return name

    with (
        RunningGateway(open_log(f"embedded:{tmp_path}")) as gateway,
        concurrent.futures.ThreadPoolExecutor(8) as clients,
    ):
        acknowledged = set(clients.map(send, range(80)))
    log = open_log(f"embedded:{tmp_path}")
    records = log.read(USAGE_EVENTS, {0: 0}, bytes_max=1 << 30)
    log.close()
    lines = [line for record in records for line in record.value.split(b"\n")]
    assert sorted(msgspec.json.decode(line)["external_id"] for line in lines) == sorted(acknowledged)
    assert [record.offset for record in records] == list(range(len(records)))
    assert min(record.timestamp_us for record in records) > CREATED.timestamp() * 1e6


def test_a_customer_is_known_as_soon_as_it_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event may follow its customer at once: what is in the log already is not unknown, only not read yet."""
    monkeypatch.setattr("ingest.catalogue_follower.CATCH_UP_S", 30.0)
    with RunningGateway(open_log(f"embedded:{tmp_path}")) as gateway:
        for preference in ("handling=strict", "handling=lenient") * 10:
            customer = Customer(id=str(uuid.uuid4()), organization_id=gateway.organization_id, created_at=CREATED)
            gateway.decide(CustomerCreated(customer))
            body = {"events": [{"name": "call", "customer_id": customer.id}]}
            assert gateway.ingest(body, prefer=preference).json()["inserted"] == 1


@pytest.mark.parametrize(("reader", "blanks"), [("admit_quickly", 0), ("admit", INLINE_BODY_BYTES_MAX)])
@pytest.mark.parametrize("preference", ["handling=strict", "handling=lenient"])
def test_a_customer_made_while_a_body_is_judged_is_known(
    reader: str, blanks: int, preference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creation is applied between the first judgement and what follows it, in the event loop and in the thread."""
    judge = getattr(intake, reader)
    judged = list[str]()
    with RunningGateway() as gateway:
        customer = Customer(id=str(uuid.uuid4()), organization_id=gateway.organization_id, created_at=CREATED)

        def judge_then_create(*arguments: Any, **options: Any) -> Any:
            found = judge(*arguments, **options)
            if not judged:
                creating = threading.Thread(target=gateway.decide, args=[CustomerCreated(customer)])
                creating.start()
                creating.join()
                ends = gateway.log.ends(USAGE_CONTROL)
                eventually(lambda: gateway.gateway.tail.position == ends)
            judged.append(type(found).__name__)
            return found

        monkeypatch.setattr(intake, reader, judge_then_create)
        content = json.dumps({"events": [{"name": "call", "customer_id": customer.id}] * 3}).encode() + b" " * blanks
        answer = gateway.ingest(content=content, prefer=preference)
        assert (answer.status_code, len(gateway.lines())) == (200, 3), answer.text
        assert answer.json()["inserted"] == 3


class WaitedForLog(MemoryLog):
    """A log that knows how long its readers would have waited for more of the control stream."""

    def __init__(self) -> None:
        super().__init__(Disk(), lambda: 0, Limits())
        self.waits_s: list[float] = []

    def read(self, stream: str, positions: Mapping[int, int], *, bytes_max: int, wait_s: float = 0.0) -> list[Record]:
        """What is there, at once."""
        self.waits_s.append(wait_s)
        return super().read(stream, positions, bytes_max=bytes_max)


def test_a_decision_acts_with_the_next_look_which_is_within_a_second() -> None:
    """Even in a log that wakes nobody: a read waits a second at most, and applies all that was decided before it."""
    tail = CatalogueTail(log := WaitedForLog())
    token = Token(id="t", organization_id="o", name="a token", sha256="s", scopes=[], created_at=CREATED)
    for change in (TokenCreated(token), TokenRevoked("t", CREATED)):
        asyncio.run(log.append(USAGE_CONTROL, [Entry(encode_change(change))]))
        tail._read_once()
        known = tail.catalogue.tokens["s"]
        assert (known.revoked_at is not None) == isinstance(change, TokenRevoked)
    for _ in range(2):
        tail._read_once()

    assert tail.current
    assert 0 < max(log.waits_s) <= 1


def test_readiness_says_how_far_the_log_is_ahead() -> None:
    """Only where the time of a decision is still to come."""
    ahead_us = 0
    log = open_log("memory:", clock_us=lambda: clock_us() + ahead_us)
    with RunningGateway(log) as gateway:
        assert "log_clock_ahead_s" not in gateway.client.get("/readyz").json()
        ahead_us = 7_200_000_000
        asyncio.run(log.append(USAGE_CONTROL, [Entry(encode_change(TokenCreated(gateway.token)), admitted=True)]))
        said = eventually(lambda: gateway.client.get("/readyz").json().get("log_clock_ahead_s"))
        assert 0 < said <= 7200


class ControlLostLog(MemoryLog):
    """A log whose control stream can be followed, and not be asked how far it goes once it is ``lost``."""

    lost = False

    def ends(self, stream: str) -> dict[int, int]:
        """Where the stream ends, as long as it can be told."""
        if stream == USAGE_CONTROL and self.lost:
            raise TryAgain("not now")
        return super().ends(stream)


def test_no_customer_is_called_unknown_while_that_is_uncertain() -> None:
    """503 with Retry-After where the newest decisions cannot be read, and Polar's refusal where they can."""
    log = ControlLostLog(Disk(), lambda: 0, Limits())
    body = {"events": [{"name": "call", "customer_id": str(uuid.uuid4())}]}
    with RunningGateway(log) as gateway:
        assert gateway.ingest(body).status_code == 422
        log.lost = True
        answer = gateway.ingest(body)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
