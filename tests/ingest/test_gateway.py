"""What the gateway answers over HTTP, and what is in the log when it has answered."""

import asyncio
import concurrent.futures
import gzip
import json
import logging
import threading
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zstandard

from ingest.log import open_log
from ingest.log.limits import Limits
from ingest.log.memory import Disk, MemoryLog
from ingest.recent import Fingerprints, RecentIdentities, Verdict
from meters.access import TOKEN_PREFIX
from meters.catalogue import TokenCreated
from meters.event import identity
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry
from tests.ingest.running import CREATED, RunningGateway, event, eventually

INVALID_TOKEN = {
    "error": "invalid_token",
    "error_description": "The access token provided is expired, revoked, malformed, or invalid for other reasons.",
}


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """One gateway on a log in memory, for tests that do not change it for others."""
    with RunningGateway() as running:
        yield running


def test_a_good_request_is_in_the_log_when_it_is_answered(gateway: RunningGateway) -> None:
    """200 with the two counts and the position after the record; the record holds the lines and their tenant."""
    answer = gateway.ingest({"events": [event(external_id="first-1"), event(external_id="first-2")]})
    assert answer.status_code == 200
    assert answer.json() == {"inserted": 2, "duplicates": 0}
    record = gateway.records()[-1]
    assert answer.headers["log-position"] == f"0:{record.offset + 1}"
    assert answer.headers["content-type"] == "application/json"
    assert record.organization_id == gateway.organization_id
    assert record.admitted
    assert [json.loads(line)["external_id"] for line in record.value.split(b"\n")] == ["first-1", "first-2"]


def test_no_events_are_no_record(gateway: RunningGateway) -> None:
    """An empty list is answered with zeros and where the log stands."""
    gateway.ingest({"events": [event()]})
    before = len(gateway.records())
    answer = gateway.ingest({"events": []})
    assert answer.json() == {"inserted": 0, "duplicates": 0}
    assert answer.headers["log-position"] == f"0:{before}"
    assert len(gateway.records()) == before


@pytest.mark.parametrize("path", ["/v1/events/ingest", "/v1/events/ingest/", "/api/v1/events/ingest"])
def test_the_endpoint_has_aliases(gateway: RunningGateway, path: str) -> None:
    """With and without a slash, and under the old prefix, which says that it is old."""
    answer = gateway.client.post(path, json={"events": []}, headers=gateway.authorization)
    assert answer.status_code == 200
    assert ("x-polar-deprecation-notice" in answer.headers) == path.startswith("/api")


def test_other_methods_are_not_allowed(gateway: RunningGateway) -> None:
    """Only POST ingests."""
    answer = gateway.client.get("/v1/events/ingest", headers=gateway.authorization)
    assert answer.status_code == 405
    assert answer.json() == {"detail": "Method Not Allowed"}


@pytest.mark.parametrize("version", ["2026-04", "2026-10", "2027-01"])
def test_the_api_version_is_echoed(gateway: RunningGateway, version: str) -> None:
    """Every answer names the version of the API that it is given in."""
    assert gateway.ingest({"events": []}, polar_version=version).headers["polar-version"] == version
    assert gateway.ingest({"events": []}).headers["polar-version"] == "2026-04"


def test_an_unknown_api_version_is_not_found(gateway: RunningGateway) -> None:
    """As Polar answers it."""
    answer = gateway.ingest({"events": []}, polar_version="1999-01")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "Not Found"}


# ---- who may


@pytest.mark.parametrize(
    ("authorization", "body"),
    [
        ("", {"error": "Unauthorized", "detail": "Unauthorized"}),
        ("Basic dXNlcg==", {"error": "Unauthorized", "detail": "Unauthorized"}),
        ("Bearer", {"error": "Unauthorized", "detail": "Unauthorized"}),
        ("Bearer " + TOKEN_PREFIX + "guess", INVALID_TOKEN),
        ("Bearer \xff\xfe", INVALID_TOKEN),
        ("bearer " + "x" * 10_000, INVALID_TOKEN),
    ],
)
def test_without_a_good_token_nobody_sends(gateway: RunningGateway, authorization: str, body: dict[str, str]) -> None:
    """401 before the body is looked at, with the challenge that clients know."""
    answer = gateway.client.post("/v1/events/ingest", content=b"no json",
        headers={b"authorization": authorization.encode("latin-1")},
    )
    assert answer.status_code == 401
    assert answer.json() == body
    assert answer.headers["www-authenticate"].startswith('Bearer realm="polar"')


