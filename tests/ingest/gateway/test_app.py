"""What the gateway answers over HTTP, and what is in the log when it has answered."""

import json
import logging
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from meters.catalogue.access import TOKEN_PREFIX
from meters.catalogue.catalogue import TokenCreated
from tests.support.servers.gateway import RunningGateway, event
from tests.support.waiting import eventually

INVALID_TOKEN = {
    "error": "invalid_token",
    "error_description": "The access token provided is expired, revoked, malformed, or invalid for other reasons.",
}


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


@pytest.mark.parametrize("path", ["/v1/events/ingest", "/v1/events/ingest/", "/api/v1/events/ingest"])
def test_a_parameter_that_nobody_knows_is_refused(gateway: RunningGateway, path: str) -> None:
    """Sending events has no parameters: whoever gives one means something that would not be done. Nothing is kept."""
    before, body = len(gateway.records()), {"events": [event()]}
    refused = gateway.client.post(f"{path}?dry_run=true&x", json=body, headers=gateway.authorization)
    assert (refused.status_code, refused.json()["error"]) == (422, "RequestValidationError")
    assert [(entry["type"], entry["loc"]) for entry in refused.json()["detail"]] == [
        ("extra_forbidden", ["query", "dry_run"]), ("extra_forbidden", ["query", "x"]),
    ]  # fmt: skip
    assert len(gateway.records()) == before
    unknown = gateway.client.post(f"{path}?dry_run=true", headers={"authorization": "Bearer nobodys"}, json={})
    assert unknown.status_code == 401


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_what_the_gateway_answers_itself_has_no_parameters(gateway: RunningGateway, path: str) -> None:
    """Without one it answers."""
    assert gateway.client.get(path).status_code == 200
    refused = gateway.client.get(f"{path}?verbose=1")
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["query", "verbose"])


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
    refused = gateway.client.get("/v1/events/ingest", headers={"polar-version": version})
    assert refused.headers["polar-version"] == version


def test_an_unknown_api_version_is_not_found(gateway: RunningGateway) -> None:
    """As Polar answers it."""
    answer = gateway.ingest({"events": []}, polar_version="1999-01")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "Not Found"}


@pytest.mark.parametrize("path", ["/v1/events/ingest", "/v1/meters/"])
def test_a_page_in_a_browser_may_ask(gateway: RunningGateway, path: str) -> None:
    """From any origin, with a token of its own; the browser asks first, and may show the answer."""
    origin = {"origin": "https://app.example.com"}
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    first = gateway.client.options(path, headers=origin | asking)
    assert (first.status_code, first.headers["access-control-allow-origin"]) == (200, "*")
    assert "POST" in first.headers["access-control-allow-methods"]
    allowed = first.headers["access-control-allow-headers"].lower()
    assert {"authorization", "content-type", "polar-version"} <= set(allowed.split(", "))
    then = gateway.ingest({"events": []}, **origin)
    assert (then.status_code, then.headers["access-control-allow-origin"]) == (200, "*")
    assert "Polar-Version" in then.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in then.headers
    assert "access-control-allow-origin" not in gateway.ingest({"events": []}).headers


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
    assert [row["verdict"] for row in answer.json()["events"]] == ["known", "duplicate", "accepted"]
    assert len(gateway.lines()) == before + 5


# ---- what a client may prefer


@pytest.mark.parametrize("metadata", [{"n": 1}, {"n": "\n"}, {"_cost": {"amount": "1", "currency": "usd"}}])
def test_an_empty_external_id_is_none(gateway: RunningGateway, metadata: dict[str, object]) -> None:
    """By each way of reading: every such event gets an id of its own, and is new."""
    sent = [event(external_id="", metadata=metadata | {"place": place}) for place in range(3)]
    assert gateway.ingest({"events": sent}).json() == {"inserted": 3, "duplicates": 0}
    written = [json.loads(line)["external_id"] for line in gateway.lines()[-3:]]
    assert all(written)
    assert len(set(written)) == 3


@pytest.mark.parametrize(
    "again",
    [
        b'{"external_customer_id":"ann","name":"call","external_id":"%s","timestamp":"2026-03-01T10:00:00Z"}',
        b'{"name": "call", "external_customer_id": "ann", "external_id": "%s", "timestamp": "2026-03-01T10:00:00Z"}',
        b'{"name":"call","external_customer_id":"ann","external_id":"%s","timestamp":"2026-03-01T10:00:00.000Z"}',
        b'{"name":"call","external_customer_id":"ann","external_id":"%s","timestamp":"2026-03-01T11:00:00+01:00"}',
        b'{"name":"c\\u0061ll","external_customer_id":"ann","external_id":"%s","timestamp":"2026-03-01T10:00:00Z"}',
    ],
)
def test_the_same_event_in_other_bytes_is_no_conflict(gateway: RunningGateway, again: bytes) -> None:
    """The store compares what it says; until then the answer says that the id is known."""
    name = uuid.uuid4().hex.encode()
    first = b'{"name":"call","external_customer_id":"ann","external_id":"%s","timestamp":"2026-03-01T10:00:00Z"}' % name
    headers = gateway.authorization | {"prefer": "return=representation", "content-type": "application/json"}
    for line, verdict in ((first, "accepted"), (first, "duplicate"), (again % name, "known")):
        body = b'{"events":[%s]}' % line
        answer = gateway.client.post("/v1/events/ingest", content=body, headers=headers)
        assert [row["verdict"] for row in answer.json()["events"]] == [verdict]


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


def test_preferences_may_stand_in_several_lines(gateway: RunningGateway) -> None:
    """As every list in HTTP may."""
    lines = [("prefer", "handling=lenient"), ("prefer", "return=representation"), *gateway.authorization.items()]
    answer = gateway.client.post("/v1/events/ingest", json={"events": [{}]}, headers=lines)
    assert answer.headers["preference-applied"] == "handling=lenient, return=representation"


def test_every_event_is_in_one_metric() -> None:
    """Accepted, duplicate, known and rejected add up to what was sent; requests are counted by status."""
    with RunningGateway() as gateway:  # its own, since the metrics of a process show the newest gateway
        def counted() -> dict[str, float]:
            lines = gateway.client.get("/metrics").text.splitlines()
            rows = (line.rpartition(" ") for line in lines if line.startswith("meterstream_gateway_"))
            return {name.removeprefix("meterstream_gateway_"): float(value) for name, _, value in rows}

        before = counted()
        same = event(external_id="metric")
        other = event(external_id="metric", name="other")
        gateway.ingest({"events": [same, same, other, {}]}, prefer="handling=lenient")
        gateway.ingest({"events": [event(), {}, {}]})
        after = counted()
        for verdict, count in {"accepted": 1, "duplicate": 1, "known": 1, "rejected": 3}.items():
            name = f'events_total{{verdict="{verdict}"}}'
            assert after[name] - before[name] == count, verdict
        assert after['requests_total{status="200"}'] - before['requests_total{status="200"}'] == 1
        assert after['requests_total{status="422"}'] - before['requests_total{status="422"}'] == 1
        assert after["catalogue_current"] == 1