def test_a_token_needs_the_scope(gateway: RunningGateway) -> None:
    """403 names the scope that is missing."""
    secret = TOKEN_PREFIX + uuid.uuid4().hex
    gateway.decide(TokenCreated(gateway.make_token(secret, ["events:read", "meters:write"])))
    answer = eventually(lambda: _unless(gateway.ingest({"events": []}, authorization=f"Bearer {secret}"), 401))
    assert answer.status_code == 403
    assert answer.json()["error"] == "insufficient_scope"
    assert 'scope="events:write"' in answer.headers["www-authenticate"]


def _unless(answer: httpx.Response, status: int) -> httpx.Response | None:
    return None if answer.status_code == status else answer


def test_an_expired_token_is_none(gateway: RunningGateway) -> None:
    """Expiry is looked at with every request."""
    secret = TOKEN_PREFIX + uuid.uuid4().hex
    expired = datetime.now(UTC) - timedelta(seconds=1)
    gateway.decide(TokenCreated(gateway.make_token(secret, ["events:write"], expires_at=expired)))
    assert gateway.ingest({"events": []}, authorization=f"Bearer {secret}").json() == INVALID_TOKEN


def test_a_new_token_works_and_a_revoked_one_stops_without_a_restart() -> None:
    """Decisions in the control stream reach a running gateway."""
    with RunningGateway() as gateway:
        secret = TOKEN_PREFIX + uuid.uuid4().hex
        token = gateway.make_token(secret, ["events:write"])
        authorization = f"Bearer {secret}"
        gateway.decide(TokenCreated(token))
        eventually(lambda: gateway.ingest({"events": []}, authorization=authorization).status_code == 200)
        gateway.revoke(token)
        eventually(lambda: gateway.ingest({"events": []}, authorization=authorization).status_code == 401)


def test_a_token_appears_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Good, bad and broken credentials leave no trace, whatever happens around them."""
    caplog.set_level(logging.DEBUG)
    with RunningGateway() as gateway:
        guess = TOKEN_PREFIX + "a-guess-in-vain"
        gateway.ingest({"events": []})
        gateway.ingest({"events": []}, authorization=f"Bearer {guess}")
        with gateway.connect() as connection:
            connection.sendall(f"POST /v1/events/ingest HTTP/1.1\r\nAuthorization: Bearer {guess}\0\r\n\r\n".encode())
            connection.recv(65536)
        metrics = gateway.client.get("/metrics").text
        for text in (caplog.text, metrics):
            assert guess not in text
            assert gateway.secret not in text


# ---- customers and duplicates


def test_a_new_customer_may_be_named() -> None:
    """A customer id that does not exist refuses the request until the customer does."""
    with RunningGateway() as gateway:
        body = {"events": [{"name": "n", "customer_id": str(uuid.uuid4())}]}
        answer = gateway.ingest(body)
        assert answer.status_code == 422
        assert answer.json()["error"] == "PolarRequestValidationError"
        customer = gateway.add_customer()
        body["events"][0]["customer_id"] = customer.id
        assert gateway.ingest(body).json() == {"inserted": 1, "duplicates": 0}


def test_repetitions_are_counted_and_written_all_the_same(gateway: RunningGateway) -> None:
    """Within a request and across requests; the log has every copy, for the store to decide."""
    first = event(external_id="twice")
    other = event(external_id="twice", name="other")
    before = len(gateway.lines())
    assert gateway.ingest({"events": [first, first]}).json() == {"inserted": 1, "duplicates": 1}
    answer = gateway.ingest({"events": [other, first, event()]}, prefer="return=representation")
    assert answer.headers["preference-applied"] == "return=representation"
    assert answer.json()["inserted"] == 1
    assert answer.json()["duplicates"] == 2
    assert [row["verdict"] for row in answer.json()["events"]] == ["conflict", "duplicate", "accepted"]
    assert len(gateway.lines()) == before + 5


def test_an_id_belongs_to_its_organization() -> None:
    """Two organizations may use the same external id."""
    recent = RecentIdentities()
    recent.remember(Fingerprints("one", ["id"], [b"{}"]))
    assert recent.judge(Fingerprints("other", ["id"], [b"{}"])) is None
    assert recent.judge(Fingerprints("one", ["id"], [b"{}"])) == [Verdict.DUPLICATE]


def test_the_memory_of_identities_is_limited_and_keeps_the_younger_ones() -> None:
    """At least one generation is remembered, never more than two."""
    recent = RecentIdentities(generation_max=10)
    for number in range(25):
        recent.remember(Fingerprints("o", [str(number)], [b"{}"]))
    known = [number for number in range(25) if recent.judge(Fingerprints("o", [str(number)], [b"{}"]))]
    assert known == list(range(10, 25))


# ---- what a client may prefer


def test_strictness_is_the_default(gateway: RunningGateway) -> None:
    """One bad event refuses the request, and nothing of it is written."""
    before = len(gateway.lines())
    answer = gateway.ingest({"events": [event(), event(name=5), event(metadata={"k": None})]})
    assert answer.status_code == 422
    assert answer.json()["error"] == "RequestValidationError"
    assert [entry["loc"][2] for entry in answer.json()["detail"]] == [1, 2]
    assert [set(entry) for entry in answer.json()["detail"]] == [{"type", "loc", "msg", "input"}] * 2
    assert len(gateway.lines()) == before


def test_a_lenient_request_says_what_was_not_kept(gateway: RunningGateway) -> None:
    """Prefer: handling=lenient keeps the good ones and lists the others by their index."""
    before = len(gateway.lines())
    answer = gateway.ingest({"events": [event(), event(name=5)]}, prefer="respond-async, handling = lenient; x=1")
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "handling=lenient"
    assert answer.json() == {
        "inserted": 1, "duplicates": 0,
        "rejected": [{
            "index": 1, "type": "string_type", "msg": "Input should be a valid string",
            "loc": ["body", "events", 1, "EventCreateExternalCustomer", "name"],
        }],
    }  # fmt: skip
    assert len(gateway.lines()) == before + 1


def test_both_preferences_together_account_for_every_event(gateway: RunningGateway) -> None:
    """Each event of the request has one verdict, in its order, and the name it was logged under."""
    events = [event(external_id="p1"), event(name=5), event(), {}]
    answer = gateway.ingest({"events": events}, prefer="handling=lenient, return=representation")
    rows = answer.json()["events"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["verdict"] for row in rows] == ["accepted", "rejected", "accepted", "rejected"]
    logged = [json.loads(line)["external_id"] for line in gateway.lines()[-2:]]
    assert [rows[0]["external_id"], rows[2]["external_id"]] == logged
    assert rows[0]["external_id"] == "p1"


def test_a_lenient_request_without_a_good_event_writes_nothing(gateway: RunningGateway) -> None:
    """It is answered, since that is what was asked for."""
    before = len(gateway.lines())
    answer = gateway.ingest({"events": [{}]}, prefer="handling=lenient")
    assert answer.status_code == 200
    assert answer.json()["inserted"] == 0
    assert len(gateway.lines()) == before


# ---- bodies

BODY = json.dumps({"events": [event()]}).encode()


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "zstd", "identity", "GZIP"])
def test_packed_bodies_are_taken(gateway: RunningGateway, encoding: str) -> None:
    """gzip, zstd, or neither, in whatever letters."""
    packed = {"gzip": gzip.compress, "zstd": zstandard.compress}.get(encoding.strip().lower().removeprefix("x-"), bytes)
    answer = gateway.ingest(content=packed(BODY), content_encoding=encoding)
    assert answer.json() == {"inserted": 1, "duplicates": 0}


def _zstd_of_unknown_size(body: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(body)


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        ("br", BODY, 415),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY)), 415),
        ("gzip", BODY, 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(BODY)[:-1], 400),
        ("gzip", gzip.compress(BODY) + b"garbage", 400),
        ("gzip", gzip.compress(BODY) + gzip.compress(BODY), 400),
        ("gzip", gzip.compress(b" " * 20_000_000), 413),
        ("zstd", BODY, 400),
        ("zstd", b"", 400),
        ("zstd", zstandard.compress(BODY)[:-1], 400),
        ("zstd", zstandard.compress(BODY) + b"garbage", 400),
        ("zstd", _zstd_of_unknown_size(BODY)[:-1], 400),
        ("zstd", _zstd_of_unknown_size(BODY) + b"garbage", 400),
        ("zstd", zstandard.compress(b" " * 20_000_000), 413),
        ("zstd", _zstd_of_unknown_size(b" " * 20_000_000), 413),
        ("gzip", gzip.compress(gzip.compress(BODY)), 422),
    ],
)
def test_a_packed_body_is_whole_alone_and_small_enough(
    gateway: RunningGateway, encoding: str, content: bytes, status: int
) -> None:
    """Unknown or nested encodings, damage, more than one stream, and bombs: each has its status, and none is taken."""
    before = len(gateway.lines())
    answer = gateway.ingest(content=content, content_encoding=encoding)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert len(gateway.lines()) == before


@pytest.mark.parametrize("encode", [bytes, gzip.compress])
def test_a_large_body_is_taken_whole(gateway: RunningGateway, encode: Any) -> None:
    """Ten thousand events in one request are one record."""
    body = json.dumps({"events": [event(metadata={"number": number}) for number in range(10_000)]}).encode()
    headers = {"content_encoding": "gzip"} if encode is gzip.compress else {}
    assert gateway.ingest(content=encode(body), **headers).json() == {"inserted": 10_000, "duplicates": 0}
    assert len(gateway.records()[-1].value.split(b"\n")) == 10_000


def test_a_body_over_the_limit_is_refused() -> None:
    """By its length, before it is read; the limit itself still passes."""
    with RunningGateway(body_bytes_max=1000) as gateway:
        fitting = BODY + b" " * (1000 - len(BODY))
        assert gateway.ingest(content=fitting).status_code == 200
        answer = gateway.ingest(content=fitting + b" ")
        assert answer.status_code == 413
        assert answer.json()["error"] == "RequestBodyTooLarge"


def test_a_body_without_length_is_refused(gateway: RunningGateway) -> None:
    """Chunked uploads are 411, as with Polar."""
    answer = gateway.client.post("/v1/events/ingest", content=iter([BODY]), headers=gateway.authorization)
    assert answer.status_code == 411
    assert answer.json()["error"] == "LengthRequired"


@pytest.mark.parametrize(
    ("content", "kind", "loc"),
    [(b"", "missing", ["body"]), (b"{", "json_invalid", ["body", 1]), (b"[1", "json_invalid", ["body", 2])],
)
def test_a_body_that_is_no_json_is_unprocessable(
    gateway: RunningGateway, content: bytes, kind: str, loc: list[Any]
) -> None:
    """422 and not 400, with the offset, as Polar's clients expect."""
    answer = gateway.ingest(content=content)
    assert answer.status_code == 422
    assert answer.json()["error"] == "RequestValidationError"
    assert [(entry["type"], entry["loc"]) for entry in answer.json()["detail"]] == [(kind, loc)]


# ---- limits, and a log that cannot


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
        disk.full = False
        assert gateway.ingest({"events": [event(external_id="later")]}).json() == {"inserted": 1, "duplicates": 0}
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
    with RunningGateway(log) as gateway:
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

    async def append(self, stream: str, entries: Sequence[Entry]) -> list[int]:
        """Durable now, acknowledged later."""
        offsets = await super().append(stream, entries)
        if stream == USAGE_EVENTS:
            await asyncio.to_thread(self.let_go.wait)
        return offsets


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
    assert {msgspec.json.decode(record.value)["external_id"] for record in records} == acknowledged
    assert [record.offset for record in records] == list(range(80))
    assert min(record.timestamp_us for record in records) > CREATED.timestamp() * 1e6
